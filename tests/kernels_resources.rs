//! What ptxas made of the kernels: on the hot path none may spill or touch local memory.
//!
//! A spilled accumulator costs more than anything that a kernel could gain
//! elsewhere, and it comes without a word. The build script keeps what
//! `ptxas -v` says; without nvcc there is nothing to read and the test says so.

use std::fs;
use std::path::Path;

use kiln::driver::embedded;
use kiln::driver::nvcc::{Resources, parse_resources};

/// Families in which every kernel is hot.
const HOT: &[&str] = &["attention", "conv", "gemm", "norm"];

/// Fewest hot kernels of a target; those of sm_90a alone come on top for it.
const LEAST_HOT: usize = 97;
const LEAST_HOPPER: usize = 56;

/// Says why a test does not run, which `.ci/run` does not accept.
fn skip(reason: &str) {
    assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
}

fn resources() -> Option<Vec<Resources>> {
    let Some(folder) = option_env!("KILN_KERNEL_OBJECTS") else {
        skip("this build had no nvcc");
        return None;
    };
    let log = fs::read_to_string(Path::new(folder).join("ptxas.txt")).unwrap();
    Some(parse_resources(&log))
}

#[test]
fn hot_kernels_do_not_spill() {
    let Some(all) = resources() else { return };
    let hot: Vec<_> = all.iter().filter(|r| HOT.contains(&r.family.as_str())).collect();
    let wrong: Vec<_> = hot
        .iter()
        .filter(|r| r.spilled > 0 || r.stack > 0)
        .map(|r| {
            let Resources { module, target, name, registers, stack, spilled, .. } = r;
            format!(
                "{module} {target} {name}: {registers} registers, {stack} bytes of stack, {spilled} spilled"
            )
        })
        .collect();
    eprintln!("{} hot kernels of {} for all targets", hot.len(), all.len());
    for target in embedded().unwrap().targets.split(' ') {
        let count = hot.iter().filter(|r| r.target == target).count();
        let least = LEAST_HOT + if target == "sm_90a" { LEAST_HOPPER } else { 0 };
        assert!(
            count >= least,
            "ptxas reported {count} hot kernels for {target}, at least {least} were there"
        );
    }
    assert!(wrong.is_empty(), "kernels on the hot list spill or use local memory:\n{}", wrong.join("\n"));
}

/// The producer's warpgroup gives registers to the two others (`setmaxnreg`): 56 + 2·224 in products, 24 + 2·240 in attention.
/// The request is granted only if a block begins with as many: 168 a thread.
#[test]
fn registers_that_change_hands_are_there() {
    let Some(all) = resources() else { return };
    if !embedded().unwrap().targets.split(' ').any(|target| target == "sm_90a") {
        skip("no kernel file was compiled for sm_90a (KILN_CUDA_ARCHS)");
        return;
    }
    for (module, least) in [("gemm_sm90", 18), ("conv_sm90", 18), ("attention_sm90", 16)] {
        let kernels: Vec<_> = all.iter().filter(|r| r.module == module).collect();
        for Resources { name, registers, .. } in &kernels {
            assert_eq!(*registers, 168, "{name} begins with {registers} registers a thread");
        }
        let count = kernels.len();
        assert!(count >= least, "ptxas reported {count} kernels of {module}, at least {least} were there");
    }
}

#[test]
fn every_module_was_compiled_and_reported() {
    let Some(all) = resources() else { return };
    let build = embedded().unwrap();
    assert!(!build.modules.is_empty());
    for module in build.modules {
        let targets: Vec<_> = all.iter().filter(|r| r.module == module.name).map(|r| &r.target).collect();
        assert!(!targets.is_empty(), "ptxas said nothing of {}", module.name);
        assert!(targets.iter().all(|t| build.targets.split(' ').any(|known| known == t.as_str())));
        // A kernel without registers would be a report that was not understood.
        assert!(all.iter().filter(|r| r.module == module.name).all(|r| r.registers > 0));
        // "Fatbinary" magic of the image.
        assert_eq!(module.image[..4], [0x50, 0xed, 0x55, 0xba], "{} is no fatbin", module.name);
    }
}
