//! Model files: folder types, their roots, lists and look-up by name.
//!
//! The folder types, their default roots and the accepted extensions are
//! ComfyUI's. The built-in demo checkpoint is always listed; a file of the
//! same name on disk takes its place.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use super::{Folders, PathError, listing, names};

/// Name of the checkpoint inside the binary.
pub const DEMO_CHECKPOINT: &str = "demo-sd.safetensors";
/// The checkpoint inside the binary.
pub static DEMO_BYTES: &[u8] = include_bytes!("../../assets/demo-sd.safetensors");

/// The file that makes a folder a pipeline of the diffusers library.
const PIPELINE: &str = "model_index.json";

/// Extensions of model files, as in ComfyUI.
const MODEL_EXTENSIONS: &[&str] = &["ckpt", "pt", "pt2", "bin", "pth", "safetensors", "pkl", "sft"];

/// Which files of a model folder are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accept {
    /// These extensions, in lower case.
    Extensions(&'static [&'static str]),
    /// All files: a type that only `extra_model_paths.yaml` knows.
    All,
    /// None: the entries are folders.
    Folders,
}

/// A folder type with its roots.
#[derive(Clone, Debug)]
pub(super) struct ModelFolder {
    name: String,
    roots: Vec<PathBuf>,
    accept: Accept,
}

