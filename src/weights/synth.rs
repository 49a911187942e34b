//! Synthetic checkpoints: real architectures, deterministic pseudo-random weights.
//!
//! A [`Manifest`] maps tensor names to shapes. The value of element `i` of
//! tensor `name` is a pure function of both, so that any implementation in any
//! language writes the same bytes and recorded results can be compared:
//!
//! ```text
//! h = FNV-1a 64 of name
//! z = splitmix64 finaliser of h + (i + 1) * 0x9E3779B97F4A7C15      (mod 2^64)
//! r = 2 * (z >> 40) / 2^24 - 1                                      in [-1, 1)
//! value = a * r + b, in f32, rounded to nearest even for f16
//! ```
//!
//! `a` and `b` come from the manifest or, by the tensor's name and shape, from
//! [`Manifest::scale_shift`]: they keep activations of a forward pass at the
//! size they have in trained networks.
//!
//! Because elements are independent, blocks are made on all cores and written
//! where they belong, in any order. The file appears under its name only when complete.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use serde::Deserialize;

use crate::tensor::DType;

/// Elements made and written as one piece of work.
const BLOCK: u64 = 1 << 20;

/// Manifests that are part of the program, by name.
const BUILT_IN: &[(&str, &str)] = &[
    ("sd15", include_str!("../../assets/manifests/sd15.json")),
    ("sd15-lora", include_str!("../../assets/manifests/sd15-lora.json")),
    ("sd15-controlnet", include_str!("../../assets/manifests/sd15-controlnet.json")),
    ("esrgan-4x", include_str!("../../assets/manifests/esrgan-4x.json")),
    ("esrgan-4x-oldkeys", include_str!("../../assets/manifests/esrgan-4x-oldkeys.json")),
    ("taesd_decoder", include_str!("../../assets/manifests/taesd_decoder.json")),
    ("taesd_encoder", include_str!("../../assets/manifests/taesd_encoder.json")),
    ("sd21-v", include_str!("../../assets/manifests/sd21-v.json")),
    ("sdxl-base", include_str!("../../assets/manifests/sdxl-base.json")),
    ("sdxl-embedding", include_str!("../../assets/manifests/sdxl-embedding.json")),
    ("sd15-embedding", include_str!("../../assets/manifests/sd15-embedding.json")),
    ("sd15-embedding-clip_l", include_str!("../../assets/manifests/sd15-embedding-clip_l.json")),
];

/// Why a synthetic checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The manifest is not the JSON it should be.
    #[error("the manifest does not map tensor names to shapes: {0}")]
    Manifest(#[from] serde_json::Error),
    /// The sizes do not fit a 64-bit number.
    #[error("the size of tensor {name:?} with shape {shape:?} overflows; check the manifest")]
    Overflow {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Only two element types are defined.
    #[error("synthetic weights are defined for F16 and F32 only, not {0:?}")]
    DType(DType),
    /// The operating system refused.
    #[error("cannot write {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Names and shapes of a checkpoint's tensors.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    entries: BTreeMap<String, Entry>,
}

/// What a manifest says about a tensor: a shape, or a shape with explicit `a` and `b`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Shape(Vec<u64>),
    Scaled {
        shape: Vec<u64>,
        #[serde(default)]
        scale: f64,
        #[serde(default)]
        shift: f64,
    },
}

impl Entry {
    fn shape(&self) -> &[u64] {
        match self {
            Entry::Shape(shape) | Entry::Scaled { shape, .. } => shape,
        }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements.
    pub parameters: u64,
}

impl Manifest {
    /// Reads a manifest: `{name: [extent, …]}` or `{name: {"shape": […], "scale": a, "shift": b}}`.
    ///
    /// # Errors
    /// If the text is anything else.
    pub fn from_json(text: &str) -> Result<Self, SynthError> {
        Ok(Self { entries: serde_json::from_str(text)? })
    }

    /// A manifest of these names and shapes.
    pub fn from_shapes(shapes: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let entry = |shape: Vec<usize>| Entry::Shape(shape.into_iter().map(|d| d as u64).collect());
        Self { entries: shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect() }
    }

    /// The manifest called `name` that is part of the program; see [`built_in_names`](Self::built_in_names).
    pub fn built_in(name: &str) -> Option<Self> {
        let (_, text) = BUILT_IN.iter().find(|(n, _)| *n == name)?;
        Self::from_json(text).ok()
    }

