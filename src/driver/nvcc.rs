//! nvcc: finding it, choosing targets, compiling kernel files into fatbins.
//!
//! Used by the build script for the kernels that the binary carries, and at run
//! time for kernels from a folder. A kernel file is compiled once for each
//! target, so that files and targets run in parallel and an edit recompiles
//! nothing else; `fatbinary` then joins the targets, compressed, and the driver
//! picks the image that fits the device (CUDA Compiler Driver NVCC, "Fatbinaries").

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::toolchain::{ToolError, hash_of, in_parallel, module_name, prune, read, read_dir, run_to, touch};

/// Targets compiled for when nothing else is said: every tier since Ampere. Turing (75) is there on request.
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
    /// Reads `80` or `90a`, with or without `sm_`. No architecture before 90 has specific code.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix("sm_").unwrap_or(text);
        let digits = text.strip_suffix('a').unwrap_or(text);
        let is_plain = (2..=3).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| is_plain)?;
        let is_specific = digits.len() < text.len();
        (!is_specific || number >= 90).then_some(Self { number, is_specific })
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
    let wrong = |item: &str| ToolError::Setting {
        what: ARCHS_SETTING.into(),
        value: item.to_owned(),
        reason: format!("is no target; write for example {DEFAULT_ARCHS}"),
    };
    let mut archs = Vec::new();
    for item in list.split([',', ' ']).filter(|s| !s.is_empty()) {
        archs.push(Arch::parse(item).ok_or_else(|| wrong(item))?);
    }
    if archs.is_empty() {
        return Err(wrong(list));
    }
    archs.sort();
    archs.dedup();
    Ok(archs)
}

/// The environment variable that names the targets.
pub const ARCHS_SETTING: &str = "KILN_CUDA_ARCHS";

/// An error if there is a target that none of the kernel files is for: a binary for it alone would be without kernels.
pub fn check_served(archs: &[Arch], files: &[Targets]) -> Result<(), ToolError> {
    let is_served = |arch: &Arch| files.iter().any(|file| !file.choose(&[*arch]).0.is_empty());
    let Some(arch) = archs.iter().find(|arch| !is_served(arch)) else { return Ok(()) };
    let mut allowed: Vec<String> = files.iter().map(Targets::to_string).collect();
    allowed.sort();
    allowed.dedup();
    Err(ToolError::Setting {
        what: ARCHS_SETTING.into(),
        value: arch.to_string(),
        reason: format!("is a target that no kernel file is for; there are files for {}", allowed.join(", ")),
    })
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
    /// Reads the first line of a kernel file, which must name them.
    pub fn of_source(path: &Path, text: &str) -> Result<Self, ToolError> {
        let first = text.lines().next().unwrap_or_default();
        let named = first.strip_prefix("//").and_then(|l| l.trim().strip_prefix("targets:"));
        match named.and_then(Arch::parse) {
            Some(arch) if arch.is_specific => Ok(Self::Only(arch)),
            Some(arch) => Ok(Self::From(arch.number)),
            None => Err(ToolError::Setting {
                what: format!("first line of {}", path.display()),
                value: named.unwrap_or(first).trim().to_owned(),
                reason: "names no target; write for example \"// targets: sm_80\"".into(),
            }),
        }
    }

    /// The targets of every one of these kernel files.
    pub fn of_files(sources: &[PathBuf]) -> Result<Vec<Self>, ToolError> {
        let of = |path: &PathBuf| Self::of_source(path, &String::from_utf8_lossy(&read(path)?));
        sources.iter().map(of).collect()
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

impl std::fmt::Display for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::From(floor) => write!(f, "{floor} and later"),
            Self::Only(arch) => write!(f, "{arch}"),
        }
    }
}

/// Environment variables by name.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

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
        Self::find_by(&|name| std::env::var_os(name), venvs)
    }

    fn find_by(environment: Environment<'_>, venvs: &[PathBuf]) -> Result<Self, ToolError> {
        let named = environment("KILN_NVCC").filter(|v| !v.is_empty());
        if named.as_ref().is_some_and(|v| v == "none") {
            let looked = "KILN_NVCC=none".into();
            return Err(ToolError::Missing { tool: "nvcc", looked, hint: "unset KILN_NVCC to look for one" });
        }
        if let Some(named) = named {
            return Self::at(Path::new(&named)).ok_or_else(|| ToolError::Missing {
                tool: "nvcc",
                looked: format!("KILN_NVCC={}", Path::new(&named).display()),
                hint: "name an nvcc that runs, or unset KILN_NVCC",
            });
        }
        candidates("nvcc", environment, venvs).into_iter().find_map(|path| Self::at(&path)).ok_or(
            ToolError::Missing {
                tool: "nvcc",
                looked: "KILN_NVCC, CUDA_HOME, CUDA_PATH, PATH, Python's site-packages".into(),
                hint: "install the CUDA toolkit, or: pip install 'nvidia-cuda-nvcc==13.0.*' \
                   'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
                   'nvidia-cuda-cccl==13.0.*'",
            },
        )
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

    /// Architectures that it compiles for, without the specific code of some.
    pub fn targets(&self) -> Vec<Arch> {
        let Ok(done) = Command::new(&self.path).arg("--list-gpu-code").output() else { return Vec::new() };
        let listed = String::from_utf8_lossy(&done.stdout);
        let mut archs: Vec<Arch> = listed.split_whitespace().filter_map(Arch::parse).collect();
        archs.retain(|arch| !arch.is_specific);
        archs.sort();
        archs
    }

    /// Another program of the toolkit.
    fn sibling(&self, name: &str) -> PathBuf {
        let folder = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        folder.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX))
    }
}

