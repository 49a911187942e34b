//! Flags that choose the device and the precision, named as in ComfyUI.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::backend::{Device, DeviceOptions, Precision};

/// Kinds of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// A GPU if there is one, else the CPU
    #[default]
    Auto,
    /// The CPU
    Cpu,
    /// An NVIDIA GPU; an error if there is none
    Cuda,
    /// The CUDA kernels on the CPU: slow and strict, for tests
    Simt,
}

/// Flags of every command that runs models.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// Where models run.
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceName,
    /// Run on the CPU, whatever other flags say.
    #[arg(long)]
    pub cpu: bool,
    /// Index of the GPU.
    #[arg(long, value_name = "N", alias = "default-device")]
    pub cuda_device: Option<usize>,
    /// Kernels from this folder (laid out as kernels/, or a part of it), compiled now, instead of those in the binary.
    #[arg(long, value_name = "DIR", conflicts_with = "cpu")]
    pub kernels_dir: Option<PathBuf>,
    /// Diffusion models in f16 on a GPU, unless a flag for them says otherwise (the default).
    #[arg(long, conflicts_with = "force_fp32")]
    pub force_fp16: bool,
    /// Everything in f32 on a GPU, unless a flag for a part says otherwise: ten times slower and more.
    #[arg(long)]
    pub force_fp32: bool,
    /// Diffusion models in f16 on a GPU (the default).
    #[arg(long, group = "unet_precision")]
    pub fp16_unet: bool,
    /// Diffusion models in bf16 on a GPU.
    #[arg(long, group = "unet_precision")]
    pub bf16_unet: bool,
    /// Diffusion models in f32 on a GPU: ten times slower and more.
    #[arg(long, group = "unet_precision", visible_alias = "fp64-unet")]
    pub fp32_unet: bool,
    /// Text encoders in f16 on a GPU (the default).
    #[arg(long, group = "text_precision")]
    pub fp16_text_enc: bool,
    /// Text encoders in bf16 on a GPU.
    #[arg(long, group = "text_precision")]
    pub bf16_text_enc: bool,
    /// Text encoders in f32 on a GPU.
    #[arg(long, group = "text_precision")]
    pub fp32_text_enc: bool,
    /// Autoencoders in f16 on a GPU: finer, but some models overflow and give black pictures.
    #[arg(long, group = "vae_precision")]
    pub fp16_vae: bool,
    /// Autoencoders in bf16 on a GPU (the default; before Ampere it is f32).
    #[arg(long, group = "vae_precision")]
    pub bf16_vae: bool,
    /// Autoencoders in f32 on a GPU: slower, and twice the memory.
    #[arg(long, group = "vae_precision")]
    pub fp32_vae: bool,
    /// Autoencoders run on the CPU.
    #[arg(long)]
    pub cpu_vae: bool,
    /// Noise that samplers draw on the way (ancestral, LCM, …) comes from the GPU's generator, as in ComfyUI on an
    /// NVIDIA GPU. Without it every device draws the picture of ComfyUI on a CPU.
    #[arg(long)]
    pub gpu_noise: bool,
    /// Worker threads of the CPU; all cores if not given.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Compute in bf16 on the CPU (AMX tiles where it has them): several times faster, about 3 decimal digits.
    #[arg(long)]
    pub cpu_bf16: bool,
    /// Most memory for activations, in MiB; larger pictures are then decoded in tiles.
    #[arg(long, value_name = "MIB")]
    pub memory_limit: Option<usize>,
}

impl DeviceArgs {
    /// As the backend takes them.
    pub fn options(&self) -> DeviceOptions {
        let device = match (self.cpu, self.device) {
            (true, _) | (_, DeviceName::Cpu) => Device::Cpu,
            (_, DeviceName::Simt) => Device::Simt,
            (_, DeviceName::Cuda) => Device::Cuda,
            // A GPU that was named, or that kernels are meant for, must be there.
            (_, DeviceName::Auto) if self.cuda_device.is_some() || self.kernels_dir.is_some() => Device::Cuda,
            (_, DeviceName::Auto) => Device::Auto,
        };
        // The flag of a part, then the one for everything; ComfyUI's flag for f16 leaves autoencoders alone.
        let precision = |flags: [bool; 3]| {
            let all = if self.force_fp32 { Some(Precision::F32) } else { None };
            let named = [Precision::F16, Precision::BF16, Precision::F32];
            flags.iter().zip(named).find_map(|(given, precision)| given.then_some(precision)).or(all)
        };
        DeviceOptions {
            device,
            ordinal: self.cuda_device.unwrap_or(0),
            kernels: self.kernels_dir.clone(),
            diffusion: precision([self.fp16_unet, self.bf16_unet, self.fp32_unet]),
            text: precision([self.fp16_text_enc, self.bf16_text_enc, self.fp32_text_enc]),
            vae: precision([self.fp16_vae, self.bf16_vae, self.fp32_vae]),
            vae_on_cpu: self.cpu_vae,
            gpu_noise: self.gpu_noise,
            threads: self.threads,
            cpu_bf16: self.cpu_bf16,
            memory_limit: self.memory_limit.map(|mib| mib << 20),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        device: DeviceArgs,
    }

    fn parsed(flags: &[&str]) -> Option<[Option<Precision>; 3]> {
        let all = ["kiln"].into_iter().chain(flags.iter().copied());
        let options = Only::try_parse_from(all).ok()?.device.options();
        Some([options.diffusion, options.text, options.vae])
    }

    #[test]
    fn flags_of_precision() {
        use Precision::{BF16, F16, F32};
        let cases: [(&[&str], [Option<Precision>; 3]); 10] = [
            (&[], [None, None, None]),
            (&["--force-fp16"], [None, None, None]),
            (&["--fp16-unet"], [Some(F16), None, None]),
            (&["--bf16-unet", "--fp16-vae"], [Some(BF16), None, Some(F16)]),
            (&["--fp32-unet"], [Some(F32), None, None]),
            (&["--fp64-unet"], [Some(F32), None, None]),
            (&["--bf16-text-enc", "--fp32-vae"], [None, Some(BF16), Some(F32)]),
            (&["--fp32-text-enc", "--bf16-vae"], [None, Some(F32), Some(BF16)]),
            (&["--force-fp32"], [Some(F32); 3]),
            (&["--force-fp32", "--fp16-unet"], [Some(F16), Some(F32), Some(F32)]),
        ];
        for (flags, expected) in cases {
            assert_eq!(parsed(flags), Some(expected), "{flags:?}");
        }
    }

    #[test]
    fn flags_that_contradict_each_other_are_refused() {
        for flags in [
            ["--force-fp16", "--force-fp32"],
            ["--fp16-unet", "--fp32-unet"],
            ["--bf16-unet", "--fp16-unet"],
            ["--fp32-text-enc", "--fp16-text-enc"],
            ["--fp32-vae", "--bf16-vae"],
        ] {
            assert_eq!(parsed(&flags), None, "{flags:?}");
        }
    }

    #[test]
    fn a_named_gpu_must_be_there() {
        let options = |flags: &[&str]| {
            Only::parse_from(["kiln"].into_iter().chain(flags.iter().copied())).device.options()
        };
        assert_eq!(
            (options(&["--default-device", "1"]).device, options(&["--cuda-device=1"]).ordinal),
            (Device::Cuda, 1)
        );
        assert!(options(&["--cpu-vae"]).vae_on_cpu && !options(&["--fp32-vae"]).vae_on_cpu);
    }
}
