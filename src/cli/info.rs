//! `kiln info`: what a model file holds, or what this build and machine are.

use std::path::PathBuf;

use anyhow::Result;

use super::setup::RuntimeArgs;
use crate::backend;
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
            println!("{}", detect::describe(&file));
        }
        None => {
            let info = backend::open(args.runtime.device.options())?.diffusion.info();
            println!("kiln {}", env!("CARGO_PKG_VERSION"));
            println!("device: {} ({}, {} threads)", info.kind, info.name, info.threads);
            println!("CUDA: {}", crate::driver::cuda::summary());
            println!("node classes: {}", crate::nodes::registry().len());
        }
    }
    Ok(())
}
