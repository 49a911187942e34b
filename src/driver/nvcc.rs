//! nvcc: finding it, choosing targets, compiling kernel files into fatbins.
//!
//! Used by the build script for the kernels that the binary carries, and at run
//! time for kernels from a folder. A kernel file is compiled once for each
//! target, so that files and targets run in parallel and an edit recompiles
//! nothing else; `fatbinary` then joins the targets, compressed, and the driver
//! picks the image that fits the device (CUDA Compiler Driver NVCC, "Fatbinaries").

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::toolchain::{ToolError, hash_of, in_parallel, module_name, prune, read, read_dir, run_to, touch};

/// Targets compiled for when nothing else is said: every tier since Ampere.
pub const DEFAULT_ARCHS: &str = "80,86,89,90a,100a,120";

const JOIN_FLAGS: [&str; 2] = ["-64", "--compress-mode=size"];

/// A target of nvcc, such as 90a.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// Ten times the major plus the minor compute capability.
    pub number: u32,
    /// Code for this very architecture (`a`), with instructions that no other has.
    pub is_specific: bool,
}

impl Arch {
    /// Reads `80` or `90a`, with or without `sm_`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix("sm_").unwrap_or(text);
        let digits = text.strip_suffix('a').unwrap_or(text);
        let is_plain = (2..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| is_plain)?;
        Some(Self { number, is_specific: digits.len() < text.len() })
    }

    /// The target that fits a device best: the specific one where kernels are written for it.
    pub fn of_device(major: u32, minor: u32) -> Self {
        let number = major * 10 + minor;
        Self { number, is_specific: matches!(number, 90 | 100) }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.number, if self.is_specific { "a" } else { "" })
    }
}

/// Reads a list of targets, such as [`DEFAULT_ARCHS`].
pub fn parse_archs(list: &str) -> Result<Vec<Arch>, ToolError> {
    let mut archs = Vec::new();
    for item in list.split([',', ' ']).filter(|s| !s.is_empty()) {
        let arch = Arch::parse(item).ok_or_else(|| ToolError::Setting {
            what: "KILN_CUDA_ARCHS".into(),
            value: item.to_owned(),
            reason: format!("is no target; write for example {DEFAULT_ARCHS}"),
        })?;
        archs.push(arch);
    }
    archs.sort();
    archs.dedup();
    Ok(archs)
}

/// What a kernel file says of its targets in its first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Targets {
    /// `// targets: sm_80`: this one and all later ones.
    From(u32),
    /// `// targets: sm_90a`: this one alone.
    Only(Arch),
}

impl Targets {
    /// Reads the first line of a kernel file; `sm_80` if it says nothing.
    pub fn of_source(path: &Path, text: &str) -> Result<Self, ToolError> {
        let first = text.lines().next().unwrap_or_default();
        let Some(named) = first.strip_prefix("//").and_then(|l| l.trim().strip_prefix("targets:")) else {
            return Ok(Self::From(80));
        };
        match Arch::parse(named) {
            Some(arch) if arch.is_specific => Ok(Self::Only(arch)),
            Some(arch) => Ok(Self::From(arch.number)),
            None => Err(ToolError::Setting {
                what: format!("first line of {}", path.display()),
                value: named.trim().to_owned(),
                reason: "is no target; write for example \"// targets: sm_80\"".into(),
            }),
        }
    }

    /// Those of `archs` that the file is compiled for, and the one whose PTX is kept for later devices.
    pub fn choose(self, archs: &[Arch]) -> (Vec<Arch>, Option<Arch>) {
        match self {
            Self::Only(only) => (archs.iter().copied().filter(|a| *a == only).collect(), None),
            Self::From(floor) => {
                let chosen: Vec<Arch> = archs.iter().copied().filter(|a| a.number >= floor).collect();
                let lowest = chosen.iter().copied().find(|a| !a.is_specific);
                (chosen, lowest)
            }
        }
    }
}

/// An nvcc that runs.
#[derive(Clone, Debug)]
pub struct Nvcc {
    path: PathBuf,
    version: String,
}

