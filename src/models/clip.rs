//! The CLIP text encoder (Radford et al. 2021), and how its outputs become conditioning.

use std::sync::Arc;

use super::ModelError;
use super::detect::{self, ClipConfig};
use super::layers::{LazyEmbedding, LazyLinear, LazyNorm, Loader, Ops, fused_self_attention};
use crate::tensor::{Activation, Backend, Embed, EmbedRow, HostTensor, Linear, Shape, Tensor};

/// End-of-text token of CLIP's vocabulary.
pub const END_TOKEN: u32 = 49407;
const START_TOKEN: u32 = 49406;

/// A token with its prompt weight.
#[derive(Clone, Debug)]
pub struct WeightedToken {
    /// The token, or a vector of an embedding file.
    pub token: ClipToken,
    /// Prompt weight; 1 is neutral.
    pub weight: f32,
}

/// A token of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum ClipToken {
    /// Row of the token table.
    Id(u32),
    /// A vector that takes the place of a row (textual inversion).
    Vector(Arc<[f32]>),
}

/// A prompt's encoding.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[1, 77·chunks, width]`.
    pub cond: HostTensor,
    /// `[1, width]`: the state at the first chunk's end token, projected if the encoder has a projection.
    pub pooled: HostTensor,
}

/// Which hidden state becomes the conditioning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HiddenState {
    /// Layers left out at the end ("clip skip": `CLIPSetLastLayer` with -2 is 1). More than there are: the
    /// whole encoder with its final norm.
    pub skip_last: usize,
    /// Whether the final norm is applied.
    pub is_normed: bool,
}

impl HiddenState {
    /// The whole encoder with its final norm.
    pub const LAST: HiddenState = HiddenState { skip_last: 0, is_normed: true };
}

/// A transformer layer, of the text or the picture encoder.
pub(super) struct Layer {
    norm1: LazyNorm,
    qkv: LazyLinear,
    out: LazyLinear,
    norm2: LazyNorm,
    fc1: LazyLinear,
    fc2: LazyLinear,
}

/// What all layers of an encoder share.
#[derive(Clone, Copy)]
pub(super) struct LayerKind {
    pub heads: usize,
    pub activation: detect::Activation,
    /// Whether a token sees only those before it.
    pub is_causal: bool,
    /// ε of the norms.
    pub eps: f32,
}

impl Layer {
    /// The layer under `loader`, of `c` channels and `mlp` inside.
    pub fn load(loader: &Loader, c: usize, mlp: usize) -> Result<Self, ModelError> {
        Ok(Self {
            norm1: loader.norm("layer_norm1", c)?,
            qkv: loader.fused(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], c, c)?,
            out: loader.linear("self_attn.out_proj", c, c)?,
            norm2: loader.norm("layer_norm2", c)?,
            fc1: loader.linear("mlp.fc1", mlp, c)?,
            fc2: loader.linear("mlp.fc2", c, mlp)?,
        })
    }

    /// `[B, 1, S, C]` to the same.
    pub fn forward(&self, ops: Ops<'_>, kind: LayerKind, x: &Tensor) -> Result<Tensor, ModelError> {
        let normed = ops.layer_norm(x, &self.norm1, kind.eps)?;
        let qkv = ops.linear(&Linear::new(&normed, self.qkv.get()?))?;
        let attended = ops.attention(&fused_self_attention(&qkv, kind.heads, kind.is_causal))?;
        let x = ops.linear(&Linear { residual: Some(x), ..Linear::new(&attended, self.out.get()?) })?;
        let normed = ops.layer_norm(&x, &self.norm2, kind.eps)?;
        let act = match kind.activation {
            detect::Activation::QuickGelu => Activation::QuickGelu,
            detect::Activation::Gelu => Activation::Gelu,
        };
        let inner = ops.linear(&Linear { act, ..Linear::new(&normed, self.fc1.get()?) })?;
        ops.linear(&Linear { residual: Some(&x), ..Linear::new(&inner, self.fc2.get()?) })
    }
}

