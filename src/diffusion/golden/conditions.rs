//! Conditioning options, guiders, guidance patches, model sampling, inpainting.

use std::sync::Arc;

use serde_json::Value as Json;

use super::{Group, Toy, distance, entry, report};
use crate::diffusion::conditioning::{Area, Rect, average, concat, zero_out};
use crate::diffusion::guidance_patch::BuiltinPatch;
use crate::diffusion::noise::prepare_noise;
use crate::diffusion::sample::{SampleRequest, sample};
use crate::diffusion::samplers::Sampler;
use crate::diffusion::schedule::{Betas, ModelSampling, Prediction, ksampler_sigmas};
use crate::diffusion::{CondEntry, Conditioning, Guidance, Guider, ModelHandle};
use crate::tensor::HostTensor;

/// What a case changes relative to "positive 1, negative −1".
struct Setup {
    model: ModelHandle,
    positive: Conditioning,
    negative: Conditioning,
    mask: Option<HostTensor>,
    guidance: Option<Guidance>,
}

fn with(s: f32, change: impl FnOnce(&mut CondEntry)) -> CondEntry {
    let mut out = entry(s);
    change(&mut out);
    out
}

/// An area given in pixels: width, height, x, y.
fn area(numbers: &[f64]) -> Area {
    let cells = |i: usize| numbers[i] as usize / 8;
    Area::Cells(Rect { width: cells(0), height: cells(1), x: cells(2), y: cells(3) })
}

/// The numbers in a case name after `prefix`, separated by underscores.
fn numbers(case: &str, prefix: &str) -> Vec<f64> {
    case[prefix.len()..].split('_').map(|n| n.parse().unwrap()).collect()
}

/// The conditioning that differs, and whether it stands alone on the positive side.
fn changed(case: &str, desc: &str, group: &Group) -> Option<(CondEntry, bool)> {
    let alone = case.contains("_only");
    let plain = case.replacen("_only", "", 1);
    if plain == "area_pct" {
        let area = Area::Fraction { width: 0.6, height: 0.5, x: 0.3, y: 0.2 };
        return Some((with(0.4, |c| (c.area, c.strength) = (Some(area), 0.8)), false));
    }
    if plain == "area_strength" {
        return Some((with(0.4, |c| c.strength = 0.35), false));
    }
    if plain.starts_with("area_") {
        let (_, strength) = desc.split_once("strength ")?;
        let strength = strength.trim_end_matches(')').parse().unwrap();
        let area = area(&numbers(&plain, "area_"));
        return Some((with(0.4, |c| (c.area, c.strength) = (Some(area), strength)), alone));
    }
    if plain.starts_with("mask") {
        let (kind, strength) = match plain.rsplit_once('_') {
            Some((kind, n)) => (kind.to_owned(), n.parse().unwrap()),
            None => (plain.clone(), 1.0),
        };
        let mask = Some(Arc::new(group.tensor("mask40").clone()));
        let entry = with(0.4, |c| {
            (c.mask, c.mask_strength, c.set_area_to_bounds) = (mask, strength, kind == "mask_mask");
        });
        return Some((entry, alone));
    }
    if plain.starts_with("range_") {
        let n = numbers(&plain, "range_");
        let range = (Some(n[0]), Some(n[1]));
        return Some((with(0.4, |c| (c.start_percent, c.end_percent) = range), alone));
    }
    None
}

/// Tone mapping after Reinhard et al., 2002: compresses the magnitude over channels
/// towards five deviations above its mean, times `multiplier`.
fn tonemap(latent: &HostTensor, multiplier: f32) -> HostTensor {
    let (c, plane) = (latent.dim(1), latent.dim(2) * latent.dim(3));
    assert_eq!(latent.dim(0), 1);
    let x = latent.data();
    let magnitude = |i: usize| (0..c).map(|k| x[k * plane + i].powi(2)).sum::<f32>().sqrt() + 1e-10;
    let all: Vec<f32> = (0..plane).map(magnitude).collect();
    let mean = all.iter().sum::<f32>() / plane as f32;
    let variance = all.iter().map(|m| (m - mean).powi(2)).sum::<f32>() / (plane - 1) as f32;
    let top = (variance.sqrt() * 5.0 + mean) * multiplier;
    HostTensor::from_fn(latent.shape(), |i| x[i] / (all[i % plane] / top + 1.0))
}

fn patch(case: &str) -> Option<BuiltinPatch> {
    let apg =
        |eta, norm_threshold, momentum| BuiltinPatch::Apg { eta, norm_threshold, momentum, state: None };
    Some(match case {
        "RescaleCFG" => BuiltinPatch::RescaleCfg { multiplier: 0.7 },
        "Mahiro" => BuiltinPatch::Mahiro,
        "CFGZeroStar" => BuiltinPatch::CfgZeroStar,
        "CFGNorm" => BuiltinPatch::CfgNorm { strength: 1.0 },
        "TCFG" => BuiltinPatch::TangentialDamping,
        "EpsilonScaling" => BuiltinPatch::EpsilonScaling { factor: 1.02 },
        "FreSca" => BuiltinPatch::FreSca { low: 1.1, high: 1.4, cutoff: 3 },
        "APG" => apg(0.7, 2.0, -0.4),
        "APG_nomom" => apg(1.0, 5.0, 0.0),
        "DifferentialDiffusion" => BuiltinPatch::DifferentialDiffusion { strength: 1.0 },
        "LatentApplyOperationCFG" => BuiltinPatch::LatentOperation(Arc::new(|x| Ok(tonemap(x, 1.1)))),
        "PerpNeg" => BuiltinPatch::PerpNeg { empty: Arc::new(vec![entry(-0.3)]), negative_scale: 1.2 },
        _ => return None,
    })
}

