//! `kiln check`: every kernel against its reference.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::gpu::GpuArgs;
use super::output::say;
use super::trace::TraceArgs;
use crate::backend::cuda::Gpu;
use crate::backend::cuda::check::{self, Case, Ceiling, Measured, Options};

/// Arguments of `kiln check`.
#[derive(clap::Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    gpu: GpuArgs,
    /// Only cases whose family or name contains this; may be given several times.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Only the small cases: for sanitizers, and for the checked SIMT build.
    #[arg(long)]
    quick: bool,
    /// Also the cases that are too large for the SIMT layer.
    #[arg(long)]
    all: bool,
    /// Changes every random operand and shape.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// No timing, no ceilings.
    #[arg(long)]
    no_timing: bool,
    /// Only the failures and the sum.
    #[arg(long)]
    failures: bool,
    #[command(flatten)]
    trace: TraceArgs,
}

impl CheckArgs {
    fn takes(&self, case: &Case, is_simulated: bool) -> bool {
        let matches =
            |text: &String| case.family.contains(text.as_str()) || case.name.contains(text.as_str());
        (self.filter.is_empty() || self.filter.iter().any(matches))
            && (!self.quick || case.quick)
            && (!is_simulated || !case.needs_gpu || self.all)
    }
}

/// Runs the checks; an error if one fails.
pub fn run(args: CheckArgs) -> Result<()> {
    let file = args.trace.create()?;
    let driver = args.gpu.driver()?;
    let trace = file.map(|file| file.start(driver.clone()));
    let info = driver.device().clone();
    let gpu = Gpu::new(driver)?;
    say!("{} (compute capability {}, {} multiprocessors)", info.name, info.capability, info.multiprocessors);
    let options = Options { seed: args.seed, timing: !args.no_timing && !info.is_simulated };
    let ceiling = if options.timing { check::measure_ceiling(&gpu)? } else { None };
    if let Some(ceiling) = ceiling {
        say!("ceilings of this run: {ceiling}");
    }
    let began = Instant::now();
    let (mut count, mut failed) = (0, 0);
    for case in check::cases_of(args.seed)
        .iter()
        .filter(|case| case.runs_on(&gpu) && args.takes(case, info.is_simulated))
    {
        count += 1;
        let result = check::run(&gpu, case, &options);
        let is_good = matches!(&result, Ok(m) if m.error <= case.tolerance);
        failed += usize::from(!is_good);
        if !is_good || !args.failures {
            let verdict = if is_good { "ok  " } else { "FAIL" };
            match result {
                Ok(measured) => {
                    let place = measured.fault.filter(|_| !is_good).map(|fault| format!(": {fault}"));
                    say!("{verdict} {}{}", line(case, &measured, ceiling), place.unwrap_or_default());
                }
                Err(error) => say!("{verdict} {:<64} {error}", case.name),
            }
        }
    }
    say!("{count} cases, {failed} failed, {:.1} s", began.elapsed().as_secs_f64());
    if let Some(trace) = trace {
        trace.finish()?;
    }
    if count == 0 {
        bail!("no case matches");
    }
    if failed > 0 {
        bail!("{failed} of {count} kernel checks failed");
    }
    gpu.driver().synchronize(gpu.stream()).context("after the last check")
}

fn line(case: &Case, measured: &Measured, ceiling: Option<Ceiling>) -> String {
    let mut text = format!("{:<64} error {:.2e} (at most {:.1e})", case.name, measured.error, case.tolerance);
    if let Some(micros) = measured.micros {
        let (amount, unit, most) = match case.flops > 0.0 {
            true => (case.flops, "GFLOP/s", ceiling.map(|c| c.flops)),
            false => (case.bytes, "GB/s", ceiling.map(|c| c.bytes)),
        };
        let rate = amount / (micros * 1e-6);
        text += &format!(" {micros:>10.1} us {:>9.1} {unit}", rate / 1e9);
        if let Some(most) = most {
            text += &format!(" {:>5.1} %", 100.0 * rate / most);
        }
    }
    text
}
