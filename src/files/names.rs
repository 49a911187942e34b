//! File names from clients, read as text only.
//!
//! The rules are the same on every system, so that a name that is harmless
//! here does not become a path on another: no absolute names, no `..`, no
//! backslash, no drive letter, no control characters, no name made of dots and
//! blanks (some systems strip those). `a..b.png` and other unusual names pass.

use super::{Kind, PathError};

/// Longest name of one file or folder, in bytes: the limit of common file systems.
const MAX_NAME_BYTES: usize = 255;

fn check(part: &str) -> Result<(), &'static str> {
    if part.is_empty() {
        return Err("it is empty");
    }
    if part.len() > MAX_NAME_BYTES {
        return Err("it is longer than 255 bytes");
    }
    if part.chars().any(char::is_control) {
        return Err("it contains a control character");
    }
    if part.contains(['/', '\\']) {
        return Err("it contains a slash or backslash");
    }
    if part.trim_end_matches(['.', ' ']).is_empty() {
        return Err("it consists of dots and blanks");
    }
    let mut bytes = part.bytes();
    if bytes.next().is_some_and(|b| b.is_ascii_alphabetic()) && bytes.next() == Some(b':') {
        return Err("it begins with a drive letter");
    }
    if cfg!(windows) && part.contains(':') {
        return Err("it contains a colon");
    }
    Ok(())
}

fn invalid(name: &str, reason: &'static str) -> PathError {
    PathError::Invalid { name: name.to_owned(), reason }
}

/// Checks the name of one file.
pub(super) fn single(name: &str) -> Result<&str, PathError> {
    check(name).map(|()| name).map_err(|reason| invalid(name, reason))
}

/// The parts of a folder name such as `a/b` (none for an empty name).
///
/// Doubled and trailing slashes and `.` parts mean nothing, as to the system.
pub(super) fn folders<'a>(name: &'a str, root: &'static str) -> Result<Vec<&'a str>, PathError> {
    let outside = || PathError::OutsideRoot { name: name.to_owned(), root };
    if name.starts_with(['/', '\\']) {
        return Err(outside());
    }
    let mut parts = Vec::new();
    for part in name.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." || part.split('\\').any(|piece| piece == "..") {
            return Err(outside());
        }
        check(part).map_err(|reason| invalid(name, reason))?;
        parts.push(part);
    }
    Ok(parts)
}

/// The parts of a file name with optional folders, such as `a/b.png`.
pub(super) fn file<'a>(name: &'a str, root: &'static str) -> Result<Vec<&'a str>, PathError> {
    let parts = folders(name, root)?;
    if parts.is_empty() || name.ends_with('/') || name.ends_with("/.") {
        return Err(invalid(name, "it names a folder"));
    }
    Ok(parts)
}

/// A folder name without the detours that it takes: `a/../b` is `b`, as ComfyUI reads it. What leads
/// out of where it starts keeps its `..`, and is refused like any other.
pub fn collapse(folder: &str) -> String {
    if folder.starts_with('/') {
        return folder.to_owned();
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').filter(|part| *part != ".") {
        match (part, parts.last()) {
            ("..", Some(&last)) if !last.is_empty() && last != ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The last part of a file name, for routes that ignore folders in it.
///
/// # Errors
/// [`PathError::Invalid`] if the name is absolute, goes upwards or names no file.
pub fn last_part(name: &str) -> Result<&str, PathError> {
    let parts = file(name, "named").map_err(|error| match error {
        PathError::OutsideRoot { name, .. } => {
            PathError::Invalid { name, reason: "it leads out of its folder" }
        }
        other => other,
    })?;
    parts.last().copied().ok_or_else(|| invalid(name, "it is empty"))
}

/// Splits `name [output]` into name and folder. Names without annotation
/// come back unchanged.
pub fn split_annotation(name: &str) -> (&str, Option<Kind>) {
    for kind in [Kind::Output, Kind::Input, Kind::Temp] {
        let plain = name
            .strip_suffix(']')
            .and_then(|rest| rest.strip_suffix(kind.name()))
            .and_then(|rest| rest.strip_suffix('['));
        if let Some(plain) = plain {
            return (plain.strip_suffix(' ').unwrap_or(plain), Some(kind));
        }
    }
    (name, None)
}

#[cfg(test)]
mod tests {
    use super::collapse;

    #[test]
    fn detours_collapse_and_ways_out_stay() {
        for (name, wanted) in [
            ("", ""),
            ("a/b", "a/b"),
            ("a/../b", "b"),
            ("a/b/../..", ""),
            ("./a/./b/.", "a/b"),
            ("..", ".."),
            ("a/../../b", "../b"),
            ("../../b", "../../b"),
            ("/a/..", "/a/.."),
            ("/..", "/.."),
            ("a\\..\\b", "a\\..\\b"),
        ] {
            assert_eq!(collapse(name), wanted, "{name}");
        }
    }
}