fn guidance(case: &str) -> Option<Guidance> {
    let side = |s| Arc::new(vec![entry(s)]);
    Some(match case {
        "guider_basic" => Guidance::Basic { positive: side(1.0) },
        "guider_dual_regular" | "guider_dual_nested" => Guidance::Dual {
            positive: side(1.0),
            middle: side(0.4),
            negative: side(-1.0),
            scale_positive: 4.0,
            scale_negative: 2.5,
            is_nested: case.ends_with("nested"),
        },
        "guider_perpneg" => Guidance::PerpNeg {
            positive: side(1.0),
            negative: side(-1.0),
            empty: side(-0.3),
            scale: 5.0,
            negative_scale: 1.2,
        },
        _ => return None,
    })
}

fn model(case: &str) -> ModelHandle {
    let discrete = |prediction, has_zero_terminal_snr| {
        ModelSampling::discrete(prediction, Betas { has_zero_terminal_snr, ..Betas::default() })
    };
    let kind = case.rsplit_once('_').map_or(case, |(kind, _)| kind);
    Toy::handle(match kind {
        "msd_v" => discrete(Prediction::V, false),
        "msd_vz" => discrete(Prediction::V, true),
        "msd_lcm" => ModelSampling::distilled(Betas::default(), 50),
        "msd_x0" => discrete(Prediction::X0, false),
        "edm" => ModelSampling::continuous_edm(Prediction::Edm, 0.002, 80.0, 0.5),
        "cv" => ModelSampling::continuous_v(Prediction::V, 0.03, 500.0),
        _ => discrete(Prediction::Eps, false),
    })
}

fn setup(case: &str, desc: &str, group: &Group) -> Setup {
    let one = || vec![entry(1.0)];
    let mut setup = Setup {
        model: model(case),
        positive: one(),
        negative: vec![entry(-1.0)],
        mask: None,
        guidance: guidance(case),
    };
    if let Some((entry, alone)) = changed(case, desc, group) {
        setup.positive = if alone { vec![entry] } else { [one(), vec![entry]].concat() };
    }
    if let Some(patch) = patch(case) {
        setup.model = setup.model.with_patch(Arc::new(patch));
    }
    match case {
        "combine" => setup.positive.push(entry(0.4)),
        "average" => setup.positive = average(&one(), &[entry(0.4)], 0.3).unwrap(),
        "concat" => setup.positive = concat(&one(), &[entry(0.4)]).unwrap(),
        "zeroout" => setup.positive = zero_out(&one()),
        "neg_area" => {
            setup.negative = vec![with(-1.0, |c| c.area = Some(area(&[64.0, 64.0, 16.0, 0.0])))];
        }
        "neg_two" => {
            setup.positive.push(entry(0.4));
            setup.negative.push(entry(-0.3));
        }
        "DifferentialDiffusion" => {
            setup.mask = Some(HostTensor::from_fn(&[1, 64, 80], |i| (i % 80) as f32 / 79.0));
        }
        _ if case.starts_with("inpaint_") => setup.mask = Some(group.tensor("mask_full").clone()),
        _ => {}
    }
    setup
}

fn run(name: &str, case: &Json, group: &Group) -> HostTensor {
    let setup = setup(name, case["desc"].as_str().unwrap(), group);
    let latent = group.tensor("latent_in").clone();
    let seed = case["seed"].as_u64().unwrap();
    let noise = prepare_noise(latent.shape(), seed, None);
    let steps = case["steps"].as_u64().unwrap() as usize;
    let denoise = case["denoise"].as_f64().unwrap_or(1.0);
    let sampler = case["sampler"].as_str().unwrap();
    let scheduler = case["scheduler"].as_str().unwrap();
    let sigmas = ksampler_sigmas(setup.model.0.sampling(), sampler, scheduler, steps, denoise).unwrap();
    let guidance = setup.guidance.unwrap_or_else(|| Guidance::Cfg {
        positive: Arc::new(setup.positive),
        negative: Arc::new(setup.negative),
        scale: case["cfg"].as_f64().unwrap(),
    });
    let request = SampleRequest {
        guider: &Guider { model: setup.model, guidance },
        sampler: &Sampler::by_name(sampler).unwrap(),
        sigmas: &sigmas,
        noise: &noise,
        latent: &latent,
        mask: setup.mask.as_ref(),
        seed,
    };
    sample(&request, &mut ()).unwrap().samples
}

#[test]
fn every_conditioning_and_guidance_case() {
    let group = Group::load("cond_cfg_toy");
    let results: Vec<(String, f64, f64)> = group
        .cases
        .iter()
        .map(|(name, case)| (name.clone(), distance(&run(name, case, &group), group.tensor(name)), 1e-4))
        .collect();
    assert_eq!(results.len(), 67);
    report("cond_cfg_toy", &results);
}
