//! Packed weights: panels of 32 outputs × K, kept in their file type.
//!
//! ```text
//!   panel p:  k = 0   o₀ o₁ … o₃₁      o = outputs 32p … 32p+31
//!             k = 1   o₀ o₁ … o₃₁      (GEGLU: 16 values, then their 16 gates)
//!             …                        conv: k = (ky·kw + kx)·Cin + c
//! ```
//! f16, bf16 and f32 stay what they are and are widened block by block inside
//! the product, so a step reads half the bytes of an f32 copy. fp8 becomes f16
//! (exact), f64 becomes f32. Outputs are padded to whole panels with zeros.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use super::arena::Mapped;
use super::simd::product::{PANEL, PanelSlice};
use crate::tensor::{DType, RawTensor, TensorError};

/// Memory of weights, counted while alive.
pub(super) struct WeightMemory {
    map: Mapped,
    bytes: usize,
    total: Arc<AtomicUsize>,
}

impl WeightMemory {
    /// Zeroed memory, added to `total`.
    pub(super) fn new(bytes: usize, total: &Arc<AtomicUsize>) -> Result<Self, TensorError> {
        let in_use = total.load(Ordering::Relaxed);
        let map = Mapped::new(bytes).ok_or(TensorError::OutOfMemory { bytes, in_use })?;
        total.fetch_add(bytes, Ordering::Relaxed);
        Ok(Self { map, bytes, total: total.clone() })
    }

    /// A copy of `bytes`.
    pub(super) fn copy_of(bytes: &[u8], total: &Arc<AtomicUsize>) -> Result<Self, TensorError> {
        let mut memory = Self::new(bytes.len(), total)?;
        memory.map.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        Ok(memory)
    }

    /// The elements.
    pub(super) fn as_slice<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        self.map.as_slice()
    }
}

impl Drop for WeightMemory {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A matrix in panels.
pub(super) struct Panels {
    memory: WeightMemory,
    dtype: DType,
    /// Inputs, taps included.
    pub(super) k: usize,
    /// Panels.
    pub(super) count: usize,
    /// Bias of every panel column, padded with zeros.
    pub(super) bias: Vec<f32>,
    /// Panels hold 16 values and 16 gates.
    pub(super) is_geglu: bool,
    /// Outputs of the layer.
    pub(super) n: usize,
}

impl Panels {
    /// Output columns that one panel yields.
    pub(super) fn outputs_per_panel(&self) -> usize {
        if self.is_geglu { PANEL / 2 } else { PANEL }
    }

    /// Rows `from..from + kc` of a panel.
    pub(super) fn block(&self, panel: usize, from: usize, kc: usize) -> PanelSlice<'_> {
        let (start, len) = ((panel * self.k + from) * PANEL, kc * PANEL);
        match self.dtype {
            DType::F16 => PanelSlice::F16(&self.memory.as_slice::<f16>()[start..][..len]),
            DType::BF16 => PanelSlice::BF16(&self.memory.as_slice::<bf16>()[start..][..len]),
            _ => PanelSlice::F32(&self.memory.as_slice::<f32>()[start..][..len]),
        }
    }

    /// The bytes of rows `from..from + kc` of a panel; empty behind the end.
    pub(super) fn block_bytes(&self, panel: usize, from: usize, kc: usize) -> &[u8] {
        let row = PANEL * self.dtype.size();
        self.memory
            .as_slice::<u8>()
            .get((panel * self.k + from) * row..)
            .map_or(&[], |s| &s[..s.len().min(kc * row)])
    }
}

/// What to pack: matrices stacked along the outputs.
pub(super) struct PanelSource<'a> {
    /// The op, for errors.
    pub(super) op: &'static str,
    /// `[rows, cin·taps]`, row-major.
    pub(super) matrices: &'a [RawTensor<'a>],
    /// Biases, one for each matrix or none.
    pub(super) biases: &'a [RawTensor<'a>],
    /// Input channels.
    pub(super) cin: usize,
    /// Kernel positions, innermost in the source.
    pub(super) taps: usize,
    /// Rows are value and gate halves.
    pub(super) is_geglu: bool,
}

