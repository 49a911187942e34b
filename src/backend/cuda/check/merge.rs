//! Cases of token merging.

use super::context::differing;
use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, CaseFn, Context, Measured, wide};
use crate::backend::cuda::launch::epilogue::Rows;
use crate::backend::cuda::launch::merge::{
    Best, Match, Mean, Picture, Ranking, Spread, Targets, Units, best, match_tokens, mean, rows, spread,
    targets, units,
};
use crate::backend::cuda::{CudaError, Element};
use crate::tensor::merge::{rows_of, target_places};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (samples, height, width) in [(1, 2, 2), (2, 3, 5), (1, 8, 8), (3, 7, 16), (2, 64, 64), (2, 128, 128)]
    {
        let tokens = height * width;
        let most = tokens - (height / 2) * (width / 2);
        for merged in [0, most / 2, most] {
            let picture = Picture { samples, height, width, merged };
            cases.push(targets_case(picture));
            cases.push(rows_case(picture));
            for (i, element) in ELEMENTS.into_iter().enumerate() {
                let channels = [8, 20, 320][i];
                cases.push(units_case(picture, channels, element));
                cases.push(mean_case(picture, channels, 3 * channels, element));
                cases.push(spread_case(picture, channels, element));
            }
        }
        cases.push(best_case(Picture { samples, height, width, merged: 0 }, 0, tokens));
        for element in ELEMENTS {
            cases.push(match_case(Picture { samples, height, width, merged: most / 2 }, 20, element));
        }
    }
    cases
}

/// Pictures of any extents, odd ones too; everything from none to all merged.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let picture = |s: &mut Shapes| {
        let (samples, height, width) = (s.of(1..=3), s.of(2..=13), s.of(2..=13));
        let most = height * width - (height / 2) * (width / 2);
        Picture { samples, height, width, merged: s.of(0..=most) }
    };
    let mut cases = Vec::new();
    cases.extend(distinct(shapes, |s| targets_case(picture(s))));
    cases.extend(distinct(shapes, |s| rows_case(picture(s))));
    cases.extend(distinct(shapes, |s| {
        let picture = picture(s);
        let first = s.below(picture.tokens());
        best_case(picture, first, s.of(1..=picture.tokens() - first))
    }));
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| match_case(picture(s), s.of(1..=40), element)));
        cases.extend(distinct(shapes, |s| units_case(picture(s), s.of(1..=90), element)));
        cases.extend(distinct(shapes, |s| {
            let channels = if s.once_in(4) { s.of(500..=600) } else { s.of(1..=140) };
            mean_case(picture(s), channels, channels + s.below(9), element)
        }));
    }
    for is_vector in [true, false] {
        cases.extend(distinct(shapes, |s| {
            let channels = if is_vector { 8 * s.of(1..=6) } else { s.odd(1..=40) };
            spread_case(picture(s), channels, s.pick(&ELEMENTS))
        }));
    }
    cases
}

/// Comparisons or products that the SIMT layer does in about a second.
const MOST_WORK: usize = 3_000_000;

fn case(name: String, elements: usize, bytes: usize, tolerance: f64, run: CaseFn) -> Case {
    Case::of_memory("merge", name, elements, bytes, tolerance, run)
}

fn name(kernel: &str, picture: &Picture) -> String {
    let Picture { samples, height, width, merged } = picture;
    format!("{kernel} {samples}x{height}x{width} less {merged}")
}

fn draws(cx: &mut Context<'_>, picture: &Picture) -> Vec<u8> {
    (0..picture.targets()).map(|_| (cx.random() >> 20) as u8 % 4).collect()
}

/// The square of every token that is a target, or −1.
fn roles(picture: &Picture, draws: &[u8]) -> Vec<i32> {
    let mut roles = vec![-1; picture.tokens()];
    for (square, place) in target_places((picture.height, picture.width), draws).into_iter().enumerate() {
        roles[place] = square as i32;
    }
    roles
}

fn integers(cx: &mut Context<'_>, values: &[i32]) -> Result<crate::driver::DevicePtr, CudaError> {
    Ok(cx.upload_bytes(bytemuck::cast_slice(values))?.ptr)
}

fn compare_integers(bytes: &[u8], want: &[i32]) -> Measured {
    differing(
        &bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>(),
        want,
    )
}

fn targets_case(picture: Picture) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let draws = draws(cx, &picture);
        let roles = roles(&picture, &draws);
        let places: Vec<i32> = target_places((picture.height, picture.width), &draws)
            .into_iter()
            .map(|place| place as i32)
            .collect();
        let (role, place) = (cx.output(4 * roles.len())?, cx.output(4 * places.len())?);
        let op = Targets { picture, draws: &draws, role: role.ptr, place: place.ptr };
        let gpu = cx.gpu;
        let first = cx.measure_by(role, |bytes| compare_integers(bytes, &roles), || targets(gpu, &op))?;
        if first.error > 0.0 {
            return Ok(first);
        }
        cx.measure_by(place, |bytes| compare_integers(bytes, &places), || targets(gpu, &op))
    };
    case(name("merge_targets", &picture), picture.tokens(), 4 * picture.tokens(), 0.0, Box::new(run))
}

