//! 2-D convolution over NHWC images, as a product without im2col.
//!
//! A block of output pixels needs a window of the input. That window is copied
//! once into scratch memory, zero-padded at the image's edge and to whole
//! 32-channel blocks; the copy also joins channel-concatenated inputs and
//! doubles an upsampled image. In the copy, output pixels that follow each
//! other are equally spaced, so a tile of 16 pixels is loaded directly at any
//! tap, and the table of k-offsets walks taps and channels:
//!
//! ```text
//! address(pixel, ky, block, kx) = tile + pixel·stride·P + (ky·Wp + kx)·P + 64·block
//! ```
//!
//! with P bytes a pixel and Wp pixels a row of the copy. Against im2col this
//! writes 1–1.3 values for each input value instead of 9, and steps kx = 1, 2
//! find the lines of kx = 0 in the first-level cache.
//!
//! Images of many channels are copied and multiplied one channel group at a
//! time, so that the window stays in the second-level cache.
//!
//! Tiles run along a row, or, where rows are no multiple of 16, through the
//! padded rows of the copy as one sequence with the padding's results dropped,
//! whichever takes fewer tiles.

use super::block::{K_STEP, TILE, TileSession};
use super::epilogue::{Epilogue, Finish, Output, Rows, SKIP};
use super::gemm::{GemmInput, gemm};
use super::memory::{Scratch, Slot};
use super::pack::PackedB;
use super::parallel::{even_blocks, run_grid};
use super::tiles::{Chunk, RowBlock, Sums, Tables, multiply};
use super::{KernelError, Tier};
use half::bf16;
use std::ops::Range;

/// An NHWC image batch, or two whose channels follow each other.
#[derive(Clone, Copy)]
pub struct ConvInput<'a> {
    /// Samples.
    pub batch: usize,
    /// Rows of the stored image.
    pub height: usize,
    /// Columns of the stored image.
    pub width: usize,
    /// First channels, `[batch, height, width, first_channels]`.
    pub first: &'a [bf16],
    /// How many of the weights' input channels `first` has.
    pub first_channels: usize,
    /// Remaining channels, if any.
    pub second: Option<&'a [bf16]>,
    /// The convolution sees every pixel twice in both directions.
    pub is_upsampled: bool,
}

impl<'a> ConvInput<'a> {
    /// One input as it is.
    pub fn plain(data: &'a [bf16], [batch, height, width, channels]: [usize; 4]) -> ConvInput<'a> {
        ConvInput {
            batch,
            height,
            width,
            first: data,
            first_channels: channels,
            second: None,
            is_upsampled: false,
        }
    }
}

/// Stride and zero padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Pixels between windows, in both directions.
    pub stride: usize,
    /// Zero rows above.
    pub top: usize,
    /// Zero columns to the left.
    pub left: usize,
    /// Zero rows below.
    pub bottom: usize,
    /// Zero columns to the right.
    pub right: usize,
}

impl Geometry {
    /// Stride 1 and the same padding on all sides.
    pub fn same(padding: usize) -> Geometry {
        Geometry { stride: 1, top: padding, left: padding, bottom: padding, right: padding }
    }

    /// Output rows and columns over an image of `height` × `width` as the
    /// window sees it; `None` if the window does not fit.
    pub fn output_size(&self, window: [usize; 2], height: usize, width: usize) -> Option<[usize; 2]> {
        let size = |length: usize, pad: usize, window: usize| {
            Some((length + pad).checked_sub(window)? / self.stride.max(1) + 1)
        };
        Some([
            size(height, self.top + self.bottom, window[0])?,
            size(width, self.left + self.right, window[1])?,
        ])
    }
}

