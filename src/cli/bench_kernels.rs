//! `kiln bench kernels`: our kernels on a table of layers, each against the ceilings measured in the same run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value as Json, json};

use super::gpu::GpuArgs;
use super::output::say;
use super::trace::{Trace, TraceArgs};
use crate::backend::cuda::check::{Ceiling, measure_ceiling};
use crate::backend::cuda::layers::table::{self, Layer, Table};
use crate::backend::cuda::{CudaError, Element, Gpu, layers};

/// Arguments of `kiln bench kernels`.
#[derive(clap::Args, Debug)]
pub struct KernelsArgs {
    /// The table: CSV with stage, op, dims, M, N, K, count_per_forward, GFLOP_each, min_MB_each. Rows elt:… have no
    /// kernel of their own and are left out; a row that can't be read is an error.
    #[arg(long, value_name = "FILE")]
    layers: PathBuf,
    /// bf16 instead of f16.
    #[arg(long)]
    bf16: bool,
    /// Only layers whose kind or stage contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Also times every way to cut a product into tiles, splits and pairs, and prints the fastest beside the launcher's choice.
    #[arg(long)]
    sweep: bool,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    gpu: GpuArgs,
}

/// Sums of one kind of op, weighted by how often it occurs.
#[derive(Default)]
struct Sum {
    micros: f64,
    flops: f64,
    floor: f64,
}

/// Ways to cut a product that a sweep tries: the best by the launcher's own estimate.
const SWEPT: usize = 32;

/// What one layer took.
struct Timed {
    micros: f64,
    /// The least time that the ceilings allow; none on the SIMT layer, which has no ceilings.
    floor: Option<f64>,
    /// Times for the ways to cut it, the launcher's choice first.
    sweep: Vec<(String, f64)>,
}

/// A share of the floor in words.
fn percent(floor: Option<f64>, micros: f64) -> String {
    floor.map_or("-".into(), |floor| format!("{:.0} %", 100.0 * floor / micros))
}

/// Runs the benchmark; an error if a layer can't be timed.
pub fn run(args: &KernelsArgs) -> Result<()> {
    let name = args.layers.display();
    let text = std::fs::read_to_string(&args.layers).with_context(|| format!("reading {name}"))?;
    let table = table::parse(&text).with_context(|| name.to_string())?;
    let takes = |l: &&Layer| {
        args.filter.as_ref().is_none_or(|f| l.op.kind().contains(f.as_str()) || l.stage.contains(f.as_str()))
    };
    let layers: Vec<&Layer> = table.layers.iter().filter(takes).collect();
    if layers.is_empty() {
        bail!("no layer of {name} matches");
    }
    let file = args.trace.create()?;
    let driver = args.gpu.driver()?;
    let trace = file.map(|file| file.start(driver.clone()));
    let gpu = Gpu::new(driver)?;
    let bench = KernelBench {
        args,
        ceiling: measure_ceiling(&gpu)?,
        element: if args.bf16 { Element::BF16 } else { Element::F16 },
        gpu: &gpu,
    };
    let failed = bench.all(&layers, &table)?;
    trace.map_or(Ok(()), Trace::finish)?;
    match failed {
        0 => Ok(()),
        failed => bail!("{failed} of {} layers can't be timed", layers.len()),
    }
}

struct KernelBench<'a> {
    args: &'a KernelsArgs,
    gpu: &'a Gpu,
    ceiling: Option<Ceiling>,
    element: Element,
}

