//! Compiles the kernels: with nvcc for the GPU, with a C++ compiler for the SIMT layer.
//!
//! Neither is needed. Without nvcc (`KILN_NVCC`, `CUDA_HOME`, the `PATH`, Python's
//! site-packages; `none` for none) the binary says "CUDA: not built"; without a
//! C++ compiler there is no SIMT device. `KILN_CUDA_ARCHS` names the targets.
//! Objects are kept by content hash in `KILN_KERNEL_CACHE`, or in the profile's
//! folder of the target directory, so that only what changed is compiled.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

#[allow(dead_code)]
#[path = "src/driver/nvcc.rs"]
mod nvcc;
#[allow(dead_code)]
#[path = "src/driver/toolchain.rs"]
mod toolchain;

use nvcc::{
    ARCHS_SETTING, Arch, DEFAULT_ARCHS, Fatbin, FatbinOptions, Nvcc, Targets, build_fatbins, check_served,
    parse_archs,
};
use toolchain::{SimtVariant, ToolError, build_simt, kernel_sources};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let kernels = root.join("kernels");
    let cache = env::var_os("KILN_KERNEL_CACHE").map_or_else(|| default_cache(&out), PathBuf::from);
    for file in ["kernels", "build.rs", "src/driver/nvcc.rs", "src/driver/toolchain.rs"] {
        println!("cargo:rerun-if-changed={file}");
    }
    for variable in ["KILN_NVCC", "KILN_CUDA_ARCHS", "KILN_KERNEL_CACHE", "CUDA_HOME", "CUDA_PATH", "CXX"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rustc-check-cfg=cfg(kiln_build_script)");
    println!("cargo:rustc-cfg=kiln_build_script");
    simt(&kernels, &cache.join("simt"));
    let built = headers(&kernels, &out).and_then(|()| cuda(&root, &kernels, &cache.join("cuda"), &out));
    if let Err(error) = built {
        println!("cargo:warning=the CUDA kernels could not be built; KILN_NVCC=none builds without them");
        eprintln!("{error}");
        std::process::exit(1);
    }
}

/// A folder beside `build` in the target directory: unlike `OUT_DIR` it outlives a change of dependencies.
fn default_cache(out: &Path) -> PathBuf {
    let build = out.ancestors().find(|p| p.file_name().is_some_and(|n| n == "build"));
    build.and_then(Path::parent).unwrap_or(out).join("kernel-cache")
}

/// Builds the SIMT layer; its path reaches tests and `--device simt` through the environment of the compiler.
fn simt(kernels: &Path, cache: &Path) {
    let target = |name: &str| env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("ARCH") != "x86_64" || target("OS") != "linux" {
        return;
    }
    for (variant, variable) in
        [(SimtVariant::Fast, "KILN_SIMT_FAST"), (SimtVariant::Checked, "KILN_SIMT_CHECKED")]
    {
        match build_simt(kernels, &[], cache, variant) {
            Ok(library) => println!("cargo:rustc-env={variable}={}", library.display()),
            // The product does not need it, and not every C++ compiler knows what it is written with.
            Err(error) => {
                println!("cargo:warning=no SIMT layer");
                for line in error.to_string().lines().take(20) {
                    println!("cargo:warning={line}");
                }
                return;
            }
        }
    }
}

/// Writes `headers.rs`, which embeds the kernels' headers: a folder of kernels need not repeat them.
fn headers(kernels: &Path, out: &Path) -> Result<(), ToolError> {
    let mut text = String::from("&[\n");
    for path in toolchain::read_dir(&kernels.join("include"))? {
        let name = path.file_name().unwrap_or_default();
        let _ = writeln!(text, "({name:?}, include_str!({path:?})),");
    }
    write(&out.join("headers.rs"), (text + "]\n").as_bytes())
}

