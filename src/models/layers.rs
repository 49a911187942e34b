//! Layers: weights that are packed on first use, and ops that allocate their outputs.
//!
//! Loading a model reads only the file's header: every tensor's presence and
//! shape is checked, nothing is copied. A weight is packed into the backend's
//! layout when a forward pass first needs it, and the file's pages are given
//! back to the system right after.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::ModelError;
use crate::tensor::{
    Activation, Attention, AttentionDrawn, Backend, Cols, Conv2d, ConvWeight, Curve, DType, Embedding,
    Filter, GroupNorm, HostLayout, HostTensor, LayerNorm, Linear, LinearParts, LinearWeight, MatchTokens,
    NormWeight, RawTensor, ScaleHalf, Shape, SwapTokens, Tensor, TokenRows,
};

/// Where a model's tensors come from: a file, or a file under patches.
pub trait WeightSource: Send + Sync {
    /// The tensor of that name.
    fn raw(&self, name: &str) -> Option<RawTensor<'_>>;
    /// The extents of that tensor, without looking at its elements.
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.raw(name).map(|raw| raw.shape)
    }
    /// The tensor has been packed: its bytes are not needed in memory any more.
    fn packed(&self, name: &str);
}

type Make<W> = Box<dyn Fn() -> Result<W, ModelError> + Send + Sync>;

/// A weight that is packed when first used.
pub struct Lazy<W> {
    cell: OnceLock<W>,
    make: Make<W>,
    making: Mutex<()>,
}

impl<W> Lazy<W> {
    fn new(make: Make<W>) -> Self {
        Self { cell: OnceLock::new(), make, making: Mutex::new(()) }
    }

    /// The packed weight.
    pub fn get(&self) -> Result<&W, ModelError> {
        if let Some(w) = self.cell.get() {
            return Ok(w);
        }
        let _guard = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(w) = self.cell.get() {
            return Ok(w);
        }
        let made = (self.make)()?;
        Ok(self.cell.get_or_init(|| made))
    }
}

/// A linear layer's weight.
pub type LazyLinear = Lazy<LinearWeight>;
/// A convolution's weight.
pub type LazyConv = Lazy<ConvWeight>;
/// A norm's weight.
pub type LazyNorm = Lazy<NormWeight>;
/// An embedding table.
pub type LazyEmbedding = Lazy<Embedding>;

/// Makes the layers under one name prefix of a weight source.
#[derive(Clone)]
pub struct Loader {
    source: Arc<dyn WeightSource>,
    backend: Arc<dyn Backend>,
    prefix: String,
}

impl Loader {
    /// Layers of `source` whose names begin with `prefix`.
    pub fn new(source: Arc<dyn WeightSource>, backend: Arc<dyn Backend>, prefix: &str) -> Self {
        Self { source, backend, prefix: prefix.to_owned() }
    }

    /// The layers under `prefix.name.`.
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// All layers of the source.
    pub fn root(&self) -> Self {
        Self { prefix: String::new(), ..self.clone() }
    }

