//! Samplers: from noise to a latent, one file a family.
//!
//! A sampler sees the guided model as a function `(x, sigma) → denoised` through
//! [`Run`], which also hands out noise and takes progress reports. Latents are [`Field`]s: f32, in host memory or on
//! the model's device; every scalar coefficient is computed in f64 and rounded once, and every
//! update is one linear combination, so that a device can run it as one kernel.

mod consistency;
mod dpm_solver;
mod dpmpp;
mod dpmpp_sde;
mod er_sde;
mod euler;
mod heun;
mod multistep;
mod names;
mod polynomial;
mod res;
mod run;
mod sa_solver;
mod seeds;
mod snr;
mod uni_pc;

pub use consistency::{LcmUpscaleOptions, Resizer};
pub use dpm_solver::AdaptiveOptions;
pub use er_sde::{ErSdeOptions, NoiseScaler};
pub use names::SAMPLERS;
pub use run::{Guided, Run, RunSetup};
pub use sa_solver::SaSolverOptions;
pub use snr::SnrSpace;
pub use uni_pc::BVariant;

use super::{DiffusionError, Field};

/// How much noise a stochastic sampler puts in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stochastic {
    /// Share of the step's noise that is replaced: 0 none, 1 ancestral.
    pub eta: f64,
    /// Factor on the noise put in.
    pub s_noise: f64,
}

impl Stochastic {
    /// No noise at all.
    pub const NONE: Self = Self { eta: 0.0, s_noise: 0.0 };
    /// Ancestral.
    pub const FULL: Self = Self { eta: 1.0, s_noise: 1.0 };

    /// Whether any noise is added.
    pub fn is_active(self) -> bool {
        self.eta > 0.0 && self.s_noise > 0.0
    }
}

/// Whose random numbers an SDE method takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoiseDevice {
    /// PyTorch's generator of the CPU.
    #[default]
    Cpu,
    /// PyTorch's generator of the device that the latent is on: an NVIDIA GPU has one of its own.
    Gpu,
}

/// Second-order term of DPM-Solver++(2M) SDE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SolverType {
    /// Weight of the midpoint rule.
    Midpoint,
    /// Weight of Heun's rule.
    Heun,
}

/// A sampling method with its settings.
#[derive(Clone, Debug)]
pub enum Algorithm {
    /// Euler; ancestral if stochastic.
    Euler(Stochastic),
    /// Euler in CFG++ form.
    EulerCfgPp(Stochastic),
    /// The alternative CFG++ form of Euler.
    EulerCfgPpAlternative,
    /// Heun.
    Heun,
    /// Heun++.
    HeunPp2,
    /// DPM-2; ancestral if stochastic.
    Dpm2(Stochastic),
    /// Linear multistep of this order.
    Lms {
        /// Number of slopes used.
        order: usize,
    },
    /// DPM-Solver with a fixed number of model calls.
    DpmFast,
    /// DPM-Solver with error control.
    DpmAdaptive(AdaptiveOptions),
    /// DPM-Solver++(2S) ancestral.
    Dpmpp2s(Stochastic),
    /// DPM-Solver++(2S) ancestral in CFG++ form.
    Dpmpp2sCfgPp(Stochastic),
    /// DPM-Solver++ SDE.
    DpmppSde {
        /// Noise settings.
        noise: Stochastic,
        /// Place of the inner model call in the step.
        r: f64,
    },
    /// DPM-Solver++(2M).
    Dpmpp2m,
    /// DPM-Solver++(2M) in CFG++ form.
    Dpmpp2mCfgPp,
    /// DPM-Solver++(2M) SDE.
    Dpmpp2mSde {
        /// Noise settings.
        noise: Stochastic,
        /// Second-order weight.
        solver: SolverType,
    },
    /// DPM-Solver++(3M) SDE.
    Dpmpp3mSde(Stochastic),
    /// DDPM.
    Ddpm,
    /// LCM.
    Lcm,
    /// LCM that enlarges the latent on the way.
    LcmUpscale(LcmUpscaleOptions),
    /// iPNDM.
    Ipndm,
    /// iPNDM for unequal steps.
    IpndmV,
    /// DEIS.
    Deis,
    /// RES multistep.
    ResMultistep {
        /// Noise settings.
        noise: Stochastic,
        /// CFG++ form.
        cfg_pp: bool,
    },
    /// Gradient estimation.
    GradientEstimation {
        /// Extrapolation of the slope.
        gamma: f64,
        /// CFG++ form.
        cfg_pp: bool,
    },
    /// ER-SDE.
    ErSde(ErSdeOptions),
    /// SEEDS-2.
    Seeds2 {
        /// Noise settings.
        noise: Stochastic,
        /// Place of the inner stage in the step.
        r: f64,
    },
    /// SEEDS-3.
    Seeds3(Stochastic),
    /// SA-Solver.
    SaSolver(SaSolverOptions),
    /// UniPC.
    UniPc(BVariant),
}

