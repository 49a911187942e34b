//! Samplers on a device: the arithmetic of every one of them beside the same in host memory.
//!
//! A closed form stands in for the network, so that nothing but the arithmetic is compared. Its output is worked out on
//! the host from the latent on the device, and goes back there as a network's output would.

use std::any::Any;
use std::sync::Arc;

use kiln::backend::cuda::{CudaBackend, Element, Gpu, Shared};
use kiln::diffusion::conditioning::{Area, Rect};
use kiln::diffusion::guidance_patch::BuiltinPatch;
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
        let hosts = items.iter().map(|item| item.x.to_host()).collect::<Result<Vec<_>, _>>()?;
        let with_x = || items.iter().zip(&hosts);
        let outputs: Vec<HostTensor> = with_x().map(|(item, x)| self.output(item, x, sigma)).collect();
        let Some(on_device) = x.on_device() else {
            let outputs = outputs.iter().zip(&hosts);
            let denoised = outputs.map(|(out, x)| self.sampling.calculate_denoised(sigma, out, x));
            return Ok(denoised.map(Field::from).collect());
        };
        let host = &hosts[0];
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
    /// In place of classifier-free guidance.
    guidance: Option<Guidance>,
    patches: Vec<BuiltinPatch>,
}

impl Case {
    fn of(sampler: &'static str) -> Self {
        let sampling = ModelSampling::discrete(Prediction::Eps, Betas::default());
        let positive = vec![entry(1.0, 1.0)];
        Self { sampler, sampling, cfg: 5.0, has_mask: false, positive, guidance: None, patches: Vec::new() }
    }

