//! Every entry of `tests/data/golden/schedulers.json`, recorded from ComfyUI
//! 0.3.64, and what follows from the definitions.
//!
//! The recorded bar is 1e-5 relative. Here it is [`LAST_BITS`]: the arithmetic
//! is done in the same precision and order, so only the last bit of exp, tan
//! and pow of two mathematics libraries may differ. Schedulers that pick table
//! entries must agree exactly.

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

use super::*;
use crate::diffusion::noise::prepare_noise;
use crate::tensor::HostTensor;

/// Three units in the last place of f32, relative.
const LAST_BITS: f32 = 3.6e-7;

fn golden() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/schedulers.json");
    serde_json::from_slice(&std::fs::read(path).expect("schedulers.json")).expect("JSON")
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a string")
}

/// A recorded number; `"NaN"` stands for itself.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| {
        assert_eq!(value, "NaN");
        f64::NAN
    })
}

fn sigmas(value: &Value) -> Vec<f32> {
    list(value).iter().map(|v| number(v) as f32).collect()
}

fn model(name: &str) -> ModelSampling {
    let zero_snr = Betas { has_zero_terminal_snr: true, ..Betas::default() };
    match name {
        "sd15_eps" | "eps" => ModelSampling::discrete(Prediction::Eps, Betas::default()),
        "sd_v" => ModelSampling::discrete(Prediction::V, Betas::default()),
        "v_zsnr" => ModelSampling::discrete(Prediction::V, zero_snr),
        "flow_shift3" => ModelSampling::flow(3.0, 1000.0),
        other => panic!("no model {other}"),
    }
}

/// The largest relative difference; NaN agrees with NaN alone.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    if got.len() != want.len() {
        return f32::INFINITY;
    }
    let difference = got.iter().zip(want).map(|(&g, &w)| match (g.is_nan(), w.is_nan()) {
        (true, true) => 0.0,
        (false, false) if g == w => 0.0,
        (false, false) => (g - w).abs() / w.abs(),
        _ => f32::INFINITY,
    });
    difference.fold(0.0, f32::max)
}

fn assert_close(got: &[f32], want: &[f32], bar: f32, what: &dyn std::fmt::Display) {
    let apart = apart(got, want);
    assert!(apart <= bar, "{what}: {apart:e} apart\n got {got:?}\nwant {want:?}");
}

#[test]
fn ksampler_schedules() {
    let golden = golden();
    let entries = list(&golden["ksampler"]);
    assert_eq!(entries.len(), 180);
    for entry in entries {
        let sampler = text(&entry["sampler"]).split(' ').next().expect("a word");
        let scheduler = text(&entry["scheduler"]);
        let steps = entry["steps"].as_u64().expect("steps") as usize;
        let model = model(text(&entry["model"]));
        let got = ksampler_sigmas(&model, sampler, scheduler, steps, number(&entry["denoise"]));
        let bar = if matches!(scheduler, "simple" | "ddim_uniform" | "beta") { 0.0 } else { LAST_BITS };
        assert_close(&got.expect("a scheduler"), &sigmas(&entry["sigmas"]), bar, entry);
    }
}

#[test]
fn samplers_that_drop_a_sigma() {
    let model = model("sd15_eps");
    let schedule = |sampler| ksampler_sigmas(&model, sampler, "normal", 4, 1.0);
    for sampler in ["dpm_2_ancestral", "uni_pc", "uni_pc_bh2"] {
        assert_eq!(schedule(sampler), schedule("dpm_2"));
        assert_ne!(schedule(sampler), schedule("euler"));
    }
}

