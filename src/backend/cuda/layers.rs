//! Kernels on a table of layers: the shapes of a model, timed one by one.
//!
//! The [`table`] is CSV. Several launches are captured as one graph, as the backend runs them, over
//! operand sets that together exceed the L2 cache.

pub mod table;

pub use self::table::{Layer, LayerOp};
use super::check::Context;
use super::launch::attention::{Attention, attention};
use super::launch::conv::{Conv, Padding, conv};
use super::launch::epilogue::{Epilogue, Rows};
use super::launch::gemm::{Gemm, gemm};
pub use super::launch::hopper::Cut;
use super::launch::norm::{GroupNorm, LayerNorm, group_norm, layer_norm};
use super::launch::{conv_sm90, gemm_sm90};
use super::{CudaError, Element, Gpu};
use crate::driver::DevicePtr;

/// Launches of one graph.
const LAUNCHES: usize = 24;
/// Times that the graph runs; the median counts.
const ROUNDS: usize = 7;
/// Most operand sets of one layer.
const MOST_SETS: usize = 16;

/// The ways to cut `layer` into tiles on this device, the launcher's choice first; none where there is no choice.
pub fn cuts(gpu: &Gpu, layer: &Layer, element: Element) -> Result<Vec<Cut>, CudaError> {
    // No memory: only extents and alignment count, and nothing is launched. Null would mean an operand that is absent.
    let mut nothing = |_: usize| Ok(DevicePtr(1 << 20));
    Ok(match layer.op {
        _ if !gpu.is_hopper() => Vec::new(),
        LayerOp::Gemm(extents) => {
            let op = gemm_of(extents, element, &mut nothing)?;
            if gemm_sm90::supports(&op) { gemm_sm90::cuts_of(&op, gpu.room()) } else { Vec::new() }
        }
        LayerOp::Conv(extents) => {
            let op = conv_of(extents, element, &mut nothing)?;
            if conv_sm90::supports(&op) { conv_sm90::cuts_of(&op, gpu.room()) } else { Vec::new() }
        }
        _ => Vec::new(),
    })
}

/// A layer with its operands in device memory, ready to be timed.
pub struct Bench<'a> {
    gpu: &'a Gpu,
    runs: Vec<Run>,
    /// Owns the operands.
    _memory: Context<'a>,
}

impl<'a> Bench<'a> {
    /// Random operands of `element` for `layer`.
    pub fn new(gpu: &'a Gpu, layer: &Layer, element: Element) -> Result<Self, CudaError> {
        let mut cx = Context::for_layer(gpu);
        let l2 = gpu.driver().device().l2_cache as f64;
        let sets = ((2.0 * l2 / layer.bytes.max(1.0)).ceil() as usize).clamp(1, MOST_SETS);
        let runs = (0..sets).map(|_| prepare(&mut cx, layer.op, element)).collect::<Result<_, _>>()?;
        Ok(Self { gpu, runs, _memory: cx })
    }

    /// Microseconds of one launch; `cut` as [`cuts`] names it, or the launcher's choice.
    ///
    /// A trace sees one plain launch of it; the measurement is not slowed down by it.
    pub fn time(&self, cut: Option<Cut>) -> Result<f64, CudaError> {
        self.runs[0](self.gpu, cut)?; // Scratch memory grows and modules load outside the capture.
        self.gpu.driver().instruments().untraced(|| self.time_graph(cut))
    }

    /// Captures the launches and times the graph.
    fn time_graph(&self, cut: Option<Cut>) -> Result<f64, CudaError> {
        let (gpu, runs) = (self.gpu, &self.runs);
        let (driver, stream) = (gpu.driver(), gpu.stream());
        gpu.begin_capture()?;
        let launched = (0..LAUNCHES).try_for_each(|i| runs[i % runs.len()](gpu, cut));
        let graph = gpu.end_capture();
        launched?;
        let graph = graph?;
        let (from, to) = (driver.create_event(true)?, driver.create_event(true)?);
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            driver.record(from, stream)?;
            driver.launch_graph(graph, stream)?;
            driver.record(to, stream)?;
            driver.synchronize_event(to)?;
            times.push(f64::from(driver.elapsed_ms(from, to)?) * 1e3 / LAUNCHES as f64);
        }
        driver.destroy_event(from)?;
        driver.destroy_event(to)?;
        driver.destroy_graph(graph)?;
        times.sort_by(f64::total_cmp);
        Ok(times[ROUNDS / 2])
    }
}

/// The launch on one set of operands, cut up as said.
type Run = Box<dyn Fn(&Gpu, Option<Cut>) -> Result<(), CudaError>>;

