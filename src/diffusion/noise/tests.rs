//! Every entry of `tests/data/golden/rng.json`: noise recorded from ComfyUI
//! 0.3.64 on PyTorch 2.15, NumPy 2.4 and torchsde 0.2.6.

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{BrownianNoise, BrownianTree, Generator, SeedSequence, prepare_noise};

#[derive(Deserialize)]
struct Entry {
    kind: String,
    seed: u64,
    tensor: Option<String>,
    #[serde(default)]
    shape: Vec<usize>,
    batch_index: Option<Vec<usize>>,
    generate_state_4: Option<Vec<u32>>,
    spawn2: Option<Vec<Vec<u32>>>,
    #[serde(default)]
    sigma_min: f32,
    #[serde(default)]
    sigma_max: f32,
    #[serde(default)]
    queries: Vec<(f32, f32)>,
    #[serde(default)]
    points: Vec<f32>,
}

struct Golden {
    entries: Vec<Entry>,
    bytes: Vec<u8>,
}

impl Golden {
    fn load() -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden");
        let json = std::fs::read(folder.join("rng.json")).expect("rng.json");
        let bytes = std::fs::read(folder.join("rng.safetensors")).expect("rng.safetensors");
        Self { entries: serde_json::from_slice(&json).expect("entries"), bytes }
    }

    /// Entries whose kind begins with `kind`; there must be `count` of them, so
    /// that a renamed kind cannot silently empty a test.
    fn of_kind(&self, kind: &str, count: usize) -> Vec<&Entry> {
        let found: Vec<_> = self.entries.iter().filter(|e| e.kind.starts_with(kind)).collect();
        assert_eq!(found.len(), count, "entries of kind {kind}");
        found
    }

    fn raw(&self, entry: &Entry) -> Vec<u8> {
        let name = entry.tensor.as_deref().expect("a tensor name");
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        file.tensor(name).expect("the tensor").data().to_vec()
    }

    fn f32s(&self, entry: &Entry) -> Vec<f32> {
        self.raw(entry).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn words64(&self, entry: &Entry) -> Vec<u64> {
        let word = |b: &[u8]| b.iter().rev().fold(0, |w, &byte| w << 8 | u64::from(byte));
        self.raw(entry).chunks_exact(8).map(word).collect()
    }
}

fn mismatches(got: &[f32], want: &[f32]) -> (usize, f32) {
    assert_eq!(got.len(), want.len());
    let differ = got.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    (differ, got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max))
}

/// Exact: the same polynomials in the same order leave no freedom.
#[test]
fn initial_noise_is_exact() {
    let golden = Golden::load();
    for entry in golden.of_kind("prepare_noise", 44) {
        let noise = prepare_noise(&entry.shape, entry.seed, entry.batch_index.as_deref());
        assert_eq!(noise.shape(), entry.shape, "{:?}", entry.tensor);
        assert_eq!(mismatches(noise.data(), &golden.f32s(entry)), (0, 0.0), "{:?}", entry.tensor);
    }
}

#[test]
fn ancestral_draws_are_exact() {
    let golden = Golden::load();
    for entry in golden.of_kind("ancestral noise sampler", 2) {
        let mut generator = Generator::new(entry.seed);
        let draws: Vec<f32> = (0..4).flat_map(|_| generator.randn(&[1, 4, 8, 8]).into_data()).collect();
        assert_eq!(mismatches(&draws, &golden.f32s(entry)), (0, 0.0), "{:?}", entry.tensor);
    }
}

#[test]
fn uniforms_and_integers_are_exact() {
    let golden = Golden::load();
    let entry = golden.of_kind("torch.rand(40)", 1)[0];
    let uniform = Generator::new(entry.seed).rand(&[40]);
    assert_eq!(mismatches(uniform.data(), &golden.f32s(entry)), (0, 0.0));

    let entry = golden.of_kind("torch.randint(0,1000,(40,))", 1)[0];
    let integers = Generator::new(entry.seed).randint(0, 1000, 40);
    assert_eq!(integers.iter().map(|&i| i as u64).collect::<Vec<_>>(), golden.words64(entry));
}

#[test]
fn other_precisions() {
    let golden = Golden::load();
    let entry = golden.of_kind("torch.randn(20,dtype=float64)", 1)[0];
    let wide = Generator::new(entry.seed).randn_f64(20);
    for (got, want) in wide.iter().zip(golden.words64(entry)) {
        // The C library's log, cos and sin may round the last bit of 53 otherwise.
        assert!((got - f64::from_bits(want)).abs() < 1e-14, "{got} for {}", f64::from_bits(want));
    }

    let entry = golden.of_kind("torch.randn(20,dtype=float16)", 1)[0];
    let narrow: Vec<u16> = Generator::new(entry.seed).randn_f16(20).iter().map(|v| v.to_bits()).collect();
    let want: Vec<u16> =
        golden.raw(entry).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    assert_eq!(narrow, want);
}

