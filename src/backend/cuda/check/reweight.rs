//! Cases of reweighted feature maps, against the CPU's reference, and of tokens in another order.

use super::random::{ELEMENTS, Shapes, UNITS, distinct, unit_of};
use super::{Case, CaseFn, Context, Measured, wide};
use crate::backend::cuda::launch::copy::{Columns, Swap, swap};
use crate::backend::cuda::launch::reweight::{ScaleHalf, ScaleLowBand, scale_half, scale_low_band};
use crate::backend::cuda::{CudaError, Element};
use crate::tensor::Shape;
use crate::tensor::reference::{half_scaled, low_band_scaled};

/// Samples, height, width, channels.
const MAPS: [[usize; 4]; 20] = [
    [1, 1, 2, 2],
    [1, 1, 5, 3],
    [1, 7, 1, 33],
    [2, 2, 2, 8],
    [1, 3, 3, 31],
    [1, 4, 6, 32],
    [2, 5, 7, 64],
    [3, 8, 8, 40],
    [1, 8, 8, 320],
    [2, 16, 16, 20],
    [1, 9, 31, 12],
    [4, 6, 5, 7],
    [1, 32, 32, 34],
    [2, 13, 12, 96],
    [1, 64, 3, 10],
    [1, 1, 100, 16],
    [5, 4, 4, 48],
    [1, 17, 19, 1],
    [2, 12, 24, 66],
    [1, 24, 24, 128],
];

/// Samples, rows, columns, run, width, pitch, first column.
const ORDERS: [[usize; 7]; 20] = [
    [1, 1, 1, 1, 1, 1, 0],
    [1, 1, 1, 5, 3, 9, 6],
    [2, 1, 1, 64, 16, 48, 32],
    [1, 2, 2, 1, 8, 8, 0],
    [1, 2, 3, 4, 8, 24, 0],
    [2, 4, 4, 4, 16, 48, 16],
    [1, 8, 2, 3, 5, 7, 1],
    [3, 3, 5, 2, 4, 12, 8],
    [1, 16, 4, 16, 8, 24, 8],
    [2, 7, 3, 1, 2, 6, 4],
    [1, 5, 5, 5, 12, 36, 24],
    [4, 2, 8, 2, 32, 96, 0],
    [1, 32, 2, 16, 20, 60, 40],
    [1, 1, 9, 9, 6, 18, 0],
    [2, 9, 1, 9, 6, 18, 12],
    [1, 10, 12, 3, 10, 10, 0],
    [6, 2, 2, 2, 64, 192, 128],
    [1, 3, 7, 11, 1, 3, 1],
    [2, 16, 16, 1, 24, 72, 48],
    [1, 12, 2, 6, 40, 120, 80],
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, map) in MAPS.iter().enumerate() {
        for element in [ELEMENTS[i % 3], ELEMENTS[(i + 1) % 3]] {
            cases.push(half_case(*map, element, false));
            cases.push(half_case(*map, element, true));
            cases.push(band_case(*map, element));
        }
    }
    for (i, order) in ORDERS.iter().enumerate() {
        cases.push(swap_case(*order, ELEMENTS[i % 3]));
        cases.push(swap_case(*order, ELEMENTS[(i + 1) % 3]));
    }
    // The lowest two levels of SDXL at 1024², and its tiles.
    for map in [[2, 32, 32, 1280], [2, 64, 64, 640]] {
        cases.extend([half_case(map, Element::F16, false), half_case(map, Element::F16, true)]);
        cases.push(band_case(map, Element::F16));
    }
    cases.push(swap_case([2, 16, 4, 16, 640, 1920, 0], Element::F16));
    cases
}

/// Feature maps, and tokens in runs of every unit that a copy moves.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let map = |s: &mut Shapes| [s.of(1..=3), s.of(1..=20), s.of(1..=20), s.of(2..=70)];
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| half_case(map(s), element, false)));
        cases.extend(distinct(shapes, |s| half_case(map(s), element, true)));
        cases.extend(distinct(shapes, |s| band_case(map(s), element)));
    }
    for unit in UNITS {
        cases.extend(distinct(shapes, |s| {
            let (element, each) = unit_of(s, unit);
            let (width, before, behind) = (each * s.odd(1..=9), each * s.below(4), each * s.below(4));
            let [samples, rows, columns, run] = [s.of(1..=4), s.of(1..=9), s.of(1..=9), s.of(1..=9)];
            swap_case([samples, rows, columns, run, width, before + width + behind, before], element)
        }));
    }
    cases
}

