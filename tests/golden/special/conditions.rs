//! Conditioning options, guiders, guidance patches, model sampling and
//! inpainting with the closed-form denoiser.
//!
//! What a case does stands in its `desc`: nodes with their values, such as
//! `ConditioningCombine(1, ConditioningSetArea(0.4; w,h,x,y=(64, 64, 0, 0) strength 1))`
//! or `RescaleCFG({'multiplier': 0.7}) on the model`; a number is a conditioning
//! of that value. See [`description`](super::description) for how it is read.

use std::sync::Arc;

use kiln::diffusion::DiffusionError;
use kiln::diffusion::conditioning::{Area, Rect, average, concat, zero_out};
use kiln::diffusion::guidance_patch::BuiltinPatch;
use kiln::diffusion::noise::prepare_noise;
use kiln::diffusion::sample::{SampleRequest, sample};
use kiln::diffusion::samplers::Sampler;
use kiln::diffusion::schedule::{Betas, ModelSampling, Prediction, ksampler_sigmas};
use kiln::diffusion::{CondEntry, Conditioning, Guidance, Guider};
use kiln::nodes::latent_math::LatentOperation;
use kiln::tensor::HostTensor;
use serde_json::Value as Json;

use super::description::{Call, Description, Term};
use super::toy::{self, entry, number, tensor, text, whole};
use crate::Group;
use crate::compare::{self, Measure};
use crate::report::Outcome;

/// A float64 denoiser moves the reference by 3e-6 (median) to 1.5e-5.
const TOLERANCE: Measure = Measure::RelativeToStd(1e-4);

/// What a case changes relative to "positive 1, negative -1".
struct Setup {
    sampling: ModelSampling,
    patch: Option<BuiltinPatch>,
    guidance: Guidance,
    mask: Option<HostTensor>,
}

pub fn compare(group: &Group, name: &str, case: &Json) -> Result<Outcome, Outcome> {
    let latent = tensor(group, "latent_in")?;
    let Setup { sampling, patch, guidance, mask } = setup(group, case, &latent)?;
    let seed = whole(case, "seed")?;
    let (sampler, steps) = (text(case, "sampler")?, whole(case, "steps")? as usize);
    let denoise = case["denoise"].as_f64().unwrap_or(1.0);
    let sigmas = ksampler_sigmas(&sampling, sampler, text(case, "scheduler")?, steps, denoise);
    let sigmas = sigmas.map_err(failed)?;
    let mut model = toy::model(sampling);
    if let Some(patch) = patch {
        model = model.with_patch(Arc::new(patch));
    }
    let request = SampleRequest {
        guider: &Guider { model, guidance },
        sampler: &Sampler::by_name(sampler).ok_or_else(|| failed(format!("no sampler {sampler}")))?,
        sigmas: &sigmas,
        noise: &prepare_noise(latent.shape(), seed, None),
        latent: &latent,
        mask: mask.as_ref(),
        seed,
    };
    let samples = sample(&request, &mut ()).map_err(failed)?.samples;
    let mut outcome = compare::tensors(&samples, &tensor(group, name)?, TOLERANCE);
    if let Some(recorded) = case["sigmas"].as_array() {
        let recorded: Vec<f32> = recorded.iter().filter_map(Json::as_f64).map(|v| v as f32).collect();
        outcome = outcome.and(compare::values(&sigmas, &recorded, Measure::RelativeEach(1e-5)));
    }
    Ok(outcome)
}

fn failed(why: impl ToString) -> Outcome {
    Outcome::Fail(why.to_string())
}

fn setup(group: &Group, case: &Json, latent: &HostTensor) -> Result<Setup, Outcome> {
    let desc = Description::new(text(case, "desc")?);
    let side = |words: &[&str], default: f32| -> Result<Conditioning, Outcome> {
        match words.iter().find_map(|word| desc.term_after(word)) {
            Some(term) => conditioning(&term, group),
            None => Ok(vec![entry(default)]),
        }
    };
    let positive = match desc.leading_call().filter(|call| is_conditioning(&call.name)) {
        Some(call) => conditioning(&Term::Call(call), group)?,
        None => side(&["positive", "cond1"], 1.0)?,
    };
    let sides = Sides {
        positive: Arc::new(positive),
        middle: Arc::new(side(&["cond2"], 1.0)?),
        negative: Arc::new(side(&["negative"], -1.0)?),
        empty: Arc::new(side(&["empty", "empty_conditioning"], 0.0)?),
    };
    let mut setup = Setup {
        sampling: toy::sampling("eps")?,
        patch: None,
        guidance: guidance(&desc, &sides, number(case, "cfg")?)?,
        mask: None,
    };
    if let Some((name, settings)) = desc.node_with_settings().map_err(failed)? {
        match sampling(&name, &settings) {
            Some(sampling) => setup.sampling = sampling,
            None => setup.patch = Some(patch(&name, &settings, &desc, sides.empty)?),
        }
    }
    setup.mask = match desc.word_after("noise_mask") {
        Some(word) if word.starts_with("linspace") => {
            let (h, w) = (latent.dim(2) * 8, latent.dim(3) * 8);
            Some(HostTensor::from_fn(&[1, h, w], |i| (i % w) as f32 / (w - 1) as f32))
        }
        Some(name) => Some(tensor(group, name)?),
        None => None,
    };
    Ok(setup)
}

