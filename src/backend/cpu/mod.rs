//! The CPU backend: f32 throughout, or bf16 activations with f32 sums.
//!
//! | file | what |
//! | --- | --- |
//! | `arena` | activation memory, recycled |
//! | `weights` | panels in the file's type |
//! | `layers`, `matmul` | convolution and linear layers, one blocked product |
//! | `regions` | the same for convolutions over large maps |
//! | `attention` | online softmax, a head at a time |
//! | `drawn` | how much attention every key draws |
//! | `norm`, `elementwise` | the rest |
//! | `bf16` | matrix kernels on bf16 inputs: AMX, AVX512-BF16 |
//! | `bf16_ops` | the matrix ops on those kernels |
//! | `simd` | inner loops, generic over the instruction set |
//! | `scheduling` | how threads that answer get along with these |
//!
//! Work is cut into tasks that compute disjoint pieces of the output, each
//! element in an order that doesn't depend on the cut: the same bits on any
//! number of threads.

mod arena;
mod attention;
pub mod bf16;
mod bf16_ops;
pub mod ceiling;
mod check;
mod drawn;
mod elementwise;
mod heap;
mod layers;
mod matmul;
mod norm;
mod regions;
mod scheduling;
mod scratch;
pub mod simd;
#[cfg(test)]
mod tests;
mod weights;

pub use self::scheduling::answer_promptly;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::arena::Arena;
use self::bf16::Tier;
use self::bf16_ops::TileWeight;
use self::check::size;
use self::elementwise::Table;
use self::norm::NormParams;
use self::simd::Isa;
use self::weights::{PanelSource, Panels, WeightMemory, check_len, decode};
use crate::tensor::*;

/// How to run on the CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads; all CPUs if not given.
    pub threads: Option<usize>,
    /// Keep activations in bf16: half the memory, about 3 decimal digits.
    pub bf16: bool,
    /// Most bytes of activations.
    pub memory_limit: Option<usize>,
}

/// What a backend's weights may be.
enum Weight {
    /// Linear and convolution weights.
    Panels(Panels),
    /// The same for bf16 tile instructions.
    Tiles(TileWeight),
    /// Scale and shift.
    Norm(NormParams),
    /// Embedding table.
    Table(Table),
}

/// What every op needs to know.
struct Exec {
    /// Instruction set.
    isa: Isa,
    /// Worker threads.
    threads: usize,
    /// Instructions that multiply bf16, if activations are bf16 and the CPU has them.
    tier: Option<Tier>,
}

/// Runs the op set on the CPU.
pub struct CpuBackend {
    exec: Exec,
    pool: rayon::ThreadPool,
    arena: Arc<Arena>,
    weights: Arc<AtomicUsize>,
    is_bf16: bool,
}

/// Calls a generic op with the backend's element type, inside its pool.
macro_rules! run {
    ($self:ident, $module:ident :: $op:ident, $($arg:expr),*) => {
        $self.pool.install(|| if $self.is_bf16 { $module::$op::<half::bf16>($($arg),*) } else { $module::$op::<f32>($($arg),*) })
    };
}

impl CpuBackend {
    /// A backend with a thread pool of its own.
    ///
    /// Fails if the system can't start the threads.
    pub fn new(options: CpuOptions) -> Result<Self, TensorError> {
        Self::with_isa(options, Isa::best())
    }

