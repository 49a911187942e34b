//! `kiln bench kernels`: our kernels on a table of layers, each against the ceilings measured in the same run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::gpu::{GpuArgs, trace_json};
use crate::backend::cuda::check::measure_ceiling;
use crate::backend::cuda::layers::{self, Cut};
use crate::backend::cuda::{Element, Gpu};

/// Arguments of `kiln bench kernels`.
#[derive(clap::Args, Debug)]
pub struct KernelsArgs {
    /// The table: CSV with stage, op, dims, M, N, K, count_per_forward, GFLOP_each, min_MB_each.
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
    /// Writes a trace of all launches for Chrome or Perfetto.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
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

/// Times of a layer for the ways to cut it, the launcher's choice first.
fn sweep(bench: &layers::Bench<'_>, cuts: &[Cut]) -> Result<Vec<(String, f64)>> {
    let timed = |cut: &Cut| Ok((cut.to_string(), bench.time(Some(*cut))?));
    cuts.iter().take(SWEPT).map(timed).collect()
}

/// Runs the benchmark.
pub fn run(args: &KernelsArgs) -> Result<()> {
    let text = std::fs::read_to_string(&args.layers)
        .with_context(|| format!("reading {}", args.layers.display()))?;
    let table = layers::parse(&text)?;
    let takes = |l: &&layers::Layer| {
        args.filter.as_ref().is_none_or(|f| l.op.kind().contains(f.as_str()) || l.stage.contains(f.as_str()))
    };
    let driver = args.gpu.driver()?;
    driver.instruments().set_tracing(args.trace.is_some());
    let device = driver.device().name.clone();
    let gpu = Gpu::new(driver)?;
    let ceiling = measure_ceiling(&gpu)?;
    let element = if args.bf16 { Element::BF16 } else { Element::F16 };
    if !args.json {
        println!("{device}, {}", element.suffix());
        if let Some(ceiling) = ceiling {
            println!("ceilings: {ceiling}");
        }
        println!("{:<72} {:>6} {:>10} {:>9} {:>8}", "layer", "count", "us each", "TFLOP/s", "of floor");
    }
    let (mut rows, mut sums) = (Vec::new(), BTreeMap::<&str, Sum>::new());
    for layer in table.iter().filter(takes) {
        let context = || format!("{} {:?}", layer.stage, layer.op);
        let bench = layers::Bench::new(&gpu, layer, element).with_context(context)?;
        let micros = bench.time(None).with_context(context)?;
        // The least time that the ceilings allow; 0 on the SIMT layer, which has none.
        let floor = ceiling.map_or(0.0, |c| 1e6 * (layer.flops / c.flops).max(layer.bytes / c.bytes));
        let sum = sums.entry(layer.op.kind()).or_default();
        sum.micros += layer.count * micros;
        sum.flops += layer.count * layer.flops;
        sum.floor += layer.count * floor;
        if !args.json {
            println!(
                "{:<72} {:>6} {micros:>10.1} {:>9.1} {:>6.0} %",
                format!("{} {:?}", layer.stage, layer.op),
                layer.count,
                layer.flops / micros / 1e6,
                100.0 * floor / micros
            );
        }
        let sweep = if args.sweep {
            sweep(&bench, &layers::cuts(&gpu, layer, element)?).with_context(context)?
        } else {
            Vec::new()
        };
        if let (false, [(chosen, _), ..], Some((best, fastest))) =
            (args.json, &sweep[..], sweep.iter().min_by(|a, b| a.1.total_cmp(&b.1)))
        {
            println!("    chosen {chosen}, fastest {best}: {fastest:.1} us");
        }
        let sweep: Vec<_> = sweep.iter().map(|(cut, us)| json!({"cut": cut, "us": us})).collect();
        rows.push(json!({
            "sweep": sweep,
            "stage": layer.stage, "op": layer.op.kind(), "shape": format!("{:?}", layer.op), "count": layer.count,
            "us": micros, "flops": layer.flops, "bytes": layer.bytes, "floor_us": floor,
        }));
    }
    if rows.is_empty() {
        bail!("no layer of {} matches", args.layers.display());
    }
    if args.json {
        let ceilings = ceiling.map(|c| json!({"flops": c.flops, "bytes": c.bytes}));
        let body =
            json!({"device": device, "element": element.suffix(), "ceilings": ceilings, "layers": rows});
        println!("{body:#}");
    } else {
        println!("\n{:<12} {:>12} {:>9} {:>8}   (weighted by count)", "sum", "us", "TFLOP/s", "of floor");
        for (kind, sum) in &sums {
            let rate = sum.flops / sum.micros / 1e6;
            println!("{kind:<12} {:>12.1} {rate:>9.1} {:>6.0} %", sum.micros, 100.0 * sum.floor / sum.micros);
        }
    }
    if let Some(path) = &args.trace {
        let trace = trace_json(&gpu.driver().instruments().take_trace());
        std::fs::write(path, trace.to_string()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