/// The conditionings of a case.
struct Sides {
    positive: Arc<Conditioning>,
    middle: Arc<Conditioning>,
    negative: Arc<Conditioning>,
    empty: Arc<Conditioning>,
}

/// Names of conditioning nodes, with or without the prefix.
fn is_conditioning(name: &str) -> bool {
    let short = name.trim_start_matches("Conditioning");
    name.starts_with("Conditioning") || short.starts_with("Set") || short == "Combine"
}

/// The conditioning that a term stands for.
fn conditioning(term: &Term, group: &Group) -> Result<Conditioning, Outcome> {
    let call = match term {
        Term::Number(s) => return Ok(vec![entry(*s as f32)]),
        Term::Name(name) if name == "positive" => return Ok(vec![entry(1.0)]),
        Term::Name(name) => return Err(failed(format!("no conditioning called {name}"))),
        Term::Call(call) => call,
    };
    let of = |i: usize| match call.terms.get(i) {
        Some(term) => conditioning(term, group),
        None => Err(failed(format!("{} needs more arguments", call.name))),
    };
    let first = of(0)?;
    Ok(match call.name.trim_start_matches("Conditioning") {
        "Combine" => [first, of(1)?].concat(),
        "Concat" => concat(&first, &of(1)?).map_err(failed)?,
        "Average" => {
            average(&first, &of(1)?, call.value_after("strength").unwrap_or(1.0) as f32).map_err(failed)?
        }
        "ZeroOut" => zero_out(&first),
        name => {
            let change = change(name, call, group)?;
            first
                .into_iter()
                .map(|mut entry| {
                    change(&mut entry);
                    entry
                })
                .collect()
        }
    })
}

type Change = Box<dyn Fn(&mut CondEntry)>;

/// What a `ConditioningSet…` node does to an entry.
fn change(name: &str, call: &Call, group: &Group) -> Result<Change, Outcome> {
    let n = &call.numbers;
    let need = |count: usize| {
        if n.len() < count { Err(failed(format!("{name} needs {count} values"))) } else { Ok(()) }
    };
    let strength = call.value_after("strength").unwrap_or(1.0);
    Ok(match name {
        "SetArea" => {
            need(4)?;
            let cells = |i: usize| n[i] as usize / 8;
            let rect = Rect { width: cells(0), height: cells(1), x: cells(2), y: cells(3) };
            Box::new(move |c| (c.area, c.strength) = (Some(Area::Cells(rect)), strength))
        }
        "SetAreaPercentage" => {
            need(4)?;
            let area = Area::Fraction { width: n[0], height: n[1], x: n[2], y: n[3] };
            Box::new(move |c| (c.area, c.strength) = (Some(area), strength))
        }
        "SetAreaStrength" => {
            need(1)?;
            let strength = n[0];
            Box::new(move |c| c.strength = strength)
        }
        "SetMask" => {
            let mask = Arc::new(tensor(group, call.first_word().unwrap_or_default())?);
            let is_bounded = call.says("mask bounds");
            Box::new(move |c| {
                (c.mask, c.mask_strength, c.set_area_to_bounds) = (Some(mask.clone()), strength, is_bounded);
            })
        }
        "SetTimestepRange" => {
            need(2)?;
            let range = (Some(n[0]), Some(n[1]));
            Box::new(move |c| (c.start_percent, c.end_percent) = range)
        }
        _ => return Err(Outcome::Later(vec![format!("Conditioning{name}")])),
    })
}

