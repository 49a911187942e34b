//! GLoRA, OFT and BOFT against their formulas in f64.

use std::path::Path;
use std::sync::Arc;

use kiln::models::layers::WeightSource;
use kiln::models::lora::{Lora, Target};
use kiln::models::patch::{PatchedSource, Patches};
use kiln::tensor::RawTensor;
use kiln::weights::WeightsFile;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

struct Stored(Arc<WeightsFile>);

impl WeightSource for Stored {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.0.get(name)
    }

    fn packed(&self, _: &str) {}
}

/// A tensor of numbers between -`scale` and `scale` that follow from `seed`.
#[derive(Clone)]
struct Array {
    shape: Vec<usize>,
    data: Vec<f32>,
}

fn array(seed: u64, shape: &[usize], scale: f32) -> Array {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let data = (0..shape.iter().product()).map(|_| scale * next()).collect();
    Array { shape: shape.to_vec(), data }
}

fn scalar(value: f32) -> Array {
    Array { shape: vec![], data: vec![value] }
}

impl Array {
    /// Rows of the first extent, columns of all others.
    fn matrix(&self) -> Dense {
        let columns = self.shape[1..].iter().product();
        self.data.chunks(columns).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect()
    }
}

type Dense = Vec<Vec<f64>>;

fn times(a: &Dense, b: &Dense) -> Dense {
    assert_eq!(a[0].len(), b.len());
    let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, b)| x * b[j]).sum::<f64>();
    a.iter().map(|row| (0..b[0].len()).map(|j| entry(row, j)).collect()).collect()
}

fn transposed(a: &Dense) -> Dense {
    (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
}

/// `x·a + y·b`.
fn sum(x: f64, a: &Dense, y: f64, b: &Dense) -> Dense {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| x * a + y * b).collect()).collect()
}