fn units_case(picture: Picture, channels: usize, element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (pitch, padded) = (channels + 3, channels.next_multiple_of(8));
        let count = picture.samples * picture.tokens();
        let x = cx.values(count * pitch, 1.0, element);
        let draws = draws(cx, &picture);
        let roles = roles(&picture, &draws);
        let mut inverses = Vec::with_capacity(count);
        let mut wanted = vec![0.0; picture.samples * picture.targets() * padded];
        for (token, x) in x.chunks_exact(pitch).enumerate() {
            let length = x[..channels].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            inverses.push(1.0 / length);
            let (sample, place) = (token / picture.tokens(), token % picture.tokens());
            if roles[place] >= 0 {
                let row = sample * picture.targets() + roles[place] as usize;
                let unit = wanted[row * padded..][..channels].iter_mut().zip(x);
                unit.for_each(|(to, x)| *to = f64::from(*x) / length);
            }
        }
        let (inverse, unit) = (cx.output(4 * count)?, cx.output(wanted.len() * element.size())?);
        let op = Units {
            picture,
            x: Rows::new(cx.upload(&x, element)?.ptr, pitch),
            channels,
            role: integers(cx, &roles)?,
            inverse: inverse.ptr,
            unit: unit.ptr,
            element,
        };
        let gpu = cx.gpu;
        // Three roundings behind a sum of squares, all of one sign.
        let lengths = cx.measure(inverse, Element::F32, &inverses, || units(gpu, &op))?;
        if lengths.error > 16.0 * Element::F32.rounding() {
            return Ok(Measured { error: f64::INFINITY, ..lengths });
        }
        cx.measure(unit, element, &wanted, || units(gpu, &op))
    };
    let count = picture.samples * picture.tokens() * channels;
    let name = format!("{} of {channels}", name(&format!("merge_units_{}", element.suffix()), &picture));
    let tolerance = element.rounding() * 1.01 + 16.0 * Element::F32.rounding();
    case(name, count, count * element.size(), tolerance, Box::new(run))
}

fn best_case(picture: Picture, first: usize, count: usize) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (samples, tokens, squares) = (picture.samples, picture.tokens(), picture.targets());
        // Few values, so that there are equals; no NaN wins.
        let mut score: Vec<f32> =
            (0..samples * count * squares).map(|_| ((cx.random() >> 20) % 12) as f32 - 6.0).collect();
        if squares > 1 && score.len() > 3 {
            score[2] = f32::NAN;
        }
        let inverse: Vec<f32> =
            cx.values(samples * tokens, 0.1, Element::F32).iter().map(|v| v + 1.0).collect();
        let fill = vec![7i32; samples * tokens];
        let (mut wanted, mut cosines) = (fill.clone(), vec![7.0f32; samples * tokens]);
        for (row, score) in score.chunks_exact(squares).enumerate() {
            let to = row / count * tokens + first + row % count;
            let top = score
                .iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best });
            wanted[to] = top.0 as i32;
            cosines[to] = top.1 * inverse[to];
        }
        let target = cx.output(4 * fill.len())?;
        cx.gpu.driver().upload(target.ptr, bytemuck::cast_slice(&fill), cx.gpu.stream())?;
        let cosine = cx.output_over(&vec![7.0; samples * tokens], Element::F32)?;
        let op = Best {
            picture,
            score: cx.upload(&score, Element::F32)?.ptr,
            first,
            count,
            inverse: cx.upload(&inverse, Element::F32)?.ptr,
            best: cosine.ptr,
            target: target.ptr,
        };
        let gpu = cx.gpu;
        let chosen = cx.measure_by(target, |bytes| compare_integers(bytes, &wanted), || best(gpu, &op))?;
        if chosen.error > 0.0 {
            return Ok(chosen);
        }
        cx.measure(cosine, Element::F32, &wide(cosines.iter().copied()), || best(gpu, &op))
    };
    let scores = picture.samples * count * picture.targets();
    let name = format!("{} from {first} {count}", name("merge_best", &picture));
    let needs_gpu = scores > MOST_WORK;
    Case { needs_gpu, ..case(name, scores, 4 * scores, 0.0, Box::new(run)) }
}