impl Nvcc {
    /// Finds nvcc: `KILN_NVCC`, `CUDA_HOME`, `CUDA_PATH`, the `PATH`, and the
    /// places where the wheels from PyPI put it, in the virtual environments
    /// `venvs` and `VIRTUAL_ENV` and for the Python on the `PATH`.
    ///
    /// `KILN_NVCC=none` finds none, for a build without CUDA kernels.
    pub fn find(venvs: &[PathBuf]) -> Result<Self, ToolError> {
        if std::env::var_os("KILN_NVCC").is_some_and(|v| v == "none") {
            let looked = "KILN_NVCC=none".into();
            return Err(ToolError::Missing { tool: "nvcc", looked, hint: "unset KILN_NVCC to look for one" });
        }
        if let Some(named) = std::env::var_os("KILN_NVCC").filter(|v| !v.is_empty()) {
            return Self::at(Path::new(&named)).ok_or_else(|| ToolError::Missing {
                tool: "nvcc",
                looked: format!("KILN_NVCC={}", Path::new(&named).display()),
                hint: "name an nvcc that runs, or unset KILN_NVCC",
            });
        }
        candidates("nvcc", venvs).into_iter().find_map(|path| Self::at(&path)).ok_or(ToolError::Missing {
            tool: "nvcc",
            looked: "KILN_NVCC, CUDA_HOME, CUDA_PATH, PATH, Python's site-packages".into(),
            hint: "install the CUDA toolkit, or: pip install 'nvidia-cuda-nvcc==13.0.*' \
                   'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
                   'nvidia-cuda-cccl==13.0.*'",
        })
    }

    fn at(path: &Path) -> Option<Self> {
        let done = Command::new(path).arg("--version").output().ok().filter(|d| d.status.success())?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let version = said.rsplit_once(", V")?.1.split_whitespace().next()?.to_owned();
        Some(Self { path: path.to_owned(), version })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, such as 13.0.88.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether it compiles for `arch`.
    pub fn supports(&self, arch: Arch) -> bool {
        let Ok(done) = Command::new(&self.path).arg("--list-gpu-code").output() else { return false };
        let plain = format!("sm_{}", arch.number);
        String::from_utf8_lossy(&done.stdout).split_whitespace().any(|code| code == plain)
    }

    /// Another program of the toolkit.
    fn sibling(&self, name: &str) -> PathBuf {
        let folder = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        folder.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX))
    }
}

/// A program of the toolkit, such as `nvdisasm`: looked for where nvcc is looked for.
pub fn find_tool(name: &str, venvs: &[PathBuf]) -> Option<PathBuf> {
    candidates(name, venvs).into_iter().find(|path| path.is_file())
}

fn candidates(name: &str, venvs: &[PathBuf]) -> Vec<PathBuf> {
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let mut found = Vec::new();
    if let Some(nvcc) = std::env::var_os("KILN_NVCC").filter(|v| !v.is_empty() && v != "none") {
        found.push(Path::new(&nvcc).with_file_name(&file));
    }
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os) {
        found.push(Path::new(&home).join("bin").join(&file));
    }
    if let Some(path) = std::env::var_os("PATH") {
        found.extend(std::env::split_paths(&path).map(|dir| dir.join(&file)).filter(|p| p.is_file()));
    }
    found.push(Path::new("/usr/local/cuda/bin").join(&file));
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    for venv in active.iter().chain(venvs) {
        for lib in read_dir(&venv.join("lib")).unwrap_or_default() {
            found.extend(in_site_packages(&lib.join("site-packages"), &file));
        }
        found.extend(in_site_packages(&venv.join("Lib").join("site-packages"), &file));
    }
    if !found.iter().any(|path| path.is_file()) {
        found.extend(python_site_packages().iter().flat_map(|dir| in_site_packages(dir, &file)));
    }
    found
}

/// The layout of the CUDA wheels: `nvidia/cu13/bin`.
fn in_site_packages(packages: &Path, file: &str) -> Vec<PathBuf> {
    let toolkits = read_dir(&packages.join("nvidia")).unwrap_or_default();
    toolkits.into_iter().rev().map(|t| t.join("bin").join(file)).filter(|p| p.is_file()).collect()
}

fn python_site_packages() -> Vec<PathBuf> {
    let ask = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let answers = ["python3", "python"].map(|python| Command::new(python).args(["-c", ask]).output());
    let texts = answers.into_iter().flatten().filter(|done| done.status.success());
    texts.map(|done| PathBuf::from(String::from_utf8_lossy(&done.stdout).trim())).collect()
}

