//! Portable leaf: the same operand layouts in plain Rust.
//!
//! Correct everywhere and vectorised by the compiler; not tuned.

use super::block::{BlockArgs, TILE};
use super::epilogue::{Activation, C_COLUMNS, Finish, FinishBlock, SKIP};
use super::polynomial::{ERFCX, ERFCX_SCALE};
use half::bf16;

/// [`multiply_block`](super::block::multiply_block) without vector intrinsics.
///
/// # Safety
///
/// As there.
pub(super) unsafe fn block(args: &BlockArgs) {
    let columns = args.column_tiles * TILE;
    for row in 0..args.row_tiles * TILE {
        // SAFETY: the caller vouches for every address the arguments describe.
        unsafe {
            let a = args.a[row / TILE].add(row % TILE * args.row_stride);
            let c = args.c.cast::<u8>().add(row * args.c_stride).cast::<f32>();
            let c = std::slice::from_raw_parts_mut(c, columns);
            if args.accumulate == 0 {
                c.fill(0.0);
            }
            for (tile, c) in c.chunks_exact_mut(TILE).enumerate() {
                block_row(args, a, tile, c);
            }
        }
    }
}

/// One row of A times one column tile of B.
unsafe fn block_row(args: &BlockArgs, a: *const u8, tile: usize, c: &mut [f32]) {
    let mut sums = [0f32; TILE];
    sums.copy_from_slice(c);
    for step in 0..args.k_steps {
        // SAFETY: as `block`.
        let (a, b) = unsafe {
            let offset = *args.k_offsets.add(step) as usize;
            let at = (step * args.column_tiles + tile) * super::block::TILE_BYTES;
            (&*a.add(offset).cast::<[[bf16; 2]; 16]>(), &*args.b.add(at).cast::<[[[bf16; 2]; TILE]; 16]>())
        };
        for (a, b) in a.iter().zip(b) {
            let (low, high) = (a[0].to_f32(), a[1].to_f32());
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += low * widen(b[0]) + high * widen(b[1]);
            }
        }
    }
    c.copy_from_slice(&sums);
}

#[inline(always)]
fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// x · Φ(x), with the same approximation as the vector tiers.
pub(super) fn gelu(x: f32) -> f32 {
    let t = 1.0 / (1.0 + ERFCX_SCALE * x.abs());
    let g = ERFCX.iter().rev().fold(0.0, |sum, c| sum * t + c);
    let lower = g * t * (-0.5 * x * x).exp();
    x * if x < 0.0 { lower } else { 1.0 - lower }
}

/// Bias plus group bias of one column.
unsafe fn bias(f: &Finish, row: usize, column: usize) -> f32 {
    let mut sum = 0.0;
    // SAFETY: the column lies inside both arrays (checked by Finish::new).
    unsafe {
        if !f.bias.is_null() {
            sum += *f.bias.add(column);
        }
        if !f.group_bias.is_null() && column < f.columns {
            let at = row / f.group_rows * f.columns + column;
            sum += if f.group_bias_is_f32 {
                *f.group_bias.cast::<f32>().add(at)
            } else {
                (*f.group_bias.cast::<bf16>().add(at)).to_f32()
            };
        }
    }
    sum
}

/// [`Finish::run`] in plain Rust.
///
/// # Safety
///
/// As there.
pub(super) unsafe fn finish(f: &Finish, block: &FinishBlock) {
    for (i, &row) in block.rows.iter().enumerate() {
        if row == SKIP {
            continue;
        }
        let row = row as usize;
        for (j, column) in block.columns.clone().enumerate() {
            // SAFETY: rows, columns and sums are the caller's to vouch for.
            unsafe {
                let sum = *block.sums.add(i * C_COLUMNS + j) + bias(f, row, column);
                let value = match f.activation {
                    Activation::None => sum,
                    Activation::Silu => sum * sigmoid(sum),
                    Activation::QuickGelu => sum * sigmoid(1.702 * sum),
                    Activation::Gelu => gelu(sum),
                    Activation::Relu => sum.max(0.0),
                    Activation::LeakyRelu => sum.max(0.2 * sum),
                    Activation::Geglu => {
                        let gate = *block.sums.add(i * C_COLUMNS + TILE + j);
                        sum * gelu(gate + bias(f, row, f.gate_offset + column))
                    }
                };
                let mut value = value * f.scale;
                if !f.residual.is_null() {
                    value += (*f.residual.add(row * f.residual_stride + column)).to_f32();
                }
                let at = row * f.out_stride + column;
                if f.out_is_f32 {
                    *f.out.cast::<f32>().add(at) = value;
                } else {
                    *f.out.cast::<bf16>().add(at) = bf16::from_f32(value);
                }
            }
        }
    }
}
