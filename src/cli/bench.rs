//! `kiln bench model`: how fast a model runs here, against a ceiling measured in the same run.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value as Json, json};

use super::bench_device;
use super::bench_kernels::{self, KernelsArgs};
use super::device::DeviceArgs;
use super::output::say;
use super::process;
use super::trace::TraceArgs;
use crate::backend::metered::{Counts, Metered};
use crate::backend::{self, Device, DeviceOptions};
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
    /// A built-in architecture with synthetic weights of real size: sd15, sd21-v or sdxl-base.
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
    /// One JSON object instead of the table.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) trace: TraceArgs,
}

/// Runs the benchmark.
pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        BenchWhat::Model(args) => model(&args),
        BenchWhat::Kernels(args) => bench_kernels::run(&args),
    }
}

/// Whether a manifest is a whole checkpoint: adapters and upscalers have no step to measure.
fn is_whole(manifest: &Manifest) -> bool {
    manifest.shapes().any(|(name, _)| name.starts_with("model.diffusion_model."))
}

/// The manifest of `--arch`; none with a file.
fn manifest(args: &ModelArgs) -> Result<Option<Manifest>> {
    if args.checkpoint.is_some() {
        return Ok(None);
    }
    let manifest = Manifest::built_in(&args.arch).filter(is_whole);
    manifest.map(Some).with_context(|| {
        let whole = |name: &&str| Manifest::built_in(name).is_some_and(|m| is_whole(&m));
        let known: Vec<_> = Manifest::built_in_names().filter(whole).collect();
        let arch = &args.arch;
        format!("--arch {arch}: not a whole model that can be measured; there are {}", known.join(", "))
    })
}

/// The file to measure with: the given one, or a synthetic one kept in the system's temporary folder.
pub(super) fn checkpoint_file(args: &ModelArgs) -> Result<PathBuf> {
    let Some(manifest) = manifest(args)? else { return Ok(args.checkpoint.clone().unwrap_or_default()) };
    let path = std::env::temp_dir().join(format!("kiln-bench-{}.safetensors", args.arch));
    let elements: u64 = manifest.shapes().map(|(_, shape)| shape.iter().product::<u64>()).sum();
    if std::fs::metadata(&path).is_ok_and(|m| m.len() > elements * 2) {
        return Ok(path);
    }
    eprintln!("writing {} (kept for the next run)", path.display());
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
    /// What was measured so far, for --json.
    rows: &'a RefCell<Vec<Json>>,
}

impl Stage<'_> {
    fn print(&self, name: &str, timing: &Timing) -> Result<()> {
        let rate = timing.flop() / timing.cpu.max(1e-9) / 1e9;
        if self.args.json {
            let ops = timing.counts.iter().map(|(kind, count)| {
                let seconds = count.time.as_secs_f64();
                (kind.to_string(), json!({"calls": count.calls, "flops": count.flop, "wall_s": seconds}))
            });
            self.rows.borrow_mut().push(json!({
                "stage": name, "cpu_s": timing.cpu, "wall_s": timing.wall, "flops": timing.flop(),
                "of_ceiling": rate / self.ceiling, "faults": timing.faults, "ops": Json::from_iter(ops),
            }));
            return Ok(());
        }
        say!(
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
                say!("    {kind:<16} {:>5} calls {ms:>10.1} ms wall {rate:>9.1} GFLOP/s", count.calls);
            }
        }
        Ok(())
    }

    fn text(&self) -> Result<Arc<HostTensor>> {
        let (kind, parts) = text_parts(self.checkpoint)?;
        let mut encoded = None;
        let timing = best(self.args.repeats, self.meter, || {
            encoded = Some(text::encode(kind, &parts, None)?);
            Ok(())
        })?;
        self.print("text, one prompt", &timing)?;
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
        self.print(&format!("cfg step {size}"), &timing)
    }

    fn decode(&self, size: usize) -> Result<()> {
        let vae = self.checkpoint.vae()?;
        let x = Generator::new(2).randn(&[1, vae.config().z_channels, size / 8, size / 8]);
        let timing = best(self.args.repeats.min(2), self.meter, || {
            vae.decode_raw(&x)?;
            Ok(())
        })?;
        self.print(&format!("VAE decode {size}"), &timing)
    }
}