/// A node's outputs as lists, from its recorded inputs.
fn run_node(node: &str, inputs: &Value) -> Vec<Vec<f32>> {
    let of = |name: &str| number(&inputs[name]);
    let steps = inputs["steps"].as_u64().unwrap_or(0) as usize;
    let given = || sigmas(&inputs["sigmas"]);
    let model = || model(text(&inputs["model"]));
    let range = || (of("sigma_min"), of("sigma_max"));
    let one = match node {
        "KarrasScheduler" => karras_sigmas(steps, range().0, range().1, of("rho")),
        "ExponentialScheduler" => exponential_sigmas(steps, range().0, range().1),
        "PolyexponentialScheduler" => polyexponential_sigmas(steps, range().0, range().1, of("rho")),
        "LaplaceScheduler" => laplace_sigmas(steps, range().0, range().1, of("mu"), of("beta")),
        "VPScheduler" => vp_sigmas(steps, of("beta_d"), of("beta_min"), of("eps_s")),
        "BetaSamplingScheduler" => beta_sigmas(&model(), steps, of("alpha"), of("beta")).expect("a shape"),
        "BasicScheduler" => {
            basic_scheduler(&model(), text(&inputs["scheduler"]), steps, of("denoise")).expect("a scheduler")
        }
        "SDTurboScheduler" => sd_turbo_sigmas(&model(), steps, of("denoise")),
        "AlignYourStepsScheduler" => {
            let kind = AlignYourSteps::from_name(text(&inputs["model_type"])).expect("a table");
            align_your_steps_sigmas(kind, steps, of("denoise"))
        }
        "GITSScheduler" => gits_sigmas(of("coeff"), steps, of("denoise")).expect("a table"),
        "FlipSigmas" => flip_sigmas(&given()),
        "SetFirstSigma" => set_first_sigma(&given(), of("sigma") as f32),
        "ExtendIntermediateSigmas" => {
            let spacing = Spacing::from_name(text(&inputs["spacing"])).expect("a spacing");
            let (start, end) = (of("start_at_sigma") as f32, of("end_at_sigma") as f32);
            extend_intermediate_sigmas(&given(), steps, start, end, spacing)
        }
        "SplitSigmas" => {
            let (head, tail) = split_sigmas(&given(), inputs["step"].as_u64().expect("a step") as usize);
            return vec![head, tail];
        }
        "SplitSigmasDenoise" => {
            let (head, tail) = split_sigmas_denoise(&given(), of("denoise"));
            return vec![head, tail];
        }
        other => panic!("no node {other}"),
    };
    vec![one]
}

#[test]
fn custom_schedule_nodes() {
    let golden = golden();
    let entries = list(&golden["nodes"]);
    assert_eq!(entries.len(), 70);
    for entry in entries {
        let (node, inputs) = (text(&entry["node"]), &entry["inputs"]);
        let outputs = list(&entry["outputs"]);
        if node == "SamplingPercentToSigma" {
            let (model, percent) = (model(text(&inputs["model"])), number(&inputs["sampling_percent"]));
            let is_actual = inputs["return_actual_sigma"].as_bool().expect("a flag");
            let got = if is_actual {
                model.percent_to_actual_sigma(percent)
            } else {
                model.percent_to_sigma(percent)
            };
            assert_close(&[got as f32], &[number(&outputs[0]) as f32], LAST_BITS, entry);
            continue;
        }
        let got = run_node(node, inputs);
        assert_eq!(got.len(), outputs.len(), "{entry}");
        for (got, want) in got.iter().zip(outputs) {
            assert_close(got, &sigmas(want), LAST_BITS, entry);
        }
    }
}

#[test]
fn sigma_tables_and_lookups() {
    let golden = golden();
    let golden = &golden["model_sampling"];
    let eps = model("sd15_eps");
    assert_close(eps.sigmas(), &sigmas(&golden["sigmas_eps"]), 0.0, &"eps table");
    assert_close(model("v_zsnr").sigmas(), &sigmas(&golden["sigmas_zsnr"]), 0.0, &"zero-SNR table");
    let pairs = |name: &str| -> Vec<(f64, f64)> {
        list(&golden[name]).iter().map(|pair| (number(&pair[0]), number(&pair[1]))).collect()
    };
    for (percent, want) in pairs("percent_to_sigma") {
        let got = eps.percent_to_sigma(percent) as f32;
        assert_close(&[got], &[want as f32], LAST_BITS, &percent);
    }
    for (sigma, want) in pairs("timestep") {
        assert_eq!(eps.timestep(sigma as f32), want as f32, "timestep of {sigma}");
    }
    for (timestep, want) in pairs("sigma") {
        assert_close(&[eps.sigma(timestep as f32)], &[want as f32], LAST_BITS, &timestep);
    }
}