fn identity(n: usize) -> Dense {
    (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect()
}

/// What kiln makes of a weight under a file with these tensors at a strength.
fn changed(weight: &Array, tensors: &[(&str, Array)], strength: f64) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let named = tensors.iter().map(|(name, array)| (format!("layer.{name}"), array.clone()));
    let named: Vec<_> = named.chain([("w".to_owned(), weight.clone())]).collect();
    let bytes: Vec<Vec<u8>> =
        named.iter().map(|(_, a)| a.data.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = named.iter().zip(&bytes).map(|((name, array), bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, array.shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, Path::new(&path)).unwrap();
    let file = WeightsFile::open(&path).unwrap();
    let elements = weight.data.len();
    let target = Target { name: "w".into(), elements, aliases: vec!["layer".into()] };
    let lora = Lora::read(&file, &[target]);
    assert_eq!((lora.changes.len(), lora.misfits.len()), (1, 0));
    assert_eq!(lora.unused, ["w"], "all tensors of the file are taken");
    let base: Arc<dyn WeightSource> = Arc::new(Stored(file.clone()));
    let patches = Patches::default().with(lora.at(strength));
    PatchedSource::new(base, vec![Default::default()], patches).raw("w").unwrap().to_f32()
}

/// Largest difference to the expected weight, by its largest value: f32 arithmetic is good for 2e-6.
fn assert_close(case: &str, got: &[f32], want: &Dense) {
    let want: Vec<f64> = want.iter().flatten().copied().collect();
    assert_eq!(got.len(), want.len(), "{case}");
    let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    println!("{case}: {:.1e}", worst / largest);
    assert!(worst <= 2e-6 * largest, "{case}: off by {worst}, largest value {largest}");
}

/// W' = W + s·α/r·(W·A + B).
#[test]
fn glora_adds_a_product_of_the_weight_and_a_product_of_its_own() {
    for strength in [1.0, -0.4] {
        let scale = strength * 2.0 / 3.0;
        let weight = array(1, &[12, 10], 1.0);
        let a = [array(2, &[10, 3], 0.5), array(3, &[3, 10], 0.5)];
        let b = [array(4, &[12, 3], 0.5), array(5, &[3, 10], 0.5)];
        let w = weight.matrix();
        let wa = times(&w, &times(&a[0].matrix(), &a[1].matrix()));
        let delta = sum(1.0, &wa, 1.0, &times(&b[0].matrix(), &b[1].matrix()));
        let want = sum(1.0, &w, scale, &delta);
        let alpha = ("alpha", scalar(2.0));
        let file = |names: [&'static str; 4]| {
            let [a1, a2, b1, b2] = names;
            let (a, b) = (a.clone(), b.clone());
            let [first, second] = a;
            let [left, right] = b;
            [(a1, first), (a2, second), (b1, left), (b2, right), alpha.clone()]
        };
        let new = file(["a1.weight", "a2.weight", "b1.weight", "b2.weight"]);
        assert_close("linear", &changed(&weight, &new, strength), &want);
        // The first files had both pairs the other way round.
        let old = file(["a2.weight", "a1.weight", "b2.weight", "b1.weight"]);
        assert_close("old linear", &changed(&weight, &old, strength), &want);
    }
}

/// For a convolution A acts on the input channels, alike at every place of the kernel.
#[test]
fn glora_of_a_convolution() {
    let weight = array(6, &[6, 5, 3, 3], 1.0);
    let (a1, a2) = (array(7, &[5, 2, 1, 1], 0.5), array(8, &[2, 5, 1, 1], 0.5));
    let (b1, b2) = (array(9, &[6, 2, 1, 1], 0.5), array(10, &[2, 5, 3, 3], 0.5));
    let (w, a) = (weight.matrix(), times(&a1.matrix(), &a2.matrix()));
    let entry = |o: usize, j: usize, t: usize| (0..5).map(|i| w[o][i * 9 + t] * a[i][j]).sum::<f64>();
    let wa: Dense = (0..6).map(|o| (0..45).map(|at| entry(o, at / 9, at % 9)).collect()).collect();
    let delta = sum(1.0, &wa, 1.0, &times(&b1.matrix(), &b2.matrix()));
    let tensors = [("a1.weight", a1), ("a2.weight", a2), ("b1.weight", b1), ("b2.weight", b2)];
    assert_close("convolution", &changed(&weight, &tensors, 0.7), &sum(1.0, &w, 0.7, &delta));
}

/// The Cayley transforms (I + Q)(I − Q)⁻¹ of skew blocks that together are no longer than `limit`; the inverse as
/// its series Σ Qᵏ, which converges for short Q.
fn cayley(blocks: &Array, limit: Option<f64>) -> Vec<Dense> {
    let n = *blocks.shape.last().unwrap();
    let block = |data: &[f32]| -> Dense {
        let b = Array { shape: vec![n, n], data: data.to_vec() }.matrix();
        sum(1.0, &b, -1.0, &transposed(&b))
    };
    let mut skew: Vec<Dense> = blocks.data.chunks(n * n).map(block).collect();
    let norm = skew.iter().flatten().flatten().map(|v| v * v).sum::<f64>().sqrt();
    if let Some(limit) = limit.filter(|limit| norm > *limit) {
        skew.iter_mut().flatten().flatten().for_each(|v| *v *= limit / norm);
    }
    let rotation = |q: &Dense| {
        let (mut inverse, mut power) = (identity(n), identity(n));
        for _ in 0..400 {
            power = times(&power, q);
            inverse = sum(1.0, &inverse, 1.0, &power);
        }
        times(&sum(1.0, &identity(n), 1.0, q), &inverse)
    };
    let rotations: Vec<Dense> = skew.iter().map(rotation).collect();
    for r in &rotations {
        let rest = sum(1.0, &times(r, &transposed(r)), -1.0, &identity(n));
        assert!(rest.iter().flatten().all(|v| v.abs() < 1e-12), "a rotation");
    }
    rotations
}

/// The matrix with these on its diagonal.
fn diagonal(blocks: &[Dense]) -> Dense {
    let n = blocks[0].len();
    let mut all = vec![vec![0.0; n * blocks.len()]; n * blocks.len()];
    for (i, block) in blocks.iter().enumerate() {
        for (y, row) in block.iter().enumerate() {
            all[i * n + y][i * n..(i + 1) * n].copy_from_slice(row);
        }
    }
    all
}

/// W' = RᵀW; in between by strength, which the reference applies to R and to the difference.
#[test]
fn oft_turns_the_outputs_in_blocks() {
    for (name, shape) in [("linear", &[12, 7][..]), ("convolution", &[12, 5, 3, 3])] {
        for limit in [None, Some(0.3)] {
            for strength in [1.0, 0.5] {
                let (weight, blocks) = (array(11, shape, 1.0), array(12, &[3, 4, 4], 0.15));
                let w = weight.matrix();
                let r = diagonal(&cayley(&blocks, limit));
                let delta = sum(1.0, &times(&transposed(&r), &w), -1.0, &w);
                let want = sum(1.0, &w, strength * strength, &delta);
                let mut tensors = vec![("oft_blocks", blocks)];
                tensors.extend(limit.map(|limit| ("alpha", scalar(limit as f32))));
                let limit = limit.is_some();
                let case = format!("OFT {name} at {strength}, limited: {limit}");
                assert_close(&case, &changed(&weight, &tensors, strength), &want);
            }
        }
    }
}

/// W' = Π PᵢᵀRᵢPᵢ · W: in round i, Pᵢ brings outputs together that are half a block times 2ⁱ apart.
#[test]
fn boft_turns_the_outputs_in_rounds() {
    let (rows, size, rounds) = (24, 4, 2);
    let permutation = |round: usize| -> Dense {
        let apart = (size / 2) << round;
        let mut p = vec![vec![0.0; rows]; rows];
        for group in (0..rows).step_by(2 * apart) {
            for i in 0..apart {
                p[group + 2 * i][group + i] = 1.0;
                p[group + 2 * i + 1][group + apart + i] = 1.0;
            }
        }
        p
    };
    for (limit, strength, is_scaled) in
        [(None, 1.0, false), (Some(0.4), 1.0, true), (Some(0.4), 0.6, false), (None, 0.6, true)]
    {
        let weight = array(13, &[rows, 5, 1, 1], 1.0);
        let blocks = array(14, &[rounds, rows / size, size, size], 0.1);
        let rescale =
            Array { data: (0..rows).map(|i| 0.9 + 0.01 * i as f32).collect(), shape: vec![rows, 1, 1, 1] };
        let rotations = cayley(&blocks, limit);
        let w = weight.matrix();
        let mut turned = w.clone();
        for round in 0..rounds {
            let blocks = &rotations[round * rows / size..(round + 1) * rows / size];
            let r = sum(strength, &diagonal(blocks), 1.0 - strength, &identity(rows));
            let p = permutation(round);
            turned = times(&times(&transposed(&p), &times(&r, &p)), &turned);
        }
        let mut tensors = vec![("oft_blocks", blocks)];
        tensors.extend(limit.map(|limit| ("alpha", scalar(limit as f32))));
        if is_scaled {
            let factors = rescale.matrix();
            for (row, factor) in turned.iter_mut().zip(&factors) {
                row.iter_mut().for_each(|v| *v *= factor[0]);
            }
            tensors.push(("rescale", rescale));
        }
        let want = sum(1.0, &w, strength, &sum(1.0, &turned, -1.0, &w));
        let case = format!("BOFT at {strength}, limit {limit:?}, scaled: {is_scaled}");
        assert_close(&case, &changed(&weight, &tensors, strength), &want);
    }
}

/// A file whose blocks don't fit leaves the weight as it is.
#[test]
fn blocks_of_another_width_are_no_change() {
    let weight = array(15, &[12, 6], 1.0);
    let turned = changed(&weight, &[("oft_blocks", array(16, &[3, 2, 2], 0.1))], 1.0);
    assert_eq!(turned, weight.data);
}
