//! The op set: descriptors and the trait that every backend implements.
//!
//! Few and fused on purpose. Every op takes one descriptor and a caller-owned
//! output from [`Backend::alloc`]; nothing else allocates. Activations are
//! NHWC in the backend's own element type; models never see it.

use std::any::Any;
use std::sync::Arc;

use super::{
    Cols, Curve, Filter, LatentOps, MatchTokens, RawTensor, Shape, Tensor, TensorError, TokenRows, merge,
    reference,
};

/// A weight in a backend's own layout. Cloning shares it.
#[derive(Clone)]
pub struct Packed(Arc<dyn Any + Send + Sync>);

impl Packed {
    /// Wraps a backend's representation.
    pub fn new<T: Any + Send + Sync>(inner: T) -> Self {
        Self(Arc::new(inner))
    }

    /// The backend's representation, if it is a `T`.
    pub fn downcast<T: Any + Send + Sync>(&self) -> Option<&T> {
        self.0.downcast_ref()
    }
}

/// Weight of [`Backend::linear`]: `n` outputs, `k` inputs, bias inside.
#[derive(Clone)]
pub struct LinearWeight {
    /// Output features (for GEGLU: of the halved result).
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Whether the epilogue is GEGLU: rows `0..n` are values, `n..2n` gates.
    pub is_geglu: bool,
    /// The backend's layout.
    pub packed: Packed,
}

/// Weight of [`Backend::conv2d`], bias inside.
#[derive(Clone)]
pub struct ConvWeight {
    /// Output channels.
    pub cout: usize,
    /// Input channels.
    pub cin: usize,
    /// Kernel height.
    pub kh: usize,
    /// Kernel width.
    pub kw: usize,
    /// The backend's layout.
    pub packed: Packed,
}

/// Scale and shift of a norm.
#[derive(Clone)]
pub struct NormWeight {
    /// Channels.
    pub c: usize,
    /// The backend's layout.
    pub packed: Packed,
}

/// An embedding table.
#[derive(Clone)]
pub struct Embedding {
    /// Number of rows.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
    /// The backend's layout.
    pub packed: Packed,
}

/// Activation functions of epilogues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// x
    #[default]
    None,
    /// x·σ(x)
    Silu,
    /// x·Φ(x), exact (erf)
    Gelu,
    /// x·σ(1.702·x)
    QuickGelu,
    /// max(x, 0)
    Relu,
    /// x, or 0.2·x where x is negative
    LeakyRelu,
}

/// What to pack as a linear weight.
pub struct LinearParts<'a> {
    /// Matrices `[n_i, k]` (or `[n_i, k, 1, 1]`), stacked along the outputs: fused q/k/v.
    pub weights: &'a [RawTensor<'a>],
    /// One bias for each matrix (`[n_i]`), or none at all.
    pub biases: &'a [RawTensor<'a>],
    /// The rows are value and gate halves of a GEGLU.
    pub is_geglu: bool,
}

/// Padding of a convolution, in virtual input pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pad {
    /// Rows above.
    pub top: usize,
    /// Columns to the left.
    pub left: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Pad {
    /// The same on every side.
    pub fn same(p: usize) -> Self {
        Self { top: p, left: p, bottom: p, right: p }
    }
}

/// `out = act(conv(upsample(x ‖ x2)) + bias + time_bias)·scale + residual`.
pub struct Conv2d<'a> {
    /// Input `[N, H, W, C1]`.
    pub x: &'a Tensor,
    /// Further input channels `[N, H, W, C2]`, concatenated behind `x` (skip connections).
    pub x2: Option<&'a Tensor>,
    /// Weight with `cin = C1 + C2`.
    pub w: &'a ConvWeight,
    /// Stride in both directions.
    pub stride: usize,
    /// Zero padding.
    pub pad: Pad,
    /// The input is first enlarged twice, nearest neighbour.
    pub upsample2x: bool,
    /// Per-sample bias: columns of a `[N, 1, 1, *]` tensor, `width = cout`.
    pub time_bias: Option<Cols<'a>>,
    /// Activation before scale and residual.
    pub act: Activation,
    /// Factor before the residual is added.
    pub scale: f32,
    /// Added at the end, same shape as the output.
    pub residual: Option<&'a Tensor>,
}

impl<'a> Conv2d<'a> {
    /// A plain convolution, stride 1, padded to keep the size.
    pub fn new(x: &'a Tensor, w: &'a ConvWeight) -> Self {
        Self {
            x,
            x2: None,
            w,
            stride: 1,
            pad: Pad::same(w.kh / 2),
            upsample2x: false,
            time_bias: None,
            act: Activation::None,
            scale: 1.0,
            residual: None,
        }
    }