/// A number of elements in device memory.
type Memory<'a> = dyn FnMut(usize) -> Result<DevicePtr, CudaError> + 'a;

/// Attention over a batch, heads, their width, queries and keys.
fn attention_of(
    [batch, heads, head_dim, queries, keys]: [usize; 5],
    element: Element,
    memory: &mut Memory<'_>,
) -> Result<Attention, CudaError> {
    let width = heads * head_dim;
    let (q, k, v) =
        (memory(batch * queries * width)?, memory(batch * keys * width)?, memory(batch * keys * width)?);
    Ok(Attention {
        q,
        k,
        v,
        out: memory(batch * queries * width)?,
        q_pitch: width,
        k_pitch: width,
        v_pitch: width,
        out_pitch: width,
        batch,
        key_batch: batch,
        queries,
        keys,
        heads,
        head_dim,
        is_causal: false,
        scale: 1.0 / (head_dim as f32).sqrt(),
        element,
    })
}

/// A convolution over a batch, channels in and out, kernel side, stride, height and width.
fn conv_of(
    [batch, c1, cout, side, stride, height, width]: [usize; 7],
    element: Element,
    memory: &mut Memory<'_>,
) -> Result<Conv, CudaError> {
    let (x, w) = (memory(batch * height * width * c1)?, memory(cout * side * side * c1.next_multiple_of(8))?);
    let mut op = Conv {
        x: Rows::new(x, c1),
        x2: None,
        w,
        w_is_constant: true,
        batch,
        height,
        width,
        c1,
        c2: 0,
        cout,
        kernel: [side, side],
        stride,
        padding: Padding::all(side / 2),
        upsample: false,
        element,
        epilogue: Epilogue::to(Rows::new(DevicePtr::NULL, cout)),
    };
    let [out_height, out_width] = op.out_extent();
    let out = Rows::new(memory(batch * out_height * out_width * cout)?, cout);
    op.epilogue = Epilogue { bias: memory(2 * cout)?, ..Epilogue::to(out) };
    Ok(op)
}

/// A linear layer of M, N, K.
fn gemm_of([m, n, k]: [usize; 3], element: Element, memory: &mut Memory<'_>) -> Result<Gemm, CudaError> {
    let (x, w, out, bias) =
        (memory(m * k)?, memory(n * k.next_multiple_of(8))?, memory(m * n)?, memory(2 * n)?);
    let epilogue = Epilogue { bias, ..Epilogue::to(Rows::new(out, n)) };
    let (x, x2, k1, k2) = (Rows::new(x, k), None, k, 0);
    Ok(Gemm { x, x2, w, w_is_constant: true, m, n, k1, k2, rows_per_sample: m, element, epilogue })
}

/// Operands of one set, and the launch on them.
fn prepare(cx: &mut Context<'_>, op: LayerOp, element: Element) -> Result<Run, CudaError> {
    let mut memory = |count: usize| cx.random_memory(count, element);
    Ok(match op {
        LayerOp::Attention(extents) => {
            let op = attention_of(extents, element, &mut memory)?;
            Box::new(move |gpu, _| attention(gpu, &op))
        }
        LayerOp::Conv(extents) => {
            let op = conv_of(extents, element, &mut memory)?;
            Box::new(move |gpu, cut| match cut {
                Some(cut) => conv_sm90::conv_cut(gpu, &op, cut),
                None => conv(gpu, &op),
            })
        }
        LayerOp::Gemm(extents) => {
            let op = gemm_of(extents, element, &mut memory)?;
            Box::new(move |gpu, cut| match cut {
                Some(cut) => gemm_sm90::gemm_by(gpu, &op, cut),
                None => gemm(gpu, &op),
            })
        }
        LayerOp::GroupNorm([samples, c1, pixels, groups]) => {
            let count = samples * pixels * c1;
            let op = GroupNorm {
                x: memory(count)?,
                x2: DevicePtr::NULL,
                scale: memory(2 * c1)?,
                shift: memory(2 * c1)?,
                out: memory(count)?,
                samples,
                pixels,
                c1,
                c2: 0,
                groups,
                eps: 1e-5,
                silu: true,
                element,
            };
            Box::new(move |gpu, _| group_norm(gpu, &op))
        }
        LayerOp::LayerNorm([rows, channels]) => {
            let op = LayerNorm {
                x: memory(rows * channels)?,
                scale: memory(2 * channels)?,
                shift: memory(2 * channels)?,
                out: memory(rows * channels)?,
                rows,
                channels,
                pitch: channels,
                out_pitch: channels,
                eps: 1e-5,
                element,
            };
            Box::new(move |gpu, _| layer_norm(gpu, &op))
        }
    })
}
