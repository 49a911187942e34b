//! Token merging (`kernels/tokens/token_merge.cu`): which tokens share a row, rows from tokens, tokens from rows.

use bytemuck::{Pod, Zeroable, bytes_of};

use super::super::{CudaError, Element, Geometry, Gpu, Kernel};
use super::copy::unit;
use super::epilogue::{Epilogue, Rows, int};
use super::gemm::Gemm;
use super::gemm_batched::{BatchedGemm, gemm_batched};
use crate::driver::DevicePtr;

const OP: &str = "token merging";
const MODULE: &str = "token_merge";
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;
/// Key and role of every token that a block compares with at a time.
const ROWS_SHARED: u32 = THREADS * 8;
const MEAN_THREADS: u32 = 128;
const MEAN_SHARED: u32 = MEAN_THREADS / 32 * 4;
/// Squares whose draws one launch brings along.
const DRAWS: usize = 8192;
/// Most bytes of similarities at a time.
const SCORES: usize = 32 << 20;

/// The tokens of a picture, of several samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Samples.
    pub samples: usize,
    /// Height.
    pub height: usize,
    /// Width.
    pub width: usize,
    /// Tokens that share the row of another.
    pub merged: usize,
}

impl Picture {
    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.height * self.width
    }

    /// Tokens that others may be merged into: one of every whole 2×2 square.
    pub fn targets(&self) -> usize {
        (self.height / 2) * (self.width / 2)
    }

    /// Rows of a sample.
    pub fn rows(&self) -> usize {
        self.tokens() - self.merged
    }

    fn check(&self) -> Result<(), CudaError> {
        if self.targets() == 0 || self.merged > self.tokens() - self.targets() {
            let reason =
                format!("{} of {}x{} tokens into {}", self.merged, self.height, self.width, self.targets());
            return Err(CudaError::Unsupported { op: OP, reason });
        }
        Ok(())
    }

    fn label(&self, what: &str) -> String {
        format!("{what} {}x{}x{} to {}", self.samples, self.height, self.width, self.rows())
    }
}

/// Which tokens are targets.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The picture.
    pub picture: Picture,
    /// For every square, row by row, which of its tokens (row by row) is its target.
    pub draws: &'a [u8],
    /// i32 a token: the square that it is the target of, or −1.
    pub role: DevicePtr,
    /// i32 a square: its target's token.
    pub place: DevicePtr,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TargetsArgs {
    role: DevicePtr,
    place: DevicePtr,
    height: i32,
    width: i32,
    first: i32,
    count: i32,
    draw: [u32; DRAWS / 16],
}