    /// Names that [`built_in`](Self::built_in) knows.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// Names and shapes, by name.
    pub fn shapes(&self) -> impl ExactSizeIterator<Item = (&str, &[u64])> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry.shape()))
    }

    /// Scale `a` and shift `b` of tensor `name`: the manifest's own, or by rule.
    /// The first that fits of: biases, norm scales (1-D weights), embeddings,
    /// and everything else with a variance of 1 / fan-in. `None` if there is no such tensor.
    pub fn scale_shift(&self, name: &str) -> Option<(f64, f64)> {
        let entry = self.entries.get(name)?;
        let shape = match entry {
            Entry::Scaled { scale, shift, .. } => return Some((*scale, *shift)),
            Entry::Shape(shape) => shape,
        };
        Some(if name.ends_with(".bias") || name.ends_with("_bias") {
            (0.05, 0.0)
        } else if shape.len() == 1 && name.ends_with(".weight") {
            (0.1, 1.0)
        } else if name.contains("embedding") && shape.len() == 2 {
            (0.035, 0.0)
        } else {
            // Projections named so are stored transposed: inputs first.
            let split = shape.len().min(1);
            let inputs = if name.ends_with("_projection") { &shape[..split] } else { &shape[split..] };
            let fan_in = inputs.iter().fold(1u64, |n, &d| n.saturating_mul(d)).max(1);
            ((3.0 / fan_in as f64).sqrt(), 0.0)
        })
    }

    /// Elements `range` of tensor `name` in f32, before rounding to the file's type; `None` if there is no such tensor.
    pub fn values(&self, name: &str, range: std::ops::Range<u64>) -> Option<Vec<f32>> {
        let (scale, shift) = self.scale_shift(name)?;
        Some(Generator::new(name, scale, shift).values(range).collect())
    }
}

/// The values of one tensor.
#[derive(Clone, Copy)]
struct Generator {
    hash: u64,
    scale: f32,
    shift: f32,
}

impl Generator {
    fn new(name: &str, scale: f64, shift: f64) -> Self {
        let hash = name
            .bytes()
            .fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
        Self { hash, scale: scale as f32, shift: shift as f32 }
    }

    fn values(self, range: std::ops::Range<u64>) -> impl Iterator<Item = f32> {
        range.map(move |i| {
            let mut z = (i.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(self.hash);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            // 24 bits: the conversion is exact, and i32 converts faster than u64.
            let r = (z >> 40) as i32 as f32 * (1.0 / 8_388_608.0) - 1.0;
            r * self.scale + self.shift
        })
    }
}

/// Where a tensor's data go.
struct Placed<'m> {
    name: &'m str,
    shape: &'m [u64],
    numel: u64,
    begin: u64,
}

/// A run of elements of one tensor.
struct Block {
    generator: Generator,
    elements: std::ops::Range<u64>,
    at: u64,
}

/// Writes the checkpoint that `manifest` describes to `out`, in `dtype` (F16 or F32).
///
/// `metadata` becomes `__metadata__`, in the order given. `progress` is called
/// from several threads with bytes done and bytes in all. The file is
/// written next to `out` under a temporary name and renamed when complete.
///
/// # Errors
/// If a size overflows, `dtype` is another type, or the file cannot be written.
pub fn write(
    manifest: &Manifest,
    out: &Path,
    dtype: DType,
    metadata: &[(String, String)],
    progress: impl Fn(u64, u64) + Sync,
) -> Result<Written, SynthError> {
    if !matches!(dtype, DType::F16 | DType::F32) {
        return Err(SynthError::DType(dtype));
    }
    let size = dtype.size() as u64;
    let (placed, data_bytes) = place(manifest, size)?;
    let header = header_bytes(&placed, dtype, metadata);
    let total = data_bytes.saturating_add(header.len() as u64);
    let blocks = blocks_of(manifest, &placed, header.len() as u64, size);

    let io_error = |source| SynthError::Io { file: out.to_path_buf(), source };
    let file = temporary_beside(out).map_err(io_error)?;
    let fill = || -> io::Result<()> {
        file.as_file().set_len(total)?;
        let target = Mutex::new(file.as_file());
        write_at(&target, 0, &header)?;
        let done = AtomicU64::new(header.len() as u64);
        blocks.par_iter().try_for_each_init(Vec::new, |buffer, block| {
            encode(block, dtype, buffer);
            write_at(&target, block.at, buffer)?;
            let written = buffer.len() as u64;
            progress(done.fetch_add(written, Ordering::Relaxed) + written, total);
            Ok(())
        })
    };
    fill().map_err(io_error)?;
    // No fsync: the file can be made again, and its header reveals missing data at opening.
    file.persist(out).map_err(|error| io_error(error.error))?;
    Ok(Written { bytes: total, tensors: placed.len(), parameters: data_bytes / size })
}

