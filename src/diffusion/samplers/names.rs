//! Samplers by ComfyUI's names, with the settings those names stand for.

use super::{
    AdaptiveOptions, Algorithm as A, BVariant, ErSdeOptions, NoiseDevice, SaSolverOptions, Sampler,
    SolverType, Stochastic,
};

/// Every sampler name, in the order of ComfyUI's list.
pub const SAMPLERS: &[&str] = &[
    "euler",
    "euler_cfg_pp",
    "euler_ancestral",
    "euler_ancestral_cfg_pp",
    "heun",
    "heunpp2",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde",
    "dpmpp_sde_gpu",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu",
    "ddpm",
    "lcm",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation",
    "gradient_estimation_cfg_pp",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "sa_solver_pece",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
];

impl Sampler {
    /// The sampler of that name with ComfyUI's default settings.
    pub fn by_name(name: &str) -> Option<Self> {
        if name == "ddim" {
            return Some(Self { fresh_inpaint_noise: true, ..A::Euler(Stochastic::NONE).into() });
        }
        let (name, noise_device) = match name.strip_suffix("_gpu") {
            Some(name) => (name, NoiseDevice::Gpu),
            None => (name, NoiseDevice::Cpu),
        };
        algorithm(name).map(|algorithm| Self { noise_device, ..algorithm.into() })
    }
}

fn algorithm(name: &str) -> Option<A> {
    let (none, full) = (Stochastic::NONE, Stochastic::FULL);
    let sde = |solver| A::Dpmpp2mSde { noise: full, solver };
    Some(match name {
        "euler" => A::Euler(none),
        "euler_cfg_pp" => A::EulerCfgPp(none),
        "euler_ancestral" => A::Euler(full),
        "euler_ancestral_cfg_pp" => A::EulerCfgPp(full),
        "heun" => A::Heun,
        "heunpp2" => A::HeunPp2,
        "dpm_2" => A::Dpm2(none),
        "dpm_2_ancestral" => A::Dpm2(full),
        "lms" => A::Lms { order: 4 },
        "dpm_fast" => A::DpmFast,
        "dpm_adaptive" => A::DpmAdaptive(AdaptiveOptions::default()),
        "dpmpp_2s_ancestral" => A::Dpmpp2s(full),
        "dpmpp_2s_ancestral_cfg_pp" => A::Dpmpp2sCfgPp(full),
        "dpmpp_sde" => A::DpmppSde { noise: full, r: 0.5 },
        "dpmpp_2m" => A::Dpmpp2m,
        "dpmpp_2m_cfg_pp" => A::Dpmpp2mCfgPp,
        "dpmpp_2m_sde" => sde(SolverType::Midpoint),
        "dpmpp_2m_sde_heun" => sde(SolverType::Heun),
        "dpmpp_3m_sde" => A::Dpmpp3mSde(full),
        "ddpm" => A::Ddpm,
        "lcm" => A::Lcm,
        "ipndm" => A::Ipndm,
        "ipndm_v" => A::IpndmV,
        "deis" => A::Deis,
        "res_multistep" => A::ResMultistep { noise: none, cfg_pp: false },
        "res_multistep_cfg_pp" => A::ResMultistep { noise: none, cfg_pp: true },
        "res_multistep_ancestral" => A::ResMultistep { noise: full, cfg_pp: false },
        "res_multistep_ancestral_cfg_pp" => A::ResMultistep { noise: full, cfg_pp: true },
        "gradient_estimation" => A::GradientEstimation { gamma: 2.0, cfg_pp: false },
        "gradient_estimation_cfg_pp" => A::GradientEstimation { gamma: 2.0, cfg_pp: true },
        "er_sde" => A::ErSde(ErSdeOptions::default()),
        "seeds_2" => A::Seeds2 { noise: full, r: 0.5 },
        "seeds_3" => A::Seeds3(full),
        "sa_solver" => A::SaSolver(SaSolverOptions::default()),
        "sa_solver_pece" => A::SaSolver(SaSolverOptions { use_pece: true, ..SaSolverOptions::default() }),
        "uni_pc" => A::UniPc(BVariant::Bh1),
        "uni_pc_bh2" => A::UniPc(BVariant::Bh2),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{SAMPLERS, Sampler};

    #[test]
    fn every_name_has_a_sampler() {
        assert_eq!(SAMPLERS.len(), 42);
        for name in SAMPLERS {
            assert!(Sampler::by_name(name).is_some(), "{name}");
        }
        assert!(Sampler::by_name("no_such_sampler").is_none());
    }
}