impl PanelSource<'_> {
    /// Packs into panels; memory is counted in `total`.
    pub(super) fn pack(&self, total: &Arc<AtomicUsize>) -> Result<Panels, TensorError> {
        let k = self.cin * self.taps;
        let mut rows: Vec<(usize, usize)> = Vec::new();
        for (i, m) in self.matrices.iter().enumerate() {
            let count = m.shape.first().copied().unwrap_or(0);
            check_len(self.op, m, count * k)?;
            rows.extend((0..count).map(|r| (i, r)));
        }
        let bias = self.bias(rows.len())?;
        let n = if self.is_geglu { rows.len() / 2 } else { rows.len() };
        if self.is_geglu && rows.len() % 2 != 0 {
            let (expected, found) = (2 * n + 2, rows.len());
            return Err(TensorError::Size { op: self.op, what: "GEGLU rows", expected, found });
        }
        let per_panel = if self.is_geglu { PANEL / 2 } else { PANEL };
        let count = n.div_ceil(per_panel);
        let columns: Vec<Option<usize>> = (0..count * PANEL)
            .map(|i| {
                let (panel, j) = (i / PANEL, i % PANEL);
                let output = panel * per_panel + j % per_panel;
                (output < n).then_some(if j < per_panel { output } else { n + output })
            })
            .collect();
        let bias = columns.iter().map(|c| c.map_or(0.0, |c| bias[c])).collect();
        let dtype = self.stored_type()?;
        let mut memory = WeightMemory::new(count * PANEL * k * dtype.size(), total)?;
        let sources: Vec<Option<(&RawTensor<'_>, usize)>> =
            columns.iter().map(|c| c.map(|c| (&self.matrices[rows[c].0], rows[c].1))).collect();
        match dtype {
            DType::F16 => self.fill::<f16>(&sources, memory.map.as_mut_slice()),
            DType::BF16 => self.fill::<bf16>(&sources, memory.map.as_mut_slice()),
            _ => self.fill::<f32>(&sources, memory.map.as_mut_slice()),
        }
        Ok(Panels { memory, dtype, k, count, bias, is_geglu: self.is_geglu, n })
    }

    /// All biases; zeros if there are none.
    pub(super) fn bias(&self, rows: usize) -> Result<Vec<f32>, TensorError> {
        if self.biases.is_empty() {
            return Ok(vec![0.0; rows]);
        }
        let mut bias = Vec::with_capacity(rows);
        for b in self.biases {
            bias.extend(decode(b)?);
        }
        if bias.len() != rows {
            let (expected, found) = (rows, bias.len());
            return Err(TensorError::Size { op: self.op, what: "bias length", expected, found });
        }
        Ok(bias)
    }

    /// The common type that loses nothing.
    pub(super) fn stored_type(&self) -> Result<DType, TensorError> {
        let mut stored = None;
        for m in self.matrices {
            let own = match m.dtype {
                DType::F16 | DType::F8E4M3 | DType::F8E5M2 => DType::F16,
                DType::BF16 => DType::BF16,
                DType::F32 | DType::F64 => DType::F32,
                other => return Err(TensorError::WeightType(other)),
            };
            stored = Some(if stored.is_none_or(|s| s == own) { own } else { DType::F32 });
        }
        Ok(stored.unwrap_or(DType::F32))
    }

    fn fill<T: Stored>(&self, columns: &[Option<(&RawTensor<'_>, usize)>], to: &mut [T]) {
        let k = self.cin * self.taps;
        if k == 0 {
            return;
        }
        to.par_chunks_mut(k * PANEL).zip(columns.par_chunks(PANEL)).for_each(|(panel, columns)| {
            // Some channels at a time, so that the target stays in the first-level cache.
            let step = (1024 / (PANEL * self.taps)).max(1) * 4;
            for c0 in (0..self.cin).step_by(step) {
                let channels = step.min(self.cin - c0);
                for (j, column) in columns.iter().enumerate() {
                    if let Some((m, row)) = column {
                        let from = row * k + c0 * self.taps;
                        let len = channels * self.taps;
                        let place = Place { cin: self.cin, taps: self.taps, c0, j };
                        scatter(m, from, len, &place, panel);
                    }
                }
            }
        });
    }
}

/// Where a run of one row's elements goes in a panel.
struct Place {
    cin: usize,
    taps: usize,
    c0: usize,
    j: usize,
}

fn scatter<T: Stored>(m: &RawTensor<'_>, from: usize, len: usize, place: &Place, panel: &mut [T]) {
    let size = m.dtype.size();
    let bytes = &m.bytes[from * size..(from + len) * size];
    match m.dtype {
        DType::F8E4M3 => spread(bytes.iter().map(|&b| T::from_f32(f8e4m3(b))), place, panel),
        DType::F8E5M2 => spread(bytes.iter().map(|&b| T::from_f32(f8e5m2(b))), place, panel),
        DType::F16 => spread(pairs(bytes).map(T::from_f16), place, panel),
        DType::BF16 => spread(pairs(bytes).map(T::from_bf16), place, panel),
        DType::F64 => spread(
            bytes.as_chunks().0.iter().map(|&b| T::from_f32(f64::from_le_bytes(b) as f32)),
            place,
            panel,
        ),
        _ => spread(bytes.as_chunks().0.iter().map(|&b| T::from_f32(f32::from_le_bytes(b))), place, panel),
    }
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b))
}