    /// Shape of the output; `None` if the kernel is larger than the padded input.
    pub fn out_shape(&self) -> Option<Shape> {
        let s = self.x.shape();
        let up = if self.upsample2x { 2 } else { 1 };
        let h = (s.h * up + self.pad.top + self.pad.bottom).checked_sub(self.w.kh)? / self.stride + 1;
        let w = (s.w * up + self.pad.left + self.pad.right).checked_sub(self.w.kw)? / self.stride + 1;
        Some(Shape::nhwc(s.n, h, w, self.w.cout))
    }
}

/// `out = act((x ‖ x2)·Wᵀ + bias)·scale + residual`, row by row.
pub struct Linear<'a> {
    /// Input rows of `C1` features.
    pub x: Cols<'a>,
    /// Further features of the same rows, concatenated behind `x`.
    pub x2: Option<Cols<'a>>,
    /// Weight with `k = C1 + C2`; a GEGLU weight applies value·gelu(gate).
    pub w: &'a LinearWeight,
    /// Activation (must be `None` with a GEGLU weight).
    pub act: Activation,
    /// Factor before the residual is added.
    pub scale: f32,
    /// Added at the end, same shape as the output.
    pub residual: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    /// A plain linear layer over all columns of `x`.
    pub fn new(x: &'a Tensor, w: &'a LinearWeight) -> Self {
        Self { x: Cols::all(x), x2: None, w, act: Activation::None, scale: 1.0, residual: None }
    }
}

/// softmax(q·kᵀ·scale + mask)·v for every sample and head.
pub struct Attention<'a> {
    /// Queries `[B, Sq, heads·D]`.
    pub q: Cols<'a>,
    /// Keys `[Bk, Sk, heads·D]`. `Bk` divides `B`: sample `i` uses keys `i / (B / Bk)`,
    /// so the samples of one conditioning share its keys.
    pub k: Cols<'a>,
    /// Values, like the keys.
    pub v: Cols<'a>,
    /// Number of heads.
    pub heads: usize,
    /// Position `i` sees keys `0..=i` only.
    pub is_causal: bool,
    /// Factor on the scores; 1/√D in all models here.
    pub scale: f32,
}

/// For every key the sum over queries of its share of attention, the mean over heads.
pub struct AttentionDrawn<'a> {
    /// Queries `[B, Sq, heads·D]`.
    pub q: Cols<'a>,
    /// Keys `[B, Sk, heads·D]`.
    pub k: Cols<'a>,
    /// Number of heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// The first sample that counts; the output has as many as count.
    pub first: usize,
}

/// Group normalisation over channels of NHWC, optionally followed by SiLU.
pub struct GroupNorm<'a> {
    /// Input.
    pub x: &'a Tensor,
    /// Further channels concatenated behind `x`; groups may straddle the seam.
    pub x2: Option<&'a Tensor>,
    /// Scale and shift.
    pub w: &'a NormWeight,
    /// Number of groups.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Apply SiLU to the result.
    pub silu: bool,
}

/// Layer normalisation over the channels of every row.
pub struct LayerNorm<'a> {
    /// Input.
    pub x: &'a Tensor,
    /// Scale and shift.
    pub w: &'a NormWeight,
    /// Added to the variance.
    pub eps: f32,
}

/// One token of [`Backend::embed`].
#[derive(Clone, Copy, Debug)]
pub enum EmbedRow<'a> {
    /// A row of the table.
    Id(u32),
    /// A vector of its own (textual inversion), `width` long.
    Vector(&'a [f32]),
}

/// `out[b, s] = table[token] + positions[s]`.
pub struct Embed<'a> {
    /// Token table.
    pub table: &'a Embedding,
    /// Position table.
    pub positions: &'a Embedding,
    /// `B·S` tokens, row-major.
    pub tokens: &'a [EmbedRow<'a>],
}

/// Columns of tokens `[…, rows, columns, run]` in the order `[…, columns, rows, run]`: tiles of a picture become
/// runs of neighbouring tokens, or the other way round.
pub struct SwapTokens<'a> {
    /// The tokens `[B, 1, S, *]`.
    pub x: Cols<'a>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Tokens that stay together; `rows · columns · run` divides S.
    pub run: usize,
}

