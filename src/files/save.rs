//! Names for new files, and writing them so that no half file is ever seen.

use std::fs::Permissions;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{Folders, Kind, LocalTime, PathError, inside, names};

/// Where the files of one save go: `{folder}/{name}_{counter:05}_.{extension}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveTarget {
    /// The folder; it exists.
    pub folder: PathBuf,
    /// The folder relative to its root, for clients; empty for the root itself.
    pub subfolder: String,
    /// First part of the file names.
    pub name: String,
    /// Number of the next file.
    pub counter: u64,
}

impl SaveTarget {
    /// The next file name, for picture `index` of a batch (`%batch_num%` in the
    /// name); counts on.
    pub fn next_name(&mut self, index: usize, extension: &str) -> String {
        let name = self.name.replace("%batch_num%", &index.to_string());
        let counter = self.counter;
        self.counter += 1;
        format!("{name}_{counter:05}_.{extension}")
    }
}

impl Folders {
    /// Where files with a prefix such as `sub/%year%/name` are saved.
    ///
    /// `%width%`, `%height%`, `%year%`, `%month%`, `%day%`, `%hour%`,
    /// `%minute%` and `%second%` are filled in (local time); other patterns
    /// stay. The folder is created. The counter is one more than the largest
    /// of the files already there.
    ///
    /// # Errors
    /// [`PathError`] for a prefix that leads outside or a folder that cannot be made.
    pub fn save_path(
        &self,
        kind: Kind,
        prefix: &str,
        width: usize,
        height: usize,
    ) -> Result<SaveTarget, PathError> {
        self.save_path_at(kind, prefix, (width, height), LocalTime::now())
    }

    fn save_path_at(
        &self,
        kind: Kind,
        prefix: &str,
        size: (usize, usize),
        now: LocalTime,
    ) -> Result<SaveTarget, PathError> {
        let prefix = fill_in(prefix, size, now);
        let mut parts = names::folders(&prefix, kind.name())?;
        // A prefix without any name counts as the folder itself.
        let name = parts.pop().unwrap_or(".").to_owned();
        let folder = inside(self.root(kind), &parts, kind.name())?;
        std::fs::create_dir_all(&folder).map_err(|source| PathError::Io { path: folder.clone(), source })?;
        let counter = next_counter(&folder, &name)?;
        Ok(SaveTarget { subfolder: parts.join("/"), folder, name, counter })
    }
}

fn fill_in(prefix: &str, (width, height): (usize, usize), now: LocalTime) -> String {
    if !prefix.contains('%') {
        return prefix.to_owned();
    }
    prefix
        .replace("%width%", &width.to_string())
        .replace("%height%", &height.to_string())
        .replace("%year%", &now.year.to_string())
        .replace("%month%", &format!("{:02}", now.month))
        .replace("%day%", &format!("{:02}", now.day))
        .replace("%hour%", &format!("{:02}", now.hour))
        .replace("%minute%", &format!("{:02}", now.minute))
        .replace("%second%", &format!("{:02}", now.second))
}

/// One more than the largest number among `{name}_{number}_…` in the folder.
fn next_counter(folder: &Path, name: &str) -> Result<u64, PathError> {
    let entries =
        std::fs::read_dir(folder).map_err(|source| PathError::Io { path: folder.to_owned(), source })?;
    let largest = entries
        .flatten()
        .filter_map(|entry| {
            let file = entry.file_name().into_string().ok()?;
            let rest = file.strip_prefix(name)?.strip_prefix('_')?;
            // A file of this name without a number counts as number 0.
            Some(rest.split('_').next()?.trim().parse::<u64>().unwrap_or(0))
        })
        .max();
    Ok(largest.map_or(1, |n| n.saturating_add(1)))
}

/// Writes a file under a temporary name in the same folder, then renames it:
/// the final name holds the old content or the new, never a part.
///
/// # Errors
/// [`PathError::Io`] naming the path; the temporary file is removed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), PathError> {
    let file = staged(path, bytes)?;
    file.persist(path).map_err(|e| PathError::Io { path: path.to_owned(), source: e.error })?;
    Ok(())
}

/// As [`write_atomic`], but never replaces a file: `false` if there is one.
///
/// # Errors
/// [`PathError::Io`] naming the path; the temporary file is removed.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<bool, PathError> {
    match staged(path, bytes)?.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(e) if e.error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(PathError::Io { path: path.to_owned(), source: e.error }),
    }
}