#[inline(always)]
fn spread<T: Copy>(values: impl Iterator<Item = T>, place: &Place, panel: &mut [T]) {
    if place.taps == 1 {
        let lines = panel[place.c0 * PANEL..].as_chunks_mut::<PANEL>().0;
        for (line, v) in lines.iter_mut().zip(values) {
            line[place.j] = v;
        }
        return;
    }
    let (mut c, mut tap) = (place.c0, 0);
    for v in values {
        panel[(tap * place.cin + c) * PANEL + place.j] = v;
        tap += 1;
        if tap == place.taps {
            (c, tap) = (c + 1, 0);
        }
    }
}

/// A type that panels are stored in.
trait Stored: Copy + Send + Sync {
    fn from_f32(x: f32) -> Self;
    fn from_f16(bits: u16) -> Self;
    fn from_bf16(bits: u16) -> Self;
}

impl Stored for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
    fn from_f16(bits: u16) -> Self {
        f16::from_bits(bits).to_f32()
    }
    fn from_bf16(bits: u16) -> Self {
        bf16::from_bits(bits).to_f32()
    }
}

impl Stored for f16 {
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn from_f16(bits: u16) -> Self {
        f16::from_bits(bits)
    }
    fn from_bf16(bits: u16) -> Self {
        f16::from_f32(bf16::from_bits(bits).to_f32())
    }
}

impl Stored for bf16 {
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn from_f16(bits: u16) -> Self {
        bf16::from_f32(f16::from_bits(bits).to_f32())
    }
    fn from_bf16(bits: u16) -> Self {
        bf16::from_bits(bits)
    }
}

/// OCP E4M3: bias 7, no infinity, all ones is NaN.
fn f8e4m3(b: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(b >> 3 & 15), f32::from(b & 7));
    let magnitude = match (exponent, b & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if b & 0x80 == 0 { magnitude } else { -magnitude }
}

/// OCP E5M2: the upper byte of an IEEE half.
fn f8e5m2(b: u8) -> f32 {
    f16::from_bits(u16::from(b) << 8).to_f32()
}

/// All elements as f32.
pub(super) fn decode(t: &RawTensor<'_>) -> Result<Vec<f32>, TensorError> {
    check_len("pack", t, t.shape.iter().product())?;
    let mut out = vec![0.0; t.bytes.len() / t.dtype.size()];
    decode_into(t.dtype, &t.bytes, &mut out)?;
    Ok(out)
}

/// Elements as f32.
pub(super) fn decode_into(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), TensorError> {
    match dtype {
        DType::F8E4M3 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f8e4m3(b)),
        DType::F8E5M2 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f8e5m2(b)),
        DType::F16 => out.iter_mut().zip(pairs(bytes)).for_each(|(o, b)| *o = f16::from_bits(b).to_f32()),
        DType::BF16 => out.iter_mut().zip(pairs(bytes)).for_each(|(o, b)| *o = bf16::from_bits(b).to_f32()),
        DType::F32 => {
            out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, &b)| *o = f32::from_le_bytes(b));
        }
        DType::F64 => {
            out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, &b)| *o = f64::from_le_bytes(b) as f32);
        }
        other => return Err(TensorError::WeightType(other)),
    }
    Ok(())
}

/// Whether a stored tensor has the bytes of `elements` elements.
pub(super) fn check_len(op: &'static str, t: &RawTensor<'_>, elements: usize) -> Result<(), TensorError> {
    let (expected, found) = (elements * t.dtype.size(), t.bytes.len());
    if expected != found {
        return Err(TensorError::Size { op, what: "bytes of the weight", expected, found });
    }
    Ok(())
}
