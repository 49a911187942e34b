//! What can be wrong with folders and names.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a client's name is no path.
#[derive(Debug, Error)]
pub enum PathError {
    /// No file or folder may have this name.
    #[error("{name:?} cannot be a file name: {reason}")]
    Invalid {
        /// The name as the client gave it.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The name leads outside its folder.
    #[error("{name:?} lies outside the {root} folder, which is not allowed")]
    OutsideRoot {
        /// The name as the client gave it.
        name: String,
        /// The folder it should lie in.
        root: &'static str,
    },
    /// There is no such file.
    #[error("there is no {name:?} in the {folder} folder")]
    NotFound {
        /// The name as the client gave it.
        name: String,
        /// The folder it was looked for in.
        folder: String,
    },
    /// There is no model folder of that type.
    #[error("there is no model folder called {0:?}")]
    UnknownFolder(String),
    /// The operating system refused.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// The path in question.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
}

/// Why the folders cannot be laid out.
#[derive(Debug, Error)]
pub enum FoldersError {
    /// A folder cannot be created.
    #[error("cannot create the folder {}: {source}", path.display())]
    Create {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A YAML file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// A YAML file does not have the form of `extra_model_paths.yaml`.
    #[error("{} is no list of model paths: {message}", path.display())]
    ExtraPaths {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
}
