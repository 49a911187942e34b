//! A folder as a capability: what clients name is opened below it, never beside it.
//!
//! A name is read as text first ([`names`]), as everywhere here; then it is
//! walked from an open directory, by the kernel where it can (`openat2` with
//! `RESOLVE_BENEATH`), and component by component elsewhere. Relative links
//! inside the folder work; an absolute one, or one that leads out of it, is
//! refused at the moment of use, so whoever makes links while the server runs
//! gains nothing.
//!
//! New files are written under a hidden name and get their own in one step
//! ([`Staged`]): a name holds the old content or the new, never a part.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, Metadata, OpenOptions};
use tempfile::NamedTempFile;

use super::{Folders, Kind, PathError, names};

/// Deepest folder that lists go into.
const MAX_DEPTH: usize = 64;
/// Most entries of one list.
const MAX_ENTRIES: usize = 100_000;
/// Unfinished files begin and end with these.
const STAGED: (&str, &str) = (".kiln-", ".part");

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Sandbox {
    dir: Arc<Dir>,
    /// What error messages call it.
    root: &'static str,
}

/// Size and times of a file; times in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FileFacts {
    /// Bytes.
    pub size: u64,
    /// Last change of the content.
    pub modified: f64,
    /// When it was made; the last change where the file system doesn't know.
    pub created: f64,
}

/// A file or folder in a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Name relative to the listed folder, with `/`.
    pub name: String,
    /// Absent for a folder.
    pub facts: Option<FileFacts>,
}

/// What a list holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Goes into folders too.
    pub recurse: bool,
    /// Shows names that begin with a dot.
    pub hidden: bool,
}

/// A file that is being written; dropped before it is [kept](Staged::keep) it is gone.
#[derive(Debug)]
pub struct Staged {
    sandbox: Sandbox,
    name: String,
    file: File,
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl FileFacts {
    fn of(data: &Metadata) -> Self {
        let modified = data.modified().map_or(0.0, |t| seconds(t.into_std()));
        Self {
            size: data.len(),
            modified,
            created: data.created().map_or(modified, |t| seconds(t.into_std())),
        }
    }
}

/// The name of a file in a folder, which may have no name.
pub fn below(folder: &str, file: &str) -> String {
    if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") }
}

/// The path of checked parts; `.` for none.
fn joined(parts: &[&str]) -> PathBuf {
    if parts.is_empty() { PathBuf::from(".") } else { parts.iter().collect() }
}

impl Sandbox {
    fn at(path: &Path, root: &'static str) -> Result<Self, PathError> {
        let dir = Dir::open_ambient_dir(path, ambient_authority());
        let dir = dir.map_err(|source| PathError::Io { path: path.to_owned(), source })?;
        Ok(Self { dir: Arc::new(dir), root })
    }

    /// What an operating system's error means for a client's name.
    fn refuse(&self, name: &str, error: io::Error) -> PathError {
        match error.kind() {
            // Made by the walk itself, not by the system.
            ErrorKind::PermissionDenied if error.raw_os_error().is_none() => {
                PathError::OutsideRoot { name: name.to_owned(), root: self.root }
            }
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                PathError::NotFound { name: name.to_owned(), folder: self.root.to_owned() }
            }
            ErrorKind::IsADirectory => {
                PathError::Invalid { name: name.to_owned(), reason: "it names a folder" }
            }
            _ => PathError::Io { path: Path::new(self.root).join(name), source: error },
        }
    }

    fn file_path(&self, name: &str) -> Result<PathBuf, PathError> {
        names::file(name, self.root).map(|parts| joined(&parts))
    }

    /// The name of a file as it is stored: doubled slashes and the like are gone.
    ///
    /// # Errors
    /// [`PathError`] for a name that is none or leads outside.
    pub fn normal_name(&self, name: &str) -> Result<String, PathError> {
        names::file(name, self.root).map(|parts| parts.join("/"))
    }

    /// The name of a folder likewise; empty for the sandbox itself.
    ///
    /// # Errors
    /// As [`Sandbox::normal_name`].
    pub fn normal_folder(&self, name: &str) -> Result<String, PathError> {
        names::folders(name, self.root).map(|parts| parts.join("/"))
    }

    /// Opens a file to read it.
    ///
    /// # Errors
    /// [`PathError`] for a name that is none or leads outside, and if there is no such file.
    pub fn open(&self, name: &str) -> Result<File, PathError> {
        let path = self.file_path(name)?;
        let file = self.dir.open(path).map_err(|e| self.refuse(name, e))?.into_std();
        match file.metadata() {
            Ok(data) if data.is_file() => Ok(file),
            Ok(_) => Err(PathError::NotFound { name: name.to_owned(), folder: self.root.to_owned() }),
            Err(error) => Err(self.refuse(name, error)),
        }
    }