/// Convolves `input` with packed weights on the current rayon pool. A group of
/// the epilogue's group bias is a sample here; its row count is not read.
///
/// # Errors
///
/// If a slice is too short for its shape, the window larger than the padded
/// image, or the epilogue does not fit the weights.
pub fn conv2d(
    tier: Tier,
    input: &ConvInput,
    geometry: Geometry,
    weights: &PackedB,
    epilogue: &Epilogue,
    out: Output,
) -> Result<(), KernelError> {
    let shape = weights.shape();
    let pixels = input.batch * input.height * input.width;
    let is_complete = input.second.is_some() || input.first_channels == shape.cin;
    KernelError::check("input channels", is_complete, input.first_channels, shape.cin)?;
    KernelError::check("input channels", input.first_channels <= shape.cin, input.first_channels, shape.cin)?;
    let first_size = pixels * input.first_channels;
    KernelError::check("first input", input.first.len() >= first_size, input.first.len(), first_size)?;
    let second_size = pixels * (shape.cin - input.first_channels);
    let second_len = input.second.map_or(0, <[bf16]>::len);
    KernelError::check("second input", second_len >= second_size, second_len, second_size)?;
    KernelError::check("stride", geometry.stride > 0, geometry.stride, 1)?;
    let scale = if input.is_upsampled { 2 } else { 1 };
    let seen = [input.height * scale, input.width * scale];
    let Some(out_size) = geometry.output_size([shape.height, shape.width], seen[0], seen[1]) else {
        return Err(KernelError::Window { window: [shape.height, shape.width], image: seen });
    };
    let rows = input.batch * out_size[0] * out_size[1];
    if rows >= SKIP as usize {
        return Err(KernelError::TooManyRows { rows });
    }
    let sample_rows = out_size[0] * out_size[1];
    let epilogue = Epilogue { group_bias: epilogue.group_bias.map(|(b, _)| (b, sample_rows)), ..*epilogue };
    if shape.height * shape.width == 1 && !input.is_upsampled && geometry == Geometry::same(0) {
        return gemm(tier, &as_matrix(input, shape.cin, rows), weights, &epilogue, out);
    }
    let finish = Finish::new(&epilogue, weights, rows, out)?;
    if rows == 0 {
        return Ok(());
    }
    let tier = tier.or_available();
    let plan = Plan::new(input, geometry, weights, out_size);
    run_grid(plan.blocks(), weights.panels(), |block, panels| {
        let _session = TileSession::new(tier);
        // SAFETY: the tier is available and its session held; the grid's parts
        // do not overlap in pixels × panels.
        unsafe { plan.run(tier, input, weights, (block, panels), &finish) };
    });
    Ok(())
}

fn as_matrix<'a>(input: &ConvInput<'a>, cin: usize, rows: usize) -> GemmInput<'a> {
    let stride = cin - input.first_channels;
    GemmInput {
        rows,
        first: Rows { data: input.first, stride: input.first_channels },
        first_columns: input.first_channels,
        second: input.second.filter(|_| stride > 0).map(|data| Rows { data, stride }),
    }
}

/// Bytes of a block's copied window.
const NEAR_WINDOW: usize = 832 << 10;
/// Below this many output rows, a region is made narrower instead.
const MIN_ROWS: usize = 6;

/// How a convolution is cut into blocks: regions of one sample, or whole
/// samples together if they are small.
struct Plan {
    geometry: Geometry,
    shift: usize,
    seen: [usize; 2],
    window: [usize; 2],
    cin: usize,
    batch: usize,
    out_size: [usize; 2],
    /// Output rows and columns of a region.
    region: [usize; 2],
    /// Regions down and across a sample.
    regions: [usize; 2],
    /// Samples a block; more than 1 only if a region is a whole sample.
    samples: usize,
    pixel_bytes: usize,
}

impl Plan {
    fn new(input: &ConvInput, geometry: Geometry, weights: &PackedB, out_size: [usize; 2]) -> Plan {
        let shape = weights.shape();
        let lines = weights.group_blocks();
        // Pixels a multiple of 8 lines apart would share few cache sets.
        let lines = if lines.is_multiple_of(8) { lines + 1 } else { lines };
        let shift = usize::from(input.is_upsampled);
        let mut plan = Plan {
            geometry,
            shift,
            seen: [input.height << shift, input.width << shift],
            window: [shape.height, shape.width],
            cin: shape.cin,
            batch: input.batch,
            out_size,
            region: out_size,
            regions: [1, 1],
            samples: 1,
            pixel_bytes: lines * 64,
        };
        plan.choose_region();
        plan
    }

    fn choose_region(&mut self) {
        let [height, width] = self.out_size;
        let whole = self.window_pixels([height, width]) * self.pixel_bytes;
        if whole <= NEAR_WINDOW {
            // 512 rows a block are enough to hide the weights behind.
            let useful = 512usize.div_ceil(height * width);
            self.samples = (NEAR_WINDOW / whole).min(useful).clamp(1, self.batch);
            return;
        }
        let fit = |columns: usize| {
            (1..=height)
                .take_while(|&rows| self.window_pixels([rows, columns]) * self.pixel_bytes <= NEAR_WINDOW)
                .last()
                .unwrap_or(1)
        };
        let mut columns = width;
        while fit(columns) < MIN_ROWS.min(height) && columns > 64 {
            columns = columns.div_ceil(2).next_multiple_of(TILE);
        }
        let across = width.div_ceil(columns);
        let down = height.div_ceil(fit(columns));
        let down = (even_blocks(down * across * self.batch) / (across * self.batch)).max(down);
        let rows = height.div_ceil(down);
        self.region = [rows, columns];
        self.regions = [height.div_ceil(rows), across];
    }

