//! `kiln info`: what a model file holds, or what this build and machine are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use super::output::say;
use super::setup::RuntimeArgs;
use crate::backend;
use crate::driver::{DeviceInfo, cuda, embedded};
use crate::models::detect;
use crate::weights::WeightsFile;

/// Arguments of `kiln info`.
#[derive(clap::Args, Debug)]
pub struct InfoArgs {
    /// A safetensors or PyTorch file; without it, facts about this build and machine.
    file: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// Prints the facts.
pub fn run(args: InfoArgs) -> Result<()> {
    match args.file {
        Some(path) => {
            let file = WeightsFile::open(&path)?;
            say!("{}", detect::describe(&file));
        }
        None => machine(&args.runtime)?,
    }
    Ok(())
}

/// This build, its kernels, and the devices of this machine.
fn machine(args: &RuntimeArgs) -> Result<()> {
    let info = backend::open(args.device.options())?.diffusion.info();
    say!("kiln {}", env!("CARGO_PKG_VERSION"));
    let threads = if info.threads > 0 { format!(", {} threads", info.threads) } else { String::new() };
    say!("device: {} ({}{threads})", info.kind, info.name);
    match embedded() {
        None => say!("CUDA kernels: not built"),
        Some(build) => {
            let (count, targets, compiler) = (build.modules.len(), build.targets, build.compiler);
            say!("CUDA kernels: {count} files for {targets} ({compiler})");
            let mut families = BTreeMap::<&str, Vec<&str>>::new();
            build.modules.iter().for_each(|m| families.entry(m.family).or_default().push(m.name));
            for (family, names) in families {
                say!("  {family}: {}", names.join(", "));
            }
        }
    }
    match cuda::devices() {
        Ok(devices) => {
            if let Some(DeviceInfo { driver_version, .. }) = devices.first() {
                say!("CUDA driver: {}.{}", driver_version / 1000, driver_version % 1000 / 10);
            }
            say!("GPUs: {}", devices.len());
            for gpu in devices {
                let DeviceInfo { ordinal, name, capability, multiprocessors, memory, .. } = gpu;
                let gib = memory as f64 / f64::from(1 << 30);
                say!(
                    "  {ordinal}: {name}, compute capability {capability}, {multiprocessors} multiprocessors, {gib:.1} GiB"
                );
            }
        }
        Err(error) => say!("GPUs: none in reach ({error})"),
    }
    say!("node classes: {}", crate::nodes::registry().len());
    Ok(())
}