fn model(args: &ModelArgs) -> Result<()> {
    if let Some(size) = args.size.iter().find(|s| **s < 8 || **s % 8 != 0) {
        bail!("--size {size}: must be a multiple of 8");
    }
    manifest(args)?;
    let options = args.device.options();
    if options.device != Device::Cpu {
        match bench_device::run(args, &options) {
            Err(error) if options.device == Device::Auto && error.is::<DriverError>() => {
                eprintln!("no GPU in use: {error}");
            }
            done => return done,
        }
    }
    if args.trace.trace.is_some() {
        bail!("--trace records the kernels of a GPU or of --device simt, and this runs on the CPU");
    }
    on_cpu(args, &options, checkpoint_file(args)?)
}

fn on_cpu(args: &ModelArgs, options: &DeviceOptions, path: PathBuf) -> Result<()> {
    let backend = backend::cpu_backend(options)?;
    let info = backend.info();
    let meter = Arc::new(Metered::new(backend.clone()));
    let began = Instant::now();
    let store = ModelStore::new(Placement::all(meter.clone()), OpenOptions::default());
    let checkpoint = store.file(ModelSource::File(path.clone()));
    checkpoint.unet()?;
    for variant in checkpoint.clip_variants()? {
        checkpoint.clip(variant)?;
    }
    checkpoint.vae()?;
    let open_seconds = began.elapsed().as_secs_f64();
    let ceiling = backend::cpu::ceiling::measure(args.device.cpu_bf16)?;
    if !args.json {
        say!("{} {}, {} thread(s), {}", info.kind, info.name, info.threads, path.display());
        say!("ceiling: {:.0} GFLOP/s a core ({})", ceiling.gflops, ceiling.what);
        say!("open and check: {open_seconds:.3} s (nothing is copied yet)\n");
        say!(
            "{:<18} {:>9} {:>9} {:>10} {:>9} {:>10} {:>8} {:>7}",
            "stage",
            "CPU s",
            "wall s",
            "GFLOP",
            "GFLOP/s",
            "of ceiling",
            "ops",
            "faults"
        );
    }
    let rows = RefCell::default();
    let stage = Stage { args, meter: &meter, checkpoint: &checkpoint, ceiling: ceiling.gflops, rows: &rows };
    let cond = stage.text()?;
    for &size in &args.size {
        stage.step(size, &cond)?;
        if !args.no_vae {
            stage.decode(size)?;
        }
    }
    let (memory, peak) = (backend.memory(), process::peak_resident_bytes());
    if args.json {
        let body = json!({
            "device": format!("{} {}", info.kind, info.name), "threads": info.threads, "checkpoint": path,
            "ceiling": {"flops_a_core": ceiling.gflops * 1e9, "what": ceiling.what},
            "open_s": open_seconds, "stages": rows.take(),
            "memory": {"peak_resident": peak, "weights": memory.weights, "activations_peak": memory.peak},
        });
        say!("{body:#}");
        return Ok(());
    }
    say!(
        "\nmemory: peak resident {:.2} GB, packed weights {:.2} GB, arena peak {:.2} GB in {} system allocations",
        peak as f64 / 1e9,
        memory.weights as f64 / 1e9,
        memory.peak as f64 / 1e9,
        memory.system_allocations
    );
    say!("GFLOP/s are per CPU second, summed over threads; a step is the UNet on the cfg pair (batch 2)");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_models_are_measured() {
        let is_whole = |name: &str| Manifest::built_in(name).is_some_and(|m| is_whole(&m));
        let whole: Vec<_> = Manifest::built_in_names().filter(|name| is_whole(name)).collect();
        assert_eq!(whole, ["sd15", "sd21-v", "sdxl-base"], "these are the ones that --help names");
    }
}