    /// Size and times of a file; `None` for a folder. An empty name is the folder itself.
    ///
    /// # Errors
    /// As [`Sandbox::open`].
    pub fn facts(&self, name: &str) -> Result<Option<FileFacts>, PathError> {
        let path = joined(&names::folders(name, self.root)?);
        let data = self.dir.metadata(path).map_err(|e| self.refuse(name, e))?;
        Ok((!data.is_dir()).then(|| FileFacts::of(&data)))
    }

    /// Begins a new file.
    ///
    /// # Errors
    /// [`PathError::Io`] if the folder takes none.
    pub fn stage(&self) -> Result<Staged, PathError> {
        let name = format!("{}{}{}", STAGED.0, uuid::Uuid::new_v4().simple(), STAGED.1);
        let file = self.dir.open_with(&name, OpenOptions::new().write(true).create_new(true));
        let file = file.map_err(|e| self.refuse(&name, e))?.into_std();
        Ok(Staged { sandbox: self.clone(), name, file })
    }

    /// Gives a temporary file from elsewhere its name here, making folders as
    /// needed; `false` if there is one of that name that must not be replaced.
    ///
    /// # Errors
    /// As [`Staged::keep`].
    pub fn take_in(&self, file: &NamedTempFile, name: &str, overwrite: bool) -> Result<bool, PathError> {
        let refuse = |e| self.refuse(name, e);
        let target = self.file_path(name)?;
        self.make_parent(name, &target)?;
        let (folder, old) = (file.path().parent(), file.path().file_name().and_then(|n| n.to_str()));
        let (Some(folder), Some(old)) = (folder, old) else { return Err(refuse(ErrorKind::NotFound.into())) };
        let from = Dir::open_ambient_dir(folder, ambient_authority()).map_err(refuse)?;
        match place((&from, old), (&self.dir, &target), overwrite) {
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                let mut staged = self.stage()?;
                io::copy(&mut file.reopen().map_err(refuse)?, staged.file()).map_err(refuse)?;
                staged.keep(name, overwrite)
            }
            outcome => outcome.map_err(refuse),
        }
    }

    /// Removes a file.
    ///
    /// # Errors
    /// As [`Sandbox::open`]; a folder is refused.
    pub fn remove(&self, name: &str) -> Result<(), PathError> {
        let path = self.file_path(name)?;
        self.dir.remove_file(path).map_err(|e| self.refuse(name, e))
    }

    /// Gives a file or folder another name; `false` if there is one of that name
    /// that must not be replaced.
    ///
    /// # Errors
    /// As [`Sandbox::open`], for either name.
    pub fn rename(&self, from: &str, to: &str, overwrite: bool) -> Result<bool, PathError> {
        let (source, target) = (self.file_path(from)?, self.file_path(to)?);
        self.dir.metadata(&source).map_err(|e| self.refuse(from, e))?;
        if !overwrite && self.dir.symlink_metadata(&target).is_ok() {
            return Ok(false);
        }
        self.make_parent(to, &target)?;
        self.dir.rename(source, &self.dir, target).map_err(|e| self.refuse(to, e))?;
        Ok(true)
    }

    fn make_parent(&self, name: &str, path: &Path) -> Result<(), PathError> {
        let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) else { return Ok(()) };
        let Err(error) = self.dir.create_dir_all(parent) else { return Ok(()) };
        match (error.kind(), self.dir.metadata(parent)) {
            // A file where a folder would have to be.
            (ErrorKind::AlreadyExists | ErrorKind::NotADirectory, Ok(_)) => {
                Err(PathError::Invalid { name: name.to_owned(), reason: "a part of it names a file" })
            }
            // A link that leads outside.
            (ErrorKind::AlreadyExists, Err(error)) => Err(self.refuse(name, error)),
            _ => Err(self.refuse(name, error)),
        }
    }

    /// What a folder holds, folder by folder, each sorted by name. An empty name is the folder itself.
    ///
    /// # Errors
    /// As [`Sandbox::open`]; [`PathError::NotFound`] if it is no folder.
    pub fn list(&self, folder: &str, options: ListOptions) -> Result<Vec<Listed>, PathError> {
        let path = joined(&names::folders(folder, self.root)?);
        let dir = self.dir.open_dir(path).map_err(|e| self.refuse(folder, e))?;
        let mut found = Vec::new();
        walk(&dir, "", 0, options, &mut found);
        Ok(found)
    }
}