impl SwapTokens<'_> {
    /// Shape of the output: the tokens with the columns' width.
    pub fn out_shape(&self) -> Shape {
        self.x.tensor.shape().with_channels(self.x.width)
    }
}

/// Scales the first half of a map's channels.
pub struct ScaleHalf<'a> {
    /// The map.
    pub x: &'a Tensor,
    /// The factor.
    pub factor: f32,
    /// The factor goes from 1 where a sample's mean over channels is smallest to `factor` where it is largest. A
    /// map of one place has no range: NaN, as in the reference.
    pub is_by_place: bool,
}

/// Order of elements in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostLayout {
    /// `[N, C, H, W]`, as latents cross node borders.
    Nchw,
    /// `[N, H, W, C]`, as pictures and tokens do.
    Nhwc,
}

/// What a backend is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Device type for clients: `cpu`, `cuda`.
    pub kind: &'static str,
    /// Human-readable name and tier.
    pub name: String,
    /// Index of the device among those of its kind; `None` for the CPU.
    pub index: Option<usize>,
    /// Worker threads (CPU).
    pub threads: usize,
    /// Bytes of one activation element.
    pub element_bytes: usize,
}

/// Memory of a backend, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Activations on loan now.
    pub activations: usize,
    /// Arena memory that is free for reuse.
    pub cached: usize,
    /// Scratch memory of kernels.
    pub workspace: usize,
    /// Packed weights alive.
    pub weights: usize,
    /// Highest value of `activations + cached` so far.
    pub peak: usize,
    /// How often the arena asked the system for memory.
    pub system_allocations: u64,
    /// What the device could still give, besides `cached`.
    pub available: usize,
    /// Memory of a device of its own; `None` if it is the machine's.
    pub device_total: Option<usize>,
}

impl MemoryUse {
    /// All that the backend holds, in use or not.
    pub fn held(&self) -> usize {
        self.weights + self.activations + self.workspace + self.cached
    }
}

/// Work that may be recorded, see [`Backend::record`].
pub type Body<'a> = dyn FnMut(&[&Tensor]) -> Result<Outcome, BodyError> + 'a;

/// What a [`Body`] makes.
pub struct Outcome {
    /// Its result.
    pub result: Tensor,
    /// What parts of the work leave beside the result, in an order of theirs; `None` where one leaves nothing.
    pub beside: Vec<Option<Tensor>>,
}

impl From<Tensor> for Outcome {
    fn from(result: Tensor) -> Self {
        Self { result, beside: Vec::new() }
    }
}

/// Why a [`Body`] failed.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// See [`Backend::on_pressure`].
pub type PressureHook = Arc<dyn Fn() -> bool + Send + Sync>;

/// The operations of a device. Every method may be called from any thread.
///
/// Shape mistakes are [`TensorError`]s, never panics. An op fills every
/// element of its output and reads nothing from it.
pub trait Backend: Send + Sync {
    /// What this backend is.
    fn info(&self) -> BackendInfo;

    /// Memory in use.
    fn memory(&self) -> MemoryUse;

    /// Gives free arena memory back to the system.
    fn trim(&self);

    /// An activation with undefined content, from the arena.
    fn alloc(&self, shape: Shape) -> Result<Tensor, TensorError>;

    /// An activation for a result that leaves the device, to be written by
    /// [`conv2d`](Backend::conv2d) or [`linear`](Backend::linear) and read by
    /// [`download`](Backend::download) only: f32 where the backend's own type
    /// is shorter and those ops can write it.
    fn alloc_result(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc(shape)
    }

    /// An activation in f32, whatever the backend's own type.
    fn alloc_f32(&self, shape: Shape) -> Result<Tensor, TensorError>;