/// What to compile and where to keep it.
#[derive(Clone, Debug)]
pub struct FatbinOptions<'a> {
    /// Folders of headers, in order.
    pub includes: &'a [PathBuf],
    /// Targets; each kernel file takes those that fit it.
    pub archs: &'a [Arch],
    /// Keep PTX of the lowest target, for devices later than all targets.
    pub with_ptx: bool,
    /// Keep line numbers, for profilers and sanitizers.
    pub with_lines: bool,
    /// Folder of compiled objects, by the hash of what they were made from.
    pub cache: &'a Path,
}

/// A compiled kernel file.
#[derive(Clone, Debug)]
pub struct Fatbin {
    /// Module: file stem of the source.
    pub module: String,
    /// Folder of the source.
    pub family: String,
    /// What the file says of its targets.
    pub targets: Targets,
    /// The fatbin.
    pub image: PathBuf,
    /// Machine code of each target.
    pub cubins: Vec<(Arch, PathBuf)>,
    /// What `ptxas -v` said, after a line `== family/module sm_N` for each target.
    pub log: String,
}

/// One run of nvcc.
struct Job<'a> {
    source: &'a Path,
    targets: Targets,
    arch: Arch,
    is_ptx: bool,
    /// Hash of the source and all it includes.
    content: u64,
}

/// Compiles one kernel file.
pub fn build_fatbin(nvcc: &Nvcc, source: &Path, options: &FatbinOptions<'_>) -> Result<Fatbin, ToolError> {
    let fatbins = build_fatbins(nvcc, &[source.to_owned()], options)?;
    fatbins.into_iter().next().ok_or_else(|| ToolError::Setting {
        what: format!("targets of {}", source.display()),
        value: options.archs.iter().map(Arch::to_string).collect::<Vec<_>>().join(","),
        reason: "fits none of them".into(),
    })
}

/// Compiles kernel files, as many at a time as there are cores. Files whose
/// targets are not among those asked for are left out.
pub fn build_fatbins(
    nvcc: &Nvcc,
    sources: &[PathBuf],
    options: &FatbinOptions<'_>,
) -> Result<Vec<Fatbin>, ToolError> {
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| ToolError::File { path, source }
    };
    fs::create_dir_all(options.cache).map_err(file_error(options.cache))?;
    let mut jobs = Vec::new();
    for source in sources {
        let content = content_hash(source, options.includes)?;
        let text = read(source)?;
        let targets = Targets::of_source(source, &String::from_utf8_lossy(&text))?;
        let (archs, ptx) = targets.choose(options.archs);
        let ptx = ptx.filter(|_| options.with_ptx).map(|arch| (arch, true));
        let runs = archs.into_iter().map(|arch| (arch, false)).chain(ptx);
        jobs.extend(runs.map(|(arch, is_ptx)| Job { source, targets, arch, is_ptx, content }));
    }
    let objects = in_parallel(&jobs, |job| compile(nvcc, job, options))?;
    let mut by_source: BTreeMap<&Path, Vec<(&Job<'_>, PathBuf)>> = BTreeMap::new();
    for (job, object) in jobs.iter().zip(objects) {
        by_source.entry(job.source).or_default().push((job, object));
    }
    let files: Vec<_> = by_source.into_iter().collect();
    let fatbins = in_parallel(&files, |(source, objects)| join(nvcc, source, objects, options.cache))?;
    prune(options.cache);
    Ok(fatbins)
}

fn flags(job: &Job<'_>, options: &FatbinOptions<'_>) -> Vec<String> {
    let mut flags = vec!["-std=c++17".to_owned(), "-O3".to_owned()];
    if job.is_ptx {
        flags.extend(["-ptx".to_owned(), format!("-arch=compute_{}", job.arch)]);
    } else {
        flags.extend(["-cubin".to_owned(), format!("-arch=sm_{}", job.arch)]);
        flags.extend(["-Xptxas".to_owned(), "-v".to_owned()]);
    }
    if options.with_lines {
        flags.push("-lineinfo".to_owned());
    }
    flags
}

