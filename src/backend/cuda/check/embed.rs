//! Cases of embeddings.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::embed::{Embed, TimestepEmbedding, Timesteps, embed, timestep_embedding};
use crate::backend::cuda::{CudaError, Element};
use crate::driver::DevicePtr;

/// Sequences, tokens of one, width, rows of the table, vectors of textual inversion.
const TOKENS: [[usize; 5]; 20] = [
    [1, 1, 1, 1, 0],
    [1, 1, 8, 2, 0],
    [1, 2, 7, 3, 1],
    [2, 3, 16, 10, 0],
    [1, 5, 40, 100, 2],
    [3, 7, 9, 5, 0],
    [1, 77, 64, 500, 0],
    [2, 77, 32, 500, 5],
    [1, 77, 768, 300, 0],
    [1, 77, 768, 300, 8],
    [2, 77, 20, 50, 1],
    [4, 11, 24, 64, 3],
    [1, 1, 1280, 7, 1],
    [1, 13, 1001, 20, 2],
    [8, 2, 56, 30, 0],
    [1, 255, 8, 9, 0],
    [1, 256, 3, 9, 4],
    [5, 5, 5, 5, 5],
    [1, 30, 1024, 11, 0],
    [2, 77, 1280, 200, 2],
];

/// Timesteps and width.
const TIMES: [(usize, usize); 20] = [
    (1, 1),
    (1, 2),
    (1, 3),
    (2, 4),
    (1, 5),
    (3, 7),
    (1, 8),
    (1, 31),
    (5, 32),
    (1, 63),
    (2, 64),
    (7, 65),
    (1, 100),
    (4, 128),
    (2, 255),
    (12, 256),
    (2, 320),
    (8, 320),
    (1, 321),
    (16, 500),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for table in [element, Element::F32] {
            if table == element || element != Element::F32 {
                cases.extend(TOKENS.iter().map(|shape| embed_case(*shape, table, element)));
            }
        }
        for is_same in [false, true] {
            cases.extend(TIMES.iter().map(|&(count, dim)| timestep_case(count, dim, is_same, element)));
        }
    }
    cases.push(embed_case([2, 77, 768, 49_408, 4], Element::F16, Element::F16));
    cases.push(embed_case([2, 77, 1280, 49_408, 4], Element::F16, Element::F16));
    cases
}

/// Widths of whole vectors and others.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for table in ELEMENTS.into_iter().filter(|table| *table == element || *table == Element::F32) {
            for is_vector in [true, false] {
                cases.extend(distinct(shapes, |s| {
                    let width = if is_vector { 8 * s.of(1..=20) } else { s.odd(1..=160) };
                    let shape = [s.of(1..=4), s.of(1..=40), width, s.of(1..=90), s.below(5)];
                    embed_case(shape, table, element)
                }));
            }
        }
        cases.extend(distinct(shapes, |s| timestep_case(s.of(1..=20), s.of(1..=350), s.once_in(3), element)));
    }
    cases
}

fn embed_case(shape: [usize; 5], table: Element, element: Element) -> Case {
    let [sequences, seq, width, rows, vectors] = shape;
    let count = sequences * seq * width;
    Case {
        family: "embed",
        name: format!(
            "embed_{}_{} {sequences}x{seq}x{width} of {rows}+{vectors}",
            table.suffix(),
            element.suffix()
        ),
        quick: count < 20_000,
        needs_gpu: rows > 10_000,
        is_random: false,
        flops: 0.0,
        bytes: (count * (2 * table.size() + element.size())) as f64,
        // One sum of two numbers, rounded to f32 and then to the element.
        tolerance: element.rounding() * 1.01 + 1e-7,
        run: Box::new(move |cx| run_embed(cx, shape, table, element)),
    }
}

