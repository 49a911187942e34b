//! `kiln bench model`: how fast a model runs here, against a ceiling measured in the same run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::bench_device;
use super::bench_kernels::{self, KernelsArgs};
use super::device::DeviceArgs;
use super::process;
use crate::backend::metered::{Counts, Metered};
use crate::backend::{self, Device};
use crate::diffusion::noise::Generator;
use crate::driver::DriverError;
use crate::models::clip::{ClipToken, WeightedToken};
use crate::models::text::{self, TextKind, TextPart};
use crate::models::unet::UnetInput;
use crate::models::{ModelFile, ModelSource, ModelStore};
use crate::tensor::{Backend, DType, HostTensor, Placement};
use crate::weights::OpenOptions;
use crate::weights::synth::{self, Manifest};

/// Arguments of `kiln bench`.
#[derive(clap::Args, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: BenchWhat,
}

#[derive(clap::Subcommand, Debug)]
enum BenchWhat {
    /// One denoise step, one VAE decode and one text encoding of a whole model.
    Model(ModelArgs),
    /// The kernels on a table of layers, against the ceilings of the device.
    Kernels(KernelsArgs),
}

#[derive(clap::Args, Debug)]
pub(super) struct ModelArgs {
    /// A built-in architecture with synthetic weights of real size.
    #[arg(long, default_value = "sd15")]
    pub(super) arch: String,
    /// A checkpoint file instead.
    #[arg(long, conflicts_with = "arch")]
    pub(super) checkpoint: Option<PathBuf>,
    /// Width and height of the picture; may be given several times.
    #[arg(long, default_values_t = [512])]
    pub(super) size: Vec<usize>,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
    /// Timed repetitions of each stage, after one that warms up.
    #[arg(long, default_value_t = 3)]
    pub(super) repeats: usize,
    /// Leaves the VAE out.
    #[arg(long)]
    pub(super) no_vae: bool,
    /// Prints where the time goes by kind of op.
    #[arg(long)]
    pub(super) ops: bool,
    /// On a GPU: prints the kernels of a step and a decode by shape, with the time that each takes on the device.
    #[arg(long)]
    pub(super) launches: bool,
}

/// Runs the benchmark.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        BenchWhat::Model(args) => model(&args),
        BenchWhat::Kernels(args) => bench_kernels::run(&args),
    }
}

/// The file to measure with: the given one, or a synthetic one kept in the system's temporary folder.
pub(super) fn checkpoint_file(args: &ModelArgs) -> Result<PathBuf> {
    if let Some(path) = &args.checkpoint {
        return Ok(path.clone());
    }
    let manifest = Manifest::built_in(&args.arch).with_context(|| {
        let known: Vec<_> = Manifest::built_in_names().collect();
        format!("no architecture '{}'; built in: {}", args.arch, known.join(", "))
    })?;
    let path = std::env::temp_dir().join(format!("kiln-bench-{}.safetensors", args.arch));
    let elements: u64 = manifest.shapes().map(|(_, shape)| shape.iter().product::<u64>()).sum();
    if std::fs::metadata(&path).is_ok_and(|m| m.len() > elements * 2) {
        return Ok(path);
    }
    println!("writing {} (kept for the next run)", path.display());
    synth::write(&manifest, &path, DType::F16, &[], |_, _| {})?;
    Ok(path)
}

/// CPU seconds, wall seconds, page faults and counted ops of the best repetition.
struct Timing {
    cpu: f64,
    wall: f64,
    faults: u64,
    counts: Counts,
}

impl Timing {
    fn flop(&self) -> f64 {
        self.counts.values().map(|c| c.flop).sum()
    }
}

fn best(repeats: usize, meter: &Metered, mut run: impl FnMut() -> Result<()>) -> Result<Timing> {
    run()?;
    meter.take();
    let mut best: Option<Timing> = None;
    for _ in 0..repeats.max(1) {
        let (cpu, began, faults) = (process::cpu_seconds(), Instant::now(), process::minor_faults());
        run()?;
        let timing = Timing {
            cpu: process::cpu_seconds() - cpu,
            wall: began.elapsed().as_secs_f64(),
            faults: process::minor_faults().saturating_sub(faults),
            counts: meter.take(),
        };
        if best.as_ref().is_none_or(|b| timing.cpu < b.cpu) {
            best = Some(timing);
        }
    }
    best.context("no repetition ran")
}

/// A prompt of twenty tokens for every text encoder of a checkpoint.
pub(super) fn text_parts(checkpoint: &ModelFile) -> Result<(TextKind, Vec<TextPart>)> {
    let variants = checkpoint.clip_variants()?;
    let kind = TextKind::of(&variants).context("no text encoders that belong together")?;
    let mut parts = Vec::new();
    for variant in variants {
        parts.push(TextPart { encoder: checkpoint.clip(variant)?, chunks: vec![chunk()] });
    }
    Ok((kind, parts))
}

/// The tokens of a prompt of nineteen words.
fn chunk() -> Vec<WeightedToken> {
    let mut chunk = vec![WeightedToken { token: ClipToken::Id(49407), weight: 1.0 }; 77];
    for (i, token) in chunk.iter_mut().take(20).enumerate() {
        token.token = ClipToken::Id(if i == 0 { 49406 } else { 300 + 17 * i as u32 });
    }
    chunk
}