/// Lays the tensors out by name, without gaps; also the length of the data.
fn place(manifest: &Manifest, size: u64) -> Result<(Vec<Placed<'_>>, u64), SynthError> {
    let mut placed = Vec::with_capacity(manifest.entries.len());
    let mut begin = 0u64;
    for (name, shape) in manifest.shapes() {
        let numel = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let end = numel.and_then(|n| n.checked_mul(size)).and_then(|bytes| begin.checked_add(bytes));
        let (Some(numel), Some(end)) = (numel, end) else {
            return Err(SynthError::Overflow { name: name.to_owned(), shape: shape.to_vec() });
        };
        placed.push(Placed { name, shape, numel, begin });
        begin = end;
    }
    Ok((placed, begin))
}

/// Length and JSON as Python's `json.dumps` writes it without blanks, padded to eight bytes.
fn header_bytes(placed: &[Placed], dtype: DType, metadata: &[(String, String)]) -> Vec<u8> {
    let (type_name, size) = if dtype == DType::F16 { ("F16", 2) } else { ("F32", 4) };
    let mut json = String::from("{");
    if !metadata.is_empty() {
        json.push_str("\"__metadata__\":{");
        for (key, value) in metadata {
            push_ascii_string(&mut json, key);
            json.push(':');
            push_ascii_string(&mut json, value);
            json.push(',');
        }
        json.pop();
        json.push_str("},");
    }
    for tensor in placed {
        push_ascii_string(&mut json, tensor.name);
        let shape = tensor.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let end = tensor.begin + tensor.numel * size;
        // Writing to a String cannot fail.
        let _ = write!(
            json,
            ":{{\"dtype\":\"{type_name}\",\"shape\":[{shape}],\"data_offsets\":[{},{end}]}},",
            tensor.begin
        );
    }
    if json.ends_with(',') {
        json.pop();
    }
    json.push('}');
    let mut header = json.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut header);
    bytes
}

/// Appends `text` as a JSON string in printable ASCII.
fn push_ascii_string(json: &mut String, text: &str) {
    json.push('"');
    for c in text.chars() {
        match c {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            '\x08' => json.push_str("\\b"),
            '\x0c' => json.push_str("\\f"),
            ' '..='~' => json.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(json, "\\u{unit:04x}");
                }
            }
        }
    }
    json.push('"');
}

/// Cuts the tensors into blocks.
fn blocks_of(manifest: &Manifest, placed: &[Placed], data_begin: u64, size: u64) -> Vec<Block> {
    let mut blocks = Vec::new();
    for tensor in placed {
        let (scale, shift) = manifest.scale_shift(tensor.name).unwrap_or_default();
        let generator = Generator::new(tensor.name, scale, shift);
        let mut first = 0;
        while first < tensor.numel {
            let last = tensor.numel.min(first + BLOCK);
            blocks.push(Block {
                generator,
                elements: first..last,
                at: data_begin + tensor.begin + first * size,
            });
            first = last;
        }
    }
    blocks
}

/// Fills `buffer` with the block's bytes.
fn encode(block: &Block, dtype: DType, buffer: &mut Vec<u8>) {
    const STAGE: usize = 1024;
    let (mut values, mut halves) = ([0f32; STAGE], [f16::ZERO; STAGE]);
    buffer.clear();
    let mut first = block.elements.start;
    while first < block.elements.end {
        let last = block.elements.end.min(first + STAGE as u64);
        let values = &mut values[..(last - first) as usize];
        for (v, made) in values.iter_mut().zip(block.generator.values(first..last)) {
            *v = made;
        }
        if dtype == DType::F16 {
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            buffer.extend(halves.iter().flat_map(|h| h.to_le_bytes()));
        } else {
            buffer.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        first = last;
    }
}

/// Writes `bytes` at offset `at`. Under a lock: making the bytes takes longer than writing them.
fn write_at(target: &Mutex<&File>, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut file = target.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}

/// An unnamed-to-the-user file in the folder of `out`, readable like any other.
fn temporary_beside(out: &Path) -> io::Result<tempfile::NamedTempFile> {
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".synth-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private by default; the result should be as the user's umask says.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

#[cfg(test)]
#[path = "synth_tests.rs"]
mod tests;