fn rows_case(picture: Picture) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (samples, tokens, squares) = (picture.samples, picture.tokens(), picture.targets());
        let draws = draws(cx, &picture);
        let roles = roles(&picture, &draws);
        let mut best: Vec<f32> =
            (0..samples * tokens).map(|_| ((cx.random() >> 20) % 40) as f32 / 20.0 - 1.0).collect();
        best[0] = f32::NAN;
        best[1] = f32::NEG_INFINITY;
        let target: Vec<i32> = (0..samples * tokens)
            .map(|_| (cx.random() >> 20) as i32 % squares as i32)
            .map(i32::abs)
            .collect();
        let alone = (picture.rows() - squares) as i32;
        let mut wanted = Vec::with_capacity(samples * tokens);
        for sample in 0..samples {
            let at = |token: usize| sample * tokens + token;
            let mut order: Vec<usize> = (0..tokens).filter(|token| roles[*token] < 0).collect();
            order.sort_by(|a, b| best[at(*b)].total_cmp(&best[at(*a)]));
            let mut of_sample: Vec<i32> = roles.iter().map(|role| alone + role).collect();
            for (rank, token) in order.into_iter().enumerate() {
                let is_merged = rank < picture.merged;
                of_sample[token] =
                    if is_merged { alone + target[at(token)] } else { (rank - picture.merged) as i32 };
            }
            wanted.extend(of_sample);
        }
        let row = cx.output(4 * wanted.len())?;
        let op = Ranking {
            picture,
            best: cx.upload(&best, Element::F32)?.ptr,
            target: integers(cx, &target)?,
            role: integers(cx, &roles)?,
            row: row.ptr,
        };
        let gpu = cx.gpu;
        cx.measure_by(row, |bytes| compare_integers(bytes, &wanted), || rows(gpu, &op))
    };
    let count = picture.samples * picture.tokens();
    let needs_gpu = count * picture.tokens() > MOST_WORK;
    Case { needs_gpu, ..case(name("merge_rows", &picture), count, 12 * count, 0.0, Box::new(run)) }
}

/// Row numbers as a match gives them, of tokens that are noise.
fn some_rows(cx: &mut Context<'_>, picture: &Picture) -> (Vec<u8>, Vec<u32>) {
    const CHANNELS: usize = 5;
    let draws = draws(cx, picture);
    let x = cx.values(picture.samples * picture.tokens() * CHANNELS, 1.0, Element::F32);
    let size = (picture.height, picture.width);
    let samples = x.chunks_exact(picture.tokens() * CHANNELS);
    let rows = samples.flat_map(|x| rows_of(x, size, &draws, picture.merged)).collect();
    (draws, rows)
}

fn signed(numbers: &[u32]) -> Vec<i32> {
    numbers.iter().map(|number| *number as i32).collect()
}

fn mean_case(picture: Picture, channels: usize, pitch: usize, element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (draws, numbers) = some_rows(cx, &picture);
        let x = cx.values(picture.samples * picture.tokens() * pitch, 1.0, element);
        let mut wanted = vec![0.0; picture.samples * picture.rows() * channels];
        let mut counts = vec![0.0; picture.samples * picture.rows()];
        for (token, (x, row)) in x.chunks_exact(pitch).zip(&numbers).enumerate() {
            let row = token / picture.tokens() * picture.rows() + *row as usize;
            counts[row] += 1.0;
            wanted[row * channels..][..channels].iter_mut().zip(x).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        for (sums, count) in wanted.chunks_exact_mut(channels).zip(&counts) {
            sums.iter_mut().for_each(|sum| *sum /= *count);
        }
        let places: Vec<i32> = target_places((picture.height, picture.width), &draws)
            .into_iter()
            .map(|place| place as i32)
            .collect();
        let out = cx.output(wanted.len() * element.size())?;
        let op = Mean {
            picture,
            x: Rows::new(cx.upload(&x, element)?.ptr, pitch),
            channels,
            row: integers(cx, &signed(&numbers))?,
            place: integers(cx, &places)?,
            out: out.ptr,
            element,
        };
        let gpu = cx.gpu;
        cx.measure(out, element, &wanted, || mean(gpu, &op))
    };
    let count = picture.samples * picture.tokens() * channels;
    let name =
        format!("{} of {channels}/{pitch}", name(&format!("merge_mean_{}", element.suffix()), &picture));
    // Sums in float of at most all tokens, then one rounding.
    let sums = (picture.tokens() as f64).sqrt() * Element::F32.rounding();
    let tolerance = element.rounding() * 1.01 + 4.0 * sums;
    let needs_gpu = picture.samples * picture.targets() * picture.tokens() > MOST_WORK;
    Case { needs_gpu, ..case(name, count, 2 * count * element.size(), tolerance, Box::new(run)) }
}