struct Stage<'a> {
    args: &'a ModelArgs,
    meter: &'a Metered,
    checkpoint: &'a ModelFile,
    /// GFLOP/s a core that a bare matrix product reaches in this run.
    ceiling: f64,
}

impl Stage<'_> {
    fn print(&self, name: &str, timing: &Timing) {
        let rate = timing.flop() / timing.cpu.max(1e-9) / 1e9;
        println!(
            "{name:<18} {:>9.3} {:>9.3} {:>10.1} {:>9.1} {:>8.0} % {:>8} {:>7}",
            timing.cpu,
            timing.wall,
            timing.flop() / 1e9,
            rate,
            100.0 * rate / self.ceiling,
            timing.counts.values().map(|c| c.calls).sum::<u64>(),
            timing.faults,
        );
        if self.args.ops {
            for (kind, count) in &timing.counts {
                let ms = count.time.as_secs_f64() * 1e3;
                let rate = count.flop / count.time.as_secs_f64().max(1e-9) / 1e9;
                println!("    {kind:<16} {:>5} calls {ms:>10.1} ms wall {rate:>9.1} GFLOP/s", count.calls);
            }
        }
    }

    fn text(&self) -> Result<Arc<HostTensor>> {
        let (kind, parts) = text_parts(self.checkpoint)?;
        let mut encoded = None;
        let timing = best(self.args.repeats, self.meter, || {
            encoded = Some(text::encode(kind, &parts, None)?);
            Ok(())
        })?;
        self.print("text, one prompt", &timing);
        encoded.map(|e| Arc::new(e.cond)).context("no encoding")
    }

    fn step(&self, size: usize, cond: &Arc<HostTensor>) -> Result<()> {
        let unet = self.checkpoint.unet()?;
        let x = Generator::new(1).randn(&[2, unet.config().in_channels, size / 8, size / 8]);
        let conds = [cond.clone(), cond.clone()];
        let vector = unet.config().adm_channels.map(|width| HostTensor::full(&[2, width], 0.5));
        let timing = best(self.args.repeats, self.meter, || {
            let context = unet.context(&conds)?;
            let input =
                UnetInput { x: &x, timesteps: &[801.0; 2], context: &context, vector: vector.as_ref() };
            unet.forward(&input, None)?;
            Ok(())
        })?;
        self.print(&format!("cfg step {size}"), &timing);
        Ok(())
    }

    fn decode(&self, size: usize) -> Result<()> {
        let vae = self.checkpoint.vae()?;
        let x = Generator::new(2).randn(&[1, vae.config().z_channels, size / 8, size / 8]);
        let timing = best(self.args.repeats.min(2), self.meter, || {
            vae.decode_raw(&x)?;
            Ok(())
        })?;
        self.print(&format!("VAE decode {size}"), &timing);
        Ok(())
    }
}

fn model(args: &ModelArgs) -> Result<()> {
    if let Some(size) = args.size.iter().find(|s| **s < 8 || **s % 8 != 0) {
        bail!("--size {size}: must be a multiple of 8");
    }
    let options = args.device.options();
    if options.device != Device::Cpu {
        match bench_device::run(args, &options) {
            Err(error) if options.device == Device::Auto && error.is::<DriverError>() => {
                println!("no GPU in use: {error}");
            }
            done => return done,
        }
    }
    let path = checkpoint_file(args)?;
    let backend = backend::cpu_backend(&options)?;
    let info = backend.info();
    let meter = Arc::new(Metered::new(backend.clone()));
    println!("{} {}, {} thread(s), {}", info.kind, info.name, info.threads, path.display());
    let ceiling = backend::cpu::ceiling::measure(args.device.cpu_bf16)?;
    println!("ceiling: {:.0} GFLOP/s a core ({})", ceiling.gflops, ceiling.what);

    let began = Instant::now();
    let store = ModelStore::new(Placement::all(meter.clone()), OpenOptions::default());
    let checkpoint = store.file(ModelSource::File(path));
    checkpoint.unet()?;
    for variant in checkpoint.clip_variants()? {
        checkpoint.clip(variant)?;
    }
    checkpoint.vae()?;
    println!("open and check: {:.3} s (nothing is copied yet)", began.elapsed().as_secs_f64());
    println!();
    println!(
        "{:<18} {:>9} {:>9} {:>10} {:>9} {:>10} {:>8} {:>7}",
        "stage", "CPU s", "wall s", "GFLOP", "GFLOP/s", "of ceiling", "ops", "faults"
    );
    let stage = Stage { args, meter: &meter, checkpoint: &checkpoint, ceiling: ceiling.gflops };
    let cond = stage.text()?;
    for &size in &args.size {
        stage.step(size, &cond)?;
        if !args.no_vae {
            stage.decode(size)?;
        }
    }
    let memory = backend.memory();
    println!();
    println!(
        "memory: peak resident {:.2} GB, packed weights {:.2} GB, arena peak {:.2} GB in {} system allocations",
        process::peak_resident_bytes() as f64 / 1e9,
        memory.weights as f64 / 1e9,
        memory.peak as f64 / 1e9,
        memory.system_allocations
    );
    println!("GFLOP/s are per CPU second, summed over threads; a step is the UNet on the cfg pair (batch 2)");
    Ok(())
}
