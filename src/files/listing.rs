//! Lists of files: what is in the input folder, what is below a model root.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::models::{Found, walk};
use super::{Folders, Kind};

/// Extensions that stand for a picture (media type `image/*`).
const IMAGE_EXTENSIONS: &[&str] = &[
    "avif", "bmp", "gif", "heic", "heif", "ico", "ief", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm",
    "ppm", "ras", "rgb", "svg", "tif", "tiff", "webp", "xbm", "xpm", "xwd",
];

/// The extension in lower case; empty if there is none.
pub(super) fn extension(name: &str) -> String {
    let base = name.rsplit('/').next().unwrap_or(name);
    match base.trim_start_matches('.').rsplit_once('.') {
        Some((_, extension)) => extension.to_lowercase(),
        None => String::new(),
    }
}

/// Whether the extension is a picture's.
pub(super) fn is_image(name: &str) -> bool {
    IMAGE_EXTENSIONS.contains(&extension(name).as_str())
}

/// Files directly in a folder; none if it cannot be read.
pub(super) fn files_in(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect()
}

/// All files below a folder, by relative name.
pub(super) fn files_below(root: &Path) -> Found {
    let mut found = Found::new();
    walk(root, "", &mut HashSet::new(), &mut found);
    found
}

impl Folders {
    fn input_files(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut names: Vec<String> =
            files_in(&self.input).into_iter().map(|(name, _)| name).filter(|name| wanted(name)).collect();
        names.sort_unstable();
        names
    }

    /// Pictures directly in the input folder, sorted.
    pub fn input_images(&self) -> Vec<String> {
        self.input_files(is_image)
    }

    /// `*.latent` files directly in the input folder, sorted.
    pub fn input_latents(&self) -> Vec<String> {
        self.input_files(|name| name.ends_with(".latent"))
    }

    /// Files directly in a folder, newest first, hidden ones left out.
    pub fn newest_files(&self, kind: Kind) -> Vec<String> {
        let mut files: Vec<(Reverse<SystemTime>, String)> = files_in(self.root(kind))
            .into_iter()
            .filter(|(name, _)| !name.starts_with('.'))
            .filter_map(|(name, path)| Some((Reverse(path.metadata().ok()?.modified().ok()?), name)))
            .collect();
        files.sort_unstable();
        files.into_iter().map(|(_, name)| name).collect()
    }

    /// Names of embeddings without extension, as clients list them.
    pub fn embedding_names(&self) -> Vec<String> {
        let names = self.list_models("embeddings");
        names
            .iter()
            .map(|name| name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem).to_owned())
            .collect()
    }
}
