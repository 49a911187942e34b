//! Vectors of unCLIP models against their definition in f64.

use super::*;
use crate::tensor::HostTensor;

const WIDTH: usize = 16;

fn wave(seed: f64, scale: f64) -> Vec<f32> {
    (0..WIDTH).map(|i| ((i as f64 * 0.9 + seed).sin() * scale) as f32).collect()
}

fn augmentor() -> NoiseAugmentor {
    let std = wave(2.0, 0.3).into_iter().map(|v| v + 1.0).collect();
    NoiseAugmentor::new(wave(1.0, 0.5), std).unwrap()
}

fn picture(rows: &[f64], strength: f64, noise: f64) -> UnclipPicture {
    let data: Vec<f32> = rows.iter().flat_map(|&seed| wave(seed, 1.0)).collect();
    let image_embeds = HostTensor::new(&[rows.len(), WIDTH], data).unwrap();
    let (last_hidden_state, penultimate_hidden_states) = Default::default();
    let output = VisionOutput { image_embeds, last_hidden_state, penultimate_hidden_states };
    UnclipPicture { output: Arc::new(output), strength, noise }
}

/// ᾱ after `level + 1` steps: no step below the last few is capped.
fn alpha(level: usize) -> f64 {
    let rest = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    rest((level + 1) as f64 / 1000.0) / rest(0.0)
}

/// The embedding under noise, then the level's sinusoids.
fn expected(embedding: &[f64], level: usize, noise: &[f32]) -> Vec<f64> {
    let (mean, std) = (wave(1.0, 0.5), wave(2.0, 0.3));
    let noisy = (0..WIDTH).map(|i| {
        let (mean, std) = (f64::from(mean[i]), f64::from(std[i] + 1.0));
        let scaled = (embedding[i] - mean) / std;
        (alpha(level).sqrt() * scaled + (1.0 - alpha(level)).sqrt() * f64::from(noise[i])) * std + mean
    });
    let angle = |i: usize| level as f64 * (-(10_000f64.ln()) * i as f64 / (WIDTH / 2) as f64).exp();
    let half = 0..WIDTH / 2;
    noisy.chain(half.clone().map(|i| angle(i).cos())).chain(half.map(|i| angle(i).sin())).collect()
}

fn check(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Angles of up to 999 in f32.
        assert!((f64::from(*got) - want).abs() < 1e-4, "{i}: {got} {want}");
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn one_picture_is_weighted_with_its_level() {
    let got = merged(&augmentor(), &[picture(&[0.0], 0.5, 0.3)], 7).unwrap();
    let noise = Generator::new(7).randn(&[1, WIDTH]);
    // round(999 · 0.3) = 300
    let want = expected(&wide(&wave(0.0, 1.0)), 300, noise.data());
    check(&got, &want.iter().map(|v| v * 0.5).collect::<Vec<_>>());
}

#[test]
fn several_pictures_are_summed_and_noised_again() {
    // Two pictures, the second a batch of two.
    let pictures = [picture(&[0.0], 1.0, 0.0), picture(&[3.0, 5.0], -0.5, 0.2)];
    let got = merged(&augmentor(), &pictures, 11).unwrap();
    let mut generator = Generator::new(11);
    let (first, second) = (generator.randn(&[1, WIDTH]), generator.randn(&[1, WIDTH]));
    let mut sum = vec![0.0; WIDTH];
    for (seed, weight, level) in [(0.0, 1.0, 0), (3.0, -0.5, 200), (5.0, -0.5, 200)] {
        let one = expected(&wide(&wave(seed, 1.0)), level, first.data());
        sum.iter_mut().zip(&one).for_each(|(s, v)| *s += v * weight);
    }
    check(&got, &expected(&sum, 50, second.data()));
}

#[test]
fn seeds_below_ten_wrap_as_in_torch() {
    // torch.manual_seed(-10) is that of 2^64 - 10, of which 32 bits count.
    assert_eq!(0u64.wrapping_sub(SEED_OFFSET) as u32, 4_294_967_286);
}
