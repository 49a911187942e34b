use std::sync::Arc;

use super::*;
use crate::diffusion::{CondEntry, Field, RunInputs};
use crate::models::detect::Heads;

fn config(in_channels: usize, adm_channels: Option<usize>) -> UnetConfig {
    UnetConfig {
        prefix: String::new(),
        in_channels,
        out_channels: 4,
        model_channels: 32,
        time_embed_dim: 128,
        channel_mult: vec![1],
        num_res_blocks: vec![1],
        input_depth: vec![1],
        middle_depth: 1,
        output_depth: vec![1, 1],
        context_dim: 8,
        heads: Heads::Count(1),
        norm_groups: 8,
        use_linear_in_transformer: true,
        adm_channels,
    }
}

/// What an item is made of.
struct Setup {
    x: Field,
    cond: CondEntry,
    run: RunInputs,
    is_negative: bool,
}

impl Setup {
    fn new(batch: usize, h: usize, w: usize) -> Self {
        let cond = CondEntry::new(Arc::new(HostTensor::zeros(&[1, 77, 8])));
        Self {
            x: HostTensor::zeros(&[batch, 4, h, w]).into(),
            cond,
            run: RunInputs::default(),
            is_negative: false,
        }
    }

    fn item(&self, full_size: (usize, usize), offset: (usize, usize)) -> DenoiseItem<'_> {
        let Self { x, cond, run, is_negative } = self;
        DenoiseItem { x, cond, full_size, offset, is_negative: *is_negative, run }
    }

    fn whole(&self) -> DenoiseItem<'_> {
        self.item((self.x.dim(2), self.x.dim(3)), (0, 0))
    }
}

/// The numbers behind a vector's sinusoids: their angle at frequency 1, from the first cosine and sine.
fn numbers(vector: &[f32], pooled: usize) -> Vec<f64> {
    vector[pooled..].chunks_exact(NUMBER_WIDTH).map(|c| f64::from(c[NUMBER_WIDTH / 2].atan2(c[0]))).collect()
}

fn check(vector: &[f32], pooled: usize, expected: &[f64]) {
    let found = numbers(vector, pooled);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        // Angles modulo 2π in f32.
        let difference = (found - expected).rem_euclid(std::f64::consts::TAU);
        assert!(difference.min(std::f64::consts::TAU - difference) < 1e-4, "{found} is not {expected}");
    }
}

#[test]
fn sdxl_is_told_six_sizes_and_without_them_those_of_the_picture() {
    let config = config(4, Some(1280 + 6 * 256));
    let mut setup = Setup::new(2, 5, 6);
    setup.cond.pooled = Some(Arc::new(HostTensor::full(&[1, 1280], 0.5)));
    let told = vector(&config, Family::Sdxl, &setup.item((10, 20), (1, 2))).unwrap().unwrap();
    assert_eq!(told.len(), 2816);
    assert!(told[..1280].iter().all(|v| *v == 0.5));
    check(&told, 1280, &[80.0, 160.0, 0.0, 0.0, 80.0, 160.0]);
    for (name, value) in [("height", 7.0), ("width", 11.0), ("crop_h", 3.0), ("crop_w", 2.0)] {
        setup.cond.extra.insert(name, value);
    }
    let told = vector(&config, Family::Sdxl, &setup.whole()).unwrap().unwrap();
    check(&told, 1280, &[7.0, 11.0, 3.0, 2.0, 7.0, 11.0]);
    setup.cond.extra.insert("target_width", 1.5);
    let told = vector(&config, Family::Sdxl, &setup.whole()).unwrap().unwrap();
    check(&told, 1280, &[7.0, 11.0, 3.0, 2.0, 7.0, 1.5]);
}

#[test]
fn the_refiner_is_told_a_score_by_side() {
    let config = config(4, Some(1280 + 5 * 256));
    let mut setup = Setup::new(1, 8, 8);
    setup.cond.pooled = Some(Arc::new(HostTensor::zeros(&[1, 1280])));
    let told = |setup: &Setup| vector(&config, Family::SdxlRefiner, &setup.whole()).unwrap().unwrap();
    check(&told(&setup), 1280, &[64.0, 64.0, 0.0, 0.0, 6.0]);
    setup.is_negative = true;
    check(&told(&setup), 1280, &[64.0, 64.0, 0.0, 0.0, 2.5]);
    setup.cond.extra.insert("aesthetic_score", 4.25);
    check(&told(&setup), 1280, &[64.0, 64.0, 0.0, 0.0, 4.25]);
}

#[test]
fn a_prompt_of_another_family_is_a_clear_error() {
    let config = config(4, Some(2816));
    let mut setup = Setup::new(1, 8, 8);
    for pooled in [None, Some(Arc::new(HostTensor::zeros(&[1, 768])))] {
        setup.cond.pooled = pooled;
        let error = vector(&config, Family::Sdxl, &setup.whole()).unwrap_err().to_string();
        assert!(error.contains("must be 1280") && error.contains("model's family"), "{error}");
    }
    assert_eq!(vector(&self::config(4, None), Family::Sd1, &setup.whole()).unwrap(), None);
}

