//! `extra_model_paths.yaml`: model folders of other installations.
//!
//! ```yaml
//! a111:
//!     base_path: /srv/webui        # optional; joined in front of every path
//!     is_default: true             # optional; these paths are searched first
//!     checkpoints: models/Stable-diffusion
//!     loras: |
//!         models/Lora
//!         models/LyCORIS
//! ```
//! Paths that are still relative count from the file's own folder.

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::FoldersError;
use super::models::{ModelFolder, add_root};

/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Adds the folders of one YAML file.
pub(super) fn read(file: &Path, folders: &mut Vec<ModelFolder>) -> Result<(), FoldersError> {
    let wrong = |message: String| FoldersError::ExtraPaths { path: file.to_owned(), message };
    let unreadable = |source| FoldersError::Read { path: file.to_owned(), source };
    let size = std::fs::metadata(file).map_err(unreadable)?.len();
    if size > MAX_BYTES {
        return Err(wrong(format!("it has {size} bytes, at most {MAX_BYTES} are read")));
    }
    let text = std::fs::read_to_string(file).map_err(unreadable)?;
    let own_folder = std::path::absolute(file).map_err(unreadable)?;
    let own_folder = own_folder.parent().unwrap_or(Path::new("/"));
    if is_blank(&text) {
        return Ok(());
    }
    let groups: Option<Map<String, Value>> =
        serde_saphyr::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    for (group, entries) in groups.unwrap_or_default() {
        match entries {
            Value::Null => {}
            Value::Object(entries) => {
                add_group(&entries, own_folder, folders)
                    .map_err(|message| wrong(format!("{group}: {message}")))?;
            }
            other => return Err(wrong(format!("{group} must hold names and paths, not {other}"))),
        }
    }
    Ok(())
}

/// Whether the file holds nothing but comments, which is no YAML value at all.
fn is_blank(text: &str) -> bool {
    text.lines().all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#'))
}

fn add_group(
    entries: &Map<String, Value>,
    own_folder: &Path,
    folders: &mut Vec<ModelFolder>,
) -> Result<(), String> {
    let base = match entries.get("base_path") {
        None | Some(Value::Null) => own_folder.to_owned(),
        Some(Value::String(path)) => own_folder.join(expand(path)),
        Some(other) => return Err(format!("base_path must be a path, not {other}")),
    };
    let is_default = match entries.get("is_default") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(flag)) => *flag,
        Some(other) => return Err(format!("is_default must be true or false, not {other}")),
    };
    for (name, paths) in entries {
        if name == "base_path" || name == "is_default" {
            continue;
        }
        let Value::String(paths) = paths else {
            return Err(format!("{name} must be one path a line, not {paths}"));
        };
        for path in paths.lines().filter(|line| !line.is_empty()) {
            add_root(folders, name, normalized(&base.join(path)), is_default);
        }
    }
    Ok(())
}

/// `~` and `$NAME` or `${NAME}` at the places where a shell would expand them.
fn expand(path: &str) -> PathBuf {
    let home = path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let path = match (home, std::env::var("HOME")) {
        (Some(rest), Ok(home)) => format!("{home}{rest}"),
        _ => path.to_owned(),
    };
    let mut out = String::new();
    let mut rest = path.as_str();
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, tail) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(pair) => pair,
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                after.split_at(end)
            }
        };
        match std::env::var(name) {
            Ok(value) => out.push_str(&value),
            Err(_) => out.push_str(&rest[before.len()..rest.len() - tail.len()]),
        }
        rest = tail;
    }
    out.push_str(rest);
    PathBuf::from(out)
}

/// Without `.`, and with `..` resolved as text.
fn normalized(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}