    /// Whether `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.source.shape(&format!("{}{name}", self.prefix)).is_some()
    }

    /// The extents of tensor `name`.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(&format!("{}{name}", self.prefix)).map(<[usize]>::to_vec)
    }

    fn checked(&self, name: &str, expected: &[usize]) -> Result<String, ModelError> {
        let name = format!("{}{name}", self.prefix);
        let found =
            self.source.shape(&name).ok_or_else(|| ModelError::Missing { name: name.clone() })?.to_vec();
        // A linear layer may be stored as a 1×1 convolution and the other way round.
        let bare = |s: &[usize]| {
            let mut s = s.to_vec();
            while s.len() > 2 && s.last() == Some(&1) {
                s.pop();
            }
            s
        };
        if bare(&found) != bare(expected) {
            return Err(ModelError::Shape { name, expected: expected.to_vec(), found });
        }
        Ok(name)
    }

    fn lazy<W: 'static>(
        &self,
        names: Vec<String>,
        make: impl Fn(&dyn Backend, &[RawTensor<'_>]) -> Result<W, ModelError> + Send + Sync + 'static,
    ) -> Lazy<W> {
        let (source, backend) = (self.source.clone(), self.backend.clone());
        Lazy::new(Box::new(move || {
            let mut raw = Vec::with_capacity(names.len());
            for name in &names {
                raw.push(source.raw(name).ok_or_else(|| ModelError::Missing { name: name.clone() })?);
            }
            let made = make(backend.as_ref(), &raw)?;
            drop(raw);
            names.iter().for_each(|name| source.packed(name));
            Ok(made)
        }))
    }

    /// A linear layer `name.weight` `[n, k]` with bias if there is one.
    pub fn linear(&self, name: &str, n: usize, k: usize) -> Result<LazyLinear, ModelError> {
        self.fused_linear(&[name], n, k, false)
    }

    /// A GEGLU projection: `2·n` rows, value half then gate half.
    pub fn geglu(&self, name: &str, n: usize, k: usize) -> Result<LazyLinear, ModelError> {
        self.fused_linear(&[name], 2 * n, k, true)
    }

    /// Several linear layers `[n, k]` on one input as one, outputs side by side.
    pub fn fused(&self, names: &[&str], n: usize, k: usize) -> Result<LazyLinear, ModelError> {
        self.fused_linear(names, n, k, false)
    }

    fn fused_linear(
        &self,
        names: &[&str],
        n: usize,
        k: usize,
        is_geglu: bool,
    ) -> Result<LazyLinear, ModelError> {
        let mut all = Vec::new();
        for name in names {
            all.push(self.checked(&format!("{name}.weight"), &[n, k])?);
        }
        let weights = all.len();
        for name in names.iter().filter(|name| self.has(&format!("{name}.bias"))) {
            all.push(self.checked(&format!("{name}.bias"), &[n])?);
        }
        Ok(self.lazy(all, move |backend, raw| {
            let (weights, biases) = raw.split_at(weights);
            Ok(backend.pack_linear(&LinearParts { weights, biases, is_geglu })?)
        }))
    }

    /// Linear layers of different heights on one input as one (names relative to this loader).
    pub fn stacked(&self, parts: &[(String, usize)], k: usize) -> Result<LazyLinear, ModelError> {
        let mut names = Vec::new();
        for (name, n) in parts {
            names.push(self.checked(&format!("{name}.weight"), &[*n, k])?);
        }
        for (name, n) in parts {
            names.push(self.checked(&format!("{name}.bias"), &[*n])?);
        }
        let count = parts.len();
        Ok(self.lazy(names, move |backend, raw| {
            let (weights, biases) = raw.split_at(count);
            Ok(backend.pack_linear(&LinearParts { weights, biases, is_geglu: false })?)
        }))
    }

    /// A convolution `name.weight` `[cout, cin, k, k]` with bias.
    pub fn conv(&self, name: &str, cout: usize, cin: usize, k: usize) -> Result<LazyConv, ModelError> {
        let names = vec![
            self.checked(&format!("{name}.weight"), &[cout, cin, k, k])?,
            self.checked(&format!("{name}.bias"), &[cout])?,
        ];
        Ok(self.lazy(names, |backend, raw| Ok(backend.pack_conv(&raw[0], raw.get(1))?)))
    }

    /// A convolution without bias.
    pub fn bare_conv(&self, name: &str, cout: usize, cin: usize, k: usize) -> Result<LazyConv, ModelError> {
        let names = vec![self.checked(&format!("{name}.weight"), &[cout, cin, k, k])?];
        Ok(self.lazy(names, |backend, raw| Ok(backend.pack_conv(&raw[0], None)?)))
    }

    /// The elements of a small tensor.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let name = self.checked(name, shape)?;
        Ok(self.source.raw(&name).map(|raw| raw.to_f32()).unwrap_or_default())
    }

    /// The last rows, from `first` on, of a matrix `[n, k]` and its bias, under names of their own.
    pub fn packed_rows(
        &self,
        (weight, bias): (&str, &str),
        (n, k): (usize, usize),
        first: usize,
    ) -> Result<LazyLinear, ModelError> {
        let names = vec![self.checked(weight, &[n, k])?, self.checked(bias, &[n])?];
        Ok(self.lazy(names, move |backend, raw| {
            let (rows, size) = (n - first, [raw[0].dtype.size(), raw[1].dtype.size()]);
            let tail = |i: usize, skipped: usize| raw[i].bytes[skipped * size[i]..].to_vec().into();
            let (shape, bias_shape) = ([rows, k], [rows]);
            let weights = [RawTensor { dtype: raw[0].dtype, shape: &shape, bytes: tail(0, first * k) }];
            let biases = [RawTensor { dtype: raw[1].dtype, shape: &bias_shape, bytes: tail(1, first) }];
            Ok(backend.pack_linear(&LinearParts { weights: &weights, biases: &biases, is_geglu: false })?)
        }))
    }

    /// A PReLU of `c` channels with slopes `name.weight`, as a linear layer over `x ‖ max(x, 0)`.
    pub fn prelu(&self, name: &str, c: usize) -> Result<LazyLinear, ModelError> {
        let names = vec![self.checked(&format!("{name}.weight"), &[c])?];
        Ok(self.lazy(names, move |backend, raw| {
            let mut matrix = vec![0.0f32; c * 2 * c];
            for (i, slope) in raw[0].to_f32().into_iter().enumerate() {
                matrix[i * 2 * c + i] = slope;
                matrix[i * 2 * c + c + i] = 1.0 - slope;
            }
            let bytes = bytemuck::cast_slice(&matrix).to_vec().into();
            let weights = [RawTensor { dtype: DType::F32, shape: &[c, 2 * c], bytes }];
            Ok(backend.pack_linear(&LinearParts { weights: &weights, biases: &[], is_geglu: false })?)
        }))
    }

    /// Some input channels of a convolution: it is linear in them, so sums of parts are the whole. The first
    /// part has the bias.
    pub fn conv_part(
        &self,
        name: &str,
        (cout, cin, k): (usize, usize, usize),
        inputs: Range<usize>,
    ) -> Result<LazyConv, ModelError> {
        let mut names = vec![self.checked(&format!("{name}.weight"), &[cout, cin, k, k])?];
        if inputs.start == 0 {
            names.push(self.checked(&format!("{name}.bias"), &[cout])?);
        }
        Ok(self.lazy(names, move |backend, raw| {
            let size = raw[0].dtype.size() * k * k;
            let rows = raw[0].bytes.chunks_exact((cin * size).max(1));
            let bytes: Vec<u8> =
                rows.flat_map(|row| row[inputs.start * size..inputs.end * size].iter().copied()).collect();
            let shape = [cout, inputs.len(), k, k];
            let part = RawTensor { dtype: raw[0].dtype, shape: &shape, bytes: bytes.into() };
            Ok(backend.pack_conv(&part, raw.get(1))?)
        }))
    }

    /// A convolution without bias whose steps are as long as its kernel, as a linear layer over patches of
    /// `k` values, which zeros fill up to `padded`.
    pub fn patches(
        &self,
        name: &str,
        (n, channels, side): (usize, usize, usize),
        padded: usize,
    ) -> Result<LazyLinear, ModelError> {
        let names = vec![self.checked(&format!("{name}.weight"), &[n, channels, side, side])?];
        let k = channels * side * side;
        Ok(self.lazy(names, move |backend, raw| {
            let mut matrix = vec![0.0f32; n * padded];
            for (to, from) in matrix.chunks_exact_mut(padded).zip(raw[0].to_f32().chunks_exact(k)) {
                to[..k].copy_from_slice(from);
            }
            let bytes = bytemuck::cast_slice(&matrix).to_vec().into();
            let weights = [RawTensor { dtype: DType::F32, shape: &[n, padded], bytes }];
            Ok(backend.pack_linear(&LinearParts { weights: &weights, biases: &[], is_geglu: false })?)
        }))
    }

    /// A norm `name.weight`, `name.bias` of `c` channels.
    pub fn norm(&self, name: &str, c: usize) -> Result<LazyNorm, ModelError> {
        let names = vec![
            self.checked(&format!("{name}.weight"), &[c])?,
            self.checked(&format!("{name}.bias"), &[c])?,
        ];
        Ok(self.lazy(names, |backend, raw| Ok(backend.pack_norm(&raw[0], &raw[1])?)))
    }

    /// An embedding table `name.weight` `[rows, width]`.
    pub fn embedding(&self, name: &str, rows: usize, width: usize) -> Result<LazyEmbedding, ModelError> {
        let names = vec![self.checked(&format!("{name}.weight"), &[rows, width])?];
        Ok(self.lazy(names, |backend, raw| Ok(backend.pack_embedding(&raw[0])?)))
    }
}

