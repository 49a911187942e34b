//! Group and layer normalisation.

use super::*;

fn group_norm_case(
    b: &CpuBackend,
    s: Shape,
    c2: usize,
    groups: usize,
    offset: f32,
    silu: bool,
    rng: &mut Rng,
) {
    let values = |shape: Shape, rng: &mut Rng| {
        let v: Vec<f32> = rng.values(shape.len()).iter().map(|v| v + offset).collect();
        b.put(shape, &v)
    };
    let x = values(s, rng);
    let x2 = (c2 > 0).then(|| values(s.with_channels(c2), rng));
    let c = s.c + c2;
    let scale = Stored::random(DType::F16, &[c], rng);
    let shift = Stored::random(DType::F32, &[c], rng);
    let w = b.pack_norm(&scale.raw(), &shift.raw()).unwrap();
    let op = GroupNorm { x: &x, x2: x2.as_ref(), w: &w, groups, eps: 1e-5, silu };
    let mut out = b.poisoned(s.with_channels(c));
    b.group_norm(&op, &mut out).unwrap();

    let (xv, x2v) = (b.get(&x), x2.as_ref().map(|t| b.get(t)).unwrap_or_default());
    let at = |row: usize, ch: usize| {
        f64::from(if ch < s.c { xv[row * s.c + ch] } else { x2v[row * c2 + ch - s.c] })
    };
    let mut reference = vec![0f64; s.rows() * c];
    let per = c / groups;
    for n in 0..s.n {
        for g in 0..groups {
            let cells: Vec<(usize, usize)> = (n * s.positions()..(n + 1) * s.positions())
                .flat_map(|row| (g * per..(g + 1) * per).map(move |ch| (row, ch)))
                .collect();
            let count = cells.len() as f64;
            let mean = cells.iter().map(|&(r, ch)| at(r, ch)).sum::<f64>() / count;
            let var = cells.iter().map(|&(r, ch)| (at(r, ch) - mean).powi(2)).sum::<f64>() / count;
            for (r, ch) in cells {
                let y = (at(r, ch) - mean) / (var + 1e-5).sqrt();
                let y = y * f64::from(scale.values[ch]) + f64::from(shift.values[ch]);
                let act = if silu { Activation::Silu } else { Activation::None };
                reference[r * c + ch] = activation(act, y);
            }
        }
    }
    // x·factor + shift: the offset's rounding error stays in.
    let tolerance = 1e-6 * f64::from(1.0 + offset.abs());
    b.check(&format!("group_norm {s} + {c2}, {groups} groups"), &out, &reference, tolerance);
}

#[test]
fn group_norm_matches_the_reference() {
    let mut rng = Rng(7);
    for b in backends() {
        group_norm_case(&b, Shape::nhwc(2, 8, 8, 64), 0, 32, 0.0, false, &mut rng);
        group_norm_case(&b, Shape::nhwc(2, 5, 7, 40), 24, 16, 1.0, true, &mut rng);
        group_norm_case(&b, Shape::nhwc(1, 40, 41, 32), 0, 32, 0.0, true, &mut rng);
        group_norm_case(&b, Shape::nhwc(2, 3, 3, 70), 26, 32, 0.0, true, &mut rng);
        group_norm_case(&b, Shape::nhwc(1, 1, 1, 96), 0, 3, 0.0, false, &mut rng);
        group_norm_case(&b, Shape::nhwc(1, 16, 16, 5), 2, 7, 0.0, false, &mut rng);
    }
}

#[test]
fn group_norm_survives_a_large_mean_on_a_large_map() {
    let b = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    group_norm_case(&b, Shape::nhwc(1, 200, 201, 8), 0, 2, 100.0, false, &mut Rng(8));
}

#[test]
fn layer_norm_matches_the_reference() {
    let mut rng = Rng(9);
    for b in backends() {
        for (rows, c) in [(64, 320), (77, 768), (3, 1), (5, 13), (40, 1280)] {
            let x = b.random(Shape::tokens(1, rows, c), &mut rng);
            let scale = Stored::random(DType::F32, &[c], &mut rng);
            let shift = Stored::random(DType::F16, &[c], &mut rng);
            let w = b.pack_norm(&scale.raw(), &shift.raw()).unwrap();
            let mut out = b.poisoned(x.shape());
            b.layer_norm(&LayerNorm { x: &x, w: &w, eps: 1e-5 }, &mut out).unwrap();
            let xv = b.get(&x);
            let mut reference = Vec::new();
            for row in xv.chunks(c) {
                let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / c as f64;
                let var = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / c as f64;
                reference.extend(row.iter().enumerate().map(|(i, &v)| {
                    let y = (f64::from(v) - mean) / (var + 1e-5).sqrt();
                    y * f64::from(scale.values[i]) + f64::from(shift.values[i])
                }));
            }
            b.check(&format!("layer_norm {rows}×{c}"), &out, &reference, 2e-6);
        }
    }
}
