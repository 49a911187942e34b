//! The tools of whoever works on kernels, as they are used: the binary is run, and what it prints and writes is read.
//!
//! Kernels run on the SIMT layer; what needs a GPU's times is in `tests/cuda_driver`.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod folder;
mod layers;
mod output;
mod scripts;
mod trace;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kiln::driver::simt::built_library;
use kiln::driver::toolchain::SimtVariant;

/// The binary with these arguments.
fn kiln(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    // Compiled kernels stay between runs, and apart from the user's.
    command.args(args).env("XDG_CACHE_HOME", temporary("cache"));
    command
}

/// What a run said and how it ended.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Said {
    fn from(done: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: done.status.code(), out: text(&done.stdout), err: text(&done.stderr) }
    }
}

fn run(args: &[&str]) -> Said {
    kiln(args).output().expect("kiln runs").into()
}

/// A path in the tests' own folder.
fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("tools").join(name)
}

/// A folder of that name, empty.
fn empty(name: &str) -> PathBuf {
    let folder = temporary(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Whether the SIMT layer was built; without it the tests that need it say so.
fn has_simt() -> bool {
    let found = built_library(SimtVariant::Fast).is_some();
    if !found {
        assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "the build script made no SIMT layer");
        eprintln!("skipped: the build script made no SIMT layer");
    }
    found
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