/// Ops that allocate their outputs from the backend's arena.
#[derive(Clone, Copy)]
pub struct Ops<'a>(pub &'a dyn Backend);

impl Ops<'_> {
    fn with(
        &self,
        shape: Shape,
        run: impl FnOnce(&mut Tensor) -> Result<(), crate::tensor::TensorError>,
    ) -> Result<Tensor, ModelError> {
        let mut out = self.0.alloc(shape)?;
        run(&mut out)?;
        Ok(out)
    }

    /// Convolution whose result leaves the device.
    pub fn conv_result(&self, op: &Conv2d<'_>) -> Result<Tensor, ModelError> {
        let mut out = self.0.alloc_result(conv_shape(op)?)?;
        self.0.conv2d(op, &mut out)?;
        Ok(out)
    }

    /// Convolution.
    pub fn conv(&self, op: &Conv2d<'_>) -> Result<Tensor, ModelError> {
        self.with(conv_shape(op)?, |out| self.0.conv2d(op, out))
    }

    /// Linear layer.
    pub fn linear(&self, op: &Linear<'_>) -> Result<Tensor, ModelError> {
        self.with(op.x.tensor.shape().with_channels(op.w.n), |out| self.0.linear(op, out))
    }

    /// Attention.
    pub fn attention(&self, op: &Attention<'_>) -> Result<Tensor, ModelError> {
        self.with(op.q.tensor.shape().with_channels(op.q.width), |out| self.0.attention(op, out))
    }

    /// Group normalisation of `x ‖ x2`.
    pub fn group_norm(&self, op: &GroupNorm<'_>) -> Result<Tensor, ModelError> {
        let c = op.x.shape().c + op.x2.map_or(0, |t| t.shape().c);
        self.with(op.x.shape().with_channels(c), |out| self.0.group_norm(op, out))
    }

    /// Layer normalisation.
    pub fn layer_norm(&self, x: &Tensor, w: &LazyNorm, eps: f32) -> Result<Tensor, ModelError> {
        let op = LayerNorm { x, w: w.get()?, eps };
        self.with(x.shape(), |out| self.0.layer_norm(&op, out))
    }

    /// A map of `h`×`w`.
    pub fn resize(&self, x: &Tensor, filter: Filter, (h, w): (usize, usize)) -> Result<Tensor, ModelError> {
        let shape = Shape { h, w, ..x.shape() };
        self.with(shape, |out| self.0.resize(x, filter, out))
    }

    /// Tokens in another order.
    pub fn swap_tokens(&self, op: &SwapTokens<'_>) -> Result<Tensor, ModelError> {
        self.with(op.out_shape(), |out| self.0.swap_tokens(op, out))
    }

    /// Which tokens share a row.
    pub fn match_tokens(&self, op: &MatchTokens<'_>) -> Result<TokenRows, ModelError> {
        Ok(self.0.match_tokens(op)?)
    }

    /// Rows from tokens.
    pub fn merge_tokens(&self, x: Cols<'_>, rows: &TokenRows) -> Result<Tensor, ModelError> {
        self.with(rows.merged_shape(x.width), |out| self.0.merge_tokens(&x, rows, out))
    }

    /// Tokens from rows.
    pub fn spread_tokens(&self, x: &Tensor, rows: &TokenRows) -> Result<Tensor, ModelError> {
        self.with(rows.spread_shape(x.shape().c), |out| self.0.spread_tokens(x, rows, out))
    }

    /// Columns of every token.
    pub fn columns(&self, x: Cols<'_>) -> Result<Tensor, ModelError> {
        self.swap_tokens(&SwapTokens { x, rows: 1, columns: 1, run: x.tensor.shape().positions().max(1) })
    }

    /// Columns of several tensors of the same rows side by side.
    pub fn concat(&self, parts: &[Cols<'_>]) -> Result<Tensor, ModelError> {
        let (expected, found) = (1, parts.len());
        let what = "tensors side by side";
        let first = parts.first().ok_or(ModelError::Input { what, expected, found })?;
        let shape = first.tensor.shape().with_channels(parts.iter().map(|part| part.width).sum());
        self.with(shape, |out| self.0.concat(parts, out))
    }

    /// The first half of the channels scaled.
    pub fn scale_half(&self, op: &ScaleHalf<'_>) -> Result<Tensor, ModelError> {
        self.with(op.x.shape(), |out| self.0.scale_half(op, out))
    }

    /// The lowest spatial frequencies scaled.
    pub fn scale_low_band(&self, x: &Tensor, factor: f32) -> Result<Tensor, ModelError> {
        self.with(x.shape(), |out| self.0.scale_low_band(x, factor, out))
    }

    /// `a·x + b·y`.
    pub fn axpby(&self, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<Tensor, ModelError> {
        self.with(x.shape(), |out| self.0.axpby(a, x, b, y, out))
    }

    /// `act(x)`.
    pub fn activate(&self, x: &Tensor, act: Activation) -> Result<Tensor, ModelError> {
        self.with(x.shape(), |out| self.0.activate(x, act, out))
    }

    /// Attention that every key draws, of `samples` samples: `[samples, 1, keys, 1]` in f32.
    pub fn attention_drawn(&self, op: &AttentionDrawn<'_>, samples: usize) -> Result<Tensor, ModelError> {
        let mut out = self.0.alloc_f32(Shape::nhwc(samples, 1, op.k.tensor.shape().positions(), 1))?;
        self.0.attention_drawn(op, &mut out)?;
        Ok(out)
    }

    /// `curve(x)`.
    pub fn curve(&self, x: &Tensor, curve: Curve) -> Result<Tensor, ModelError> {
        self.with(x.shape(), |out| self.0.curve(x, curve, out))
    }

    /// Sinusoidal timestep embedding.
    pub fn timestep_embedding(&self, timesteps: &[f32], dim: usize) -> Result<Tensor, ModelError> {
        self.with(Shape::nhwc(timesteps.len(), 1, 1, dim), |out| self.0.timestep_embedding(timesteps, out))
    }

    /// Uploads `[N, C, H, W]`.
    pub fn upload_nchw(&self, x: &HostTensor) -> Result<Tensor, ModelError> {
        let shape = Shape::nhwc(x.dim(0), x.dim(2), x.dim(3), x.dim(1));
        self.with(shape, |out| self.0.upload(x.data(), HostLayout::Nchw, out))
    }

    /// Uploads `[B, S, C]`.
    pub fn upload_tokens(&self, x: &HostTensor) -> Result<Tensor, ModelError> {
        let shape = Shape::tokens(x.dim(0), x.dim(1), x.dim(2));
        self.with(shape, |out| self.0.upload(x.data(), HostLayout::Nhwc, out))
    }

    /// Downloads as `[N, C, H, W]`.
    pub fn download_nchw(&self, x: &Tensor) -> Result<HostTensor, ModelError> {
        let s = x.shape();
        let mut out = HostTensor::zeros(&[s.n, s.c, s.h, s.w]);
        self.0.download(x, HostLayout::Nchw, out.data_mut())?;
        Ok(out)
    }

    /// Downloads as `[B, S, C]`.
    pub fn download_tokens(&self, x: &Tensor) -> Result<HostTensor, ModelError> {
        let s = x.shape();
        let mut out = HostTensor::zeros(&[s.n, s.positions(), s.c]);
        self.0.download(x, HostLayout::Nhwc, out.data_mut())?;
        Ok(out)
    }

    /// Downloads as `[N, H, W, C]`.
    pub fn download_nhwc(&self, x: &Tensor) -> Result<HostTensor, ModelError> {
        let s = x.shape();
        let mut out = HostTensor::zeros(&[s.n, s.h, s.w, s.c]);
        self.0.download(x, HostLayout::Nhwc, out.data_mut())?;
        Ok(out)
    }
}

fn conv_shape(op: &Conv2d<'_>) -> Result<Shape, ModelError> {
    op.out_shape().ok_or(ModelError::Input {
        what: "height and width of a convolution's input",
        expected: op.w.kh,
        found: op.x.shape().h.min(op.x.shape().w),
    })
}

/// Self-attention over the fused projection `[B, 1, S, 3·C]`.
pub fn fused_self_attention(qkv: &Tensor, heads: usize, is_causal: bool) -> Attention<'_> {
    let c = qkv.shape().c / 3;
    Attention {
        q: Cols::range(qkv, 0, c),
        k: Cols::range(qkv, c, c),
        v: Cols::range(qkv, 2 * c, c),
        heads,
        is_causal,
        scale: head_scale(c, heads),
    }
}

/// 1/√(head width).
pub fn head_scale(channels: usize, heads: usize) -> f32 {
    1.0 / ((channels / heads.max(1)) as f32).sqrt()
}
