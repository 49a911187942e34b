//! `kiln bench model` on a GPU: wall milliseconds of each stage, its launches, and the share of the device's ceiling.
//!
//! A stage is what the nodes call: it begins with an upload and ends when the
//! result is in host memory. Weights are packed and graphs captured before the
//! clock runs; the median of the repetitions counts.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde_json::{Value as Json, json};

use super::bench::{ModelArgs, checkpoint_file, text_parts};
use super::output::say;
use crate::backend::cuda::check::{Ceiling, measure_ceiling};
use crate::backend::cuda::{self, Gpu};
use crate::backend::metered::Metered;
use crate::backend::{DeviceOptions, cpu_backend};
use crate::diffusion::noise::Generator;
use crate::driver::{Driver, LaunchRecord};
use crate::models::text;
use crate::models::unet::UnetInput;
use crate::models::{ModelFile, ModelSource, ModelStore};
use crate::tensor::{HostTensor, Placement};
use crate::weights::OpenOptions;

/// Least repetitions of a stage: fewer give no median.
const LEAST_REPEATS: usize = 5;

struct Stage<'a> {
    args: &'a ModelArgs,
    driver: &'a dyn Driver,
    meter: &'a Metered,
    checkpoint: &'a ModelFile,
    ceiling: Option<Ceiling>,
    /// What was measured so far, for --json.
    rows: &'a RefCell<Vec<Json>>,
    /// Launches of the stages so far.
    records: &'a RefCell<Vec<LaunchRecord>>,
}

/// Runs the benchmark on the device that the options name.
pub(super) fn run(args: &ModelArgs, options: &DeviceOptions) -> Result<()> {
    let trace = args.trace.create()?;
    let driver = cuda::open_driver(options)?;
    let placement = cuda::open_on(driver.clone(), options, || cpu_backend(options))?;
    let path = &checkpoint_file(args)?;
    // One meter counts the parts one after the other.
    let [diffusion, text, vae] = [&placement.diffusion, &placement.text, &placement.vae]
        .map(|backend| Arc::new(Metered::new(backend.clone())));
    let metered = Placement { diffusion: diffusion.clone(), text: text.clone(), vae: vae.clone() };
    let store = ModelStore::new(metered, OpenOptions::default());
    let checkpoint = store.file(ModelSource::File(path.clone()));
    checkpoint.unet()?;
    let ceiling = measure_ceiling(&Gpu::new(driver.clone())?)?;
    let name = placement.diffusion.info().name;
    if !args.json {
        print_head(&name, path, ceiling)?;
    }
    let (rows, records) = (RefCell::default(), RefCell::default());
    let stage = |meter| Stage {
        args,
        driver: driver.as_ref(),
        meter,
        checkpoint: &checkpoint,
        ceiling,
        rows: &rows,
        records: &records,
    };
    let cond = stage(&text).text()?;
    for &size in &args.size {
        stage(&diffusion).step(size, &cond)?;
        if !args.no_vae {
            stage(&vae).decode(size)?;
        }
    }
    let memory = placement.diffusion.memory();
    if args.json {
        let body = json!({
            "device": name, "checkpoint": path,
            "ceilings": ceiling.map(|c| json!({"flops": c.flops, "bytes": c.bytes})), "stages": rows.take(),
            "memory": {"weights": memory.weights, "activations_peak": memory.peak},
        });
        say!("{body:#}");
    } else {
        say!(
            "\ndevice memory: weights {:.2} GB, activations at most {:.2} GB",
            memory.weights as f64 / 1e9,
            memory.peak as f64 / 1e9
        );
        say!(
            "a step is the UNet on the cfg pair (batch 2); first: with packing of weights; allocs, syncs: of one \
             repetition"
        );
    }
    trace.map_or(Ok(()), |file| file.write(driver.as_ref(), &records.borrow()))
}

fn print_head(device: &str, path: &Path, ceiling: Option<Ceiling>) -> Result<()> {
    say!("{device}, {}", path.display());
    if let Some(ceiling) = ceiling {
        say!("ceilings: {ceiling}");
    }
    say!(
        "\n{:<18} {:>9} {:>9} {:>9} {:>10} {:>9} {:>10} {:>9} {:>7} {:>6}",
        "stage",
        "first ms",
        "ms",
        "least ms",
        "GFLOP",
        "TFLOP/s",
        "of ceiling",
        "launches",
        "allocs",
        "syncs"
    );
    Ok(())
}

