//! The machine code of the Hopper kernels: it must hold the instructions that they are written for.
//!
//! A kernel file that says `// targets: sm_90a` exists for what only Hopper
//! has: the asynchronous tensor cores (`HGMMA`) and the bulk tensor copy
//! (`UTMALDG`), clusters of blocks (`UCGABAR`) and registers that change hands
//! (`USETMAXREG`). And as kernels are launched while their predecessor still
//! runs, every single one must wait for it (`ACQBULK`), and none may load what
//! that writes through the cache for constants (`LDG…CONSTANT`). Whether that is in the machine code is read with nvdisasm (on
//! PyPI: nvidia-cuda-nvdisasm); without it, or without nvcc at build time, the
//! test says so and skips. That kernels for other targets wait is read in their
//! sources.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::driver::nvcc::find_tool;

/// What every kernel of a file must hold, and how many kernels there are at least.
fn needed(module: &str) -> (usize, &'static [&'static str]) {
    match module {
        "ceiling_sm90" => (2, &["HGMMA"]),
        "groupnorm_sm90" => (4, &["UCGABAR"]),
        "attention_sm90" => (16, &["HGMMA", "UTMALDG", "USETMAXREG"]),
        // Products, and whatever file comes to them.
        _ => (18, &["HGMMA", "UTMALDG", "UTMALDG.2D.MULTICAST", "UCGABAR", "USETMAXREG"]),
    }
}

/// The kernels of a disassembly, each by its name.
fn kernels(sass: &str) -> Vec<(&str, &str)> {
    let sections = sass.split("\t.section\t.text.").skip(1);
    sections.map(|text| (text.split([',', '"']).next().unwrap_or("?"), text)).collect()
}

/// What the kernels of `module` lack: instructions, the wait for their predecessor, or kernels altogether.
fn missing(module: &str, sass: &str) -> Vec<String> {
    let (least, names) = needed(module);
    let kernels = kernels(sass);
    let mut missing = Vec::new();
    if kernels.len() < least {
        missing.push(format!("{} kernels, at least {least} were there", kernels.len()));
    }
    for (kernel, text) in &kernels {
        let lacks = names.iter().chain(&["ACQBULK"]).filter(|name| !text.contains(**name));
        missing.extend(lacks.map(|name| format!("no {name} in {kernel}")));
    }
    let stale = sass.lines().filter(|line| line.contains("LDG.") && line.contains(".CONSTANT")).count();
    if stale > 0 {
        missing.push(format!("{stale} loads as of constants"));
    }
    missing
}

/// Says why a test does not run, which `.ci/run` does not accept.
fn skip(reason: &str) {
    assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
}

#[test]
fn hopper_kernels_use_hopper_instructions() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(folder) = option_env!("KILN_KERNEL_OBJECTS") else {
        skip("this build had no nvcc");
        return;
    };
    let venvs = [".venv", "venv", "target/nvcc"].map(|name| root.join(name));
    let Some(nvdisasm) = find_tool("nvdisasm", &venvs) else {
        skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)");
        return;
    };
    let mut cubins: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cubins.retain(|path| path.to_string_lossy().ends_with(".sm_90a.cubin"));
    let mut wrong = Vec::new();
    for cubin in &cubins {
        let done = Command::new(&nvdisasm).arg("-c").arg(cubin).output().unwrap();
        let sass = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let name = cubin.file_name().unwrap_or_default().to_string_lossy();
        let module = name.split('.').next().unwrap_or_default();
        let names = needed(module).1;
        let counts = names.iter().map(|name| format!("{} {name}", sass.matches(name).count()));
        eprintln!("{name}: {} kernels, {}", kernels(&sass).len(), counts.collect::<Vec<_>>().join(", "));
        wrong.extend(missing(module, &sass).iter().map(|what| format!("{name}: {what}")));
    }
    if cubins.is_empty() {
        skip("no kernel file was compiled for sm_90a (KILN_CUDA_ARCHS)");
        return;
    }
    let found: Vec<_> =
        cubins.iter().filter_map(|path| path.file_name()?.to_str()?.split('.').next()).collect();
    for module in ["attention_sm90", "ceiling_sm90", "conv_sm90", "gemm_sm90", "groupnorm_sm90"] {
        assert!(found.contains(&module), "no machine code of {module}, only of {found:?}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_kernel_without_the_instruction_is_noticed() {
    let kernel = |name: &str| {
        format!(
            "\t.section\t.text.{name},\"ax\"\nACQBULK\nUTMALDG.2D.MULTICAST [UR8]\nHGMMA.64x64x16.F32\nUCGABAR_ARV\n\
             USETMAXREG\n"
        )
    };
    let good: String = (0..18).map(|i| kernel(&format!("k{i}"))).collect();
    assert!(missing("gemm_sm90", &good).is_empty());
    // One of many is enough.
    assert_eq!(missing("gemm_sm90", &good.replacen("HGMMA", "HMMA", 1)), ["no HGMMA in k0"]);
    assert_eq!(missing("conv_sm90", &good.replacen(".MULTICAST", "", 1)), ["no UTMALDG.2D.MULTICAST in k0"]);
    assert_eq!(missing("gemm_sm90", &good.replacen("ACQBULK", "EXIT", 1)), ["no ACQBULK in k0"]);
    assert_eq!(missing("gemm_sm90", &format!("{good}\nLDG.E.64.CONSTANT R2")), ["1 loads as of constants"]);
    assert_eq!(missing("ceiling_sm90", ""), ["0 kernels, at least 2 were there"]);
    assert_eq!(missing("groupnorm_sm90", &kernel("one")), ["1 kernels, at least 4 were there"]);
}

/// Every kernel begins with `begin_kernel()`, or its body is one that waits later.
#[test]
fn every_kernel_waits_for_its_predecessor() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut count = 0;
    for family in fs::read_dir(kernels).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        for file in fs::read_dir(family.path()).unwrap().flatten() {
            let text = fs::read_to_string(file.path()).unwrap();
            if file.path().extension().is_none_or(|ending| ending != "cu") {
                continue;
            }
            // Loads that only memory which nobody writes allows, and the promise that makes the compiler choose them.
            for word in ["__ldg", "__restrict__"] {
                assert!(!text.contains(word), "{}: {word}", file.path().display());
            }
            for kernel in text.split("__global__").skip(1) {
                let body = kernel.split_once('{').map_or("", |(_, body)| body);
                let start = body.trim_start_matches(['\\', ' ', '\n']);
                let waits_later = ["gemm<T, N", "conv<T, N", "attention_sm90::forward"];
                let is_good =
                    start.starts_with("begin_kernel()") || waits_later.iter().any(|b| start.starts_with(b));
                assert!(is_good, "{}: a kernel that begins {:.60}", file.path().display(), start);
                count += 1;
            }
        }
    }
    assert!(count >= 40, "{count} kernels were found");
}