    /// Rows and columns of the input window under a region.
    fn window_size(&self, region: [usize; 2]) -> [usize; 2] {
        [0, 1].map(|i| (region[i] - 1) * self.geometry.stride + self.window[i])
    }

    fn window_pixels(&self, region: [usize; 2]) -> usize {
        let [rows, columns] = self.window_size(region);
        rows * columns
    }

    fn blocks(&self) -> usize {
        self.batch.div_ceil(self.samples) * self.regions[0] * self.regions[1]
    }

    /// # Safety
    ///
    /// As [`multiply`].
    unsafe fn run(
        &self,
        tier: Tier,
        input: &ConvInput,
        weights: &PackedB,
        (block, panels): (usize, Range<usize>),
        finish: &Finish,
    ) {
        let per_sample = self.regions[0] * self.regions[1];
        let first_sample = block / per_sample * self.samples;
        let samples = first_sample..(first_sample + self.samples).min(self.batch);
        let (y, x) = (block % per_sample / self.regions[1], block % self.regions[1]);
        let origin = [y * self.region[0], x * self.region[1]];
        let size = [0, 1].map(|i| self.region[i].min(self.out_size[i] - origin[i]));
        let copy_bytes = self.window_pixels(size) * self.pixel_bytes;
        // A row's last tile may read past the window; those rows are dropped.
        let slack = 2 * TILE * self.geometry.stride * self.pixel_bytes;
        let mut copy = Scratch::take(Slot::Rows, samples.len() * copy_bytes + slack);
        let copy = copy.as_mut_slice::<bf16>();
        let layout = TileLayout::new(size, self.window_size(size)[1], self.geometry.stride);
        let taps = self.window[0] * self.window[1];
        let group = weights.group_blocks();
        let blocks = self.cin.div_ceil(K_STEP);
        let mut tables = Tables::new(samples.len() * layout.tiles, group * taps);
        let (tiles, rows, k_offsets) = tables.split();
        for (i, sample) in samples.clone().enumerate() {
            let tiles = &mut tiles[i * layout.tiles..][..layout.tiles];
            let rows = &mut rows[i * layout.tiles * TILE..][..layout.tiles * TILE];
            for (tile, to) in tiles.iter_mut().enumerate() {
                *to = i * copy_bytes + layout.first_pixel(tile) * self.pixel_bytes;
            }
            for (row, to) in rows.iter_mut().enumerate() {
                *to = layout.output(row).map_or(SKIP, |[y, x]| {
                    let y = sample * self.out_size[0] + origin[0] + y;
                    (y * self.out_size[1] + origin[1] + x) as u32
                });
            }
        }
        let mut sums = Sums::new(tiles.len(), panels.len(), blocks.div_ceil(group));
        for first in (0..blocks).step_by(group) {
            let blocks = first..(first + group).min(blocks);
            let channels = blocks.start * K_STEP..(blocks.end * K_STEP).min(self.cin);
            let values = copy_bytes / size_of::<bf16>();
            for (sample, to) in samples.clone().zip(copy.chunks_exact_mut(values)) {
                self.copy_window(input, (sample, origin), channels.clone(), (size, to));
            }
            self.fill_k_offsets(self.window_size(size)[1], blocks.len(), k_offsets);
            let row_stride = self.geometry.stride * self.pixel_bytes;
            let a = RowBlock { base: copy.as_ptr().cast(), row_stride, tiles, k_offsets, rows };
            let chunk = Chunk { a, k: blocks.start * taps..blocks.end * taps };
            // SAFETY: every tap of every tile lies in the copy or its slack;
            // the rest is the caller's.
            unsafe { multiply(tier, &chunk, weights, panels.clone(), &mut sums, finish) };
        }
    }

    /// Offsets of a channel group's steps in a copy of `width` pixels a row.
    fn fill_k_offsets(&self, width: usize, blocks: usize, k_offsets: &mut [u32]) {
        for (step, to) in k_offsets.iter_mut().enumerate() {
            let (ky, rest) = (step / (blocks * self.window[1]), step % (blocks * self.window[1]));
            let (block, kx) = (rest / self.window[1], rest % self.window[1]);
            *to = ((ky * width + kx) * self.pixel_bytes + block * 64) as u32;
        }
    }

