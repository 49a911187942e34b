//! Samplers on a device: the arithmetic of every one of them beside the same in host memory.
//!
//! A closed form stands in for the network, so that nothing but the arithmetic is compared. Its output is worked out on
//! the host from the latent on the device, and goes back there as a network's output would.

use std::any::Any;
use std::sync::Arc;

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::diffusion::noise::{GpuBrownianNoise, prepare_noise};
use kiln::diffusion::sample::{SampleRequest, sample};
use kiln::diffusion::samplers::{SAMPLERS, Sampler};
use kiln::diffusion::schedule::{Betas, ModelSampling, Prediction, ksampler_sigmas};
use kiln::diffusion::{
    CondEntry, DenoiseItem, DiffusionError, Field, Guidance, Guider, LatentFormat, Model, ModelHandle,
};
use kiln::tensor::{Backend, HostLayout, HostTensor, Shape};

use crate::pipeline::simt;

/// `output = e(input, s)` with `s` the mean of the conditioning.
struct Toy {
    sampling: ModelSampling,
    /// Factor on the output.
    factor: f32,
    device: Option<Arc<dyn Backend>>,
}

impl Toy {
    fn output(&self, item: &DenoiseItem<'_>, x: &HostTensor, sigma: f32) -> HostTensor {
        let cond = item.cond.cond.data();
        let s = cond.iter().sum::<f32>() / cond.len() as f32;
        let input = self.sampling.calculate_input(sigma, x);
        input.map(|x| self.factor * (0.8 * x + 0.2 * (2.0 * x + 0.5 * s).tanh() + 0.05 * s))
    }
}

impl Model for Toy {
    fn denoise(&self, items: &[DenoiseItem<'_>], sigma: f32) -> Result<Vec<Field>, DiffusionError> {
        let x = items[0].x;
        let host = x.to_host()?;
        let outputs: Vec<HostTensor> = items.iter().map(|item| self.output(item, &host, sigma)).collect();
        let Some(on_device) = x.on_device() else {
            let denoised = outputs.iter().map(|out| self.sampling.calculate_denoised(sigma, out, &host));
            return Ok(denoised.map(Field::from).collect());
        };
        let device = self.device.as_ref().unwrap();
        let (n, c, h, w) = (items.len() * host.dim(0), host.dim(1), host.dim(2), host.dim(3));
        let mut output = device.alloc_result(Shape::nhwc(n, h, w, c)).unwrap();
        let data: Vec<f32> = outputs.iter().flat_map(|out| out.data().iter().copied()).collect();
        device.upload(&data, HostLayout::Nchw, &mut output).unwrap();
        Field::predictions(on_device, output, self.sampling.prediction_factors(sigma))
    }

    fn device(&self) -> Option<Arc<dyn Backend>> {
        self.device.clone()
    }

    fn sampling(&self) -> &ModelSampling {
        &self.sampling
    }

    fn latent_format(&self) -> LatentFormat {
        LatentFormat::Scaled(0.18215)
    }

    fn network(&self) -> &dyn Any {
        self
    }
}

fn entry(s: f32, strength: f64) -> CondEntry {
    CondEntry { strength, ..CondEntry::new(Arc::new(HostTensor::full(&[1, 1, 1], s))) }
}

/// What is sampled.
struct Case {
    sampler: &'static str,
    sampling: ModelSampling,
    cfg: f64,
    has_mask: bool,
    positive: Vec<CondEntry>,
}

impl Case {
    fn of(sampler: &'static str) -> Self {
        let sampling = ModelSampling::discrete(Prediction::Eps, Betas::default());
        Self { sampler, sampling, cfg: 5.0, has_mask: false, positive: vec![entry(1.0, 1.0)] }
    }

    fn run(&self, device: Option<Arc<dyn Backend>>) -> HostTensor {
        let model = ModelHandle(Arc::new(Toy { sampling: self.sampling.clone(), factor: 1.0, device }));
        let guidance = Guidance::Cfg {
            positive: Arc::new(self.positive.clone()),
            negative: Arc::new(vec![entry(-1.0, 1.0)]),
            scale: self.cfg,
        };
        let shape = [2, 4, 6, 5];
        let latent = HostTensor::from_fn(&shape, |i| ((i * 37) % 101) as f32 / 50.0 - 1.0);
        let mask = HostTensor::from_fn(&[1, 6, 5], |i| [0.0, 0.25, 1.0, 1.0][i % 4]);
        let sigmas = ksampler_sigmas(&self.sampling, self.sampler, "normal", 7, 0.9).unwrap();
        let request = SampleRequest {
            guider: &Guider { model, guidance },
            sampler: &Sampler::by_name(self.sampler).unwrap(),
            sigmas: &sigmas,
            noise: &prepare_noise(&shape, 3, None),
            latent: &latent,
            mask: self.has_mask.then_some(&mask),
            seed: 3,
        };
        sample(&request, &mut ()).unwrap().samples
    }