/// Each prediction's definition inverted: the output a perfect network would
/// give for a known picture leads back to it. 2e-6 of values near 1 allows
/// for the rounding of a handful of f32 operations at sigma 2.
#[test]
fn a_perfect_network_is_denoised_exactly() {
    let clean = prepare_noise(&[1, 4, 4, 4], 1, None);
    let noise = prepare_noise(&[1, 4, 4, 4], 2, None);
    let edm = ModelSampling::continuous_edm(Prediction::Edm, 0.002, 120.0, 0.5);
    let angle = ModelSampling::continuous_v(Prediction::V, 0.03, 500.0);
    let x0 = ModelSampling::discrete(Prediction::X0, Betas::default());
    for model in [model("sd15_eps"), model("v_zsnr"), model("flow_shift3"), edm, angle, x0] {
        let sigma = if model.is_flow() { 0.7f32 } else { 2.0 };
        let x = model.noise_scaling(sigma, &noise, &clean, false);
        let output = match model.prediction() {
            Prediction::Eps => noise.clone(),
            Prediction::Flow => noise.zip(&clean, |n, c| n - c),
            Prediction::V => noise.zip(&clean, |n, c| (n - sigma * c) / (sigma * sigma + 1.0).sqrt()),
            // (clean - skip·x) / out with sigma_data 1/2.
            Prediction::Edm => x.zip(&clean, |x, c| (c - x / 17.0) * 17.0f32.sqrt() / sigma),
            _ => clean.clone(),
        };
        let got = model.calculate_denoised(sigma, &output, &x);
        let worst = got.zip(&clean, |a, b| (a - b).abs()).into_data().into_iter().fold(0.0, f32::max);
        assert!(worst < 2e-6, "{:?}: {worst}", model.prediction());
    }
}

#[test]
fn input_and_noise_scaling() {
    let eps = model("sd15_eps");
    let x = HostTensor::full(&[1, 2], 5.0);
    let latent = HostTensor::full(&[1, 2], 1.0);
    // 0.75² + 1 = 1.25².
    assert_eq!(eps.calculate_input(0.75, &x).data(), [4.0, 4.0]);
    assert_eq!(eps.noise_scaling(0.75, &x, &latent, false).data(), [4.75, 4.75]);
    assert_eq!(eps.noise_scaling(0.75, &x, &latent, true).data(), [7.25, 7.25]);
    assert_eq!(eps.inverse_noise_scaling(0.75, &x).data(), [5.0, 5.0]);
    assert!(eps.is_max_denoise(14.614_641) && eps.is_max_denoise(80.0));
    assert!(eps.is_max_denoise(eps.sigma(999.0)) && !eps.is_max_denoise(14.61));

    let flow = model("flow_shift3");
    assert_eq!(flow.calculate_input(0.75, &x).data(), [5.0, 5.0]);
    assert_eq!(flow.noise_scaling(0.75, &x, &latent, true).data(), [4.0, 4.0]);
    assert_eq!(flow.inverse_noise_scaling(0.75, &x).data(), [20.0, 20.0]);
}

/// sigma = 3t / (1 + 2t) at t = 0.001, 0.5 and 1, and back.
#[test]
fn flow_axis() {
    let flow = model("flow_shift3");
    assert_eq!(flow.sigmas().len(), 1000);
    assert_close(&[flow.sigma_min(), flow.sigma(500.0)], &[0.003 / 1.002, 0.75], LAST_BITS, &"sigmas");
    assert_eq!((flow.sigma_max(), flow.timestep(0.75)), (1.0, 750.0));
    assert_eq!((flow.percent_to_sigma(0.0), flow.percent_to_sigma(1.0)), (1.0, 0.0));
    assert!((flow.percent_to_sigma(0.5) - 0.75).abs() < 1e-15);

    let flux = ModelSampling::exponential_flow(3f64.ln());
    assert_eq!((flux.sigmas().len(), flux.sigma_max(), flux.timestep(0.4)), (10_000, 1.0, 0.4));
    assert_close(&[flux.sigma(0.5)], &[0.75], LAST_BITS, &"e^mu = 3");
    assert!((flux.percent_to_sigma(0.5) - 0.75).abs() < 1e-6);
}

/// LCM's 50 kept steps are every 20th from the top, 999 down to 19.
#[test]
fn distilled_axis() {
    let full = model("sd15_eps");
    let lcm = ModelSampling::distilled(Betas::default(), 50);
    assert_eq!(lcm.sigmas().len(), 50);
    assert_eq!((lcm.sigma_min(), lcm.sigma_max()), (full.sigmas()[19], full.sigma_max()));
    assert_eq!((lcm.timestep(14.6), lcm.timestep(0.0)), (999.0, 19.0));
    for timestep in [19.0f32, 499.0, 999.0] {
        assert_close(&[lcm.sigma(timestep)], &[full.sigma(timestep)], LAST_BITS, &timestep);
    }
    let (x, out) = (HostTensor::full(&[1], 3.0), HostTensor::full(&[1], 1.0));
    // At timestep 999 the skip is 0.25 / (9990² + 0.25): what is left is x - sigma·eps.
    let got = lcm.calculate_denoised(14.614_641, &out, &x);
    assert_close(got.data(), &[3.0 - 14.614_641], LAST_BITS, &"LCM");
}

