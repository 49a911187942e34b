//! Every entry of `tests/data/golden/schedulers.json`, recorded from ComfyUI
//! 0.3.64.

use std::path::PathBuf;

use serde_json::Value;

use super::*;

fn golden() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/schedulers.json");
    serde_json::from_slice(&std::fs::read(path).expect("schedulers.json")).expect("JSON")
}

/// A recorded number; `"NaN"` stands for itself.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| {
        assert_eq!(value, "NaN");
        f64::NAN
    })
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(number).collect()
}

fn sigmas(value: &Value) -> Vec<f32> {
    numbers(value).into_iter().map(|v| v as f32).collect()
}

fn model(name: &str) -> ModelSampling {
    let zero_snr = Betas { has_zero_terminal_snr: true, ..Betas::default() };
    match name {
        "sd15_eps" => ModelSampling::discrete(Prediction::Eps, Betas::default()),
        "sd_v" => ModelSampling::discrete(Prediction::V, Betas::default()),
        "v_zsnr" => ModelSampling::discrete(Prediction::V, zero_snr),
        other => panic!("no model {other}"),
    }
}

/// The largest relative difference; NaN agrees with NaN alone.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    if got.len() != want.len() {
        return f32::INFINITY;
    }
    let pairs = got.iter().zip(want);
    let difference = pairs.map(|(&g, &w)| match (g.is_nan(), w.is_nan()) {
        (true, true) => 0.0,
        (false, false) if g == w => 0.0,
        (false, false) => (g - w).abs() / w.abs(),
        _ => f32::INFINITY,
    });
    difference.fold(0.0, f32::max)
}

fn tmp(what: String, got: &[f32], want: &[f32]) {
    let a = apart(got, want);
    let n = got.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits() && !a.is_nan()).count();
    if n > 0 || got.len() != want.len() {
        eprintln!("DIFF {n}/{} {a:.2e} {what}", want.len());
        if a > 1e-6 {
            eprintln!("  {got:?}\n  {want:?}");
        }
    }
}

#[test]
fn ksampler() {
    let golden = golden();
    for e in golden["ksampler"].as_array().expect("a list") {
        let m = model(e["model"].as_str().expect("name"));
        let sampler = e["sampler"].as_str().expect("a name").split(' ').next().expect("a word");
        let scheduler = e["scheduler"].as_str().expect("a name");
        let steps = e["steps"].as_u64().expect("steps") as usize;
        let denoise = number(&e["denoise"]);
        let got = ksampler_sigmas(&m, sampler, scheduler, steps, denoise).expect("a scheduler");
        tmp(format!("{} {sampler} {scheduler} {steps} {denoise}", e["model"]), &got, &sigmas(&e["sigmas"]));
    }
}

#[test]
fn nodes() {
    let golden = golden();
    for e in golden["nodes"].as_array().expect("a list") {
        let i = &e["inputs"];
        let n = |k: &str| number(&i[k]);
        let steps = i["steps"].as_u64().unwrap_or(0) as usize;
        let s = || sigmas(&i["sigmas"]);
        let m = || model(i["model"].as_str().expect("name"));
        let name = e["node"].as_str().expect("name");
        let got: Vec<Vec<f32>> = match name {
            "KarrasScheduler" => vec![karras_sigmas(steps, n("sigma_min"), n("sigma_max"), n("rho"))],
            "ExponentialScheduler" => vec![exponential_sigmas(steps, n("sigma_min"), n("sigma_max"))],
            "PolyexponentialScheduler" => {
                vec![polyexponential_sigmas(steps, n("sigma_min"), n("sigma_max"), n("rho"))]
            }
            "LaplaceScheduler" => {
                vec![laplace_sigmas(steps, n("sigma_min"), n("sigma_max"), n("mu"), n("beta"))]
            }
            "VPScheduler" => vec![vp_sigmas(steps, n("beta_d"), n("beta_min"), n("eps_s"))],
            "BetaSamplingScheduler" => vec![beta_sigmas(&m(), steps, n("alpha"), n("beta")).unwrap()],
            "BasicScheduler" => {
                vec![basic_scheduler(&m(), i["scheduler"].as_str().unwrap(), steps, n("denoise")).unwrap()]
            }
            "SDTurboScheduler" => vec![sd_turbo_sigmas(&m(), steps, n("denoise"))],
            "AlignYourStepsScheduler" => vec![align_your_steps_sigmas(
                AlignYourSteps::from_name(i["model_type"].as_str().unwrap()).unwrap(),
                steps,
                n("denoise"),
            )],
            "GITSScheduler" => vec![gits_sigmas(n("coeff"), steps, n("denoise")).unwrap_or_default()],
            "SplitSigmas" => {
                let (a, b) = split_sigmas(&s(), i["step"].as_u64().unwrap() as usize);
                vec![a, b]
            }
            "SplitSigmasDenoise" => {
                let (a, b) = split_sigmas_denoise(&s(), n("denoise"));
                vec![a, b]
            }
            "FlipSigmas" => vec![flip_sigmas(&s())],
            "SetFirstSigma" => vec![set_first_sigma(&s(), n("sigma") as f32)],
            "ExtendIntermediateSigmas" => vec![extend_intermediate_sigmas(
                &s(),
                steps,
                n("start_at_sigma") as f32,
                n("end_at_sigma") as f32,
                Spacing::from_name(i["spacing"].as_str().unwrap()).unwrap(),
            )],
            "SamplingPercentToSigma" => {
                let p = n("sampling_percent");
                let v = if i["return_actual_sigma"].as_bool().unwrap() {
                    m().percent_to_actual_sigma(p)
                } else {
                    m().percent_to_sigma(p)
                };
                tmp(format!("{name} {p}"), &[v as f32], &[number(&e["outputs"][0]) as f32]);
                continue;
            }
            other => panic!("no node {other}"),
        };
        let want: Vec<Vec<f32>> = e["outputs"].as_array().unwrap().iter().map(sigmas).collect();
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(&want) {
            tmp(format!("{name} {}", i), g, w);
        }
    }
}

#[test]
fn tables() {
    let g = golden();
    let g = &g["model_sampling"];
    let m = model("sd15_eps");
    tmp("eps".into(), m.sigmas(), &sigmas(&g["sigmas_eps"]));
    tmp("zsnr".into(), model("v_zsnr").sigmas(), &sigmas(&g["sigmas_zsnr"]));
    for e in g["percent_to_sigma"].as_array().unwrap() {
        let e = numbers(e);
        tmp(format!("percent {}", e[0]), &[m.percent_to_sigma(e[0]) as f32], &[e[1] as f32]);
    }
    for e in g["timestep"].as_array().unwrap() {
        let e = numbers(e);
        tmp(format!("timestep {}", e[0]), &[m.timestep(e[0] as f32)], &[e[1] as f32]);
    }
    for e in g["sigma"].as_array().unwrap() {
        let e = numbers(e);
        tmp(format!("sigma {}", e[0]), &[m.sigma(e[0] as f32)], &[e[1] as f32]);
    }
}
