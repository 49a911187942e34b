//! Compiling kernels: what nvcc ([`nvcc`](super::nvcc)) and the C++ compiler of the SIMT layer share, and the latter.
//!
//! Used by the build script and, for kernels from a folder, at run time. Every
//! object is kept under a name that holds the hash of everything it was made
//! from — source, our headers, flags, and the compiler's version, which stands
//! for its own headers — so that nothing is compiled twice.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// Objects that no build has used for this long are deleted.
const KEEP_UNUSED: Duration = Duration::from_secs(3 * 24 * 3600);

/// A compiler that is missing or refuses.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A compiler is missing.
    #[error("no {tool}: looked in {looked}; {hint}")]
    Missing {
        /// Compiler.
        tool: &'static str,
        /// Where it was looked for.
        looked: String,
        /// What to do.
        hint: &'static str,
    },
    /// A source does not compile.
    #[error("{file} does not compile:\n{output}")]
    Compile {
        /// The source.
        file: PathBuf,
        /// What the compiler said.
        output: String,
    },
    /// A setting, or a line of a kernel source, that names no target.
    #[error("{what}: {value:?} {reason}")]
    Setting {
        /// Where it stands.
        what: String,
        /// What stands there.
        value: String,
        /// What should.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Build of the SIMT layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SimtVariant {
    /// Guard pages and poison.
    Fast,
    /// Every access of a kernel is checked for bounds, initialisation and races.
    Checked,
    /// As fast, with the bodies for Turing (sm_75).
    Turing,
}

impl SimtVariant {
    /// Name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Checked => "checked",
            Self::Turing => "turing",
        }
    }
}

/// The kernel sources under `kernels`: every `.cu` file in a family folder, by path.
pub fn kernel_sources(kernels: &Path) -> Result<Vec<PathBuf>, ToolError> {
    let mut found = Vec::new();
    for family in read_dir(kernels)? {
        if family.is_dir() {
            found.extend(read_dir(&family)?.into_iter().filter(|p| p.extension().is_some_and(|e| e == "cu")));
        }
    }
    found.sort();
    Ok(found)
}