#[test]
fn continuous_axes() {
    let edm = ModelSampling::continuous_edm(Prediction::Edm, 0.002, 120.0, 0.5);
    assert_close(&[edm.sigma_min(), edm.sigma_max()], &[0.002, 120.0], 1e-6, &"ends");
    assert_close(&[edm.timestep(2.0)], &[0.25 * 2f32.ln()], LAST_BITS, &"quarter of the logarithm");
    assert_close(&[edm.sigma(edm.timestep(7.0))], &[7.0], 1e-6, &"round trip");
    assert!((edm.percent_to_sigma(0.5) - (0.002f64 * 120.0).sqrt()).abs() < 1e-6);

    let angle = ModelSampling::continuous_v(Prediction::V, 0.03, 500.0);
    assert_close(&[angle.timestep(1.0), angle.sigma(0.5)], &[0.5, 1.0], LAST_BITS, &"45 degrees");
}

#[test]
fn names_and_odd_counts() {
    let model = model("sd15_eps");
    for scheduler in SCHEDULERS {
        assert_eq!(calculate_sigmas(&model, scheduler, 0), Ok(Vec::new()), "{scheduler}");
        for steps in [1, 2, 999, 1000, 1001, 2500] {
            let sigmas = calculate_sigmas(&model, scheduler, steps).expect("a scheduler");
            assert_eq!(sigmas.last(), Some(&0.0), "{scheduler} {steps}");
            assert!(sigmas.windows(2).all(|w| w[0] >= w[1] || w[0].is_nan()), "{scheduler} {steps} ascends");
        }
        assert_eq!(ksampler_sigmas(&model, "euler", scheduler, 4, 0.0), Ok(Vec::new()));
        // 0.9999 and less shorten; more than that is a full run.
        let full = ksampler_sigmas(&model, "euler", scheduler, 4, 1.0).expect("a scheduler");
        let nearly = ksampler_sigmas(&model, "euler", scheduler, 4, 0.99995).expect("a scheduler");
        assert_eq!(full, nearly, "{scheduler}");
    }
    let unknown = ScheduleError::Unknown { name: "cubic".to_owned() };
    assert_eq!(calculate_sigmas(&model, "cubic", 3), Err(unknown));
    let shape = ScheduleError::BetaShape { alpha: 0.0, beta: 0.6 };
    assert_eq!(beta_sigmas(&model, 3, 0.0, 0.6), Err(shape));
}

/// An optimal schedule of n + 1 steps interlaces with that of n steps: a wrong
/// digit in the table would break the order somewhere.
#[test]
fn gits_tables_interlace() {
    for hundredths in (80..=150).step_by(5) {
        let schedule = |steps| gits_sigmas(f64::from(hundredths) / 100.0, steps, 1.0).expect("a table");
        let mut shorter = schedule(2);
        for steps in 3..=20 {
            let longer = schedule(steps);
            assert_eq!(longer.len(), steps + 1);
            assert!(longer.windows(2).all(|w| w[0] > w[1]), "{hundredths} {steps}");
            let is_between = |i: usize| longer[i] >= shorter[i] && shorter[i] >= longer[i + 1];
            assert!((0..steps).all(is_between), "{hundredths} {steps}");
            shorter = longer;
        }
    }
    assert_eq!(gits_sigmas(1.2, 1, 1.0), None);
    assert_eq!(gits_sigmas(0.79, 5, 1.0), None);
    assert_eq!(gits_sigmas(1.2, 5, 0.0), Some(Vec::new()));
}

#[test]
fn edits_at_the_edges() {
    let sigmas = [3.0, 2.0, 1.0, 0.0];
    assert_eq!(split_sigmas(&sigmas, 9), (sigmas.to_vec(), vec![]));
    assert_eq!(split_sigmas(&sigmas, 0), (vec![3.0], sigmas.to_vec()));
    assert_eq!(split_sigmas_denoise(&sigmas, 0.0), (vec![], vec![0.0]));
    assert_eq!(split_sigmas_denoise(&sigmas, 1.0), (vec![3.0], sigmas.to_vec()));
    assert_eq!(split_sigmas_denoise(&[], 0.5), (vec![], vec![]));
    assert!(flip_sigmas(&[]).is_empty());
    assert!(set_first_sigma(&[], 3.0).is_empty());
    assert_eq!(extend_intermediate_sigmas(&sigmas, 1, -1.0, 0.0, Spacing::Sine), sigmas);
    assert!(extend_intermediate_sigmas(&[], 2, -1.0, 0.0, Spacing::Linear).is_empty());
}

