//! A backend that counts: operations, arithmetic and time by kind of op, around another backend.
//!
//! For benchmarks and for tests that bound the number of launches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::tensor::{
    Activation, Attention, AttentionDrawn, Backend, BackendInfo, Body, BodyError, Cols, Conv2d, ConvWeight,
    Curve, Embed, Embedding, Filter, GroupNorm, HostLayout, LatentOps, LayerNorm, Linear, LinearParts,
    LinearWeight, MatchTokens, MemoryUse, NormWeight, Outcome, PressureHook, RawTensor, ScaleHalf, Shape,
    SwapTokens, Tensor, TensorError, TokenRows,
};

/// What was counted for one kind of op.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// Number of ops.
    pub calls: u64,
    /// Floating point operations (a multiply-add is two); zero for ops that only move or normalise.
    pub flop: f64,
    /// Wall time.
    pub time: Duration,
}

/// Counts by kind of op: `conv3x3`, `linear`, `attention`, `group_norm`, …
pub type Counts = BTreeMap<&'static str, Count>;

/// A backend that counts what passes through it.
pub struct Metered {
    inner: Arc<dyn Backend>,
    counts: Mutex<Counts>,
}

impl Metered {
    /// Counts what `inner` does.
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self { inner, counts: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was counted since the last call; starts again at zero.
    pub fn take(&self) -> Counts {
        std::mem::take(&mut *self.lock())
    }

    fn count<T>(&self, kind: &'static str, flop: f64, run: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = run();
        let time = began.elapsed();
        let mut counts = self.lock();
        let count = counts.entry(kind).or_default();
        count.calls += 1;
        count.flop += flop;
        count.time += time;
        result
    }
}

impl Backend for Metered {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn memory(&self) -> MemoryUse {
        self.inner.memory()
    }

    fn trim(&self) {
        self.inner.trim();
    }

    fn alloc(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.inner.alloc(shape)
    }

    fn alloc_result(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.inner.alloc_result(shape)
    }

    fn alloc_f32(&self, shape: Shape) -> Result<Tensor, TensorError> {
        self.inner.alloc_f32(shape)
    }

    fn pack_linear(&self, parts: &LinearParts<'_>) -> Result<LinearWeight, TensorError> {
        self.count("pack", 0.0, || self.inner.pack_linear(parts))
    }

    fn pack_conv(
        &self,
        weight: &RawTensor<'_>,
        bias: Option<&RawTensor<'_>>,
    ) -> Result<ConvWeight, TensorError> {
        self.count("pack", 0.0, || self.inner.pack_conv(weight, bias))
    }

    fn pack_norm(&self, scale: &RawTensor<'_>, shift: &RawTensor<'_>) -> Result<NormWeight, TensorError> {
        self.count("pack", 0.0, || self.inner.pack_norm(scale, shift))
    }

    fn pack_embedding(&self, table: &RawTensor<'_>) -> Result<Embedding, TensorError> {
        self.count("pack", 0.0, || self.inner.pack_embedding(table))
    }

    fn upload(&self, data: &[f32], layout: HostLayout, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("copy", 0.0, || self.inner.upload(data, layout, out))
    }

    fn download(&self, x: &Tensor, layout: HostLayout, out: &mut [f32]) -> Result<(), TensorError> {
        self.count("copy", 0.0, || self.inner.download(x, layout, out))
    }

    fn conv2d(&self, op: &Conv2d<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        let kind = if op.w.kh == 1 { "conv1x1" } else { "conv3x3" };
        let flop = 2.0 * out.shape().len() as f64 * (op.w.cin * op.w.kh * op.w.kw) as f64;
        self.count(kind, flop, || self.inner.conv2d(op, out))
    }

    fn linear(&self, op: &Linear<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        let outputs = if op.w.is_geglu { 2 } else { 1 } * op.w.n;
        let flop = 2.0 * (out.shape().rows() * outputs) as f64 * op.w.k as f64;
        self.count("linear", flop, || self.inner.linear(op, out))
    }

    fn attention(&self, op: &Attention<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        let keys = op.k.tensor.shape().positions();
        let flop = 4.0 * out.shape().len() as f64 * keys as f64;
        self.count("attention", flop, || self.inner.attention(op, out))
    }

    fn attention_drawn(&self, op: &AttentionDrawn<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        let queries = op.q.tensor.shape().positions();
        let flop = 2.0 * (out.shape().len() * queries * op.q.width) as f64;
        self.count("attention", flop, || self.inner.attention_drawn(op, out))
    }

    fn group_norm(&self, op: &GroupNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("group_norm", 0.0, || self.inner.group_norm(op, out))
    }

    fn layer_norm(&self, op: &LayerNorm<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("layer_norm", 0.0, || self.inner.layer_norm(op, out))
    }

    fn embed(&self, op: &Embed<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("embed", 0.0, || self.inner.embed(op, out))
    }

    fn timestep_embedding(&self, timesteps: &[f32], out: &mut Tensor) -> Result<(), TensorError> {
        self.count("embed", 0.0, || self.inner.timestep_embedding(timesteps, out))
    }

    fn activate(&self, x: &Tensor, act: Activation, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.activate(x, act, out))
    }

    fn curve(&self, x: &Tensor, curve: Curve, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.curve(x, curve, out))
    }

    fn resize(&self, x: &Tensor, filter: Filter, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.resize(x, filter, out))
    }

    fn swap_tokens(&self, op: &SwapTokens<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.swap_tokens(op, out))
    }

    fn match_tokens(&self, op: &MatchTokens<'_>) -> Result<TokenRows, TensorError> {
        let (tokens, targets) = (op.x.shape().rows() as f64, op.targets.len() as f64);
        let flop = 2.0 * tokens * targets * op.x.shape().c as f64;
        self.count("token merging", flop, || self.inner.match_tokens(op))
    }

    fn merge_tokens(&self, x: &Cols<'_>, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("token merging", 0.0, || self.inner.merge_tokens(x, rows, out))
    }

    fn spread_tokens(&self, x: &Tensor, rows: &TokenRows, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("token merging", 0.0, || self.inner.spread_tokens(x, rows, out))
    }

    fn scale_half(&self, op: &ScaleHalf<'_>, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.scale_half(op, out))
    }

    fn scale_low_band(&self, x: &Tensor, factor: f32, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.scale_low_band(x, factor, out))
    }

    fn axpby(&self, a: f32, x: &Tensor, b: f32, y: &Tensor, out: &mut Tensor) -> Result<(), TensorError> {
        self.count("elementwise", 0.0, || self.inner.axpby(a, x, b, y, out))
    }

    /// The ops of `body` are counted when they run or are recorded, not when a recording is replayed.
    fn record(&self, key: u64, inputs: &[&Tensor], body: &mut Body<'_>) -> Result<Outcome, BodyError> {
        self.inner.record(key, inputs, body)
    }

    fn concat(&self, parts: &[Cols<'_>], out: &mut Tensor) -> Result<(), TensorError> {
        self.count("copy", 0.0, || self.inner.concat(parts, out))
    }

    fn latent_ops(&self) -> Option<&dyn LatentOps> {
        self.inner.latent_ops()
    }

    fn on_pressure(&self, hook: PressureHook) {
        self.inner.on_pressure(hook);
    }
}
