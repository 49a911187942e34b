//! The folders of a server, and the only place where a client's file name
//! becomes a path.
//!
//! A name from the network is first read as text ([`names`]): absolute names,
//! `..`, backslashes, drive letters, control characters and the like are
//! refused whatever the operating system makes of them. What a route reads or
//! writes is then opened below an open directory, which no link leads out of
//! ([`Sandbox`]). Nodes, which hand paths on, get them joined to their root and
//! checked once more with symbolic links followed ([`Folders::resolve`]):
//! whoever can *create* links inside a folder while the server runs could race
//! that check; clients cannot.
//!
//! Model folders are the operator's: links inside them are followed, names are
//! checked as text all the same ([`models`]).

pub mod assets;
mod clock;
mod error;
mod extra_paths;
mod listing;
pub mod models;
pub mod names;
mod sandbox;
mod save;
#[cfg(test)]
mod tests;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub use clock::LocalTime;
pub use error::{FoldersError, PathError};
pub use models::{DEMO_BYTES, DEMO_CHECKPOINT, ModelEntry, ModelPath};
pub use sandbox::{FileFacts, ListOptions, Listed, Sandbox, Staged, below};
pub use save::{SaveTarget, write_atomic, write_new};

use models::ModelFolder;

/// The three folders that clients name files in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Uploaded files.
    Input,
    /// Results.
    Output,
    /// Results that the next start throws away.
    Temp,
}

impl Kind {
    /// The folder of ComfyUI's type name (`input`, `output`, `temp`).
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "input" => Some(Self::Input),
            "output" => Some(Self::Output),
            "temp" => Some(Self::Temp),
            _ => None,
        }
    }

    /// ComfyUI's type name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Output => "output",
            Self::Temp => "temp",
        }
    }
}

/// Where the folders are, in terms of ComfyUI's command line.
#[derive(Clone, Debug, Default)]
pub struct FolderOptions {
    /// `--base-directory`: everything not named otherwise lies below it.
    pub base: PathBuf,
    /// `--input-directory`.
    pub input: Option<PathBuf>,
    /// `--output-directory`.
    pub output: Option<PathBuf>,
    /// `--temp-directory`: a folder `temp` is made inside.
    pub temp: Option<PathBuf>,
    /// `--user-directory`.
    pub user: Option<PathBuf>,
    /// `--extra-model-paths-config`: YAML files; `extra_model_paths.yaml` in
    /// the base folder is read without being named.
    pub extra_model_paths: Vec<PathBuf>,
}

/// The folders of a server. The default value has none, and finds nothing.
#[derive(Clone, Debug, Default)]
pub struct Folders {
    base: PathBuf,
    input: PathBuf,
    output: PathBuf,
    temp: PathBuf,
    user: PathBuf,
    models: Vec<ModelFolder>,
}

impl Folders {
    /// Lays the folders out and creates those that the server writes to.
    ///
    /// # Errors
    /// [`FoldersError`] if a folder cannot be created or a YAML file not be used.
    pub fn open(options: &FolderOptions) -> Result<Self, FoldersError> {
        let base = absolute(&options.base)?;
        let place = |given: &Option<PathBuf>, name: &str| match given {
            Some(path) => absolute(path),
            None => Ok(base.join(name)),
        };
        let output = place(&options.output, "output")?;
        let mut folders = Self {
            input: place(&options.input, "input")?,
            temp: match &options.temp {
                Some(path) => absolute(path)?.join("temp"),
                None => base.join("temp"),
            },
            user: place(&options.user, "user")?,
            models: models::default_folders(&base, &output),
            output,
            base,
        };
        for folder in [&folders.input, &folders.output, &folders.temp, &folders.user] {
            std::fs::create_dir_all(folder)
                .map_err(|source| FoldersError::Create { path: folder.clone(), source })?;
        }
        let implicit = folders.base.join("extra_model_paths.yaml");
        if implicit.is_file() {
            extra_paths::read(&implicit, &mut folders.models)?;
        }
        for file in &options.extra_model_paths {
            extra_paths::read(file, &mut folders.models)?;
        }
        Ok(folders)
    }

    /// The base folder.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The folder of user data: settings, workflows.
    pub fn user(&self) -> &Path {
        &self.user
    }

    /// The root of a folder that clients name files in.
    pub fn root(&self, kind: Kind) -> &Path {
        match kind {
            Kind::Input => &self.input,
            Kind::Output => &self.output,
            Kind::Temp => &self.temp,
        }
    }

    /// The path of `filename`, a single name, in `subfolder` of a folder.
    ///
    /// The file need not exist. With symbolic links followed the path lies
    /// inside the folder.
    ///
    /// # Errors
    /// [`PathError::Invalid`] for a name that no file may have,
    /// [`PathError::OutsideRoot`] for a subfolder or link that leads outside.
    pub fn resolve(&self, kind: Kind, subfolder: &str, filename: &str) -> Result<PathBuf, PathError> {
        let file = names::single(filename)?;
        let mut parts = names::folders(subfolder, kind.name())?;
        parts.push(file);
        inside(self.root(kind), &parts, kind.name())
    }

    /// The path of a subfolder (the folder itself for an empty name).
    ///
    /// # Errors
    /// As [`Folders::resolve`].
    pub fn resolve_folder(&self, kind: Kind, subfolder: &str) -> Result<PathBuf, PathError> {
        inside(self.root(kind), &names::folders(subfolder, kind.name())?, kind.name())
    }

    /// The path of a name such as `sub/picture.png [output]`, the form that
    /// nodes take. Without annotation it lies in `default`.
    ///
    /// # Errors
    /// As [`Folders::resolve`].
    pub fn resolve_annotated(&self, name: &str, default: Kind) -> Result<PathBuf, PathError> {
        let (name, kind) = names::split_annotation(name);
        let kind = kind.unwrap_or(default);
        inside(self.root(kind), &names::file(name, kind.name())?, kind.name())
    }
}

/// The path of a file such as `assets/page.js` below a folder of the operator's.
///
/// # Errors
/// As [`Folders::resolve`].
pub fn resolve_below(root: &Path, name: &str) -> Result<PathBuf, PathError> {
    inside(root, &names::file(name, "root")?, "root")
}

fn absolute(path: &Path) -> Result<PathBuf, FoldersError> {
    std::path::absolute(path).map_err(|source| FoldersError::Create { path: path.to_owned(), source })
}

/// Joins checked names to a root and makes sure that no link leads outside.
fn inside(root: &Path, parts: &[&str], root_name: &'static str) -> Result<PathBuf, PathError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| PathError::Io { path, source }
    };
    let root = root.canonicalize().map_err(io(root))?;
    let path = parts.iter().fold(root.clone(), |path, part| path.join(part));
    let outside = || PathError::OutsideRoot { name: parts.join("/"), root: root_name };
    let mut existing = path.as_path();
    loop {
        match existing.canonicalize() {
            Ok(real) if real.starts_with(&root) => return Ok(path),
            Ok(_) => return Err(outside()),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // A link to nowhere exists, but what it would create does not.
                if existing.symlink_metadata().is_ok() {
                    return Err(outside());
                }
                existing = existing.parent().filter(|p| p.starts_with(&root)).ok_or_else(outside)?;
            }
            Err(e) if e.kind() == ErrorKind::NotADirectory => {
                return Err(PathError::NotFound { name: parts.join("/"), folder: root_name.to_owned() });
            }
            Err(e) => return Err(io(existing)(e)),
        }
    }
}