impl KernelBench<'_> {
    /// Times the layers and prints them; returns how many can't be timed.
    fn all(&self, layers: &[&Layer], table: &Table) -> Result<usize> {
        let (device, element) = (&self.gpu.driver().device().name, self.element.suffix());
        let is_table = !self.args.json;
        if is_table {
            say!("{device}, {element}");
            if let Some(ceiling) = self.ceiling {
                say!("ceilings: {ceiling}");
            }
            say!("{:<72} {:>6} {:>10} {:>9} {:>8}", "layer", "count", "us each", "TFLOP/s", "of floor");
        }
        let (mut rows, mut failed, mut sums) = (Vec::new(), 0, BTreeMap::<&str, Sum>::new());
        for layer in layers {
            let timed = self.time(layer);
            match &timed {
                Ok(timed) => {
                    let sum = sums.entry(layer.op.kind()).or_default();
                    sum.micros += layer.count * timed.micros;
                    sum.flops += layer.count * layer.flops;
                    sum.floor += layer.count * timed.floor.unwrap_or(0.0);
                }
                Err(_) => failed += 1,
            }
            if is_table {
                self.print(layer, &timed)?;
            }
            rows.push(row(layer, &timed));
        }
        if is_table {
            self.print_sums(&sums, table)?;
        } else {
            let ceilings = self.ceiling.map(|c| json!({"flops": c.flops, "bytes": c.bytes}));
            let body = json!({
                "device": device, "element": element, "ceilings": ceilings, "layers": rows,
                "left_out": table.left_out,
            });
            say!("{body:#}");
        }
        Ok(failed)
    }

    fn time(&self, layer: &Layer) -> Result<Timed, CudaError> {
        let bench = layers::Bench::new(self.gpu, layer, self.element)?;
        let micros = bench.time(None)?;
        let floor = self.ceiling.map(|c| 1e6 * (layer.flops / c.flops).max(layer.bytes / c.bytes));
        let mut sweep = Vec::new();
        if self.args.sweep {
            for cut in layers::cuts(self.gpu, layer, self.element)?.into_iter().take(SWEPT) {
                sweep.push((cut.to_string(), bench.time(Some(cut))?));
            }
        }
        Ok(Timed { micros, floor, sweep })
    }

    fn print(&self, layer: &Layer, timed: &Result<Timed, CudaError>) -> Result<()> {
        let name = format!("{} {:?}", layer.stage, layer.op);
        let Timed { micros, floor, sweep } = match timed {
            Ok(timed) => timed,
            Err(error) => {
                say!("{name:<72} {:>6} FAILED: {error}", layer.count);
                return Ok(());
            }
        };
        let (rate, share) = (layer.flops / micros / 1e6, percent(*floor, *micros));
        say!("{name:<72} {:>6} {micros:>10.1} {rate:>9.1} {share:>8}", layer.count);
        let fastest = sweep.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        if let (Some((chosen, _)), Some((best, fastest))) = (sweep.first(), fastest) {
            say!("    chosen {chosen}, fastest {best}: {fastest:.1} us");
        }
        Ok(())
    }

    fn print_sums(&self, sums: &BTreeMap<&str, Sum>, table: &Table) -> Result<()> {
        say!("\n{:<12} {:>12} {:>9} {:>8}   (weighted by count)", "sum", "us", "TFLOP/s", "of floor");
        for (kind, Sum { micros, flops, floor }) in sums {
            let share = percent(self.ceiling.map(|_| *floor), *micros);
            say!("{kind:<12} {micros:>12.1} {:>9.1} {share:>8}", flops / micros / 1e6);
        }
        if !table.left_out.is_empty() {
            let rows: Vec<_> = table.left_out.iter().map(|(op, count)| format!("{count} {op}")).collect();
            say!("left out, as they have no kernel of their own: {}", rows.join(", "));
        }
        Ok(())
    }
}

/// A layer in JSON: its times, or why it has none.
fn row(layer: &Layer, timed: &Result<Timed, CudaError>) -> Json {
    let mut row = json!({
        "stage": layer.stage, "op": layer.op.kind(), "shape": format!("{:?}", layer.op), "count": layer.count,
        "flops": layer.flops, "bytes": layer.bytes,
    });
    match timed {
        Ok(Timed { micros, floor, sweep }) => {
            row["us"] = json!(micros);
            row["floor_us"] = json!(floor);
            row["sweep"] = sweep.iter().map(|(cut, us)| json!({"cut": cut, "us": us})).collect();
        }
        Err(error) => row["error"] = json!(error.to_string()),
    }
    row
}