    /// Packs linear weights into this backend's layout.
    fn pack_linear(&self, parts: &LinearParts<'_>) -> Result<LinearWeight, TensorError>;

    /// Packs a convolution weight `[Cout, Cin, kh, kw]` and bias `[Cout]`.
    fn pack_conv(
        &self,
        weight: &RawTensor<'_>,
        bias: Option<&RawTensor<'_>>,
    ) -> Result<ConvWeight, TensorError>;

    /// Packs scale and shift of a norm.
    fn pack_norm(&self, scale: &RawTensor<'_>, shift: &RawTensor<'_>) -> Result<NormWeight, TensorError>;

    /// Packs an embedding table `[rows, width]`.
    fn pack_embedding(&self, table: &RawTensor<'_>) -> Result<Embedding, TensorError>;

    /// Copies host data into `out` (whose shape tells the extents).
    fn upload(&self, data: &[f32], layout: HostLayout, out: &mut Tensor) -> Result<(), TensorError>;

    /// Copies `x` to host memory of the same number of elements.
    fn download(&self, x: &Tensor, layout: HostLayout, out: &mut [f32]) -> Result<(), TensorError>;

    /// Convolution; `out` has [`Conv2d::out_shape`].
    fn conv2d(&self, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Linear layer; `out` has the rows of `x` and `w.n` channels.
    fn linear(&self, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Attention; `out` has the rows and width of `q`.
    fn attention(&self, op: &Attention<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Attention that every key draws; `out` is `[samples, 1, Sk, 1]` in f32.
    fn attention_drawn(&self, op: &AttentionDrawn<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Group normalisation; `out` has all channels of `x` and `x2`.
    fn group_norm(&self, op: &GroupNorm<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Layer normalisation; `out` has the shape of `x`.
    fn layer_norm(&self, op: &LayerNorm<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Token and position embedding; `out` is `[B, 1, S, width]`.
    fn embed(&self, op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError>;

    /// Sinusoidal timestep embedding (cosines first, frequencies 10000^(-i/half)):
    /// `out` is `[timesteps.len(), 1, 1, dim]`.
    fn timestep_embedding(&self, timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError>;

    /// `act(x)`; `out` has the shape of `x`.
    fn activate(&self, x: &Tensor, act: Activation, out: &mut Tensor) -> Result<(), TensorError>;

    /// `curve(x)`; `out` has the shape of `x`.
    fn curve(&self, x: &Tensor, curve: Curve, out: &mut Tensor) -> Result<(), TensorError> {
        reference::curve(self, x, curve, out)
    }

    /// A map of another size; batch and channels stay.
    fn resize(&self, x: &Tensor, filter: Filter, out: &mut Tensor) -> Result<(), TensorError> {
        reference::resize(self, x, filter, out)
    }

    /// Tokens in another order; `out` has the tokens and [`SwapTokens::out_shape`].
    fn swap_tokens(&self, op: &SwapTokens<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        reference::swap_tokens(self, op, out)
    }

    /// Which tokens share a row.
    fn match_tokens(&self, op: &MatchTokens<'_>) -> Result<TokenRows, TensorError> {
        merge::match_tokens(self, op)
    }

    /// Rows from tokens, each the mean of all that share it; `out` has [`TokenRows::merged_shape`].
    fn merge_tokens(&self, x: &Cols<'_>, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        merge::merge_tokens(self, x, rows, out)
    }

    /// Tokens from rows; `out` has [`TokenRows::spread_shape`].
    fn spread_tokens(&self, x: &Tensor, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        merge::spread_tokens(self, x, rows, out)
    }

    /// Columns of several tensors of the same rows side by side; `out` has the rows and all columns.
    fn concat(&self, parts: &[Cols<'_>], out: &mut Tensor) -> Result<(), TensorError> {
        reference::concat(self, parts, out)
    }

    /// Scales the first half of the channels; `out` has the shape of `x`.
    fn scale_half(&self, op: &ScaleHalf<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        reference::scale_half(self, op, out)
    }

    /// Scales the spatial frequencies −1 and 0 of every channel's plane (0 alone along a side of one place) and
    /// keeps the real part; `out` has the shape of `x`.
    fn scale_low_band(&self, x: &Tensor, factor: f32, out: &mut Tensor) -> Result<(), TensorError> {
        reference::scale_low_band(self, x, factor, out)
    }

    /// Runs `body` on `inputs`; a device that can may record its launches and replay them.
    ///
    /// For one `key` and one set of input shapes `body` must be the same
    /// sequence of ops, depend on nothing but `inputs` and weights that stay,
    /// and neither upload nor download. The outcome has the shapes and contents
    /// that `body` gives, and is the caller's alone: later calls leave it as it is.
    fn record(&self, key: u64, inputs: &[&Tensor], body: &mut Body<'_>) -> Result<Outcome, BodyError> {
        let _ = key;
        body(inputs)
    }

    /// Samplers' arithmetic, if latents stay on the device while they are sampled.
    fn latent_ops(&self) -> Option<&dyn LatentOps> {
        None
    }

    /// One more who is asked to let go of memory when the device is full: returns whether it did.
    fn on_pressure(&self, hook: PressureHook) {
        let _ = hook;
    }

    /// `a·x + b·y`; all of one shape.
    fn axpby(&self, a: f32, x: &Tensor, b: f32, y: &Tensor, out: &mut Tensor) -> Result<(), TensorError>;
}
