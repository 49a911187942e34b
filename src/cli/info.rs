//! `kiln info`: what a model file holds, or what this build and machine are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use super::output::say;
use super::setup::RuntimeArgs;
use crate::backend;
use crate::driver::{DeviceInfo, KernelBuild, cuda, embedded};
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
    say!("{}", kernels(embedded()));
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

/// The kernels that a build holds, by family.
fn kernels(build: Option<&KernelBuild>) -> String {
    let Some(build) = build else { return "CUDA: not built".into() };
    let (count, targets, compiler) = (build.modules.len(), build.targets, build.compiler);
    let mut families = BTreeMap::<&str, Vec<&str>>::new();
    build.modules.iter().for_each(|m| families.entry(m.family).or_default().push(m.name));
    let families = families.iter().map(|(family, names)| format!("\n  {family}: {}", names.join(", ")));
    format!("CUDA: {count} kernel files for {targets} ({compiler}){}", families.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::kernels;
    use crate::driver::KernelBuild;

    #[test]
    fn a_build_says_which_kernels_it_holds() {
        assert_eq!(kernels(None), "CUDA: not built");
        let build = KernelBuild { compiler: "nvcc 13.0.88", targets: "sm_80 sm_90a", modules: &[] };
        assert_eq!(kernels(Some(&build)), "CUDA: 0 kernel files for sm_80 sm_90a (nvcc 13.0.88)");
    }
}