/// Folder type, folders below `models/`, folders below the output folder.
type Row = (&'static str, &'static [&'static str], &'static [&'static str], Accept);

const MODELS: Accept = Accept::Extensions(MODEL_EXTENSIONS);

/// ComfyUI's folder types in its order.
const TABLE: &[Row] = &[
    ("checkpoints", &["checkpoints"], &["checkpoints"], MODELS),
    ("configs", &["configs"], &[], Accept::Extensions(&["yaml"])),
    ("loras", &["loras"], &["loras"], MODELS),
    ("vae", &["vae"], &["vae"], MODELS),
    ("text_encoders", &["text_encoders", "clip"], &["clip"], MODELS),
    ("diffusion_models", &["unet", "diffusion_models"], &["diffusion_models"], MODELS),
    ("clip_vision", &["clip_vision"], &[], MODELS),
    ("style_models", &["style_models"], &[], MODELS),
    ("embeddings", &["embeddings"], &[], MODELS),
    ("diffusers", &["diffusers"], &[], Accept::Folders),
    ("vae_approx", &["vae_approx"], &[], MODELS),
    ("controlnet", &["controlnet", "t2i_adapter"], &[], MODELS),
    ("gligen", &["gligen"], &[], MODELS),
    ("upscale_models", &["upscale_models"], &[], MODELS),
    ("custom_nodes", &[], &[], Accept::All),
    ("hypernetworks", &["hypernetworks"], &[], MODELS),
    ("photomaker", &["photomaker"], &[], MODELS),
    ("classifiers", &["classifiers"], &[], Accept::Extensions(&[""])),
    ("model_patches", &["model_patches"], &[], MODELS),
    ("audio_encoders", &["audio_encoders"], &[], MODELS),
];

/// The folder types with their default roots.
pub(super) fn default_folders(base: &Path, output: &Path) -> Vec<ModelFolder> {
    let below = |root: &Path, names: &[&str]| names.iter().map(|n| root.join(n)).collect::<Vec<_>>();
    let models = base.join("models");
    TABLE
        .iter()
        .map(|&(name, in_models, in_output, accept)| {
            let mut roots = below(&models, in_models);
            roots.extend(below(output, in_output));
            if name == "custom_nodes" {
                roots.push(base.join("custom_nodes"));
            }
            ModelFolder { name: name.to_owned(), roots, accept }
        })
        .collect()
}

/// Adds a root to a folder type, which is made if it is new.
pub(super) fn add_root(folders: &mut Vec<ModelFolder>, name: &str, root: PathBuf, is_default: bool) {
    let name = current_name(name);
    let index = match folders.iter().position(|f| f.name == name) {
        Some(index) => index,
        None => {
            folders.push(ModelFolder { name: name.to_owned(), roots: Vec::new(), accept: Accept::All });
            folders.len() - 1
        }
    };
    let Some(folder) = folders.get_mut(index) else { return };
    if is_default {
        folder.roots.retain(|r| *r != root);
        folder.roots.insert(0, root);
    } else if !folder.roots.contains(&root) {
        folder.roots.push(root);
    }
}

/// Folder types that were renamed keep their old names in files and nodes.
fn current_name(name: &str) -> &str {
    match name {
        "unet" => "diffusion_models",
        "clip" => "text_encoders",
        other => other,
    }
}

/// Where the bytes of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPath {
    /// In a file.
    File(PathBuf),
    /// Inside this binary.
    Embedded {
        /// The name it is listed under.
        name: &'static str,
        /// The whole file.
        bytes: &'static [u8],
    },
}

/// A model file that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelEntry {
    /// Name relative to the root, with `/`.
    pub name: String,
    /// Index of the root among the folder type's roots.
    pub root: usize,
    /// The file.
    pub path: PathBuf,
}

impl Folders {
    /// All folder types in ComfyUI's order, with their roots.
    pub fn model_folders(&self) -> impl Iterator<Item = (&str, &[PathBuf])> {
        self.models.iter().map(|f| (f.name.as_str(), f.roots.as_slice()))
    }

    /// The roots of a folder type by its exact (not a former) name.
    pub fn model_roots(&self, folder: &str) -> Option<&[PathBuf]> {
        self.models.iter().find(|f| f.name == folder).map(|f| f.roots.as_slice())
    }

    fn model_folder(&self, folder: &str) -> Option<&ModelFolder> {
        let name = current_name(folder);
        self.models.iter().find(|f| f.name == name)
    }

    /// Names of the model files of a type, sorted, with `/` between folders.
    pub fn list_models(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> = self.model_entries(folder).into_iter().map(|e| e.name).collect();
        if folder == "checkpoints" {
            names.push(DEMO_CHECKPOINT.to_owned());
        }
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The model files of a type, root by root, each root sorted by name.
    pub fn model_entries(&self, folder: &str) -> Vec<ModelEntry> {
        let Some(folder) = self.model_folder(folder) else { return Vec::new() };
        let mut entries = Vec::new();
        for (root, path) in folder.roots.iter().enumerate() {
            let found = listing::files_below(path);
            let wanted = found.into_iter().filter(|(name, _)| folder.accept.takes(name));
            entries.extend(wanted.map(|(name, path)| ModelEntry { name, root, path }));
        }
        entries
    }

    /// The model file of that name: the first root that has it.
    ///
    /// # Errors
    /// [`PathError`] for an unknown type, a bad name or a missing file.
    pub fn model_path(&self, folder: &str, name: &str) -> Result<ModelPath, PathError> {
        let roots =
            &self.model_folder(folder).ok_or_else(|| PathError::UnknownFolder(folder.to_owned()))?.roots;
        let parts = names::file(name, "models")?;
        let below = |root: &PathBuf| parts.iter().fold(root.clone(), |path, part| path.join(part));
        if let Some(path) = roots.iter().map(below).find(|path| path.is_file()) {
            return Ok(ModelPath::File(path));
        }
        if folder == "checkpoints" && name == DEMO_CHECKPOINT {
            return Ok(ModelPath::Embedded { name: DEMO_CHECKPOINT, bytes: DEMO_BYTES });
        }
        Err(PathError::NotFound { name: name.to_owned(), folder: folder.to_owned() })
    }

    /// Folders of pipelines of the diffusers library, by relative name, sorted: those with a [`PIPELINE`] file.
    pub fn pipelines(&self) -> Vec<String> {
        let roots = self.model_folder("diffusers").map(|folder| folder.roots.as_slice()).unwrap_or_default();
        let files = roots.iter().flat_map(|root| listing::files_below(root).into_keys());
        let mut names: Vec<String> = files
            .filter_map(|name| Some(name.strip_suffix(PIPELINE)?.strip_suffix('/')?.to_owned()))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The folder of the pipeline of that name: the first root that has it.
    ///
    /// # Errors
    /// [`PathError`] for a bad name or a missing folder.
    pub fn pipeline(&self, name: &str) -> Result<PathBuf, PathError> {
        let parts = names::file(name, "models")?;
        let roots = self.model_folder("diffusers").map(|folder| folder.roots.as_slice()).unwrap_or_default();
        let mut below =
            roots.iter().map(|root| parts.iter().fold(root.clone(), |path, part| path.join(part)));
        let missing = || PathError::NotFound { name: name.to_owned(), folder: "diffusers".to_owned() };
        below.find(|path| path.is_dir()).ok_or_else(missing)
    }

    /// The file of a textual-inversion embedding; the extension may be left out.
    pub fn embedding(&self, name: &str) -> Option<PathBuf> {
        ["", ".safetensors", ".pt", ".bin"].iter().find_map(|extension| {
            match self.model_path("embeddings", &format!("{name}{extension}")) {
                Ok(ModelPath::File(path)) => Some(path),
                _ => None,
            }
        })
    }

    /// A picture that lies next to a model file and has its name.
    pub fn model_preview(&self, folder: &str, root: usize, name: &str) -> Option<PathBuf> {
        let root = self.model_folder(folder)?.roots.get(root)?;
        let parts = names::file(name, "models").ok()?;
        let model = parts.iter().fold(root.clone(), |path, part| path.join(part));
        let stem = model.file_stem()?.to_str()?.to_owned();
        let mut pictures: Vec<(String, PathBuf)> = listing::files_in(model.parent()?)
            .into_iter()
            .filter(|(name, _)| listing::is_image(name))
            .filter(|(name, _)| name.strip_prefix(&stem).is_some_and(|rest| rest.starts_with('.')))
            .collect();
        pictures.sort_unstable();
        pictures.into_iter().next().map(|(_, path)| path)
    }
}

impl Accept {
    fn takes(self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Folders => false,
            Self::Extensions(list) => list.contains(&listing::extension(name).as_str()),
        }
    }
}

/// Names below a root, each with its path.
pub(super) type Found = BTreeMap<String, PathBuf>;

/// Collects files below `folder`, following links but no folder twice.
pub(super) fn walk(folder: &Path, prefix: &str, seen: &mut HashSet<PathBuf>, found: &mut Found) {
    let Ok(real) = folder.canonicalize() else { return };
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    if !seen.insert(real) {
        return;
    }
    for entry in entries.flatten() {
        // Names that are no text cannot be written in a prompt.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        let relative = format!("{prefix}{name}");
        match std::fs::metadata(&path) {
            Ok(data) if data.is_file() => {
                found.insert(relative, path);
            }
            Ok(data) if data.is_dir() && name != ".git" => walk(&path, &format!("{relative}/"), seen, found),
            _ => {}
        }
    }
}