fn case(name: String, elements: usize, bytes: usize, tolerance: f64, run: CaseFn) -> Case {
    Case::of_memory("reweight", name, elements, bytes, tolerance, run)
}

fn half_case([n, h, w, c]: [usize; 4], element: Element, is_by_place: bool) -> Case {
    let count = n * h * w * c;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(count, 1.0, element);
        let mut want = x.clone();
        half_scaled(&mut want, Shape::nhwc(n, h, w, c), 1.4, is_by_place);
        let dx = cx.upload(&x, element)?;
        let means = if is_by_place { Some(cx.output(4 * n * h * w)?.ptr) } else { None };
        let out = cx.output(count * element.size())?;
        let gpu = cx.gpu;
        let op = ScaleHalf {
            x: dx.ptr,
            out: out.ptr,
            means,
            samples: n,
            places: h * w,
            channels: c,
            factor: 1.4,
            element,
        };
        cx.measure(out, element, &wide(want.iter().copied()), || scale_half(gpu, &op))
    };
    let how = if is_by_place { "by place" } else { "by 1.4" };
    let name = format!("scale_half_{} {n}x{h}x{w}x{c} {how}", element.suffix());
    // A factor that goes by place has the rounding of means and of their range before that of the result.
    let tolerance = element.rounding() * 1.01 + if is_by_place { 5e-6 } else { 1e-6 };
    case(name, count, (2 + usize::from(is_by_place)) * count * element.size(), tolerance, Box::new(run))
}

fn band_case([n, h, w, c]: [usize; 4], element: Element) -> Case {
    let count = n * h * w * c;
    let run = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(count, 1.0, element);
        let mut want = x.clone();
        low_band_scaled(&mut want, Shape::nhwc(n, h, w, c), 0.2);
        let dx = cx.upload(&x, element)?;
        let out = cx.output(count * element.size())?;
        let gpu = cx.gpu;
        let (size, factor) = ([h, w], 0.2);
        let op = ScaleLowBand { x: dx.ptr, out: out.ptr, samples: n, size, channels: c, factor, element };
        cx.measure(out, element, &wide(want.iter().copied()), || scale_low_band(gpu, &op))
    };
    let name = format!("low_band_{} {n}x{h}x{w}x{c}", element.suffix());
    // Sums of a plane in f32: a few roundings of 2^-24 each, relative to values of size 1.
    case(name, count, 3 * count * element.size(), element.rounding() * 1.01 + 4e-6, Box::new(run))
}

fn swap_case([samples, rows, columns, run, width, pitch, first]: [usize; 7], element: Element) -> Case {
    let tokens = samples * rows * columns * run;
    let launch = move |cx: &mut Context<'_>| -> Result<Measured, CudaError> {
        let x = cx.values(tokens * pitch, 1.0, element);
        let mut want = Vec::with_capacity(tokens * width);
        for (block, column) in (0..samples).flat_map(|b| (0..columns).map(move |c| (b, c))) {
            for (row, i) in (0..rows).flat_map(|r| (0..run).map(move |i| (r, i))) {
                let from = ((block * rows + row) * columns + column) * run + i;
                want.extend(wide(x[from * pitch + first..][..width].iter().copied()));
            }
        }
        let dx = cx.upload(&x, element)?;
        let out = cx.output(tokens * width * element.size())?;
        let gpu = cx.gpu;
        let x = Columns { ptr: dx.ptr.offset(first * element.size()), width, pitch };
        let op = Swap { x, out: out.ptr, tokens, rows, columns, run, element };
        cx.measure(out, element, &want, || swap(gpu, &op))
    };
    let name = format!("swap_{} {samples}x{rows}x{columns}x{run} of {width}/{pitch}", element.suffix());
    case(name, tokens * width, 2 * tokens * width * element.size(), 0.0, Box::new(launch))
}