fn run_embed(
    cx: &mut Context<'_>,
    [sequences, seq, width, rows, vector_rows]: [usize; 5],
    table_element: Element,
    element: Element,
) -> Result<Measured, CudaError> {
    let table = cx.values(rows * width, 1.0, table_element);
    let positions = cx.values(seq * width, 0.5, table_element);
    let vectors = cx.values(vector_rows * width, 1.0, Element::F32);
    let tokens = sequences * seq;
    let ids: Vec<i32> = (0..tokens)
        .map(|_| {
            let pick = (cx.random() % (rows + vector_rows) as u64) as i32;
            if pick < rows as i32 { pick } else { rows as i32 - 1 - pick }
        })
        .collect();
    let mut want = Vec::with_capacity(tokens * width);
    for (t, id) in ids.iter().enumerate() {
        let row = match usize::try_from(*id) {
            Ok(id) => &table[id * width..][..width],
            Err(_) => &vectors[(-1 - id) as usize * width..][..width],
        };
        let position = &positions[t % seq * width..][..width];
        want.extend(row.iter().zip(position).map(|(a, b)| f64::from(*a) + f64::from(*b)));
    }
    let (dtable, dpositions) = (cx.upload(&table, table_element)?, cx.upload(&positions, table_element)?);
    let dids = cx.upload_bytes(bytemuck::cast_slice(&ids))?;
    let dvectors = cx.upload(&vectors, Element::F32)?;
    let out = cx.output(want.len() * element.size())?;
    let gpu = cx.gpu;
    let op = Embed {
        table: dtable.ptr,
        positions: dpositions.ptr,
        ids: dids.ptr,
        vectors: if vector_rows == 0 { DevicePtr::NULL } else { dvectors.ptr },
        out: out.ptr,
        tokens,
        seq,
        width,
        rows,
        vector_rows,
        table_element,
        element,
    };
    cx.measure(out, element, &want, || embed(gpu, &op))
}

fn timestep_case(count: usize, dim: usize, is_same: bool, element: Element) -> Case {
    Case {
        family: "embed",
        name: format!(
            "timestep_embedding_{} {count}x{dim}{}",
            element.suffix(),
            if is_same { " of one step" } else { "" }
        ),
        quick: true,
        needs_gpu: false,
        is_random: false,
        flops: 0.0,
        bytes: (4 * count + count * dim * element.size()) as f64,
        // One rounding; sine and cosine are good to 2 ulp, and the angle is rounded as here.
        tolerance: element.rounding() * 1.01 + 3e-7,
        run: Box::new(move |cx| run_timestep(cx, [count, dim], is_same, element)),
    }
}

fn run_timestep(
    cx: &mut Context<'_>,
    [count, dim]: [usize; 2],
    is_same: bool,
    element: Element,
) -> Result<Measured, CudaError> {
    // The range of samplers, whole and in part, then sizes of pictures (SDXL) and beyond.
    let mut times = vec![999.0, 0.0, 1000.0, 0.5, 13.37, 4096.0, 1.0, 250_000.0];
    times.extend(cx.values(count, 500.0, Element::F32));
    times.truncate(count);
    if is_same {
        times.fill(981.25);
    }
    let half = dim / 2;
    let mut want = vec![0.0; count * dim];
    for (t, row) in times.iter().zip(want.chunks_exact_mut(dim)) {
        for i in 0..half {
            let exponent = -(10_000f64.ln() as f32) * i as f32 / half as f32;
            let angle = f64::from(t * f64::from(exponent).exp() as f32);
            row[i] = angle.cos();
            row[half + i] = angle.sin();
        }
    }
    let timesteps = match times.first() {
        Some(first) if is_same => Timesteps::Same(*first),
        _ => Timesteps::Each(cx.upload(&times, Element::F32)?.ptr),
    };
    let out = cx.output(want.len() * element.size())?;
    let gpu = cx.gpu;
    let op = TimestepEmbedding { timesteps, out: out.ptr, count, dim, element };
    cx.measure(out, element, &want, || timestep_embedding(gpu, &op))
}