fn staged(path: &Path, bytes: &[u8]) -> Result<NamedTempFile, PathError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kiln-").suffix(".part");
    // Others may read results; the process's umask still applies.
    #[cfg(unix)]
    builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    let write = || {
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_data()?;
        Ok(file)
    };
    write().map_err(|source| PathError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::FolderOptions;

    fn folders() -> (tempfile::TempDir, Folders) {
        let base = tempfile::tempdir().unwrap();
        let folders =
            Folders::open(&FolderOptions { base: base.path().into(), ..Default::default() }).unwrap();
        (base, folders)
    }

    fn save(folders: &Folders, prefix: &str) -> Result<SaveTarget, PathError> {
        let now = LocalTime { year: 2026, month: 3, day: 7, hour: 4, minute: 5, second: 59 };
        folders.save_path_at(Kind::Output, prefix, (24, 40), now)
    }

    #[test]
    fn names_follow_the_pattern() {
        let (_base, folders) = folders();
        for (prefix, subfolder, file) in [
            ("ComfyUI", "", "ComfyUI_00001_.png"),
            ("t/x/y/z", "t/x/y", "z_00001_.png"),
            ("t/%width%x%height%", "t", "24x40_00001_.png"),
            ("%year%-%month%-%day%_%hour%%minute%%second%", "", "2026-03-07_040559_00001_.png"),
            ("t/%nothing%", "t", "%nothing%_00001_.png"),
            ("b%batch_num%", "", "b7_00001_.png"),
            ("a//b/", "a", "b_00001_.png"),
            ("", "", "._00001_.png"),
            ("a..b", "", "a..b_00001_.png"),
        ] {
            let mut target = save(&folders, prefix).unwrap();
            assert_eq!(target.subfolder, subfolder, "{prefix:?}");
            assert_eq!(target.next_name(7, "png"), file, "{prefix:?}");
            assert!(target.folder.is_dir());
        }
    }

    #[test]
    fn the_counter_goes_on_after_the_largest() {
        let (_base, folders) = folders();
        let mut target = save(&folders, "t/a").unwrap();
        for _ in 0..3 {
            let name = target.next_name(0, "png");
            assert!(write_new(&target.folder.join(name), b"x").unwrap());
        }
        for other in
            ["a_00041.png", "a_x_.png", "ab_00099_.png", "b_00077_.png", "a00088_.png", "A_00066_.png"]
        {
            std::fs::write(target.folder.join(other), b"").unwrap();
        }
        assert_eq!(save(&folders, "t/a").unwrap().counter, 4);
        assert_eq!(save(&folders, "t/c").unwrap().counter, 1);
        std::fs::write(target.folder.join("a_123456_.png"), b"").unwrap();
        assert_eq!(save(&folders, "t/a").unwrap().next_name(0, "png"), "a_123457_.png");
    }

    #[test]
    fn prefixes_that_lead_outside_are_refused() {
        let (base, folders) = folders();
        for prefix in ["../x", "a/../../x", "/tmp/x", "..", "a/..", "..\\x", "\\x"] {
            let error = save(&folders, prefix).unwrap_err();
            assert!(matches!(error, PathError::OutsideRoot { .. }), "{prefix:?}");
            assert!(error.to_string().contains("outside the output folder"), "{error}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(base.path(), base.path().join("output/link")).unwrap();
            assert!(matches!(save(&folders, "link/x"), Err(PathError::OutsideRoot { .. })));
        }
        assert!(!base.path().join("x").exists());
    }

    #[test]
    fn writing_leaves_no_trace_when_it_fails() {
        let (base, _folders) = folders();
        let path = base.path().join("output/f.txt");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert!(!write_new(&path, b"three").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert!(write_atomic(&base.path().join("output/none/f.txt"), b"x").is_err());
        // A folder cannot be replaced by a file.
        let folder = base.path().join("output/folder");
        std::fs::create_dir(&folder).unwrap();
        assert!(write_atomic(&folder, b"x").is_err());
        let left: Vec<_> = std::fs::read_dir(base.path().join("output")).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "{left:?}");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o600, 0o600);
        }
    }
}