    /// `max|device − host| / std(host)`.
    fn distance(&self, device: &Arc<dyn Backend>) -> f64 {
        let (ours, host) = (self.run(Some(device.clone())), self.run(None));
        assert_eq!(ours.shape(), host.shape());
        let values = || host.data().iter().map(|v| f64::from(*v));
        let mean = values().sum::<f64>() / host.len() as f64;
        let std = (values().map(|v| (v - mean).powi(2)).sum::<f64>() / host.len() as f64).sqrt();
        let apart = ours.data().iter().zip(values()).map(|(a, b)| (f64::from(*a) - b).abs());
        apart.fold(0.0, |worst: f64, d| if d.is_nan() { f64::INFINITY } else { worst.max(d) }) / std
    }
}

/// Both round in f32 at other places. Seven steps of that are 2e-6 of the deviation at the median; the bar is that of
/// the recorded samplers, and a term left out or a wrong factor is beyond it at once.
const TOLERANCE: f64 = 1e-4;

fn device() -> Arc<dyn Backend> {
    simt().1.diffusion
}

#[test]
fn every_sampler_gives_what_it_gives_in_host_memory() {
    let device = device();
    let mut worst: f64 = 0.0;
    for sampler in SAMPLERS.iter().filter(|name| !name.ends_with("_gpu")) {
        for has_mask in [false, true] {
            let distance = Case { has_mask, ..Case::of(sampler) }.distance(&device);
            println!("{sampler}{}: {distance:.1e}", if has_mask { ", mask" } else { "" });
            assert!(distance < TOLERANCE, "{sampler}, mask {has_mask}: {distance:.1e}");
            worst = worst.max(distance);
        }
    }
    assert!(worst > 0.0, "the device's arithmetic is the host's: it was not used");
}

#[test]
fn every_kind_of_prediction_and_guidance() {
    let device = device();
    let zero_snr = Betas { has_zero_terminal_snr: true, ..Betas::default() };
    let samplings = [
        ("v", ModelSampling::discrete(Prediction::V, Betas::default())),
        ("v, zero SNR", ModelSampling::discrete(Prediction::V, zero_snr)),
        ("x0", ModelSampling::discrete(Prediction::X0, Betas::default())),
        ("lcm", ModelSampling::distilled(Betas::default(), 50)),
        ("edm", ModelSampling::continuous_edm(Prediction::Edm, 0.002, 80.0, 0.5)),
        ("flow", ModelSampling::flow(3.0, 1000.0)),
        ("flow ratio", ModelSampling::continuous_flow(0.002, 80.0)),
    ];
    for (name, sampling) in samplings {
        for (sampler, has_mask) in [("euler", true), ("dpmpp_2m", false), ("euler_ancestral", true)] {
            let case = Case { sampling: sampling.clone(), has_mask, ..Case::of(sampler) };
            let distance = case.distance(&device);
            println!("{name}, {sampler}: {distance:.1e}");
            assert!(distance < TOLERANCE, "{name}, {sampler}: {distance:.1e}");
        }
    }
    let several = vec![entry(1.0, 1.0), entry(0.3, 0.5), entry(-0.5, 2.0)];
    let guidances =
        [("no guidance", 1.0, vec![entry(1.0, 1.0)]), ("three prompts", 4.0, several), ("none", 3.0, vec![])];
    for (name, cfg, positive) in guidances {
        for sampler in ["euler", "euler_cfg_pp", "dpmpp_2m_cfg_pp"] {
            let case = Case { cfg, positive: positive.clone(), ..Case::of(sampler) };
            let distance = case.distance(&device);
            println!("{name}, {sampler}: {distance:.1e}");
            assert!(distance < TOLERANCE, "{name}, {sampler}: {distance:.1e}");
        }
    }
}

/// The `_gpu` samplers take other noise on a GPU, the same in every run; in host memory they are the others.
#[test]
fn gpu_samplers_draw_from_the_gpu() {
    let device = device();
    for name in SAMPLERS.iter().filter(|name| name.ends_with("_gpu")) {
        let (gpu, plain) = (Case::of(name), Case::of(name.strip_suffix("_gpu").unwrap()));
        assert_eq!(gpu.run(None), plain.run(None), "{name}");
        let ours = gpu.run(Some(device.clone()));
        assert_eq!(ours, gpu.run(Some(device.clone())), "{name} repeats");
        assert!(gpu.distance(&device) > 0.1, "{name} takes the CPU's noise");
        assert!(ours.data().iter().all(|v| v.is_finite()));
    }
}

/// With `--gpu-noise` ancestral noise is one stream of the device's generator: a model that predicts nothing leaves the
/// last step's noise.
#[test]
fn ancestral_noise_from_the_gpu() {
    let gpu = Gpu::new(simt().0).unwrap();
    let shared = Shared::new(Arc::new(gpu), None);
    shared.set_draws_noise(true);
    let device: Arc<dyn Backend> = Arc::new(CudaBackend::new(shared, Element::F16));
    let sampling = ModelSampling::discrete(Prediction::X0, Betas::default());
    let model = ModelHandle(Arc::new(Toy { sampling, factor: 0.0, device: Some(device.clone()) }));
    let shape = [1, 4, 6, 5];
    let latent = HostTensor::zeros(&shape);
    let request = SampleRequest {
        guider: &Guider { model, guidance: Guidance::Basic { positive: Arc::new(vec![entry(1.0, 1.0)]) } },
        sampler: &Sampler::by_name("lcm").unwrap(),
        sigmas: &[10.0, 5.0, 2.0],
        noise: &prepare_noise(&shape, 3, None),
        latent: &latent,
        mask: None,
        seed: 3,
    };
    let ours = sample(&request, &mut ()).unwrap().samples;
    let like = Field::on(Some(&device), latent.clone()).unwrap();
    let (_, offset) = like.gpu_noise(3, 0).unwrap().unwrap();
    let (second, _) = like.gpu_noise(3, offset).unwrap().unwrap();
    // Sigma 2, and the latent's scale on the way out.
    let expected = second.into_host().unwrap().map(|v| v * 2.0 / 0.18215);
    let apart = ours.data().iter().zip(expected.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-4, "{apart}");
}

/// A path on the device: its root is the generator's normals of the root's seed, finer steps add up to coarser ones,
/// and noise has unit variance.
#[test]
fn a_gpu_s_brownian_path() {
    let like = Field::on(Some(&device()), HostTensor::zeros(&[1, 4, 16, 16])).unwrap();
    let path = || GpuBrownianNoise::new(&like, 0.03, 14.6, 7).unwrap();
    let sample = |path: &mut GpuBrownianNoise, from: f32, to: f32| {
        path.sample(from, to).unwrap().into_host().unwrap().into_data()
    };
    let whole = sample(&mut path(), 14.6, 0.03);
    let seed = kiln::diffusion::noise::SeedSequence::new(7, &[], 24).generate(1)[0];
    let (root, _) = like.gpu_noise(u64::from(seed), 0).unwrap().unwrap();
    // Down the axis: the increment's sign is turned.
    let root = root.into_host().unwrap();
    let apart = whole.iter().zip(root.data()).map(|(a, b)| (a + b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-6, "{apart}");
    let along = |sigmas: &[f32]| {
        let (mut path, mut sum) = (path(), vec![0.0f32; 1024]);
        for pair in sigmas.windows(2) {
            let step = sample(&mut path, pair[0], pair[1]);
            let variance = step.iter().map(|v| v * v).sum::<f32>() / 1024.0;
            // Four standard deviations of the mean of 1024 squares.
            assert!((variance - 1.0).abs() < 4.0 * (2.0f32 / 1024.0).sqrt(), "{variance}");
            sum.iter_mut().zip(step).for_each(|(s, v)| *s += v * (pair[0] - pair[1]).sqrt());
        }
        sum
    };
    let (coarse, fine) = (along(&[14.6, 0.5]), along(&[14.6, 9.0, 3.3, 1.234_567, 0.5]));
    let apart = coarse.iter().zip(&fine).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 2e-5, "{apart}");
}