fn spread_case(picture: Picture, channels: usize, element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let (_, numbers) = some_rows(cx, &picture);
        let x = cx.values(picture.samples * picture.rows() * channels, 1.0, element);
        let mut wanted = Vec::with_capacity(numbers.len() * channels);
        for (token, row) in numbers.iter().enumerate() {
            let row = token / picture.tokens() * picture.rows() + *row as usize;
            wanted.extend(wide(x[row * channels..][..channels].iter().copied()));
        }
        let out = cx.output(wanted.len() * element.size())?;
        let op = Spread {
            picture,
            x: cx.upload(&x, element)?.ptr,
            channels,
            row: integers(cx, &signed(&numbers))?,
            out: out.ptr,
            element,
        };
        let gpu = cx.gpu;
        cx.measure(out, element, &wanted, || spread(gpu, &op))
    };
    let count = picture.samples * picture.tokens() * channels;
    let name = format!("{} of {channels}", name(&format!("merge_spread_{}", element.suffix()), &picture));
    case(name, count, 2 * count * element.size(), 0.0, Box::new(run))
}

/// Everything from tokens to rows. Tokens may be about as similar as others, so what is judged is how much more similar
/// than what was chosen anything else would have been.
fn match_case(picture: Picture, channels: usize, element: Element) -> Case {
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let draws = draws(cx, &picture);
        let x = cx.values(picture.samples * picture.tokens() * channels, 1.0, element);
        let row = cx.output(4 * picture.samples * picture.tokens())?;
        let role = cx.output(4 * picture.tokens())?;
        let place = cx.output(4 * picture.targets())?;
        let op = Match {
            targets: Targets { picture, draws: &draws, role: role.ptr, place: place.ptr },
            x: Rows::new(cx.upload(&x, element)?.ptr, channels),
            channels,
            element,
            row: row.ptr,
        };
        let scratch = cx.output(op.scratch())?.ptr;
        let gpu = cx.gpu;
        let places = target_places((picture.height, picture.width), &draws);
        let judge = |bytes: &[u8]| {
            let numbers: Vec<i32> = bytemuck::pod_collect_to_vec(bytes);
            let samples =
                numbers.chunks_exact(picture.tokens()).zip(x.chunks_exact(picture.tokens() * channels));
            let loss = samples.map(|(rows, x)| loss(&picture, &places, rows, x)).fold(0.0, f64::max);
            Measured { error: loss, ..Measured::default() }
        };
        cx.measure_by(row, judge, || match_tokens(gpu, &op, scratch))
    };
    let count = picture.samples * picture.tokens();
    let work = count * picture.targets() * channels;
    let name = format!("{} of {channels}", name(&format!("match_tokens_{}", element.suffix()), &picture));
    // A cosine changes by less than a rounding of the targets' elements; sums in float.
    let tolerance = element.rounding() + 8.0 * Element::F32.rounding();
    Case { needs_gpu: work > MOST_WORK, ..case(name, count, 4 * count, tolerance, Box::new(run)) }
}

/// How much more similar than what was chosen something else is; infinite if the rows are no rows.
fn loss(picture: &Picture, places: &[usize], rows: &[i32], x: &[f32]) -> f64 {
    let channels = x.len() / picture.tokens();
    let unit = |token: usize| {
        let x = &x[token * channels..][..channels];
        let length = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        x.iter().map(|v| f64::from(*v) / length).collect::<Vec<f64>>()
    };
    let units: Vec<Vec<f64>> = (0..picture.tokens()).map(unit).collect();
    let cosine = |a: usize, b: usize| units[a].iter().zip(&units[b]).map(|(a, b)| a * b).sum::<f64>();
    let alone = picture.rows() - picture.targets();
    let mut order = vec![None; alone];
    let (mut loss, mut least, mut merged) = (0f64, f64::INFINITY, 0);
    for (token, row) in rows.iter().enumerate() {
        let Ok(row) = usize::try_from(*row) else { return f64::INFINITY };
        if let Some(square) = places.iter().position(|place| *place == token) {
            if row != alone + square {
                return f64::INFINITY;
            }
            continue;
        }
        let best = places.iter().map(|place| cosine(token, *place)).fold(f64::NEG_INFINITY, f64::max);
        if row < alone {
            if order[row].replace(best).is_some() {
                return f64::INFINITY;
            }
            continue;
        }
        let Some(place) = places.get(row - alone) else { return f64::INFINITY };
        loss = loss.max(best - cosine(token, *place));
        (least, merged) = (least.min(best), merged + 1);
    }
    let Some(order) = order.into_iter().collect::<Option<Vec<f64>>>() else { return f64::INFINITY };
    if merged != picture.merged {
        return f64::INFINITY;
    }
    let falling = std::iter::once(least).chain(order).collect::<Vec<_>>();
    falling.windows(2).map(|pair| pair[1] - pair[0]).filter(|rise| rise.is_finite()).fold(loss, f64::max)
}