/// A sampler: a method, and how it fills the kept part of an inpainted latent.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// The method.
    pub algorithm: Algorithm,
    /// Noise for the kept part is drawn anew (seed + 1) instead of the initial noise.
    pub fresh_inpaint_noise: bool,
    /// Where the noise of an SDE method is drawn.
    pub noise_device: NoiseDevice,
}

impl From<Algorithm> for Sampler {
    fn from(algorithm: Algorithm) -> Self {
        Self { algorithm, fresh_inpaint_noise: false, noise_device: NoiseDevice::Cpu }
    }
}

impl Sampler {
    /// Whether the method needs the unconditional prediction even where guidance
    /// would not (scale 1).
    pub fn needs_uncond(&self) -> bool {
        use Algorithm as A;
        match self.algorithm {
            A::EulerCfgPp(_) | A::EulerCfgPpAlternative | A::Dpmpp2sCfgPp(_) | A::Dpmpp2mCfgPp => true,
            A::ResMultistep { cfg_pp, .. } | A::GradientEstimation { cfg_pp, .. } => cfg_pp,
            _ => false,
        }
    }

    /// Samples from `x`, which is already at the first sigma of `run`.
    ///
    /// # Errors
    /// What the model or the progress report return, and settings that the method
    /// does not allow.
    pub fn sample(&self, run: &mut Run<'_>, x: Field) -> Result<Field, DiffusionError> {
        use Algorithm as A;
        match self.algorithm {
            A::Euler(opt) => euler::euler(run, x, opt),
            A::EulerCfgPp(opt) => euler::euler_cfg_pp(run, x, opt),
            A::EulerCfgPpAlternative => euler::euler_cfg_pp_alternative(run, x),
            A::Heun => heun::heun(run, x),
            A::HeunPp2 => heun::heunpp2(run, x),
            A::Dpm2(opt) => heun::dpm_2(run, x, opt),
            A::Lms { order } => multistep::lms(run, x, order),
            A::DpmFast => dpm_solver::fast(run, x),
            A::DpmAdaptive(opt) => dpm_solver::adaptive(run, x, opt),
            A::Dpmpp2s(opt) => dpmpp::two_s(run, x, opt),
            A::Dpmpp2sCfgPp(opt) => dpmpp::two_s_cfg_pp(run, x, opt),
            A::DpmppSde { noise, r } => dpmpp_sde::single_step(run, x, noise, r),
            A::Dpmpp2m => dpmpp::two_m(run, x),
            A::Dpmpp2mCfgPp => dpmpp::two_m_cfg_pp(run, x),
            A::Dpmpp2mSde { noise, solver } => dpmpp_sde::two_m(run, x, noise, solver),
            A::Dpmpp3mSde(opt) => dpmpp_sde::three_m(run, x, opt),
            A::Ddpm => consistency::ddpm(run, x),
            A::Lcm => consistency::lcm(run, x),
            A::LcmUpscale(ref opt) => consistency::lcm_upscale(run, x, opt),
            A::Ipndm => multistep::ipndm(run, x),
            A::IpndmV => multistep::ipndm_v(run, x),
            A::Deis => multistep::deis(run, x),
            A::ResMultistep { noise, cfg_pp } => res::res_multistep(run, x, noise, cfg_pp),
            A::GradientEstimation { gamma, cfg_pp } => euler::gradient_estimation(run, x, gamma, cfg_pp),
            A::ErSde(opt) => er_sde::er_sde(run, x, opt),
            A::Seeds2 { noise, r } => seeds::seeds_2(run, x, noise, r),
            A::Seeds3(opt) => seeds::seeds_3(run, x, opt),
            A::SaSolver(opt) => sa_solver::sa_solver(run, x, opt),
            A::UniPc(variant) => uni_pc::uni_pc(run, x, variant),
        }
    }
}

/// Σ coefficient · field with f64 coefficients, each rounded once.
pub(super) fn lincomb(terms: &[(f64, &Field)]) -> Result<Field, DiffusionError> {
    Field::lincomb(terms)
}

/// `dx/dsigma` at `sigma`: `(x − denoised) / sigma`.
fn slope(x: &Field, denoised: &Field, sigma: f64) -> Result<Field, DiffusionError> {
    lincomb(&[(1.0 / sigma, x), (-1.0 / sigma, denoised)])
}

/// Straight line from `x` at sigma `from` towards `denoised` at 0, at sigma `to`.
fn toward(x: &Field, denoised: &Field, from: f64, to: f64) -> Result<Field, DiffusionError> {
    lincomb(&[(to / from, x), (1.0 - to / from, denoised)])
}
