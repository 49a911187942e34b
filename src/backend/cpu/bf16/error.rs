//! What a caller can get wrong.

use super::pack::KernelShape;

/// A mismatch between a kernel's operands.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The weights do not have the shape they are said to have.
    #[error(
        "weights [{}, {}, {}, {}] need {} values, got {found}: pass the tensor's own shape",
        shape.cout, shape.cin, shape.height, shape.width,
        shape.cout * shape.cin * shape.height * shape.width
    )]
    Weights {
        /// The shape asked for.
        shape: KernelShape,
        /// Values given.
        found: usize,
    },
    /// GEGLU needs two halves.
    #[error("GEGLU weights have {rows} rows, which has no two halves: pack them as a plain linear layer")]
    OddGeglu {
        /// Weight rows.
        rows: usize,
    },
    /// The GEGLU epilogue and the GEGLU packing belong together.
    #[error("GEGLU epilogue and weights disagree (weights packed for GEGLU: {packed}): use both or none")]
    GegluPacking {
        /// Whether the weights are packed for it.
        packed: bool,
    },
    /// A length or stride does not fit.
    #[error("{what} is {found}, needs {needed}: the slice or stride does not match the described shape")]
    Size {
        /// The operand.
        what: &'static str,
        /// Its length or stride.
        found: usize,
        /// What the shape asks for.
        needed: usize,
    },
    /// The window does not fit.
    #[error("a {}x{} window does not fit a {}x{} image with its padding", window[0], window[1], image[0], image[1])]
    Window {
        /// Rows and columns of the window.
        window: [usize; 2],
        /// Rows and columns of the image that it sees.
        image: [usize; 2],
    },
    /// The maximum of scaled scores is taken before scaling.
    #[error("attention scale is {scale}, must be positive: fold the sign into the queries")]
    Scale {
        /// The scale given.
        scale: f32,
    },
    /// Row numbers are 32-bit.
    #[error("{rows} output rows in one call, the limit is 2^32 - 2: split the batch")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
    },
}

impl KernelError {
    pub(super) fn check(
        what: &'static str,
        holds: bool,
        found: usize,
        needed: usize,
    ) -> Result<(), KernelError> {
        if holds { Ok(()) } else { Err(KernelError::Size { what, found, needed }) }
    }
}