/// Gives a file its name in one step; `false` if there is one of that name that
/// must not be replaced. The old name may stay as a second one.
fn place(from: (&Dir, &str), to: (&Dir, &Path), overwrite: bool) -> io::Result<bool> {
    if !overwrite {
        match from.0.hard_link(from.1, to.0, to.1) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
            // Some file systems have no links.
            Err(_) if to.0.symlink_metadata(to.1).is_ok() => return Ok(false),
            Err(_) => {}
        }
    }
    from.0.rename(from.1, to.0, to.1).map(|()| true)
}

fn is_staged(name: &str) -> bool {
    name.starts_with(STAGED.0) && name.ends_with(STAGED.1)
}

fn walk(dir: &Dir, prefix: &str, depth: usize, options: ListOptions, found: &mut Vec<Listed>) {
    let Ok(entries) = dir.entries() else { return };
    let mut names: Vec<(String, bool)> = entries
        .flatten()
        // Names that are no text can't be asked for.
        .filter_map(|e| Some((e.file_name().into_string().ok()?, e.file_type().is_ok_and(|t| t.is_dir()))))
        .filter(|(name, _)| !is_staged(name) && (options.hidden || !name.starts_with('.')))
        .collect();
    names.sort_unstable();
    let mut folders = Vec::new();
    for (name, is_own_folder) in names {
        // Follows links; one that leads outside is not there.
        let Ok(data) = dir.metadata(&name) else { continue };
        if found.len() >= MAX_ENTRIES {
            return;
        }
        let facts = (!data.is_dir()).then(|| FileFacts::of(&data));
        found.push(Listed { name: format!("{prefix}{name}"), facts });
        // Links to folders are shown but not gone into: they may lead back.
        if is_own_folder && options.recurse && depth < MAX_DEPTH {
            folders.push(name);
        }
    }
    for name in folders {
        if let Ok(inner) = dir.open_dir(&name) {
            walk(&inner, &format!("{prefix}{name}/"), depth + 1, options, found);
        }
    }
}

impl Staged {
    /// Where the content goes.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives the file its name, making folders as needed; `false` if there is
    /// one of that name that must not be replaced.
    ///
    /// # Errors
    /// [`PathError`] for a name that is none or leads outside, or names a folder.
    pub fn keep(self, name: &str, overwrite: bool) -> Result<bool, PathError> {
        let dir = &*self.sandbox.dir;
        let target = self.sandbox.file_path(name)?;
        self.file.sync_data().map_err(|e| self.sandbox.refuse(name, e))?;
        self.sandbox.make_parent(name, &target)?;
        place((dir, &self.name), (dir, &target), overwrite).map_err(|e| self.sandbox.refuse(name, e))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove.
        let _ = self.sandbox.dir.remove_file(&self.name);
    }
}

impl Folders {
    /// The data of a user (`default` in single-user mode); the folder is made if needed.
    ///
    /// # Errors
    /// [`PathError`] for a name that no folder may have, or one that leads outside.
    pub fn user_data(&self, user: &str) -> Result<Sandbox, PathError> {
        let user = names::single(user)?;
        let all = Sandbox::at(&self.user, "user")?;
        match all.dir.create_dir(user) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(all.refuse(user, error)),
            _ => {}
        }
        let dir = all.dir.open_dir(user).map_err(|e| all.refuse(user, e))?;
        Ok(Sandbox { dir: Arc::new(dir), root: "user" })
    }

    /// Whether a user has data.
    pub fn has_user_data(&self, user: &str) -> bool {
        names::single(user).is_ok_and(|user| self.user.join(user).is_dir())
    }

    /// One of the folders that clients name files in.
    ///
    /// # Errors
    /// [`PathError::Io`] if it is gone.
    pub fn sandbox(&self, kind: Kind) -> Result<Sandbox, PathError> {
        Sandbox::at(self.root(kind), kind.name())
    }

    /// Opens `filename`, a single name, in `subfolder` of a folder.
    ///
    /// # Errors
    /// As [`Folders::resolve`], and [`PathError::NotFound`].
    pub fn open_file(&self, kind: Kind, subfolder: &str, filename: &str) -> Result<File, PathError> {
        names::single(filename)?;
        names::folders(subfolder, kind.name())?;
        self.sandbox(kind)?.open(&below(subfolder, filename))
    }
}