/// Queues the roles of all tokens.
pub fn targets(gpu: &Gpu, op: &Targets<'_>) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge targets"));
    op.picture.check()?;
    if op.draws.len() != op.picture.targets() || op.draws.iter().any(|draw| *draw > 3) {
        let reason = format!("{} draws of 0 to 3 for {} squares", op.draws.len(), op.picture.targets());
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    int(OP, "tokens", op.picture.tokens())?;
    for (part, draws) in op.draws.chunks(DRAWS).enumerate() {
        let mut draw = [0; DRAWS / 16];
        for (i, of_square) in draws.iter().enumerate() {
            draw[i / 16] |= u32::from(*of_square) << (i % 16 * 2);
        }
        let args = TargetsArgs {
            role: op.role,
            place: op.place,
            height: op.picture.height as i32,
            width: op.picture.width as i32,
            first: (part * DRAWS) as i32,
            count: draws.len() as i32,
            draw,
        };
        let geometry = Geometry::strided(gpu, draws.len(), THREADS);
        gpu.launch(&Kernel { module: MODULE, name: "merge_targets" }, &geometry, &[bytes_of(&args)])?;
    }
    Ok(())
}

/// Lengths of tokens, and targets of length 1.
#[derive(Clone, Copy, Debug)]
pub struct Units {
    /// The picture.
    pub picture: Picture,
    /// Tokens.
    pub x: Rows,
    /// Channels.
    pub channels: usize,
    /// Roles, see [`Targets`].
    pub role: DevicePtr,
    /// f32 a token and sample: 1 / its length.
    pub inverse: DevicePtr,
    /// Targets of length 1, channels rounded up to 8.
    pub unit: DevicePtr,
    /// Type of tokens and targets.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UnitsArgs {
    x: DevicePtr,
    role: DevicePtr,
    inverse: DevicePtr,
    unit: DevicePtr,
    pitch: i64,
    samples: i32,
    tokens: i32,
    targets: i32,
    channels: i32,
    unit_pitch: i32,
    unused: i32,
}

/// Queues the lengths.
pub fn units(gpu: &Gpu, op: &Units) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge units"));
    op.picture.check()?;
    let rows = op.picture.samples * op.picture.tokens();
    let args = UnitsArgs {
        x: op.x.ptr,
        role: op.role,
        inverse: op.inverse,
        unit: op.unit,
        pitch: op.x.pitch as i64,
        samples: int(OP, "samples", op.picture.samples)?,
        tokens: int(OP, "tokens", op.picture.tokens())?,
        targets: op.picture.targets() as i32,
        channels: int(OP, "channels", op.channels)?,
        unit_pitch: op.channels.next_multiple_of(8) as i32,
        unused: 0,
    };
    let name = format!("merge_units_{}", op.element.suffix());
    let geometry = Geometry::strided(gpu, rows.div_ceil(WARPS) * THREADS as usize, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// The most similar target of some tokens of every sample.
#[derive(Clone, Copy, Debug)]
pub struct Best {
    /// The picture.
    pub picture: Picture,
    /// f32 `[samples][count][targets]`: products of tokens and targets.
    pub score: DevicePtr,
    /// The first of the tokens.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// See [`Units`].
    pub inverse: DevicePtr,
    /// f32 a token and sample: the cosine.
    pub best: DevicePtr,
    /// i32 a token and sample: the target's number, the lowest of equals.
    pub target: DevicePtr,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BestArgs {
    score: DevicePtr,
    inverse: DevicePtr,
    best: DevicePtr,
    target: DevicePtr,
    samples: i32,
    tokens: i32,
    targets: i32,
    first: i32,
    count: i32,
    unused: i32,
}

/// Queues the choice of targets.
pub fn best(gpu: &Gpu, op: &Best) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge best"));
    op.picture.check()?;
    if op.first + op.count > op.picture.tokens() {
        let reason = format!("tokens {} to {} of {}", op.first, op.first + op.count, op.picture.tokens());
        return Err(CudaError::Unsupported { op: OP, reason });
    }
    let args = BestArgs {
        score: op.score,
        inverse: op.inverse,
        best: op.best,
        target: op.target,
        samples: int(OP, "samples", op.picture.samples)?,
        tokens: int(OP, "tokens", op.picture.tokens())?,
        targets: op.picture.targets() as i32,
        first: op.first as i32,
        count: op.count as i32,
        unused: 0,
    };
    let rows = op.picture.samples * op.count;
    let geometry = Geometry::strided(gpu, rows.div_ceil(WARPS) * THREADS as usize, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: "merge_best" }, &geometry, &[bytes_of(&args)])
}

/// The row of every token.
#[derive(Clone, Copy, Debug)]
pub struct Ranking {
    /// The picture.
    pub picture: Picture,
    /// See [`Best`].
    pub best: DevicePtr,
    /// See [`Best`].
    pub target: DevicePtr,
    /// See [`Targets`].
    pub role: DevicePtr,
    /// i32 a token and sample.
    pub row: DevicePtr,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowsArgs {
    best: DevicePtr,
    target: DevicePtr,
    role: DevicePtr,
    row: DevicePtr,
    tokens: i32,
    targets: i32,
    merged: i32,
    unused: i32,
}

/// Queues the rows: of tokens that stay alone by falling similarity, then of targets.
pub fn rows(gpu: &Gpu, op: &Ranking) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge rows"));
    op.picture.check()?;
    let tokens = op.picture.tokens();
    let args = RowsArgs {
        best: op.best,
        target: op.target,
        role: op.role,
        row: op.row,
        tokens: int(OP, "tokens", tokens)?,
        targets: op.picture.targets() as i32,
        merged: op.picture.merged as i32,
        unused: 0,
    };
    let grid = [tokens.div_ceil(THREADS as usize) as u32, op.picture.samples as u32, 1];
    let geometry = Geometry { grid, threads: THREADS, shared: ROWS_SHARED, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: "merge_rows" }, &geometry, &[bytes_of(&args)])
}

/// Everything from tokens to the row of each.
#[derive(Clone, Copy, Debug)]
pub struct Match<'a> {
    /// Which tokens are targets, and where that is kept.
    pub targets: Targets<'a>,
    /// Tokens.
    pub x: Rows,
    /// Their channels.
    pub channels: usize,
    /// Their type.
    pub element: Element,
    /// i32 a token and sample: the row of each.
    pub row: DevicePtr,
}

/// Byte offsets of what a [`Match`] needs besides, and the bytes of all of it.
struct Layout {
    inverse: usize,
    best: usize,
    target: usize,
    unit: usize,
    score: usize,
    /// Tokens whose similarities there is room for.
    chunk: usize,
    bytes: usize,
}

impl Match<'_> {
    fn layout(&self) -> Layout {
        let Picture { samples, .. } = self.targets.picture;
        let (tokens, targets) = (self.targets.picture.tokens(), self.targets.picture.targets());
        let chunk = (SCORES / (4 * samples * targets).max(1)).clamp(1, tokens.max(1));
        let mut bytes = 0;
        let mut take = |of: usize| {
            let at = bytes;
            bytes += of.next_multiple_of(256);
            at
        };
        let numbers = 4 * samples * tokens;
        let (inverse, best, target) = (take(numbers), take(numbers), take(numbers));
        let unit = take(samples * targets * self.channels.next_multiple_of(8) * self.element.size());
        let score = take(4 * samples * chunk * targets);
        Layout { inverse, best, target, unit, score, chunk, bytes }
    }

    /// Bytes of memory that [`match_tokens`] works in.
    pub fn scratch(&self) -> usize {
        self.layout().bytes
    }
}