/// Compiles for one target, unless that was done before. What ptxas said lies beside the object.
fn compile(nvcc: &Nvcc, job: &Job<'_>, options: &FatbinOptions<'_>) -> Result<PathBuf, ToolError> {
    let flags = flags(job, options);
    let hash = hash_of(&(job.content, &flags, &nvcc.version));
    let extension = if job.is_ptx { "ptx" } else { "cubin" };
    let name = format!("{}-{}-{hash:016x}", module_name(job.source), job.arch);
    let object = options.cache.join(&name).with_extension(extension);
    let log = object.with_extension("ptxas");
    if object.exists() && (job.is_ptx || log.exists()) {
        touch(&object);
        touch(&log);
        return Ok(object);
    }
    // The log takes its place first: an object without one counts as not compiled.
    let unlogged = object.with_extension(format!("{extension}-new{}", std::process::id()));
    let said = run_to(&unlogged, job.source, |partial| {
        let mut command = Command::new(&nvcc.path);
        command.args(&flags);
        for folder in options.includes {
            command.arg("-I").arg(folder);
        }
        command.arg("-o").arg(partial).arg(job.source);
        command
    })?;
    if !job.is_ptx {
        fs::write(&log, said).map_err(|source| ToolError::File { path: log.clone(), source })?;
    }
    fs::rename(&unlogged, &object).map_err(|source| ToolError::File { path: object.clone(), source })?;
    Ok(object)
}