/// A program of the toolkit, such as `nvdisasm`: looked for where nvcc is looked for.
pub fn find_tool(name: &str, venvs: &[PathBuf]) -> Option<PathBuf> {
    let environment = |name: &str| std::env::var_os(name);
    candidates(name, &environment, venvs).into_iter().find(|path| path.is_file())
}

fn candidates(name: &str, environment: Environment<'_>, venvs: &[PathBuf]) -> Vec<PathBuf> {
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let mut found = Vec::new();
    if let Some(nvcc) = environment("KILN_NVCC").filter(|v| !v.is_empty() && v != "none") {
        found.push(Path::new(&nvcc).with_file_name(&file));
    }
    for home in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(environment) {
        found.push(Path::new(&home).join("bin").join(&file));
    }
    if let Some(path) = environment("PATH") {
        found.extend(std::env::split_paths(&path).map(|dir| dir.join(&file)).filter(|p| p.is_file()));
    }
    found.push(Path::new("/usr/local/cuda/bin").join(&file));
    let active = environment("VIRTUAL_ENV").map(PathBuf::from);
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
        assert_eq!(choose("// targets: sm_75"), (DEFAULT_ARCHS.into(), Some("80".into())));
        assert!(of("// targets: sm_9x").unwrap_err().to_string().contains("sm_9x"));
        assert!(of("// Something else").unwrap_err().to_string().contains("write for example"));
        for malformed in ["80,sm90b", "8", "75a", "100f", ",", ""] {
            let said = parse_archs(malformed).unwrap_err().to_string();
            assert!(said.starts_with("KILN_CUDA_ARCHS: ") && said.contains(DEFAULT_ARCHS), "{said}");
        }
        let hopper_alone = parse_archs("90a").unwrap();
        assert_eq!(Targets::From(80).choose(&hopper_alone), (hopper_alone, None));
        assert_eq!(Arch::of_device(9, 0).to_string(), "90a");
        assert_eq!(Arch::of_device(8, 6).to_string(), "86");
    }

    #[test]
    fn a_target_without_kernels_is_an_error() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        // Every file says what it is for, or this is an error.
        let files = Targets::of_files(&super::super::toolchain::kernel_sources(&kernels).unwrap()).unwrap();
        for list in [DEFAULT_ARCHS, "75", "75,80", "87", "90", "103,110,121"] {
            check_served(&parse_archs(list).unwrap(), &files).unwrap();
        }
        let said = check_served(&parse_archs("70,80").unwrap(), &files).unwrap_err().to_string();
        assert_eq!(
            said,
            "KILN_CUDA_ARCHS: \"70\" is a target that no kernel file is for; \
             there are files for 75 and later, 90a"
        );
        // 75 is compiled for as any other, and its PTX is the lowest.
        let asked = parse_archs("75,80,90a").unwrap();
        let chosen = Targets::From(75).choose(&asked);
        assert_eq!(chosen, (asked, Arch::parse("75")));
    }

    #[cfg(unix)]
    #[test]
    fn nvcc_is_looked_for_in_this_order() {
        use std::os::unix::fs::PermissionsExt;

        let dir = tempfile::tempdir().unwrap();
        let make = |folder: &str, version: &str| {
            let folder = dir.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            let path = folder.join("nvcc");
            fs::write(&path, format!("#!/bin/sh\necho 'Cuda compilation tools, release 1, V{version}'\n"))
                .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let named = make("named", "1.0");
        make("home/bin", "2.0");
        make("path-variable/bin", "3.0");
        let on_path = make("on-path", "4.0");
        make("venv/lib/python3/site-packages/nvidia/cu12/bin", "5.0");
        make("venv/lib/python3/site-packages/nvidia/cu13/bin", "6.0");
        let place = |name: &str| Some(dir.path().join(name).into_os_string());
        let mut variables: BTreeMap<&str, Option<OsString>> = BTreeMap::from([
            ("KILN_NVCC", Some(named.into_os_string())),
            ("CUDA_HOME", place("home")),
            ("CUDA_PATH", place("path-variable")),
            ("PATH", on_path.parent().map(|p| p.as_os_str().to_owned())),
        ]);
        let venvs = [dir.path().join("venv")];
        let mut found = Vec::new();
        for next in ["", "KILN_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
            variables.remove(next);
            let nvcc = Nvcc::find_by(&|name| variables.get(name).cloned().flatten(), &venvs).unwrap();
            found.push(nvcc.version().to_owned());
        }
        let is_installed = Path::new("/usr/local/cuda/bin/nvcc").is_file();
        assert_eq!(found[..4], ["1.0", "2.0", "3.0", "4.0"]);
        // Of the wheels the newest; a toolkit where the installer puts it comes before them.
        assert!(is_installed || found[4] == "6.0", "{found:?}");

        // A name that leads nowhere is an error, not a reason to look elsewhere; `none` finds none.
        for (value, said) in [("none", "KILN_NVCC=none"), ("/nowhere/nvcc", "KILN_NVCC=/nowhere/nvcc")] {
            let only = |name: &str| (name == "KILN_NVCC").then(|| value.into());
            let error = Nvcc::find_by(&only, &venvs).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
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