#[test]
fn the_number_of_channels_tells_what_lies_beside_the_latents() {
    let of = |channels| Beside::of(&config(channels, None));
    assert_eq!((of(4), of(8), of(9)), (Beside::Nothing, Beside::Picture, Beside::MaskAndPicture));
}

#[test]
fn an_inpainting_model_without_a_picture_sees_grey_under_a_full_mask() {
    let setup = Setup::new(2, 3, 3);
    let seen = Beside::MaskAndPicture.channels(&setup.whole(), LatentFormat::Scaled(0.5)).unwrap().unwrap();
    assert_eq!(seen.shape(), [2, 5, 3, 3]);
    let first_of = |channel: usize| seen.row(1)[channel * 9];
    assert_eq!([0, 1, 2, 3, 4].map(first_of), [1.0, 0.8223, -0.6876, 0.6364, 0.1380]);
}

#[test]
fn an_inpainting_model_sees_the_conditioning_s_mask_rounded_and_picture_scaled() {
    let mut setup = Setup::new(2, 2, 2);
    let mask = HostTensor::new(&[1, 1, 2, 2], vec![0.2, 0.6, 1.0, 0.0]).unwrap();
    setup.cond.extra.insert(CONCAT_MASK, Arc::new(mask));
    setup.cond.extra.insert(CONCAT_LATENT, Arc::new(HostTensor::full(&[1, 4, 2, 2], 3.0)));
    let seen = Beside::MaskAndPicture.channels(&setup.whole(), LatentFormat::Scaled(0.5)).unwrap().unwrap();
    for sample in 0..2 {
        assert_eq!(seen.row(sample)[..4], [0.0, 1.0, 1.0, 0.0]);
        assert!(seen.row(sample)[4..].iter().all(|v| *v == 1.5));
    }
}

/// Without anything of its own in the conditioning, the run's mask and starting latent count; the latter is in
/// the model's scale already.
#[test]
fn an_inpainting_model_falls_back_to_the_run_s_mask_and_latent() {
    let mut setup = Setup::new(1, 2, 2);
    let planes = (0..16).map(|i| if i < 4 { i as f32 / 3.0 } else { 9.0 }).collect();
    setup.run.mask = HostTensor::new(&[1, 4, 2, 2], planes).map(Arc::new);
    setup.run.latent = Some(Arc::new(HostTensor::full(&[1, 4, 2, 2], 3.0)));
    let seen = Beside::MaskAndPicture.channels(&setup.whole(), LatentFormat::Scaled(0.5)).unwrap().unwrap();
    assert_eq!(seen.row(0)[..4], [0.0, 0.0, 1.0, 1.0]);
    assert!(seen.row(0)[4..].iter().all(|v| *v == 3.0));
}

#[test]
fn an_edit_model_sees_the_picture_unscaled_or_zeros() {
    let mut setup = Setup::new(1, 2, 2);
    let none = Beside::Picture.channels(&setup.whole(), LatentFormat::Scaled(0.5)).unwrap().unwrap();
    assert_eq!((none.shape(), none.is_zero()), (&[1, 4, 2, 2][..], true));
    setup.cond.extra.insert(CONCAT_LATENT, Arc::new(HostTensor::full(&[1, 4, 4, 4], 3.0)));
    let seen = Beside::Picture.channels(&setup.whole(), LatentFormat::Scaled(0.5)).unwrap().unwrap();
    assert!(seen.shape() == [1, 4, 2, 2] && seen.data().iter().all(|v| *v == 3.0));
}

/// A conditioning with an area sees that part of the picture.
#[test]
fn a_part_of_the_latents_sees_that_part_of_the_picture() {
    let mut setup = Setup::new(1, 2, 1);
    let planes = HostTensor::from_fn(&[1, 4, 3, 4], |i| i as f32);
    setup.cond.extra.insert(CONCAT_LATENT, Arc::new(planes));
    let seen =
        Beside::Picture.channels(&setup.item((3, 4), (1, 2)), LatentFormat::Scaled(1.0)).unwrap().unwrap();
    assert_eq!(seen.data(), [6.0, 10.0, 18.0, 22.0, 30.0, 34.0, 42.0, 46.0]);
}

/// The reference spreads the samples there are evenly over those that are needed.
#[test]
fn samples_are_spread_over_a_batch() {
    let x = |count: usize| HostTensor::from_fn(&[count, 1, 1, 1], |i| i as f32);
    assert_eq!(batch_of(&x(2), 4).data(), [0.0, 0.0, 1.0, 1.0]);
    assert_eq!(batch_of(&x(3), 4).data(), [0.0, 1.0, 1.0, 2.0]);
    assert_eq!(batch_of(&x(5), 3).data(), [0.0, 2.0, 4.0]);
    assert_eq!(batch_of(&x(5), 1).data(), [0.0]);
}

#[test]
fn a_picture_with_other_channels_is_a_clear_error() {
    let mut setup = Setup::new(1, 2, 2);
    setup.cond.extra.insert(CONCAT_LATENT, Arc::new(HostTensor::full(&[1, 16, 2, 2], 3.0)));
    let error = Beside::Picture.channels(&setup.whole(), LatentFormat::Scaled(1.0)).unwrap_err().to_string();
    assert!(error.contains("picture beside the latents must be 4, found 16"), "{error}");
}
