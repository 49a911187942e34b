//! The machine code of the Hopper kernels: it must hold the instructions that they are written for.
//!
//! A kernel file that says `// targets: sm_90a` exists for the asynchronous
//! tensor cores (`HGMMA`) and the bulk tensor copy (`UTMALDG`). Whether they are
//! in the machine code is read with nvdisasm (on PyPI: nvidia-cuda-nvdisasm);
//! without it, or without nvcc at build time, the test says so and skips.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::driver::nvcc::find_tool;

const NEEDED: &[&str] = &["HGMMA", "UTMALDG"];

/// The instructions of [`NEEDED`] that are not in the text.
fn missing(sass: &str) -> Vec<&'static str> {
    NEEDED.iter().copied().filter(|name| !sass.contains(name)).collect()
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
        let counts = NEEDED.iter().map(|name| format!("{} {name}", sass.matches(name).count()));
        let name = cubin.file_name().unwrap_or_default().to_string_lossy();
        eprintln!("{name}: {}", counts.collect::<Vec<_>>().join(", "));
        wrong.extend(missing(&sass).iter().map(|instruction| format!("{name} holds no {instruction}")));
    }
    if cubins.is_empty() {
        eprintln!("skipped: no kernel file is for sm_90a alone");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_text_without_the_instruction_is_noticed() {
    assert_eq!(missing("HGMMA.64x128x16.F32 R24, gdesc[UR4]"), ["UTMALDG"]);
    assert!(missing("UTMALDG.2D [UR8], [UR4]\nHGMMA.64x64x16.F32").is_empty());
}