/// Joins the targets of one kernel file into a fatbin, compressed for size.
fn join(
    nvcc: &Nvcc,
    source: &Path,
    objects: &[(&Job<'_>, PathBuf)],
    cache: &Path,
) -> Result<Fatbin, ToolError> {
    let module = module_name(source);
    let family = source.parent().map(module_name).unwrap_or_default();
    let names: Vec<_> = objects.iter().map(|(_, path)| path.file_name()).collect();
    let image = cache.join(format!("{module}-{:016x}.fatbin", hash_of(&(names, JOIN_FLAGS, &nvcc.version))));
    if image.exists() {
        touch(&image);
    } else {
        run_to(&image, source, |partial| {
            let mut command = Command::new(nvcc.sibling("fatbinary"));
            command.args(JOIN_FLAGS);
            command.arg(format!("--create={}", partial.display()));
            command.args(objects.iter().map(|(job, path)| {
                let kind = if job.is_ptx { "ptx" } else { "elf" };
                format!("--image3=kind={kind},sm={},file={}", job.arch, path.display())
            }));
            command
        })?;
    }
    let targets = objects.first().map_or(Targets::From(0), |(job, _)| job.targets);
    let mut log = String::new();
    let mut cubins = Vec::new();
    for (job, path) in objects.iter().filter(|(job, _)| !job.is_ptx) {
        let said = read(&path.with_extension("ptxas"))?;
        log += &format!("== {family}/{module} sm_{}\n{}", job.arch, String::from_utf8_lossy(&said));
        cubins.push((job.arch, path.clone()));
    }
    Ok(Fatbin { module, family, targets, image, cubins, log })
}

/// Hash of a source and of everything that it includes with quotes, itself or
/// through others. What is not found is a header of the toolkit or of the SIMT layer.
fn content_hash(source: &Path, includes: &[PathBuf]) -> Result<u64, ToolError> {
    let mut seen = BTreeMap::new();
    let mut open = vec![source.to_owned()];
    while let Some(path) = open.pop() {
        if seen.contains_key(&path) {
            continue;
        }
        let text = read(&path)?;
        let beside = path.parent().map(Path::to_owned);
        for line in String::from_utf8_lossy(&text).lines() {
            let Some(rest) = line.trim().strip_prefix('#').map(str::trim_start) else { continue };
            let named = rest.strip_prefix("include").and_then(|r| r.split('"').nth(1));
            let Some(named) = named else { continue };
            let places = beside.iter().chain(includes).map(|folder| folder.join(named));
            open.extend(places.filter(|place| place.is_file()).take(1));
        }
        seen.insert(path, text);
    }
    // By name without folder: the same sources elsewhere are the same objects.
    let files: Vec<_> = seen.iter().map(|(path, text)| (path.file_name(), text)).collect();
    Ok(hash_of(&files))
}

/// What ptxas made of one kernel for one target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Folder of the source.
    pub family: String,
    /// File stem of the source.
    pub module: String,
    /// Target, such as `sm_80`.
    pub target: String,
    /// Kernel or device function.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Stack of a thread in bytes: spills, and arrays that are indexed at run time.
    pub stack: u32,
    /// Bytes spilled, stores and loads together.
    pub spilled: u32,
}

/// Reads [`Fatbin::log`].
pub fn parse_resources(log: &str) -> Vec<Resources> {
    let mut found: Vec<Resources> = Vec::new();
    let (mut family, mut module, mut target) = (String::new(), String::new(), String::new());
    let number = |text: &str| text.split_whitespace().rev().find_map(|word| word.parse().ok()).unwrap_or(0);
    for line in log.lines() {
        if let Some((path, arch)) = line.strip_prefix("== ").and_then(|l| l.split_once(' ')) {
            let (folder, stem) = path.split_once('/').unwrap_or(("", path));
            (family, module, target) = (folder.into(), stem.into(), arch.into());
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            found.push(Resources {
                family: family.clone(),
                module: module.clone(),
                target: target.clone(),
                name: name.trim().to_owned(),
                ..Resources::default()
            });
        } else if let Some(last) = found.last_mut() {
            if let Some((stack, rest)) = line.split_once(" bytes stack frame") {
                last.stack = number(stack);
                last.spilled = rest.split(" bytes spill").map(number).sum();
            } else if let Some((_, used)) = line.split_once(": Used ") {
                last.registers = number(used.split(" registers").next().unwrap_or_default());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_and_chosen() {
        let archs = parse_archs(DEFAULT_ARCHS).unwrap();
        let names = |list: &[Arch]| list.iter().map(Arch::to_string).collect::<Vec<_>>().join(",");
        assert_eq!(names(&archs), DEFAULT_ARCHS);
        let of = |line: &str| Targets::of_source(Path::new("x.cu"), line);
        let choose = |line: &str| {
            let (chosen, ptx) = of(line).unwrap().choose(&archs);
            (names(&chosen), ptx.map(|a| a.to_string()))
        };
        assert_eq!(choose("// targets: sm_90a\n#include"), ("90a".into(), None));
        assert_eq!(choose("// targets: sm_89"), ("89,90a,100a,120".into(), Some("89".into())));
        assert_eq!(choose("// Something else"), (DEFAULT_ARCHS.into(), Some("80".into())));
        assert!(of("// targets: sm_9x").unwrap_err().to_string().contains("sm_9x"));
        assert!(parse_archs("80,sm90b").is_err());
        let hopper_alone = parse_archs("90a").unwrap();
        assert_eq!(Targets::From(80).choose(&hopper_alone), (hopper_alone, None));
        assert_eq!(Arch::of_device(9, 0).to_string(), "90a");
        assert_eq!(Arch::of_device(8, 6).to_string(), "86");
    }

    #[test]
    fn resources_are_read_from_ptxas() {
        let log = "== gemm/gemm_sm80 sm_86\n\
            ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'gemm_f16' for 'sm_86'\n\
            ptxas info    : Function properties for gemm_f16\n    \
            16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 408 bytes cmem[0]\n\
            == gemm/gemm_sm90 sm_90a\n\
            ptxas info    : Function properties for gemm_bf16\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 0 barriers\n";
        let found = parse_resources(log);
        assert_eq!(found.len(), 2);
        let first = &found[0];
        assert_eq!((first.module.as_str(), first.target.as_str()), ("gemm_sm80", "sm_86"));
        assert_eq!(
            (first.name.as_str(), first.registers, first.stack, first.spilled),
            ("gemm_f16", 255, 16, 20)
        );
        let second = &found[1];
        assert_eq!(
            (second.name.as_str(), second.registers, second.stack, second.spilled),
            ("gemm_bf16", 168, 0, 0)
        );
    }

    #[test]
    fn an_included_header_changes_the_hash() {
        let dir = std::env::temp_dir().join(format!("kiln-nvcc-{}", std::process::id()));
        let include = dir.join("include");
        fs::create_dir_all(&include).unwrap();
        let source = dir.join("k.cu");
        fs::write(&source, "#include \"a.cuh\"\n# include \"missing.h\"\n").unwrap();
        fs::write(include.join("a.cuh"), "#include \"b.cuh\"\n").unwrap();
        fs::write(include.join("b.cuh"), "one").unwrap();
        fs::write(include.join("other.cuh"), "one").unwrap();
        let hash = || content_hash(&source, std::slice::from_ref(&include)).unwrap();
        let before = hash();
        fs::write(include.join("other.cuh"), "two").unwrap();
        assert_eq!(hash(), before);
        fs::write(include.join("b.cuh"), "two").unwrap();
        assert_ne!(hash(), before);
        fs::remove_dir_all(&dir).unwrap();
    }
}
