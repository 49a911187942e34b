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
    #[arg(long, value_name = "N")]
    pub cuda_device: Option<usize>,
    /// Kernels from this folder (laid out as kernels/, or a part of it), compiled now, instead of those in the binary.
    #[arg(long, value_name = "DIR", conflicts_with = "cpu")]
    pub kernels_dir: Option<PathBuf>,
    /// Everything in f16 on a GPU.
    #[arg(long)]
    pub force_fp16: bool,
    /// Diffusion models in f16 on a GPU (the default).
    #[arg(long, conflicts_with = "bf16_unet")]
    pub fp16_unet: bool,
    /// Diffusion models in bf16 on a GPU.
    #[arg(long)]
    pub bf16_unet: bool,
    /// Text encoders in f16 on a GPU (the default).
    #[arg(long, conflicts_with = "bf16_text_enc")]
    pub fp16_text_enc: bool,
    /// Text encoders in bf16 on a GPU.
    #[arg(long)]
    pub bf16_text_enc: bool,
    /// Autoencoders in f16 on a GPU: finer, but some models overflow and give black pictures.
    #[arg(long, conflicts_with_all = ["bf16_vae", "fp32_vae"])]
    pub fp16_vae: bool,
    /// Autoencoders in bf16 on a GPU (the default).
    #[arg(long, conflicts_with = "fp32_vae")]
    pub bf16_vae: bool,
    /// Autoencoders in f32: they then run on the CPU.
    #[arg(long)]
    pub fp32_vae: bool,
    /// Autoencoders run on the CPU.
    #[arg(long)]
    pub cpu_vae: bool,
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
        let precision = |is_f16: bool, is_bf16: bool| match (is_f16 || self.force_fp16, is_bf16) {
            (_, true) => Some(Precision::BF16),
            (true, false) => Some(Precision::F16),
            (false, false) => None,
        };
        DeviceOptions {
            device,
            ordinal: self.cuda_device.unwrap_or(0),
            kernels: self.kernels_dir.clone(),
            diffusion: precision(self.fp16_unet, self.bf16_unet),
            text: precision(self.fp16_text_enc, self.bf16_text_enc),
            vae: precision(self.fp16_vae, self.bf16_vae),
            vae_on_cpu: self.cpu_vae || self.fp32_vae,
            threads: self.threads,
            cpu_bf16: self.cpu_bf16,
            memory_limit: self.memory_limit.map(|mib| mib << 20),
        }
    }
}
