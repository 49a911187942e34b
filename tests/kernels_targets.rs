//! Targets of the kernels: what a fatbin holds, and that every file compiles for targets of which no usual build has code.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kiln::driver::embedded;
use kiln::driver::nvcc::{Arch, FatbinOptions, Nvcc, Targets, build_fatbin, parse_archs};
use kiln::driver::toolchain::{kernel_sources, module_name};

/// Turing, and the Jetson boards with Ampere.
const ON_REQUEST: [&str; 2] = ["75", "87"];

/// Says why a test does not run, which `.ci/run` does not accept.
fn skip(reason: &str) {
    assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
}

fn nvcc() -> Option<Nvcc> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let venvs = [".venv", "venv", "target/nvcc"].map(|name| root.join(name));
    Nvcc::find(&venvs).inspect_err(|error| skip(&error.to_string())).ok()
}

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Numbers of the architectures that a fatbin has machine code and PTX for.
///
/// A header of 16 bytes, then entries: kind (1 PTX, 2 machine code) and two bytes, the length of the entry's header, the
/// length of what follows it; the architecture is at byte 28.
fn contents(image: &[u8]) -> (Vec<u32>, Vec<u32>) {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 0xba55_ed50, "no fatbin");
    let (mut code, mut ptx) = (Vec::new(), Vec::new());
    let end = 16 + word(8) as usize;
    let mut at = 16;
    while at < end {
        match word(at) as u16 {
            1 => ptx.push(word(at + 28)),
            2 => code.push(word(at + 28)),
            kind => panic!("an entry of kind {kind}"),
        }
        at += (word(at + 4) + word(at + 8)) as usize;
    }
    assert_eq!(at, image.len());
    (code, ptx)
}

/// What a fatbin of these targets must hold.
fn expected(targets: Targets, archs: &[Arch]) -> (Vec<u32>, Vec<u32>) {
    let (chosen, ptx) = targets.choose(archs);
    (chosen.iter().map(|arch| arch.number).collect(), ptx.iter().map(|arch| arch.number).collect())
}

#[test]
fn this_binary_holds_the_targets_that_it_was_built_for() {
    let Some(build) = embedded() else {
        skip("this build had no nvcc");
        return;
    };
    let archs = parse_archs(build.targets).unwrap();
    let sources = kernel_sources(&kernels()).unwrap();
    for module in build.modules {
        let source = sources.iter().find(|source| module_name(source) == module.name).unwrap();
        let targets = Targets::of_source(source, &std::fs::read_to_string(source).unwrap()).unwrap();
        assert_eq!(contents(module.image), expected(targets, &archs), "{}", module.name);
    }
    // No file was left out but those for one architecture alone.
    let left_out = sources.iter().filter(|s| build.modules.iter().all(|m| m.name != module_name(s)));
    for source in left_out {
        let targets = Targets::of_source(source, &std::fs::read_to_string(source).unwrap()).unwrap();
        assert!(matches!(targets, Targets::Only(arch) if !archs.contains(&arch)), "{}", source.display());
    }
}

#[test]
fn a_fatbin_holds_what_was_asked_for() {
    let Some(nvcc) = nvcc() else { return };
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("targets");
    let source = kernels().join("layout/convert.cu");
    for (asked, code, ptx) in [("80,75,90a", vec![75, 80, 90], vec![75]), ("87", vec![87], vec![87])] {
        let options = FatbinOptions {
            includes: &[kernels().join("include")],
            archs: &parse_archs(asked).unwrap(),
            with_ptx: true,
            with_lines: false,
            cache: &cache,
        };
        let fatbin = build_fatbin(&nvcc, &source, &options).unwrap();
        assert_eq!(contents(&std::fs::read(fatbin.image).unwrap()), (code, ptx), "{asked}");
    }
}

/// Without optimisation, which takes seconds instead of minutes: what an architecture lacks is found all the same.
#[test]
fn every_file_compiles_for_targets_on_request() {
    let Some(nvcc) = nvcc() else { return };
    let sources = kernel_sources(&kernels()).unwrap();
    let mut jobs = Vec::new();
    for arch in ON_REQUEST.map(|name| Arch::parse(name).unwrap()) {
        let files = sources.iter().zip(Targets::of_files(&sources).unwrap());
        let files = files.filter(|(_, targets)| !targets.choose(&[arch]).0.is_empty());
        jobs.extend(files.map(|(source, _)| (arch, source)));
    }
    assert!(jobs.len() >= 2 * 15, "{} files", jobs.len());
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((arch, source)) = jobs.get(next.fetch_add(1, Relaxed)) {
                    let done = Command::new(nvcc.path())
                        .args(["-std=c++17", "-Xcicc", "-O0", "-Xptxas", "-O0", "-cubin"])
                        .arg(format!("-arch=sm_{arch}"))
                        .arg("-I")
                        .arg(kernels().join("include"))
                        .arg("-o")
                        .arg(folder.path().join(format!("{}-{arch}.cubin", module_name(source))))
                        .arg(source)
                        .output()
                        .unwrap();
                    if !done.status.success() {
                        let said = String::from_utf8_lossy(&done.stderr);
                        failures.lock().unwrap().push(format!("{} for sm_{arch}:\n{said}", source.display()));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