/// The bar is 1e-5, but the same sums in the same order agree to the bit.
#[test]
fn brownian_noise() {
    let golden = Golden::load();
    for entry in golden.of_kind("brownian tree noise", 6) {
        let mut path = BrownianNoise::new(&entry.shape, entry.sigma_min, entry.sigma_max, entry.seed)
            .expect("a finite range");
        let got: Vec<f32> =
            entry.queries.iter().flat_map(|&(from, to)| path.sample(from, to).into_data()).collect();
        assert_eq!(mismatches(&got, &golden.f32s(entry)), (0, 0.0), "{:?}", entry.tensor);
    }
    let entry = golden.of_kind("torchsde.BrownianTree", 1)[0];
    let mut tree = BrownianTree::new(6, 0.0, 1.0, entry.seed).expect("a finite range");
    let got: Vec<f32> = entry.points.iter().flat_map(|&point| tree.increment(0.0, point)).collect();
    assert_eq!(mismatches(&got, &golden.f32s(entry)), (0, 0.0), "{:?}", entry.tensor);
}

#[test]
fn seed_sequence_states() {
    let golden = Golden::load();
    let entry = golden.of_kind("numpy.random.SeedSequence", 1)[0];
    let root = SeedSequence::new(entry.seed, &[], 4);
    assert_eq!(Some(root.generate(4)), entry.generate_state_4);
    let children = (0..2).map(|key| SeedSequence::new(entry.seed, &[key], 4).generate(2));
    assert_eq!(Some(children.collect::<Vec<_>>()), entry.spawn2);
}

/// A million values against the SHA-256 of what PyTorch 2.15 (AVX2 and AVX-512
/// alike) writes for `torch.randn(2**20)` with seed 99: no bit may differ.
#[test]
fn a_million_normals_have_the_recorded_hash() {
    let noise = Generator::new(99).randn(&[1 << 20]);
    let bytes: Vec<u8> = noise.data().iter().flat_map(|v| v.to_le_bytes()).collect();
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hash, "0bc6e6110cdf8192f82169f8be33e9531de448b03415c3611230de745451ed62");
}

/// Recorded from one PyTorch generator with seed 3: `randn(3)`, `randn(17)`,
/// `randn(2)`. The block path in the middle leaves the spare value alone.
#[test]
fn short_and_long_draws_share_one_state() {
    let want = [
        0x3f4d_a380u32,
        0x3e33_0786,
        0x3db6_3a26,
        0x3f1a_f8ed,
        0x3f1c_7e22,
        0x3f42_a8f2,
        0xbd09_cd84,
        0xbeb0_8f91,
        0x3efc_c029,
        0xbd9e_e2a8,
        0xbfe7_162f,
        0xbef3_ba54,
        0x3e52_28f6,
        0x3ead_4676,
        0x3fad_270b,
        0x3ebf_4d23,
        0x3c5b_d0cb,
        0x3f46_0f72,
        0xbddf_bb11,
        0xbe8a_dca3,
        0xbf1d_1ca0,
        0xbf66_d444,
    ];
    let mut generator = Generator::new(3);
    let got = [3, 17, 2].into_iter().flat_map(|n| generator.randn(&[n]).into_data());
    assert_eq!(got.map(f32::to_bits).collect::<Vec<_>>(), want);
}

/// Recorded from PyTorch 2.15, seed 1: the word count changes at a span of 2^28.
#[test]
fn integer_spans() {
    let draw = |low, high, n| Generator::new(1).randint(low, high, n);
    assert_eq!(draw(-5, 9, 6), [2, -2, -1, 5, -2, 8]);
    assert_eq!(draw(0, (1 << 28) - 1, 2), [180_483_115, 256_344_314]);
    assert_eq!(draw(0, 1 << 28, 2), [256_344_299, 247_206_984]);
    assert_eq!(draw(0, 1 << 40, 3), [163_196_666_091, 605_300_724_808, 1_095_766_950_793]);
    assert_eq!(draw(7, 7, 2), [7, 7]);
    assert!(draw(i64::MIN, i64::MAX, 9).iter().any(|&v| v < 0));
}

/// Recorded from PyTorch 2.15, seed 1.
#[test]
fn brain_floats_and_double_uniforms() {
    let long = [
        0xbfc3u16, 0xbf40, 0xbf27, 0xbfce, 0xbf32, 0xbf95, 0x3f33, 0x3e4c, 0x3f5e, 0x3e7a, 0xbf2a, 0x3f4f,
        0x3f8d, 0xbe34, 0xc010, 0xbfb9, 0x3d7a, 0xbf1e, 0xbf4c, 0xbe07,
    ];
    let bits = |n| Generator::new(1).randn_bf16(n).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(20), long);
    assert_eq!(bits(5), [0x3f29, 0x3e89, 0x3d7d, 0x3f1f, 0xbee7]);
    let uniform = Generator::new(1).rand_f64(3);
    assert_eq!(uniform, [0.06105327471962363, 0.2245545065676504, 0.23425251394483937]);
}
