//! Kernels on a table of layers: the shapes of a model, timed one by one.
//!
//! A table has one row an operator: stage, op, dims, M, N, K, how often it
//! occurs in a forward pass, and what it costs at least (`GFLOP_each`,
//! `min_MB_each`). Rows whose operator has no kernel of its own here (it is
//! fused into others) are left out.
//!
//! Several launches are captured as one graph, as the backend runs them, over
//! operand sets that together exceed the L2 cache.

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

/// An operator and its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerOp {
    /// Batch, heads, head dim, queries, keys.
    Attention([usize; 5]),
    /// Batch, input channels, output channels, kernel side, stride, input height, input width.
    Conv([usize; 7]),
    /// M, N, K.
    Gemm([usize; 3]),
    /// Samples, channels, pixels, groups.
    GroupNorm([usize; 4]),
    /// Rows, channels.
    LayerNorm([usize; 2]),
}

impl LayerOp {
    /// Kind, for sums.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Attention(_) => "attention",
            Self::Conv(_) => "conv",
            Self::Gemm(_) => "gemm",
            Self::GroupNorm(_) => "group_norm",
            Self::LayerNorm(_) => "layer_norm",
        }
    }
}

/// One row of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Part of the model.
    pub stage: String,
    /// What is computed.
    pub op: LayerOp,
    /// How often in a forward pass.
    pub count: f64,
    /// Floating-point operations of one.
    pub flops: f64,
    /// Bytes that one must at least read and write.
    pub bytes: f64,
}

/// A table that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("line {line} of the layer table: {reason}")]
pub struct LayerError {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// The layers of a table in CSV.
pub fn parse(text: &str) -> Result<Vec<Layer>, LayerError> {
    let mut lines = text.lines().enumerate();
    let fail = |line: usize, reason: String| LayerError { line: line + 1, reason };
    let header = lines.next().map(|(_, line)| fields(line)).unwrap_or_default();
    let column = |name: &str| {
        header.iter().position(|f| f == name).ok_or_else(|| fail(0, format!("no column '{name}'")))
    };
    let names = ["stage", "op", "dims", "M", "N", "K", "count_per_forward", "GFLOP_each", "min_MB_each"];
    let mut columns = [0; 9];
    for (at, name) in columns.iter_mut().zip(names) {
        *at = column(name)?;
    }
    let mut layers = Vec::new();
    for (number, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let row = fields(line);
        let cell = |i: usize| row.get(columns[i]).map_or("", |cell| cell.trim());
        let float = |i: usize| {
            cell(i).parse::<f64>().map_err(|_| fail(number, format!("{} is '{}'", names[i], cell(i))))
        };
        let extents = [3, 4, 5].map(|i| cell(i).parse::<f64>().map_or(0, |v| v as usize));
        let Some(op) = layer_op(cell(1), cell(2), extents).map_err(|reason| fail(number, reason))? else {
            continue;
        };
        layers.push(Layer {
            stage: cell(0).to_owned(),
            op,
            count: float(6)?,
            flops: float(7)? * 1e9,
            bytes: float(8)? * 1e6,
        });
    }
    Ok(layers)
}

/// Cells of a line; a quoted cell may hold commas.
fn fields(line: &str) -> Vec<String> {
    let (mut cells, mut cell, mut is_quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => cells.push(std::mem::take(&mut cell)),
            c => cell.push(c),
        }
    }
    cells.push(cell);
    cells
}

/// All numbers in a text.
fn numbers(text: &str) -> Vec<usize> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn layer_op(op: &str, dims: &str, extents: [usize; 3]) -> Result<Option<LayerOp>, String> {
    let wrong = || format!("the dims of {op} are '{dims}'");
    let numbers = numbers(dims);
    Ok(Some(match op {
        "attention" => LayerOp::Attention(numbers.try_into().map_err(|_| wrong())?),
        "conv" => match numbers[..] {
            [b, cin, cout, kernel, _, stride, h, w, ..] => {
                LayerOp::Conv([b, cin, cout, kernel, stride, h, w])
            }
            _ => return Err(wrong()),
        },
        "gemm" | "gemm(conv1x1)" if extents.iter().all(|e| *e > 0) => LayerOp::Gemm(extents),
        "gemm" | "gemm(conv1x1)" => return Err(format!("M, N, K of {op} are {extents:?}")),
        "group_norm" => match numbers[..] {
            [n, c, h, w, groups] => LayerOp::GroupNorm([n, c, h * w, groups]),
            _ => return Err(wrong()),
        },
        "layer_norm" => match numbers[..] {
            [.., c] if numbers.len() > 1 => {
                LayerOp::LayerNorm([numbers[..numbers.len() - 1].iter().product(), c])
            }
            _ => return Err(wrong()),
        },
        _ => return Ok(None),
    }))
}

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
    pub fn time(&self, cut: Option<Cut>) -> Result<f64, CudaError> {
        let (gpu, runs) = (self.gpu, &self.runs);
        runs[0](gpu, cut)?; // Scratch memory grows and modules load outside the capture.
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

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each
unet,attention,b2 h8 d40 q64 kv77,64,77,40,5,0.5,1.5
unet,conv,b2 320->640 3x3 s2 8x6->4x3,24,640,2880,1,2,3
unet,gemm,,128,1280,5120,1,1.678,14.748
unet,group_norm,\"(2, 1280, 8, 8) g32\",,,,12,0.0,0.6553
unet,layer_norm,\"(2, 77, 768)\",,,,2,0,0.5
unet,elt:silu,\"(2, 640, 32, 32)\",,,,6,0.0,5.2
";

    #[test]
    fn rows_with_a_kernel_become_layers() {
        let layers = parse(TABLE).unwrap();
        let ops: Vec<LayerOp> = layers.iter().map(|l| l.op).collect();
        assert_eq!(
            ops,
            [
                LayerOp::Attention([2, 8, 40, 64, 77]),
                LayerOp::Conv([2, 320, 640, 3, 2, 8, 6]),
                LayerOp::Gemm([128, 1280, 5120]),
                LayerOp::GroupNorm([2, 1280, 64, 32]),
                LayerOp::LayerNorm([154, 768]),
            ]
        );
        assert_eq!((layers[0].count, layers[0].flops, layers[0].bytes), (5.0, 0.5e9, 1.5e6));
    }

    #[test]
    fn a_bad_table_names_its_line() {
        let error = parse("stage,op\n").unwrap_err();
        assert_eq!(error, LayerError { line: 1, reason: "no column 'dims'".into() });
        let error = parse(&TABLE.replace("b2 h8 d40 q64 kv77", "b2 h8")).unwrap_err();
        assert_eq!(error.line, 2);
        assert!(parse(&TABLE.replace("5,0.5", "five,0.5")).unwrap_err().reason.contains("'five'"));
    }
}