/// Compiles the kernels for every target and writes `kernels.rs`, which embeds them.
fn cuda(root: &Path, kernels: &Path, cache: &Path, out: &Path) -> Result<(), ToolError> {
    let folder = out.join("kernels");
    fs::create_dir_all(&folder).map_err(|source| ToolError::File { path: folder.clone(), source })?;
    let venvs = [".venv", "venv", "target/nvcc"].map(|name| root.join(name));
    let nvcc = match Nvcc::find(&venvs) {
        Ok(nvcc) => nvcc,
        Err(error) if env::var_os("KILN_NVCC").is_some_and(|v| !v.is_empty() && v != "none") => {
            return Err(error);
        }
        Err(error) => {
            println!("cargo:warning=built without CUDA kernels: {error}");
            println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");
            return write(&out.join("kernels.rs"), "None".as_bytes());
        }
    };
    println!("cargo:rerun-if-changed={}", nvcc.path().display());
    let sources = kernel_sources(kernels)?;
    let archs = archs(&nvcc, &Targets::of_files(&sources)?)?;
    let options = FatbinOptions {
        includes: &[kernels.join("include")],
        archs: &archs,
        with_ptx: true,
        with_lines: false,
        cache,
    };
    let fatbins = build_fatbins(&nvcc, &sources, &options)?;
    let mut log = String::new();
    // What an earlier build left must not be taken for this one's.
    for stale in toolchain::read_dir(&folder)? {
        let is_kept = fatbins.iter().any(|f| stale == folder.join(format!("{}.fatbin", f.module)));
        if !is_kept {
            let _ = fs::remove_file(stale);
        }
    }
    for fatbin in &fatbins {
        log += &fatbin.log;
        write(&folder.join(format!("{}.fatbin", fatbin.module)), &toolchain::read(&fatbin.image)?)?;
        for (arch, cubin) in fatbin.cubins.iter().filter(|(arch, _)| fatbin.targets == Targets::Only(*arch)) {
            let name = format!("{}.sm_{arch}.cubin", fatbin.module);
            write(&folder.join(name), &toolchain::read(cubin)?)?;
        }
    }
    write(&folder.join("ptxas.txt"), log.as_bytes())?;
    println!("cargo:rustc-env=KILN_KERNEL_OBJECTS={}", folder.display());
    write(&out.join("kernels.rs"), table(&nvcc, &archs, &fatbins, &folder).as_bytes())
}

/// The targets asked for, or those of the usual ones that this nvcc knows.
fn archs(nvcc: &Nvcc, files: &[Targets]) -> Result<Vec<Arch>, ToolError> {
    let asked = env::var(ARCHS_SETTING).ok().filter(|list| !list.trim().is_empty());
    let mut archs = parse_archs(asked.as_deref().unwrap_or(DEFAULT_ARCHS))?;
    check_served(&archs, files)?;
    let known = nvcc.targets();
    let is_known = |arch: &Arch| known.iter().any(|k| k.number == arch.number);
    if let Some(unknown) = archs.iter().find(|arch| !is_known(arch)).copied() {
        let names: Vec<String> = known.iter().map(Arch::to_string).collect();
        if asked.is_some() {
            return Err(ToolError::Setting {
                what: ARCHS_SETTING.into(),
                value: unknown.to_string(),
                reason: format!(
                    "is not a target of nvcc {}, which knows {}",
                    nvcc.version(),
                    names.join(", ")
                ),
            });
        }
        archs.retain(is_known);
        println!("cargo:warning=nvcc {} does not know sm_{unknown}: left out", nvcc.version());
    }
    Ok(archs)
}

/// The source text of the table of kernels.
fn table(nvcc: &Nvcc, archs: &[Arch], fatbins: &[Fatbin], folder: &Path) -> String {
    let names: Vec<String> = archs.iter().map(|arch| format!("sm_{arch}")).collect();
    let mut text = format!(
        "Some(KernelBuild {{ compiler: \"nvcc {}\", targets: {:?}, modules: &[\n",
        nvcc.version(),
        names.join(" ")
    );
    for Fatbin { module, family, .. } in fatbins {
        let image = folder.join(format!("{module}.fatbin"));
        let _ = writeln!(
            text,
            "Module {{ name: {module:?}, family: {family:?}, image: include_bytes!({image:?}) }},"
        );
    }
    text + "] })\n"
}

/// Writes a file unless it holds `bytes` already: then what depends on it need not be built again.
fn write(path: &Path, bytes: &[u8]) -> Result<(), ToolError> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).map_err(|source| ToolError::File { path: path.to_owned(), source })
}