/// Queues all of a match; `scratch` holds [`Match::scratch`] bytes.
pub fn match_tokens(gpu: &Gpu, op: &Match<'_>, scratch: DevicePtr) -> Result<(), CudaError> {
    let Layout { inverse, best: cosine, target, unit, score, chunk, .. } = op.layout();
    let [inverse, cosine, target, unit, score] =
        [inverse, cosine, target, unit, score].map(|at| scratch.offset(at));
    let Targets { picture, role, .. } = op.targets;
    let (tokens, squares) = (picture.tokens(), picture.targets());
    targets(gpu, &op.targets)?;
    units(gpu, &Units { picture, x: op.x, channels: op.channels, role, inverse, unit, element: op.element })?;
    for first in (0..tokens).step_by(chunk) {
        let count = chunk.min(tokens - first);
        let products = Gemm {
            x: Rows::new(op.x.ptr.offset(first * op.x.pitch * op.element.size()), op.x.pitch),
            x2: None,
            w: unit,
            w_is_constant: false,
            m: count,
            n: squares,
            k1: op.channels,
            k2: 0,
            rows_per_sample: count,
            element: op.element,
            epilogue: Epilogue { out_f32: true, ..Epilogue::to(Rows::new(score, squares)) },
        };
        let products = BatchedGemm {
            first: products,
            batch: picture.samples,
            x_stride: tokens * op.x.pitch,
            w_stride: squares * op.channels.next_multiple_of(8),
            out_stride: count * squares,
        };
        gemm_batched(gpu, &products)?;
        best(gpu, &Best { picture, score, first, count, inverse, best: cosine, target })?;
    }
    rows(gpu, &Ranking { picture, best: cosine, target, role, row: op.row })
}

/// Rows from tokens: the mean of all that share one.
#[derive(Clone, Copy, Debug)]
pub struct Mean {
    /// The picture.
    pub picture: Picture,
    /// Tokens.
    pub x: Rows,
    /// Channels.
    pub channels: usize,
    /// See [`Ranking`].
    pub row: DevicePtr,
    /// See [`Targets`].
    pub place: DevicePtr,
    /// Rows without gaps.
    pub out: DevicePtr,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MeanArgs {
    x: DevicePtr,
    row: DevicePtr,
    place: DevicePtr,
    out: DevicePtr,
    pitch: i64,
    tokens: i32,
    targets: i32,
    rows: i32,
    channels: i32,
}

/// Queues the rows' means.
pub fn mean(gpu: &Gpu, op: &Mean) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge mean"));
    op.picture.check()?;
    let args = MeanArgs {
        x: op.x.ptr,
        row: op.row,
        place: op.place,
        out: op.out,
        pitch: op.x.pitch as i64,
        tokens: int(OP, "tokens", op.picture.tokens())?,
        targets: op.picture.targets() as i32,
        rows: op.picture.rows() as i32,
        channels: int(OP, "channels", op.channels)?,
    };
    let name = format!("merge_mean_{}", op.element.suffix());
    let grid = [op.picture.tokens() as u32, op.picture.samples as u32, 1];
    let geometry = Geometry { grid, threads: MEAN_THREADS, shared: MEAN_SHARED, cluster: 1 };
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}

/// Tokens from rows.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// The picture.
    pub picture: Picture,
    /// Rows without gaps.
    pub x: DevicePtr,
    /// Their channels.
    pub channels: usize,
    /// See [`Ranking`].
    pub row: DevicePtr,
    /// Tokens without gaps.
    pub out: DevicePtr,
    /// Type of both.
    pub element: Element,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SpreadArgs {
    x: DevicePtr,
    row: DevicePtr,
    out: DevicePtr,
    count: u64,
    tokens: u32,
    rows: u32,
    width: u32,
    unused: u32,
}

/// Queues the tokens.
pub fn spread(gpu: &Gpu, op: &Spread) -> Result<(), CudaError> {
    gpu.label(|| op.picture.label("merge spread"));
    op.picture.check()?;
    let bytes = op.channels * op.element.size();
    // What is no multiple of 16 bytes goes by two.
    let unit = if unit([op.x.0 as usize, op.out.0 as usize, bytes]) == 16 { 16 } else { 2 };
    let tokens = int(OP, "tokens", op.picture.tokens())? as u32;
    let count = (op.picture.samples * op.picture.tokens() * bytes / unit) as u64;
    let args = SpreadArgs {
        x: op.x,
        row: op.row,
        out: op.out,
        count,
        tokens,
        rows: op.picture.rows() as u32,
        width: int(OP, "channels", bytes / unit)? as u32,
        unused: 0,
    };
    let name = format!("merge_spread_b{unit}");
    let geometry = Geometry::strided(gpu, count as usize, THREADS);
    gpu.launch(&Kernel { module: MODULE, name: &name }, &geometry, &[bytes_of(&args)])
}
