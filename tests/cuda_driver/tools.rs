//! The tools on the simulated GPU: what a trace holds there, and how they do with little memory.
//!
//! Its clock stands still: every two events are half a millisecond apart.

use std::path::Path;
use std::process::{Command, Output};

use kiln::driver::embedded;
use kiln::driver::simt::built_library;
use kiln::driver::toolchain::SimtVariant;
use serde_json::Value as Json;

use crate::{MEMORY, complete, skip};

/// Runs the binary on the simulated GPU of that many bytes; none where it carries no kernels for it.
fn on_gpu(memory: u64, args: &[&str]) -> Option<Output> {
    let Some(simt) = built_library(SimtVariant::Fast) else {
        skip("the build script made no SIMT layer");
        return None;
    };
    if embedded().is_none_or(|build| !build.targets.split(' ').any(|target| target == "sm_90a")) {
        skip("this binary carries no kernels for sm_90a");
        return None;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(args).env("LD_LIBRARY_PATH", complete()).env("SIMULATED_CUDA_SIMT", simt);
    Some(command.env("SIMULATED_CUDA_MEMORY", memory.to_string()).output().unwrap())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn launches(path: &Path) -> Vec<Json> {
    let all: Vec<Json> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(all[0]["args"]["name"], "simulated GPU");
    all[1..].to_vec()
}

#[test]
fn a_trace_has_the_times_of_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let (file, table) = (folder.path().join("trace.json"), folder.path().join("layers.csv"));
    let rows = "stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each
unet,gemm,,256,128,64,1,0.004,0.1
unet,conv,b2 64->128 3x3 s1 8x8->8x8,,,,1,0.02,0.2
";
    std::fs::write(&table, rows).unwrap();
    let (file_name, table_name) = (file.to_str().unwrap(), table.to_str().unwrap());
    // With little memory the ceilings are measured by a smaller copy.
    let args = ["bench", "kernels", "--device", "cuda", "--layers", table_name, "--trace", file_name];
    let Some(done) = on_gpu(MEMORY, &args) else { return };
    assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
    assert!(text(&done.stdout).contains("GB/s (copy of "), "{}", text(&done.stdout));
    let events = launches(&file);
    let named = |name: &str| {
        let is_named = |e: &&Json| e["name"].as_str().is_some_and(|n| n.starts_with(name));
        events.iter().find(is_named)
    };
    // The launch of the ceiling, and one of each layer: those inside graphs and timed loops are not told apart.
    assert_eq!(events.len(), 3, "{events:?}");
    for (kernel, shape) in [
        ("ceiling_sm90", "ceiling 4096 rounds f16"),
        ("gemm_sm90", "linear 256x128x64"),
        ("conv_sm90", "conv 3x3 2x8x8x64 -> 2x8x8x128"),
    ] {
        let event = named(kernel).unwrap_or_else(|| panic!("no {kernel} in {events:?}"));
        assert_eq!(event["args"]["shape"], shape);
        assert_eq!(event["dur"], 500.0, "the simulated half millisecond, not the time of the call");
    }
}

#[test]
fn a_check_is_traced_case_by_case() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let file_name = file.to_str().unwrap();
    let args =
        ["check", "--device", "cuda", "--quick", "--no-timing", "--filter", "axpby", "--trace", file_name];
    let Some(done) = on_gpu(64 << 20, &args) else { return };
    let said = text(&done.stdout);
    assert!(done.status.success(), "{said}{}", text(&done.stderr));
    assert!(said.starts_with("simulated GPU (compute capability 9.0, 8 multiprocessors)\n"), "{said}");
    assert!(said.contains(" 0 failed"), "{said}");
    let events = launches(&file);
    assert!(events.iter().all(|e| e["dur"] == 500.0), "{events:?}");
    assert!(
        events.iter().filter(|e| e["args"]["shape"].as_str().unwrap().starts_with("axpby ")).count() >= 12
    );
}

#[test]
fn info_lists_the_gpus() {
    let Some(done) = on_gpu(MEMORY, &["info"]) else { return };
    let said = text(&done.stdout);
    assert!(said.contains("CUDA driver: 13.0\nGPUs: 1\n  0: simulated GPU, compute capability 9.0, 8 multiprocessors, 0.2 GiB\n"), "{said}");
    assert!(said.contains("device: cuda (cuda:0 simulated GPU (f16))"), "{said}");
}