/// The noise levels that a `ModelSampling…` node sets.
fn sampling(name: &str, settings: &Json) -> Option<ModelSampling> {
    let kind = settings["sampling"].as_str().unwrap_or_default();
    let of = |key: &str| settings[key].as_f64();
    let prediction = match kind {
        "eps" => Prediction::Eps,
        "v_prediction" => Prediction::V,
        "x0" => Prediction::X0,
        _ => Prediction::Edm,
    };
    match name {
        "ModelSamplingDiscrete" if kind == "lcm" => Some(ModelSampling::distilled(Betas::default(), 50)),
        "ModelSamplingDiscrete" => {
            let has_zero_terminal_snr = settings["zsnr"].as_bool()?;
            Some(ModelSampling::discrete(prediction, Betas { has_zero_terminal_snr, ..Betas::default() }))
        }
        "ModelSamplingContinuousEDM" => {
            let data = if prediction == Prediction::Edm { 0.5 } else { 1.0 };
            Some(ModelSampling::continuous_edm(prediction, of("sigma_min")?, of("sigma_max")?, data))
        }
        "ModelSamplingContinuousV" => {
            Some(ModelSampling::continuous_v(prediction, of("sigma_min")?, of("sigma_max")?))
        }
        _ => None,
    }
}

/// The guidance patch that a node attaches to the model.
fn patch(
    name: &str,
    settings: &Json,
    desc: &Description<'_>,
    empty: Arc<Conditioning>,
) -> Result<BuiltinPatch, Outcome> {
    let of = |key: &str| number(settings, key);
    Ok(match name {
        "RescaleCFG" => BuiltinPatch::RescaleCfg { multiplier: of("multiplier")? as f32 },
        "Mahiro" => BuiltinPatch::Mahiro,
        "CFGZeroStar" => BuiltinPatch::CfgZeroStar,
        "CFGNorm" => BuiltinPatch::CfgNorm { strength: of("strength")? as f32 },
        "TCFG" => BuiltinPatch::TangentialDamping,
        "Epsilon Scaling" => BuiltinPatch::EpsilonScaling { factor: of("scaling_factor")? as f32 },
        "FreSca" => BuiltinPatch::FreSca {
            low: of("scale_low")? as f32,
            high: of("scale_high")? as f32,
            cutoff: whole(settings, "freq_cutoff")? as usize,
        },
        "APG" => BuiltinPatch::Apg {
            eta: of("eta")? as f32,
            norm_threshold: of("norm_threshold")? as f32,
            momentum: of("momentum")? as f32,
            state: None,
        },
        "DifferentialDiffusion" => BuiltinPatch::DifferentialDiffusion {
            strength: settings["strength"].as_f64().unwrap_or(1.0) as f32,
        },
        "LatentApplyOperationCFG" => match desc.term_after("operation") {
            Some(Term::Call(call)) if call.name == "LatentOperationTonemapReinhard" => {
                let multiplier = call.terms.first().and_then(Term::number).unwrap_or(1.0);
                let operation = LatentOperation::TonemapReinhard { multiplier: multiplier as f32 };
                BuiltinPatch::LatentOperation(Arc::new(move |x| {
                    operation.apply(x).map_err(DiffusionError::model)
                }))
            }
            other => return Err(Outcome::Later(vec![format!("{name} with {other:?}")])),
        },
        "PerpNeg" => BuiltinPatch::PerpNeg { empty, negative_scale: of("neg_scale")? },
        _ => return Err(Outcome::Later(vec![name.to_owned()])),
    })
}

/// Plain guidance, or the guider that a description names.
fn guidance(desc: &Description<'_>, sides: &Sides, cfg: f64) -> Result<Guidance, Outcome> {
    let Sides { positive, middle, negative, empty } = sides;
    let (positive, negative) = (positive.clone(), negative.clone());
    let value = |word: &str| {
        let number = desc.term_after(word).as_ref().and_then(Term::number);
        number.ok_or_else(|| failed(format!("no {word} in the description")))
    };
    if desc.says("BasicGuider") {
        return Ok(Guidance::Basic { positive });
    }
    if desc.says("DualCFGGuider") {
        return Ok(Guidance::Dual {
            positive,
            middle: middle.clone(),
            negative,
            scale_positive: value("cfg_conds")?,
            scale_negative: value("cfg_cond2_negative")?,
            is_nested: desc.word_after("style") == Some("nested"),
        });
    }
    if desc.says("PerpNegGuider") {
        let (scale, negative_scale) = (value("cfg")?, value("neg_scale")?);
        return Ok(Guidance::PerpNeg { positive, negative, empty: empty.clone(), scale, negative_scale });
    }
    Ok(Guidance::Cfg { positive, negative, scale: cfg })
}
