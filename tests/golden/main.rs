//! The golden runner: every case of every file in a folder of recorded numbers.
//!
//! The folder is `$KILN_GOLDEN`, or `../shared/golden` if that exists, or
//! `tests/data/golden`, a small part of the same data. What a file holds is told
//! by its structure, not by its name, so further files of the same formats run
//! without a change of code.
//! One line a case: pass or fail, largest error, tolerance. A case whose node
//! classes don't exist yet is reported as such, by node name. Workflows go through
//! the engine as a client's prompt does; the synthetic checkpoint they load is
//! written into the target folder once.
//!
//! `cargo test --release --test golden -- FILTER` runs the cases whose
//! `file/case` contains FILTER.

mod bench;
mod compare;
mod report;
mod special;
mod steps;
mod tensors;
mod workflow;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value as Json;

use report::Report;
use tensors::Tensors;

/// One group of recorded numbers: `NAME.json` and, for most, `NAME.safetensors`.
pub struct Group {
    /// File name without ending.
    pub name: String,
    /// The JSON.
    pub json: Json,
    /// The tensors; empty if there is no such file.
    pub tensors: Tensors,
    /// The folder.
    pub folder: PathBuf,
}

fn folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match std::env::var_os("KILN_GOLDEN") {
        Some(folder) => folder.into(),
        None => {
            let shared = root.join("../shared/golden");
            if shared.is_dir() { shared } else { root.join("tests/data/golden") }
        }
    }
}

fn groups(folder: &Path) -> Vec<Group> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|e| e.path()).collect())
        .unwrap_or_default();
    names.retain(|p| p.extension().is_some_and(|e| e == "json"));
    names.sort();
    names
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            Group {
                name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
                json: serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
                tensors: Tensors::open(&path.with_extension("safetensors")),
                folder: folder.to_owned(),
            }
        })
        .collect()
}

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let folder = folder();
    println!("golden data: {}", folder.display());
    let mut report = Report::new(filter);
    let bench = bench::Bench::new(&folder);
    for group in groups(&folder) {
        run_group(&group, &bench, &mut report);
        bench.release();
    }
    report.finish()
}

fn run_group(group: &Group, bench: &bench::Bench, report: &mut Report) {
    if special::run(group, bench, report) {
        return;
    }
    let Some(cases) = group.json["cases"].as_object() else {
        report.skip_file(&group.name, "no cases (a record of measurements or of another kind)");
        return;
    };
    for (name, case) in cases {
        if !report.wants(&group.name, name) {
            continue;
        }
        let outcome = match case["workflow"].as_object() {
            Some(_) => workflow::run(group, name, case, bench),
            None => special::case(group, name, case, bench),
        };
        report.case(&group.name, name, outcome);
    }
}
