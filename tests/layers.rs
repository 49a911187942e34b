//! The arrows of the architecture: who may import whom.
//!
//! Reads every `use crate::…` (and every `crate::…` path) under `src/` and
//! checks it against the table in the crate's documentation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Module and what it may import besides itself. `cli` may import everything.
const LAYERS: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("files", &[]),
    ("weights", &["tensor"]),
    ("tokenizer", &["tensor"]),
    ("image", &["tensor"]),
    ("graph", &[]),
    ("driver", &[]),
    ("backend", &["tensor", "driver"]),
    ("models", &["tensor", "weights"]),
    ("diffusion", &["tensor"]),
    ("nodes", &["diffusion", "models", "image", "graph", "files", "tokenizer", "weights", "tensor"]),
    ("engine", &["nodes", "graph", "models", "files", "tensor"]),
    ("server", &["engine", "nodes", "graph", "image", "files", "models", "weights", "tensor"]),
];

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Every first path segment after `crate::`, including those in `use crate::{a, b::c}`.
fn imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let code: String =
        text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => {
                let mut depth = 0;
                let mut word = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => word.clear(),
                        c if depth == 0 && (c.is_alphanumeric() || c == '_') => {
                            word.push(c);
                            continue;
                        }
                        ':' if depth == 0 && !word.is_empty() => {
                            found.insert(std::mem::take(&mut word));
                        }
                        _ => {}
                    }
                }
            }
            None => {
                found.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            }
        }
    }
    found
}

#[test]
fn imports_point_downward_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (module, allowed) in LAYERS {
        let mut files = Vec::new();
        rust_files(&src.join(module), &mut files);
        for file in files {
            // Tests may build whatever they need to test with.
            let is_test = file.file_name().is_some_and(|n| n.to_string_lossy().ends_with("tests.rs"))
                || file.components().any(|c| c.as_os_str() == "tests");
            if is_test {
                continue;
            }
            let text = fs::read_to_string(&file).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            checked += 1;
            for import in imports(text) {
                let is_layer = LAYERS.iter().any(|(name, _)| *name == import) || import == "cli";
                if is_layer && import != *module && !allowed.contains(&import.as_str()) {
                    wrong.push(format!("{} imports crate::{import}", file.display()));
                }
            }
        }
    }
    assert!(checked > 50, "only {checked} files found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut outside = Vec::new();
    let mut blocks = 0;
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        let count = code
            .iter()
            .filter(|l| l.contains("unsafe {") || l.contains("unsafe fn") || l.contains("unsafe impl"))
            .count();
        let path = file.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
        let is_room = ["driver/", "weights/mmap", "backend/cpu/"].iter().any(|room| path.starts_with(room));
        if count > 0 && !is_room {
            outside.push(format!("{path}: {count}"));
        }
        blocks += count;
    }
    println!("{blocks} uses of unsafe, all in driver, weights/mmap and backend/cpu");
    assert!(outside.is_empty(), "unsafe outside its rooms: {}", outside.join(", "));
}