/// Module name of a kernel source: its file stem.
pub fn module_name(source: &Path) -> String {
    source.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

pub(super) fn read_dir(dir: &Path) -> Result<Vec<PathBuf>, ToolError> {
    let fail = |source| ToolError::File { path: dir.to_owned(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        paths.push(entry.map_err(fail)?.path());
    }
    paths.sort();
    Ok(paths)
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, ToolError> {
    fs::read(path).map_err(|source| ToolError::File { path: path.to_owned(), source })
}

/// What a SIMT library is made from.
#[derive(Clone, Debug)]
pub struct SimtSources {
    /// Folder of the layer itself.
    pub layer: PathBuf,
    /// Folder of the kernels' headers.
    pub headers: PathBuf,
    /// Kernel files.
    pub kernels: Vec<PathBuf>,
    /// Where objects of the same sources may lie already, besides the folder that is written.
    pub built: Option<PathBuf>,
}

/// Compiles the SIMT layer and all kernels under `kernels` into one shared
/// library in `out` and returns its path.
///
/// `extra` are further kernel sources, such as the planted bugs of a test.
pub fn build_simt(
    kernels: &Path,
    extra: &[PathBuf],
    out: &Path,
    variant: SimtVariant,
) -> Result<PathBuf, ToolError> {
    let mut all = kernel_sources(kernels)?;
    all.extend(extra.iter().cloned());
    let (layer, headers) = (kernels.join("simt"), kernels.join("include"));
    build_simt_from(&SimtSources { layer, headers, kernels: all, built: None }, out, variant)
}

/// Compiles these sources into one shared library in `out` and returns its path.
pub fn build_simt_from(from: &SimtSources, out: &Path, variant: SimtVariant) -> Result<PathBuf, ToolError> {
    let compiler = Cxx::find();
    let layer = ["simt", "ptx_emu", "check"].map(|name| from.layer.join(format!("{name}.cpp")));
    let kernels = from.kernels.iter().cloned().map(|path| (path, true));
    let sources: Vec<(PathBuf, bool)> = kernels.chain(layer.map(|path| (path, false))).collect();
    let folders = [&from.layer, &from.headers];
    let headers = headers_hash(folders)?;
    fs::create_dir_all(out).map_err(|source| ToolError::File { path: out.to_owned(), source })?;

    let objects = in_parallel(&sources, |(source, is_kernel)| {
        let flags = simt_flags(folders, variant, *is_kernel);
        let hash = compiler.hash_of_object(headers, &read(source)?, &flags);
        let name = format!("{}-{}-{hash:016x}.o", module_name(source), variant.name());
        let built = from.built.as_ref().map(|folder| folder.join(&name)).filter(|object| object.exists());
        let object = built.unwrap_or_else(|| out.join(name));
        if object.exists() {
            touch(&object);
        } else {
            run_to(&object, source, |partial| {
                let mut command = Command::new(&compiler.name);
                command.args(&flags).arg("-c").arg(source).arg("-o").arg(partial);
                command
            })?;
        }
        Ok(object)
    })?;
    let library = out.join(format!("libkiln_simt_{}-{:016x}.so", variant.name(), hash_of(&objects)));
    if library.exists() {
        touch(&library);
    } else {
        run_to(&library, &from.layer, |partial| {
            let mut command = Command::new(&compiler.name);
            command.args(["-shared", "-Wl,-Bsymbolic", "-pthread", "-o"]).arg(partial).args(&objects);
            command
        })?;
    }
    prune(out);
    Ok(library)
}

/// The C++ compiler.
struct Cxx {
    /// `CXX`, or `c++`.
    name: OsString,
    /// What it says of its version; empty if it does not run.
    version: Vec<u8>,
}

impl Cxx {
    fn find() -> Self {
        let name = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let asked = Command::new(&name).arg("--version").output();
        Self { version: asked.map(|done| done.stdout).unwrap_or_default(), name }
    }

    fn hash_of_object(&self, headers: u64, source: &[u8], flags: &[OsString]) -> u64 {
        hash_of(&(headers, source, flags, &self.name, &self.version))
    }
}

fn simt_flags(includes: [&PathBuf; 2], variant: SimtVariant, is_kernel: bool) -> Vec<OsString> {
    let mut flags: Vec<OsString> = [
        "-std=c++20",
        "-g1",
        "-fPIC",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-fno-strict-aliasing",
        "-ffp-contract=fast",
        // Inline variables must not be shared between two of these libraries in one process.
        "-fno-gnu-unique",
        "-fvisibility-inlines-hidden",
        "-ftls-model=initial-exec",
    ]
    .iter()
    .map(Into::into)
    .collect();
    if cfg!(target_arch = "x86_64") {
        flags.push("-march=x86-64-v3".into());
    }
    for folder in includes {
        flags.push("-I".into());
        flags.push(folder.into());
    }
    if is_kernel {
        // Registers start as garbage that is easy to notice; a large frame cannot jump over a stack's guard page.
        let more = ["-O2", "-x", "c++", "-ftrivial-auto-var-init=pattern", "-fstack-clash-protection"];
        flags.extend(more.iter().map(Into::into));
        match variant {
            SimtVariant::Fast => {}
            SimtVariant::Checked => flags.push("-fsanitize=thread".into()),
            SimtVariant::Turing => flags.push("-DSIMT_TURING".into()),
        }
    } else {
        flags.push("-O3".into());
        if variant == SimtVariant::Checked {
            flags.push("-DSIMT_CHECKED".into());
        }
    }
    flags
}

/// Hash of everything that sources include.
fn headers_hash([layer, headers]: [&PathBuf; 2]) -> Result<u64, ToolError> {
    let mut all = Vec::new();
    for folder in [headers, layer] {
        for path in read_dir(folder)? {
            if path.extension().is_some_and(|e| e == "cuh" || e == "hpp" || e == "h") {
                all.push((module_name(&path), read(&path)?));
            }
        }
    }
    Ok(hash_of(&all))
}

pub(super) fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Runs a compiler that writes to a partial file, which then takes the place of `output` in one step.
/// Returns what the compiler said.
pub(super) fn run_to(
    output: &Path,
    source: &Path,
    command: impl Fn(&Path) -> Command,
) -> Result<String, ToolError> {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let run = RUNS.fetch_add(1, Relaxed);
    let partial = output.with_extension(format!("partial{}-{run}", std::process::id()));
    let mut command = command(&partial);
    let tool = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|_| ToolError::Missing {
        tool: "compiler",
        looked: tool,
        hint: "install a C++ compiler, or name one in CXX",
    })?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if !done.status.success() {
        let _ = fs::remove_file(&partial);
        return Err(ToolError::Compile { file: source.to_owned(), output: said });
    }
    fs::rename(&partial, output)
        .map_err(|error| ToolError::File { path: output.to_owned(), source: error })?;
    Ok(said)
}

/// Notes that an object is in use.
pub(super) fn touch(path: &Path) {
    if let Ok(file) = fs::File::options().append(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Deletes objects that no build has used for a while. A cache that cannot be cleaned is no error.
pub(super) fn prune(cache: &Path) {
    const OURS: [&str; 6] = ["cubin", "fatbin", "o", "ptx", "ptxas", "so"];
    for path in read_dir(cache).unwrap_or_default() {
        let age = fs::metadata(&path).and_then(|m| m.modified()).ok().and_then(|m| m.elapsed().ok());
        let is_ours = path.extension().is_some_and(|e| OURS.iter().any(|ours| e == *ours));
        if is_ours && age.is_some_and(|age| age > KEEP_UNUSED) {
            let _ = fs::remove_file(path);
        }
    }
}

/// `work` on every item, on as many threads as there are cores; results in order. After an error nothing new begins.
pub(super) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, ToolError> + Sync,
) -> Result<Vec<R>, ToolError> {
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let results: Vec<Mutex<Option<Result<R, ToolError>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(i) = Some(next.fetch_add(1, Relaxed)).filter(|i| *i < items.len()) {
                    if has_failed.load(Relaxed) {
                        return;
                    }
                    let result = work(&items[i]);
                    has_failed.fetch_or(result.is_err(), Relaxed);
                    *results[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(result);
                }
            });
        }
    });
    results
        .into_iter()
        .filter_map(|slot| slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_made_anew_by_another_compiler() {
        let compiler = Cxx::find();
        assert!(!compiler.version.is_empty(), "c++ says no version");
        let hash = |compiler: &Cxx, source: &[u8]| compiler.hash_of_object(1, source, &["-O2".into()]);
        let updated = Cxx { name: compiler.name.clone(), version: b"c++ 99".to_vec() };
        assert_eq!(hash(&compiler, b"x"), hash(&Cxx::find(), b"x"));
        assert_ne!(hash(&compiler, b"x"), hash(&updated, b"x"));
        assert_ne!(hash(&compiler, b"x"), hash(&compiler, b"y"));
    }
}
