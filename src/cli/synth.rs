//! `kiln synth`: synthetic checkpoints of real size, without a download.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::output::say;
use super::progress::Bar;
use crate::models::tiny;
use crate::tensor::DType;
use crate::weights::synth::{self, Manifest};

/// Arguments of `kiln synth`.
#[derive(clap::Args, Debug)]
pub struct SynthArgs {
    /// A manifest (JSON: tensor name to shape), or the name of a built-in one such as `sd15`.
    manifest: String,
    /// The file to write.
    out: PathBuf,
    /// MANIFEST is the name of a family (sd1, sd2-v, sdxl, sdxl-refiner, …): write a tiny model of it, for tests.
    #[arg(long)]
    tiny: bool,
    /// Element type.
    #[arg(long, value_enum, default_value_t = SynthType::F16)]
    dtype: SynthType,
}

/// Element types of synthetic checkpoints.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum SynthType {
    /// Half precision.
    F16,
    /// Single precision.
    F32,
}

/// Writes the file.
pub fn run(args: SynthArgs) -> Result<()> {
    let dtype = match args.dtype {
        SynthType::F16 => DType::F16,
        SynthType::F32 => DType::F32,
    };
    let (began, name) = (Instant::now(), args.manifest);
    if args.tiny {
        let known = tiny::names().collect::<Vec<_>>().join(", ");
        let written = tiny::write(&name, &args.out, dtype);
        let written = written.with_context(|| format!("no tiny model '{name}'; there are {known}"))??;
        say!("{}: {} bytes", args.out.display(), written.bytes);
        return Ok(());
    }
    let manifest = match Manifest::built_in(&name) {
        Some(manifest) => manifest,
        None => {
            let built_in: Vec<_> = Manifest::built_in_names().collect();
            let text = std::fs::read_to_string(&name).with_context(|| {
                format!(
                    "'{}' is neither a built-in manifest ({}) nor a readable file",
                    name,
                    built_in.join(", ")
                )
            })?;
            Manifest::from_json(&text).with_context(|| format!("reading {name}"))?
        }
    };
    let bar = Bar::bytes();
    let written = synth::write(&manifest, &args.out, dtype, &[], |done, total| bar.set(done, total))?;
    bar.clear();
    say!("{}: {} bytes in {:.1} s", args.out.display(), written.bytes, began.elapsed().as_secs_f64());
    Ok(())
}
