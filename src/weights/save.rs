//! Writing safetensors files, tensor by tensor: a checkpoint of gigabytes needs
//! the memory of its largest tensor.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::{Map, Value as Json, json};

use crate::tensor::DType;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveEntry {
    /// Its name.
    pub name: String,
    /// `F32`, `F16`, or `I64` for whole numbers that an f32 holds.
    pub dtype: DType,
    /// Its extents.
    pub shape: Vec<usize>,
}

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The file system said no.
    #[error("{} can't be written: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tensor's source gave another number of elements.
    #[error(
        "tensor {name} has {found} elements where its shape says {expected}; the model file may have changed"
    )]
    Elements {
        /// The tensor.
        name: String,
        /// Elements by shape.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Only some types are written.
    #[error("tensor {name} can't be written as {dtype:?}; F32, F16 and I64 are possible")]
    Type {
        /// The tensor.
        name: String,
        /// The type asked for.
        dtype: DType,
    },
    /// There is a file of that name; nothing was written.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
}

/// Writes `entries` to a new file at `path`, whose values `read` gives by index.
///
/// The file is written beside `path` and renamed when complete; a file that is
/// there stays.
///
/// # Errors
/// [`SaveError`]; no part of a file is left.
pub fn save(
    path: &Path,
    entries: &[SaveEntry],
    metadata: &[(String, String)],
    mut read: impl FnMut(usize) -> Vec<f32>,
) -> Result<(), SaveError> {
    let header = header(entries, metadata)?;
    let failed = |source| SaveError::Io { file: path.to_owned(), source };
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kiln-").suffix(".part");
    // Others may read results; the process's umask still applies.
    #[cfg(unix)]
    builder.permissions(<std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(&header).map_err(failed)?;
    for (i, entry) in entries.iter().enumerate() {
        let values = read(i);
        let expected = entry.shape.iter().product();
        if values.len() != expected {
            return Err(SaveError::Elements { name: entry.name.clone(), expected, found: values.len() });
        }
        for block in values.chunks(1 << 14) {
            let bytes: Vec<u8> = match entry.dtype {
                DType::F16 => block.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
                DType::I64 => block.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
                _ => block.iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            out.write_all(&bytes).map_err(failed)?;
        }
    }
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.as_file().sync_data().map_err(failed)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(SaveError::Exists(path.to_owned())),
        Err(e) => Err(failed(e.error)),
    }
}

/// The JSON header, padded to eight bytes.
fn header(entries: &[SaveEntry], metadata: &[(String, String)]) -> Result<Vec<u8>, SaveError> {
    let mut fields = Map::new();
    if !metadata.is_empty() {
        let texts = metadata.iter().map(|(k, v)| (k.clone(), Json::from(v.as_str())));
        fields.insert("__metadata__".to_owned(), Json::Object(texts.collect()));
    }
    let mut begin = 0usize;
    for entry in entries {
        let (dtype, size) = match entry.dtype {
            DType::F32 => ("F32", 4),
            DType::F16 => ("F16", 2),
            DType::I64 => ("I64", 8),
            dtype => return Err(SaveError::Type { name: entry.name.clone(), dtype }),
        };
        let end = begin + entry.shape.iter().product::<usize>() * size;
        let described = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [begin, end]});
        fields.insert(entry.name.clone(), described);
        begin = end;
    }
    let mut bytes = Json::Object(fields).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::WeightsFile;

    #[test]
    fn files_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let entry =
            |name: &str, dtype, shape: &[usize]| SaveEntry { name: name.into(), dtype, shape: shape.into() };
        let entries = [
            entry("a.weight", DType::F32, &[2, 2]),
            entry("mark", DType::F32, &[0]),
            entry("b", DType::F16, &[3]),
            entry("ids", DType::I64, &[1, 2]),
        ];
        let values = [vec![1.0, -2.5, 3.0, 1e-20], vec![], vec![0.1, 65504.0, -1.0], vec![0.0, 76.0]];
        let texts = [("prompt".to_owned(), "{\"ü\": 1}".to_owned())];
        save(&path, &entries, &texts, |i| values[i].clone()).unwrap();
        let file = WeightsFile::open(&path).unwrap();
        assert_eq!(file.get("a.weight").unwrap().to_f32(), values[0]);
        assert_eq!(file.get("a.weight").unwrap().shape, [2, 2]);
        assert_eq!(file.get("b").unwrap().to_f32(), [0.099_975_586, 65504.0, -1.0]);
        assert_eq!(file.get("ids").unwrap().to_f32(), [0.0, 76.0]);
        assert_eq!(file.get("ids").unwrap().dtype, DType::I64);
        assert_eq!(file.metadata()["prompt"], "{\"ü\": 1}");
        assert!(matches!(save(&path, &entries, &texts, |i| values[i].clone()), Err(SaveError::Exists(_))));
        let short = save(&folder.path().join("b"), &entries, &[], |_| vec![0.0]);
        assert!(matches!(short, Err(SaveError::Elements { expected: 4, found: 1, .. })), "{short:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no part of a file is left");
    }
}