impl Stage<'_> {
    /// Times `run` once cold, once more (where a graph is captured), and then by the median.
    fn time(&self, name: &str, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        self.meter.take();
        let mut timed = || -> Result<f64> {
            let began = Instant::now();
            run()?;
            Ok(began.elapsed().as_secs_f64() * 1e3)
        };
        let instruments = self.driver.instruments();
        let cold = timed()?;
        let counted = self.meter.take();
        let flop: f64 = counted.values().map(|c| c.flop).sum();
        let before = instruments.counts();
        timed()?;
        let launches = instruments.counts().launches - before.launches;
        let mut times = Vec::new();
        let mut steady = before;
        for _ in 0..self.args.repeats.max(LEAST_REPEATS) {
            steady = instruments.counts();
            times.push(timed()?);
        }
        let after = instruments.counts();
        times.sort_by(f64::total_cmp);
        let ms = times[times.len() / 2];
        let (allocations, syncs) = (after.allocations - steady.allocations, after.syncs - steady.syncs);
        if self.args.json {
            let ops = counted
                .iter()
                .map(|(kind, count)| (kind.to_string(), json!({"calls": count.calls, "flops": count.flop})));
            self.rows.borrow_mut().push(json!({
                "stage": name, "first_ms": cold, "ms": ms, "least_ms": times[0], "flops": flop,
                "of_ceiling": self.ceiling.map(|c| flop / (ms * 1e-3) / c.flops), "launches": launches,
                "allocations": allocations, "syncs": syncs, "ops": Json::from_iter(ops),
            }));
            return Ok(());
        }
        let share =
            self.ceiling.map_or("-".to_owned(), |c| format!("{:.0} %", 100.0 * flop / (ms * 1e-3) / c.flops));
        say!(
            "{name:<18} {cold:>9.1} {ms:>9.3} {:>9.3} {:>10.1} {:>9.1} {share:>10} {launches:>9} {allocations:>7} {syncs:>6}",
            times[0],
            flop / 1e9,
            flop / ms / 1e9,
        );
        if self.args.ops {
            for (kind, count) in counted.iter().filter(|(_, count)| count.flop > 0.0) {
                say!("    {kind:<16} {:>5} calls {:>10.1} GFLOP", count.calls, count.flop / 1e9);
            }
        }
        Ok(())
    }

    fn text(&self) -> Result<Arc<HostTensor>> {
        let (kind, parts) = text_parts(self.checkpoint)?;
        let mut encoded = None;
        let mut encode = || {
            encoded = Some(text::encode(kind, &parts, None)?);
            Ok(())
        };
        self.time("text, one prompt", &mut encode)?;
        self.launches(encode)?;
        encoded.map(|e| Arc::new(e.cond)).context("no encoding")
    }

    fn step(&self, size: usize, cond: &Arc<HostTensor>) -> Result<()> {
        let unet = self.checkpoint.unet()?;
        let x = Generator::new(1).randn(&[2, unet.config().in_channels, size / 8, size / 8]);
        let context = unet.context(&[cond.clone(), cond.clone()])?;
        let vector = unet.config().adm_channels.map(|width| HostTensor::full(&[2, width], 0.5));
        let input = UnetInput { x: &x, timesteps: &[801.0; 2], context: &context, vector: vector.as_ref() };
        let step = || {
            unet.forward(&input, None)?;
            Ok(())
        };
        self.time(&format!("cfg step {size}"), step)?;
        self.launches(step)
    }

    fn decode(&self, size: usize) -> Result<()> {
        let vae = self.checkpoint.vae()?;
        let x = Generator::new(2).randn(&[1, vae.config().z_channels, size / 8, size / 8]);
        let decode = || {
            vae.decode_raw(&x)?;
            Ok(())
        };
        self.time(&format!("VAE decode {size}"), decode)?;
        self.launches(decode)
    }

    /// Runs it once more with every launch recorded, to print them by kernel and shape or for the trace, if asked to.
    fn launches(&self, mut run: impl FnMut() -> Result<()>) -> Result<()> {
        if !self.args.launches && self.args.trace.trace.is_none() {
            return Ok(());
        }
        let instruments = self.driver.instruments();
        instruments.set_tracing(true);
        let done = run();
        instruments.set_tracing(false);
        let records = instruments.take_trace();
        done?;
        match self.rows.borrow_mut().last_mut() {
            Some(row) if self.args.launches => {
                row["kernels"] = by_kernel(&records).map(|k| k.json()).collect()
            }
            None if self.args.launches => print_launches(&records)?,
            _ => {}
        }
        self.records.borrow_mut().extend(records);
        Ok(())
    }
}

/// The launches of one kernel on one shape.
struct Launches<'a> {
    kernel: &'a str,
    shape: &'a str,
    count: usize,
    micros: f64,
}

impl Launches<'_> {
    fn json(&self) -> Json {
        json!({"kernel": self.kernel, "shape": self.shape, "count": self.count, "us": self.micros})
    }
}

/// What was launched, by kernel and shape, the most expensive first.
fn by_kernel(records: &[LaunchRecord]) -> impl Iterator<Item = Launches<'_>> {
    let mut groups = BTreeMap::<(&str, &str), (usize, f64)>::new();
    for record in records {
        let group = groups.entry((&record.kernel, &record.label)).or_default();
        group.0 += 1;
        group.1 += record.duration_us;
    }
    let groups = groups.into_iter();
    let mut rows: Vec<Launches<'_>> =
        groups.map(|((kernel, shape), (count, micros))| Launches { kernel, shape, count, micros }).collect();
    rows.sort_by(|a, b| b.micros.total_cmp(&a.micros));
    rows.into_iter()
}

fn print_launches(records: &[LaunchRecord]) -> Result<()> {
    let total: f64 = records.iter().map(|r| r.duration_us).sum();
    say!("    {} launches, {:.3} ms in all when each is timed alone", records.len(), total / 1e3);
    for Launches { kernel, shape, count, micros } in by_kernel(records) {
        let share = 100.0 * micros / total;
        say!("    {micros:>9.1} us {share:>5.1} % {count:>4} x {kernel:<40} {shape}");
    }
    Ok(())
}