    /// As [`CpuBackend::new`], with a given instruction set; bf16 instructions
    /// are used beside AVX-512 only.
    pub fn with_isa(options: CpuOptions, isa: Isa) -> Result<Self, TensorError> {
        heap::set_up();
        let threads = options
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
            .max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|e| TensorError::Unsupported {
                op: "cpu backend",
                what: format!("starting {threads} threads ({e})"),
            })?;
        let is_fit = options.bf16 && isa.has_wide_vectors() && Tier::detect() != Tier::Portable;
        let tier = is_fit.then(Tier::detect);
        Ok(Self {
            exec: Exec { isa, threads, tier },
            pool,
            arena: Arena::new(options.memory_limit),
            weights: Arc::default(),
            is_bf16: options.bf16,
        })
    }

    fn pack(&self, source: &PanelSource<'_>, window: [usize; 2]) -> Result<Packed, TensorError> {
        self.pool.install(|| {
            Ok(Packed::new(match self.exec.tier {
                Some(_) => Weight::Tiles(bf16_ops::pack(source, window, &self.weights)?),
                None => Weight::Panels(source.pack(&self.weights)?),
            }))
        })
    }

    fn alloc_as(&self, shape: Shape, dtype: DType) -> Result<Tensor, TensorError> {
        let bytes = [shape.n, shape.h, shape.w, shape.c, dtype.size()]
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b))
            .unwrap_or(usize::MAX);
        Ok(Tensor::new(shape, dtype, Storage::Host(self.arena.alloc(bytes)?)))
    }

    fn dtype(&self) -> DType {
        if self.is_bf16 { DType::BF16 } else { DType::F32 }
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> BackendInfo {
        let storage = if self.is_bf16 { "bf16" } else { "f32" };
        let instructions = match self.exec.tier {
            Some(Tier::Amx) => "AMX",
            Some(Tier::Avx512Bf16) => "AVX512-BF16",
            _ => self.exec.isa.name(),
        };
        BackendInfo {
            kind: "cpu",
            name: format!("cpu {storage} ({instructions})"),
            index: None,
            threads: self.exec.threads,
            element_bytes: self.dtype().size(),
        }
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { weights: self.weights.load(Ordering::Relaxed), ..self.arena.memory() }
    }

    fn trim(&self) {
        self.pool.broadcast(|_| {
            matmul::release_scratch();
            attention::release_scratch();
            regions::release_scratch();
            bf16::release_scratch();
        });
        self.arena.trim();
        heap::give_back();
    }

    fn alloc(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc_as(shape, self.dtype())
    }

    fn alloc_result(&self, shape: Shape) -> Result<Tensor, TensorError> {
        let dtype = if self.exec.tier.is_some() { DType::F32 } else { self.dtype() };
        self.alloc_as(shape, dtype)
    }

    fn alloc_f32(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.alloc_as(shape, DType::F32)
    }

    fn pack_linear(&self, parts: &LinearParts<'_>) -> Result<LinearWeight, TensorError> {
        const OP: &str = "pack_linear";
        let k = parts.weights.first().map_or(0, |w| w.shape.get(1).copied().unwrap_or(1));
        for w in parts.weights {
            size(OP, "inputs of a matrix", k, w.shape.iter().skip(1).product())?;
        }
        let source = PanelSource {
            op: OP,
            matrices: parts.weights,
            biases: parts.biases,
            cin: k,
            taps: 1,
            is_geglu: parts.is_geglu,
        };
        let rows: usize = parts.weights.iter().map(|w| w.shape.first().copied().unwrap_or(0)).sum();
        let n = if parts.is_geglu { rows / 2 } else { rows };
        Ok(LinearWeight { n, k, is_geglu: parts.is_geglu, packed: self.pack(&source, [1, 1])? })
    }

    fn pack_conv(
        &self,
        weight: &RawTensor<'_>,
        bias: Option<&RawTensor<'_>>,
    ) -> Result<ConvWeight, TensorError> {
        const OP: &str = "pack_conv";
        size(OP, "dimensions of the weight", 4, weight.shape.len())?;
        let &[cout, cin, kh, kw] = weight.shape else {
            return Err(TensorError::Size {
                op: OP,
                what: "dimensions of the weight",
                expected: 4,
                found: 0,
            });
        };
        let source = PanelSource {
            op: OP,
            matrices: std::slice::from_ref(weight),
            biases: bias.map_or(&[], std::slice::from_ref),
            cin,
            taps: kh * kw,
            is_geglu: false,
        };
        Ok(ConvWeight { cout, cin, kh, kw, packed: self.pack(&source, [kh, kw])? })
    }

    fn pack_norm(&self, scale: &RawTensor<'_>, shift: &RawTensor<'_>) -> Result<NormWeight, TensorError> {
        let (scale, shift) = (decode(scale)?, decode(shift)?);
        size("pack_norm", "length of the shift", scale.len(), shift.len())?;
        Ok(NormWeight { c: scale.len(), packed: Packed::new(Weight::Norm(NormParams { scale, shift })) })
    }

    fn pack_embedding(&self, table: &RawTensor<'_>) -> Result<Embedding, TensorError> {
        const OP: &str = "pack_embedding";
        let &[rows, width] = table.shape else {
            let found = table.shape.len();
            return Err(TensorError::Size { op: OP, what: "dimensions of the table", expected: 2, found });
        };
        check_len(OP, table, rows.saturating_mul(width))?;
        if matches!(table.dtype, DType::Bool) || weights::decode_into(table.dtype, &[], &mut []).is_err() {
            return Err(TensorError::WeightType(table.dtype));
        }
        let memory = WeightMemory::copy_of(&table.bytes, &self.weights)?;
        let packed = Packed::new(Weight::Table(Table { memory, dtype: table.dtype }));
        Ok(Embedding { rows, width, packed })
    }

    fn upload(&self, data: &[f32], layout: HostLayout, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::upload, data, layout, out)
    }

    fn download(&self, x: &Tensor, layout: HostLayout, out: &mut [f32]) -> Result<(), TensorError> {
        self.pool.install(|| match x.dtype() {
            DType::BF16 => elementwise::download::<half::bf16>(x, layout, out),
            _ => elementwise::download::<f32>(x, layout, out),
        })
    }

    fn conv2d(&self, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        if let Some(tier) = self.exec.tier {
            return self.pool.install(|| bf16_ops::conv2d(tier, op, out));
        }
        run!(self, layers::conv2d, &self.exec, op, out)
    }

    fn linear(&self, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        if let Some(tier) = self.exec.tier {
            return self.pool.install(|| bf16_ops::linear(tier, op, out));
        }
        run!(self, layers::linear, &self.exec, op, out)
    }

    fn attention(&self, op: &Attention<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, attention::attention, &self.exec, op, out)
    }

    fn attention_drawn(&self, op: &AttentionDrawn<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, drawn::attention_drawn, op, out)
    }

    fn group_norm(&self, op: &GroupNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, norm::group_norm, &self.exec, op, out)
    }

    fn layer_norm(&self, op: &LayerNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, norm::layer_norm, &self.exec, op, out)
    }

    fn embed(&self, op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::embed, op, out)
    }

    fn timestep_embedding(&self, timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::timestep_embedding, timesteps, out)
    }

    fn activate(&self, x: &Tensor, act: Activation, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::activate, &self.exec, x, act, out)
    }

    fn curve(&self, x: &Tensor, curve: Curve, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::curve, x, curve, out)
    }

    fn resize(&self, x: &Tensor, filter: Filter, out: &mut Tensor) -> Result<(), TensorError> {
        match filter {
            Filter::Nearest => run!(self, elementwise::resize_nearest, x, out),
            _ => reference::resize(self, x, filter, out),
        }
    }

    fn axpby(&self, a: f32, x: &Tensor, b: f32, y: &Tensor, out: &mut Tensor) -> Result<(), TensorError> {
        run!(self, elementwise::axpby, &self.exec, (a, x), (b, y), out)
    }
}
