//! What can be wrong with a PyTorch file.

/// Why a PyTorch file could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PickleFault {
    /// The zip directory is damaged.
    #[error("the zip archive cannot be read: {message}; download the file again")]
    Archive {
        /// The zip reader's words.
        message: String,
    },
    /// A zip archive of something else.
    #[error("the zip archive holds no data.pkl, so it is not a PyTorch file; unpack it if a model is inside")]
    NotTorch,
    /// A program with its weights.
    #[error("the file is TorchScript, a program with its weights; get the file with the weights alone")]
    Script,
    /// A member that is compressed or encrypted.
    #[error("member {member:?} of the archive is not stored as it is; save the file again with torch.save")]
    Compressed {
        /// The member.
        member: String,
    },
    /// A member whose bytes are not in the file, or two on the same bytes.
    #[error(
        "member {member:?} of the archive has no {bytes} bytes of its own at byte {begin}; download the file again"
    )]
    Member {
        /// The member.
        member: String,
        /// First byte.
        begin: u64,
        /// Its length.
        bytes: u64,
    },
    /// Numbers in the other byte order.
    #[error(
        "the file was written on a big-endian machine, whose byte order is not read; save it again on another one"
    )]
    BigEndian,
    /// A pickle that PyTorch did not write.
    #[error(
        "the pickle was not written by torch.save ({what}); load it where it comes from and save its tensors as safetensors"
    )]
    NotSaved {
        /// What is missing.
        what: &'static str,
    },
    /// The pickle or its storages end too early.
    #[error("the file ends inside its {part} (byte {at}); download it again")]
    Short {
        /// What was being read.
        part: &'static str,
        /// Where.
        at: usize,
    },
    /// An instruction that PyTorch's files don't have.
    #[error(
        "instruction 0x{opcode:02x} at byte {at} of the pickle is not known; the file is damaged or was not written by torch.save"
    )]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Where.
        at: usize,
    },
    /// An instruction whose operands are missing or of another type.
    #[error("the pickle is broken at byte {at}: {what}; the file is damaged, download it again")]
    Broken {
        /// Where.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// More of something than any model has.
    #[error("the pickle has more than {cap} {what}; no model needs as many, the file is damaged")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The most that is read.
        cap: usize,
    },
    /// A tensor that an unknown function would make.
    #[error(
        "tensor {name:?} would be made by {function}, which is not called; convert the file to safetensors"
    )]
    Foreign {
        /// The tensor.
        name: String,
        /// The function.
        function: String,
    },
    /// Nothing to load.
    #[error("the file holds no tensors{}; it is no model", what(foreign))]
    NoTensors {
        /// Names that were not called.
        foreign: Vec<String>,
    },
    /// One name twice.
    #[error("two tensors of the file are called {name:?}; save it again")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A tensor whose storage is not in the file.
    #[error("the file has no storage {key:?} for tensor {name:?}; download it again")]
    NoStorage {
        /// The tensor.
        name: String,
        /// The storage.
        key: String,
    },
    /// An element type that is not read.
    #[error("tensor {name:?} has elements of {storage}, which is not supported; convert it to half or float")]
    DType {
        /// The tensor.
        name: String,
        /// The storage's type.
        storage: String,
    },
    /// A storage with fewer bytes than it should have.
    #[error(
        "the storage of tensor {name:?} has {found} bytes where {needed} are needed; download the file again"
    )]
    Storage {
        /// The tensor.
        name: String,
        /// Bytes by the pickle.
        needed: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// A tensor that reaches beyond its storage.
    #[error(
        "tensor {name:?} (shape {shape:?}, strides {strides:?}, from element {offset}) reaches beyond its storage of {elements} elements; the file is damaged"
    )]
    Beyond {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its strides.
        strides: Vec<u64>,
        /// Its first element.
        offset: u64,
        /// Elements of the storage.
        elements: u64,
    },
    /// A tensor several of whose elements are one.
    #[error(
        "elements of tensor {name:?} (shape {shape:?}, strides {strides:?}) share memory; save a copy of it (.contiguous())"
    )]
    Overlap {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its strides.
        strides: Vec<u64>,
    },
}

fn what(foreign: &[String]) -> String {
    match foreign.is_empty() {
        true => String::new(),
        false => format!(" (it names {}, which are not called)", foreign.join(", ")),
    }
}
