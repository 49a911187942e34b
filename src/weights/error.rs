//! What can be wrong with a weight file, in words that say what to do about it.

use std::path::PathBuf;

use super::pickle::PickleFault;
use crate::tensor::DType;

/// Why a weight file could not be opened or can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was being done to it.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path leads to a folder, pipe or device.
    #[error("{} is not a regular file; give the path of a .safetensors file", file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
    },
    /// The bytes are of another format.
    #[error("{} is {format}, not a safetensors file; {advice}", file.display())]
    NotSafetensors {
        /// The file.
        file: PathBuf,
        /// What it looks like, with its article.
        format: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The header does not describe the file.
    #[error("{}: {fault}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        fault: HeaderFault,
    },
    /// A PyTorch file that cannot be read.
    #[error("{}: {fault}", file.display())]
    Pickle {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        fault: PickleFault,
    },
    /// The file was changed after it was opened.
    #[error(
        "{} was changed while in use ({what}: {was} when opened, {now} now); put the original file back or load it again",
        file.display()
    )]
    Changed {
        /// The file.
        file: PathBuf,
        /// Which of its properties changed.
        what: &'static str,
        /// Its value at opening.
        was: String,
        /// Its value now.
        now: String,
    },
}

/// What is wrong with the header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// Nothing in it.
    #[error("the file is empty (0 bytes); download it again")]
    Empty,
    /// Less than the eight bytes that hold the header's length.
    #[error("the file has {len} bytes, fewer than the 8 that hold the header's length; download it again")]
    NoLength {
        /// Length of the file.
        len: u64,
    },
    /// The header's length is beyond the format's cap.
    #[error(
        "the header claims {len} bytes, more than the {cap} the format allows; the file is damaged or not safetensors"
    )]
    TooLarge {
        /// What the first eight bytes say.
        len: u64,
        /// The cap.
        cap: u64,
    },
    /// The file ends inside the header.
    #[error("the header needs {needed} bytes but the file has {len}: {} are missing; download it again", needed - len)]
    Short {
        /// Bytes up to the end of the header.
        needed: u64,
        /// Length of the file.
        len: u64,
    },
    /// The header is not UTF-8.
    #[error("the header is not UTF-8 text (byte {at} of the file); the file is damaged or not safetensors")]
    NotText {
        /// Where in the file.
        at: u64,
    },
    /// The header is not a JSON object.
    #[error("the header is not a JSON object: {message}; the file is damaged or not safetensors")]
    NotJson {
        /// The JSON parser's words.
        message: String,
    },
    /// One name twice.
    #[error("the header names {name:?} twice, so it is unclear which data belong to it; save the file again")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// `__metadata__` is not a map from strings to strings.
    #[error("__metadata__ must map strings to strings: {message}; save the file again")]
    Metadata {
        /// The JSON parser's words.
        message: String,
    },
    /// A tensor's entry lacks a field or has one of the wrong type.
    #[error(
        "the entry of tensor {name:?} is not {{dtype, shape, data_offsets}}: {message}; save the file again"
    )]
    Entry {
        /// The tensor.
        name: String,
        /// The JSON parser's words.
        message: String,
    },
    /// An element type that is not read.
    #[error(
        "tensor {name:?} has element type {dtype:?}, which is not supported; convert it to F16, BF16 or F32"
    )]
    DType {
        /// The tensor.
        name: String,
        /// What the header says.
        dtype: String,
    },
    /// More dimensions than any model has.
    #[error("tensor {name:?} has {rank} dimensions, more than the {cap} supported; the file is damaged")]
    Rank {
        /// The tensor.
        name: String,
        /// Its dimensions.
        rank: usize,
        /// The most that is read.
        cap: usize,
    },
    /// The size does not fit a 64-bit number.
    #[error("the size of tensor {name:?} with shape {shape:?} overflows; the file is damaged")]
    Overflow {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Offsets run backwards.
    #[error(
        "tensor {name:?} ends at byte {end} of the data, before its begin at {begin}; the file is damaged"
    )]
    Reversed {
        /// The tensor.
        name: String,
        /// Offset of its first byte.
        begin: u64,
        /// Offset past its last byte.
        end: u64,
    },
    /// Offsets do not fit type and shape.
    #[error(
        "tensor {name:?} ({dtype:?}, shape {shape:?}) needs {needed} bytes but its offsets span {span}; the file is damaged"
    )]
    Span {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes by type and shape.
        needed: u64,
        /// Bytes by offsets.
        span: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap from byte {at} of the data; the file is damaged")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The one that begins inside it.
        second: String,
        /// Offset where the second begins.
        at: u64,
    },
    /// Bytes no tensor owns.
    #[error(
        "{bytes} bytes of the data before tensor {name:?} (from byte {at}) belong to no tensor; save the file again"
    )]
    Hole {
        /// The tensor after the hole.
        name: String,
        /// Offset of the hole.
        at: u64,
        /// Its length.
        bytes: u64,
    },
    /// The file ends before its data.
    #[error("the file has {len} bytes but its header describes {needed}: {} are missing; download it again", needed - len)]
    Truncated {
        /// Length of the file.
        len: u64,
        /// What header and tensors need.
        needed: u64,
    },
    /// The file goes on after its data.
    #[error("{} bytes follow the data (the header describes {needed}, the file has {len}); download it again", len - needed)]
    Trailing {
        /// Length of the file.
        len: u64,
        /// What header and tensors need.
        needed: u64,
    },
    /// The `safetensors` crate, asked as a second opinion, refuses what passed every check above.
    #[error("the safetensors reader refuses the header: {message}; save the file again")]
    Refused {
        /// Its words.
        message: String,
    },
}