    /// Copies a region's input window over some channels, zero-padded.
    fn copy_window(
        &self,
        input: &ConvInput,
        (sample, origin): (usize, [usize; 2]),
        channels: Range<usize>,
        (size, to): ([usize; 2], &mut [bf16]),
    ) {
        let pixel = self.pixel_bytes / size_of::<bf16>();
        let [rows, columns] = self.window_size(size);
        let left = (origin[1] * self.geometry.stride) as isize - self.geometry.left as isize;
        // Columns of the window that lie inside the image.
        let inside_start = (-left).clamp(0, columns as isize) as usize;
        let inside_end =
            (self.seen[1] as isize - left).clamp(inside_start as isize, columns as isize) as usize;
        for (row, to) in to.chunks_exact_mut(columns * pixel).take(rows).enumerate() {
            let y = (origin[0] * self.geometry.stride + row) as isize - self.geometry.top as isize;
            if y < 0 || y >= self.seen[0] as isize {
                to.fill(bf16::ZERO);
                continue;
            }
            to[..inside_start * pixel].fill(bf16::ZERO);
            to[inside_end * pixel..].fill(bf16::ZERO);
            let source_row = (sample * input.height + (y as usize >> self.shift)) * input.width;
            let first_x = (left + inside_start as isize) as usize;
            let inside = &mut to[inside_start * pixel..inside_end * pixel];
            self.copy_pixels(input, (source_row, first_x), channels.clone(), inside);
        }
    }

    /// Copies some channels of a row's pixels from the image to the window.
    fn copy_pixels(
        &self,
        input: &ConvInput,
        (source_row, first_x): (usize, usize),
        channels: Range<usize>,
        to: &mut [bf16],
    ) {
        let pixel = self.pixel_bytes / size_of::<bf16>();
        let c1 = input.first_channels;
        let c2 = self.cin - c1;
        if self.shift == 0 && c1 == pixel && channels.len() == pixel {
            let start = (source_row + first_x) * c1;
            to.copy_from_slice(&input.first[start..start + to.len()]);
            return;
        }
        let split = c1.clamp(channels.start, channels.end);
        let (in_first, in_second) = (channels.start..split, split.max(c1) - c1..channels.end.max(c1) - c1);
        let second = input.second.unwrap_or_default();
        for (x, to) in (first_x..).zip(to.chunks_exact_mut(pixel)) {
            let source = source_row + (x >> self.shift);
            let (head, rest) = to.split_at_mut(in_first.len());
            let (tail, padding) = rest.split_at_mut(in_second.len());
            if !head.is_empty() {
                head.copy_from_slice(&input.first[source * c1..][in_first.clone()]);
            }
            if !tail.is_empty() {
                tail.copy_from_slice(&second[source * c2..][in_second.clone()]);
            }
            padding.fill(bf16::ZERO);
        }
    }
}

/// Which pixels of a region a tile holds.
struct TileLayout {
    tiles: usize,
    size: [usize; 2],
    window_width: usize,
    stride: usize,
    /// Tiles of a row, or 0 if tiles run through the padded rows.
    tiles_in_row: usize,
}

impl TileLayout {
    fn new(size: [usize; 2], window_width: usize, stride: usize) -> TileLayout {
        let by_row = size[0] * size[1].div_ceil(TILE);
        let through = ((size[0] - 1) * window_width + size[1]).div_ceil(TILE);
        let is_by_row = stride > 1 || by_row <= through;
        TileLayout {
            tiles: if is_by_row { by_row } else { through },
            size,
            window_width,
            stride,
            tiles_in_row: if is_by_row { size[1].div_ceil(TILE) } else { 0 },
        }
    }

    /// The window pixel of a tile's first row at tap (0, 0).
    fn first_pixel(&self, tile: usize) -> usize {
        if self.tiles_in_row == 0 {
            return tile * TILE;
        }
        let (y, x) = (tile / self.tiles_in_row, tile % self.tiles_in_row * TILE);
        (y * self.window_width + x) * self.stride
    }

    /// The output pixel of a tile row, if it is one.
    fn output(&self, row: usize) -> Option<[usize; 2]> {
        let width = if self.tiles_in_row == 0 { self.window_width } else { self.tiles_in_row * TILE };
        let [y, x] = [row / width, row % width];
        (y < self.size[0] && x < self.size[1]).then_some([y, x])
    }
}