/// A CLIP text encoder on a backend.
pub struct ClipText {
    config: ClipConfig,
    backend: Arc<dyn Backend>,
    tokens: LazyEmbedding,
    positions: LazyEmbedding,
    layers: Vec<Layer>,
    final_norm: LazyNorm,
    projection: Option<LazyLinear>,
}

impl ClipText {
    /// Checks the tensors under `loader` (`…text_model.`); packs nothing yet.
    pub fn load(config: ClipConfig, backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let (c, mlp) = (config.width, config.mlp);
        let embeddings = loader.sub("embeddings");
        let mut layers = Vec::with_capacity(config.layers);
        for i in 0..config.layers {
            layers.push(Layer::load(&loader.sub("encoder.layers").sub(i), c, mlp)?);
        }
        Ok(Self {
            tokens: embeddings.embedding("token_embedding", config.vocab, c)?,
            positions: embeddings.embedding("position_embedding", config.max_positions, c)?,
            final_norm: loader.norm("final_layer_norm", c)?,
            projection: match &config.projection {
                Some((name, to)) => Some(loader.root().linear(name.trim_end_matches(".weight"), *to, c)?),
                None => None,
            },
            layers,
            config,
            backend,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// Encodes a prompt given in chunks, as ComfyUI forms conditioning.
    ///
    /// Chunks are encoded as a batch and joined along the token axis; weights
    /// act on the output, as a move away from the empty prompt's encoding.
    /// `state` says what `cond` is made of; `pooled` is always of the whole encoder.
    pub fn encode(&self, chunks: &[Vec<WeightedToken>], state: HiddenState) -> Result<Encoded, ModelError> {
        let is_weighted = chunks.iter().flatten().any(|t| t.weight != 1.0);
        let mut rows: Vec<Vec<ClipToken>> =
            chunks.iter().map(|c| c.iter().map(|t| t.token.clone()).collect()).collect();
        if is_weighted || rows.is_empty() {
            let len = chunks.first().map_or(self.config.max_positions, Vec::len);
            rows.push(empty_chunk(len, self.config.variant.pad_token()));
        }
        let (hidden, pooled) = self.forward(&rows, state)?;
        let count = chunks.len().max(1);
        let (tokens, width) = (hidden.dim(1), hidden.dim(2));
        let mut cond = hidden.rows(0, count);
        if is_weighted {
            let empty = hidden.row(rows.len() - 1);
            let states = cond.data_mut().chunks_exact_mut(tokens * width);
            for (chunk, state) in chunks.iter().zip(states) {
                for ((t, z), e) in
                    chunk.iter().zip(state.chunks_exact_mut(width)).zip(empty.chunks_exact(width))
                {
                    if t.weight != 1.0 {
                        z.iter_mut().zip(e).for_each(|(z, e)| *z = (*z - e) * t.weight + e);
                    }
                }
            }
        }
        let cond = HostTensor::new(&[1, count * tokens, width], cond.into_data());
        let cond = cond.ok_or(ModelError::Input { what: "chunk length", expected: tokens, found: 0 })?;
        Ok(Encoded { cond, pooled: self.project(pooled.rows(0, 1))? })
    }

    /// Hidden states `[B, S, width]` as `state` says, and pooled states
    /// `[B, width]` of the whole encoder, not projected.
    pub fn forward(
        &self,
        rows: &[Vec<ClipToken>],
        state: HiddenState,
    ) -> Result<(HostTensor, HostTensor), ModelError> {
        let ops = Ops(self.backend.as_ref());
        let mut x = self.embed(rows)?;
        // Fewer layers than are left out: the reference then takes the whole encoder.
        let state = if state.skip_last < self.layers.len() { state } else { HiddenState::LAST };
        let keep = self.layers.len() - state.skip_last;
        let mut kept: Option<HostTensor> = None;
        for (i, layer) in self.layers.iter().enumerate() {
            if i == keep {
                kept = Some(self.hidden(ops, &x, state.is_normed)?);
            }
            x = layer.forward(ops, self.kind(), &x)?;
        }
        let last = self.hidden(ops, &x, true)?;
        ModelError::check_numbers("text encoder", &[], last.data())?;
        let pooled = pool(rows, &last);
        if kept.is_none() && !state.is_normed {
            kept = Some(self.hidden(ops, &x, false)?);
        }
        Ok((kept.unwrap_or(last), pooled))
    }

    fn hidden(&self, ops: Ops<'_>, x: &Tensor, is_normed: bool) -> Result<HostTensor, ModelError> {
        match is_normed {
            true => ops.download_tokens(&ops.layer_norm(x, &self.final_norm, self.config.layer_norm_eps)?),
            false => ops.download_tokens(x),
        }
    }

    /// The pooled state `[1, width]` through the projection, if there is one.
    fn project(&self, pooled: HostTensor) -> Result<HostTensor, ModelError> {
        let Some(projection) = &self.projection else { return Ok(pooled) };
        let ops = Ops(self.backend.as_ref());
        let (width, w) = (pooled.len(), projection.get()?);
        let sized = |t: HostTensor, shape: &[usize]| {
            let found = t.len();
            t.reshape(shape).ok_or(ModelError::Input {
                what: "width of the pooled state",
                expected: width,
                found,
            })
        };
        let x = ops.upload_tokens(&sized(pooled, &[1, 1, width])?)?;
        sized(ops.download_tokens(&ops.linear(&Linear::new(&x, w))?)?, &[1, w.n])
    }

    fn embed(&self, rows: &[Vec<ClipToken>]) -> Result<Tensor, ModelError> {
        let tokens = rows.first().map_or(0, Vec::len);
        let mut flat = Vec::with_capacity(rows.len() * tokens);
        for row in rows {
            if row.len() != tokens {
                return Err(ModelError::Input { what: "chunk length", expected: tokens, found: row.len() });
            }
            for token in row {
                flat.push(match token {
                    ClipToken::Id(id) => EmbedRow::Id(*id),
                    ClipToken::Vector(v) if v.len() == self.config.width => EmbedRow::Vector(v),
                    ClipToken::Vector(v) => {
                        let (expected, found) = (self.config.width, v.len());
                        return Err(ModelError::Input {
                            what: "width of an embedding file's vectors",
                            expected,
                            found,
                        });
                    }
                });
            }
        }
        let mut out = self.backend.alloc(Shape::tokens(rows.len(), tokens, self.config.width))?;
        let op = Embed { table: self.tokens.get()?, positions: self.positions.get()?, tokens: &flat };
        self.backend.embed(&op, &mut out)?;
        Ok(out)
    }

    fn kind(&self) -> LayerKind {
        let ClipConfig { heads, activation, layer_norm_eps: eps, .. } = self.config;
        LayerKind { heads, activation, is_causal: true, eps }
    }
}

/// The chunk of an empty prompt: start, end, padding.
fn empty_chunk(len: usize, pad: u32) -> Vec<ClipToken> {
    let ids = [START_TOKEN, END_TOKEN].into_iter().chain(std::iter::repeat(pad));
    ids.take(len).map(ClipToken::Id).collect()
}

/// The state at each row's first end token.
fn pool(rows: &[Vec<ClipToken>], states: &HostTensor) -> HostTensor {
    let (tokens, width) = (states.dim(1), states.dim(2));
    let mut out = HostTensor::zeros(&[rows.len(), width]);
    for ((row, state), out) in rows
        .iter()
        .zip(states.data().chunks_exact(tokens * width))
        .zip(out.data_mut().chunks_exact_mut(width))
    {
        let end = row.iter().position(|t| *t == ClipToken::Id(END_TOKEN)).unwrap_or(0);
        out.copy_from_slice(&state[end * width..(end + 1) * width]);
    }
    out
}