/// The closed-form denoiser of the recorded toy runs, for one conditioning.
fn toy_denoised(model: &ModelSampling, sigma: f32, x: &HostTensor, s: f32) -> HostTensor {
    let scaled = model.calculate_input(sigma, x);
    let eps = scaled.map(|v| 0.8 * v + 0.2 * (2.0 * v + 0.5 * s).tanh() + 0.05 * s);
    x.zip(&eps, |x, e| x - sigma * e)
}

/// Noise, schedule and scaling together: Euler runs recorded from ComfyUI with
/// a closed-form denoiser, relative to the result's spread. The bar is the
/// recorded one, 1e-4, and 5e-4 for zero terminal SNR.
#[test]
fn euler_runs_end_where_comfyui_ends() {
    let folder = std::env::var("KILN_GOLDEN").unwrap_or_else(|_| "../shared/golden".to_owned());
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder).join("samplers_toy.safetensors");
    let Ok(bytes) = std::fs::read(&path) else {
        eprintln!("skipped: no {}", path.display());
        return;
    };
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    for (case, name, scheduler, steps, cfg, bar) in [
        ("euler.normal5", "eps", "normal", 5, 3.0f32, 1e-4f32),
        ("euler.simple1", "eps", "simple", 1, 3.0, 1e-4),
        ("euler.cfg1", "eps", "exponential", 4, 1.0, 1e-4),
        ("euler.vz", "v_zsnr", "sgm_uniform", 5, 3.0, 5e-4),
        ("euler.flow", "flow_shift3", "simple", 6, 3.0, 1e-4),
    ] {
        let tensor = file.tensor(case).expect("the case");
        let model = model(name);
        let sigmas = ksampler_sigmas(&model, "euler", scheduler, steps, 1.0).expect("a scheduler");
        let noise = prepare_noise(tensor.shape(), 1234, None);
        let latent = HostTensor::zeros(tensor.shape());
        let mut x = model.noise_scaling(sigmas[0], &noise, &latent, model.is_max_denoise(sigmas[0]));
        for step in sigmas.windows(2) {
            let positive = toy_denoised(&model, step[0], &x, 1.0);
            let negative = toy_denoised(&model, step[0], &x, -1.0);
            let denoised = negative.zip(&positive, |n, p| n + (p - n) * cfg);
            x = x.zip(&denoised, |x, d| x + (x - d) / step[0] * (step[1] - step[0]));
        }
        let got = model.inverse_noise_scaling(0.0, &x).map(|v| v / 0.18215);
        let bytes = tensor.data().chunks_exact(4);
        let want: Vec<f32> = bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let spread = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
        let worst = got.data().iter().zip(&want).map(|(a, b)| (a - b).abs() / spread).fold(0.0, f32::max);
        assert!(worst < bar, "{case}: {worst} of the spread {spread}");
    }
}

/// Twenty steps of Flux are twice its table's ten: every other sigma is the table's, those between the mean in log
/// sigma of both neighbours.
#[test]
fn optimal_steps_are_tabulated_or_between() {
    let ten = optimal_sigmas("FLUX", 10, 1.0).expect("a table");
    assert_eq!((ten.len(), ten[0], ten[9], ten[10]), (11, 0.9968, 0.2808, 0.0));
    let twenty = optimal_sigmas("FLUX", 20, 1.0).expect("a table");
    assert_eq!(twenty.len(), 21);
    for i in 0..10 {
        assert!((twenty[2 * i] - ten[i]).abs() < 1e-6, "{i}");
    }
    assert!((twenty[1] - (0.9968f32 * 0.9886).sqrt()).abs() < 1e-6);
    assert_eq!(optimal_sigmas("Wan", 20, 0.5).expect("a table").len(), 11);
    assert_eq!(optimal_sigmas("Chroma", 20, 0.0), Some(Vec::new()));
    assert_eq!(optimal_sigmas("SD1", 20, 1.0), None);
}