    fn run(&self, device: Option<Arc<dyn Backend>>) -> HostTensor {
        let model = ModelHandle(Arc::new(Toy { sampling: self.sampling.clone(), factor: 1.0, device }));
        let with_patch = |model: ModelHandle, patch: &BuiltinPatch| model.with_patch(Arc::new(patch.clone()));
        let model = self.patches.iter().fold(model, with_patch);
        let guidance = self.guidance.clone().unwrap_or_else(|| Guidance::Cfg {
            positive: Arc::new(self.positive.clone()),
            negative: Arc::new(vec![entry(-1.0, 1.0)]),
            scale: self.cfg,
        });
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

fn side(s: f32) -> Arc<Vec<CondEntry>> {
    Arc::new(vec![entry(s, 1.0)])
}

/// Regional prompts: masks of the whole picture and of its box, areas with ramps, several of each, ranges of steps.
#[test]
fn every_region_gives_what_it_gives_in_host_memory() {
    let with = |s: f32, strength: f64, change: &dyn Fn(&mut CondEntry)| {
        let mut entry = entry(s, strength);
        change(&mut entry);
        entry
    };
    let mask = |samples: usize| {
        let inside = |i: usize| (i % 5 > 1 && i / 5 % 6 < 4) as usize as f32 * (0.5 + (i % 3) as f32 / 4.0);
        Some(Arc::new(HostTensor::from_fn(&[samples, 6, 5], inside)))
    };
    let area = |height, width, y, x| Some(Area::Cells(Rect { height, width, y, x }));
    let masked = with(0.4, 0.8, &|c| (c.mask, c.mask_strength) = (mask(1), 0.9));
    let of_each = with(-0.3, 1.0, &|c| c.mask = mask(2));
    let boxed = with(0.2, 1.0, &|c| (c.mask, c.set_area_to_bounds) = (mask(1), true));
    let left = with(0.4, 0.7, &|c| c.area = area(6, 3, 0, 0));
    let right = with(-0.6, 1.5, &|c| c.area = area(6, 3, 0, 2));
    let inner = with(0.9, 1.0, &|c| (c.area, c.end_percent) = (area(4, 4, 1, 1), Some(0.5)));
    let beyond = with(0.9, 1.0, &|c| c.area = area(4, 4, 3, 3));
    let whole = || entry(1.0, 1.0);
    let many: Vec<CondEntry> =
        [&masked, &of_each, &left, &right, &inner, &beyond, &left, &right].map(Clone::clone).into();
    let cases = [
        ("a mask", vec![whole(), masked.clone()]),
        ("a mask alone", vec![masked]),
        ("a mask for every sample", vec![whole(), of_each]),
        ("the box of a mask", vec![whole(), boxed]),
        ("an area", vec![whole(), left.clone()]),
        ("two areas alone", vec![left, right]),
        ("an area of the first steps", vec![whole(), inner]),
        ("an area beyond the edge", vec![whole(), beyond]),
        ("eight", many),
    ];
    let device = device();
    for (name, positive) in cases {
        let distance = Case { positive, ..Case::of("dpmpp_2m") }.distance(&device);
        println!("{name}: {distance:.1e}");
        assert!(distance > 0.0 && distance < TOLERANCE, "{name}: {distance:.1e}");
    }
}

/// Patches of the guidance and other guiders: what they combine on the device beside the same in host memory.
#[test]
fn every_guidance_gives_what_it_gives_in_host_memory() {
    let apg =
        |eta, norm_threshold, momentum| BuiltinPatch::Apg { eta, norm_threshold, momentum, state: None };
    let patches = [
        ("RescaleCFG", BuiltinPatch::RescaleCfg { multiplier: 0.7 }),
        ("APG", apg(0.7, 2.0, -0.4)),
        ("Mahiro", BuiltinPatch::Mahiro),
        ("CFGZeroStar", BuiltinPatch::CfgZeroStar),
        ("CFGNorm", BuiltinPatch::CfgNorm { strength: 0.95 }),
        ("RenormCFG", BuiltinPatch::RenormCfg { truncation: 5.0, limit: 1.0 }),
        ("TCFG", BuiltinPatch::TangentialDamping),
        ("FreSca", BuiltinPatch::FreSca { low: 1.1, high: 1.4, cutoff: 2 }),
        ("APG without momentum", apg(1.0, 5.0, 0.0)),
        ("LatentApplyOperationCFG", BuiltinPatch::LatentOperation(Arc::new(|x| Ok(x.map(f32::tanh))))),
        ("DifferentialDiffusion", BuiltinPatch::DifferentialDiffusion { strength: 0.8 }),
        ("PerpNeg", BuiltinPatch::PerpNeg { empty: side(-0.3), negative_scale: 1.2 }),
        ("Epsilon Scaling", BuiltinPatch::EpsilonScaling { factor: 1.02 }),
    ];
    let of = |(name, patch): &(&str, BuiltinPatch), cfg| {
        let patches = vec![patch.clone()];
        (format!("{name} at {cfg}"), Case { patches, cfg, has_mask: true, ..Case::of("euler") })
    };
    let mut cases: Vec<(String, Case)> = patches.iter().map(|patch| of(patch, 5.0)).collect();
    // Without a negative side.
    cases.extend(patches[..5].iter().map(|patch| of(patch, 1.0)));
    let several = patches[..5].iter().map(|(_, patch)| patch.clone()).collect();
    cases.push(("five patches".into(), Case { patches: several, cfg: 3.0, ..Case::of("euler_cfg_pp") }));
    let dual = |is_nested, scale_negative| Guidance::Dual {
        positive: side(1.0),
        middle: side(0.4),
        negative: side(-1.0),
        scale_positive: 4.0,
        scale_negative,
        is_nested,
    };
    let perp = Guidance::PerpNeg {
        positive: side(1.0),
        negative: side(-1.0),
        empty: side(-0.3),
        scale: 5.0,
        negative_scale: 1.2,
    };
    let guidances = [
        ("dual", dual(false, 2.5)),
        ("dual nested", dual(true, 2.5)),
        ("dual of one", dual(false, 1.0)),
        ("perp-neg", perp),
        ("basic", Guidance::Basic { positive: side(1.0) }),
    ];
    for (name, guidance) in guidances {
        let case = |patches| Case { guidance: Some(guidance.clone()), patches, ..Case::of("dpmpp_2m") };
        cases.push((name.into(), case(Vec::new())));
        cases.push((format!("{name}, scaled noise"), case(vec![patches[12].1.clone()])));
    }
    let device = device();
    for (name, case) in cases {
        let distance = case.distance(&device);
        println!("{name}: {distance:.1e}");
        assert!(distance < TOLERANCE, "{name}: {distance:.1e}");
        assert!(distance > 0.0, "{name}: the device's arithmetic is the host's: it was not used");
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
