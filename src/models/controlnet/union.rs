//! Union ControlNets (xinsir 2024): one net for several kinds of pictures.
//!
//! The kind shifts the features of the picture by a vector for all places, made
//! by a small transformer over one token, and the time embedding by another. With
//! one token attention is the value projection, so nothing here needs more
//! than linear layers.

use crate::models::ModelError;
use crate::models::detect::UnetConfig;
use crate::models::layers::{LazyLinear, LazyNorm, Loader, Ops};
use crate::tensor::{Activation, Cols, HostTensor, Linear, Tensor};

/// Kinds of pictures in the order of the published nets: names in `SetUnionControlNetType`.
pub const KINDS: [&str; 8] = [
    "openpose",
    "depth",
    "hed/pidi/scribble/ted",
    "canny/lineart/anime_lineart/mlsd",
    "normal",
    "segment",
    "tile",
    "repaint",
];

/// Frequencies of a kind's embedding, sines and cosines.
const FREQUENCIES: usize = 256;

struct Block {
    norm1: LazyNorm,
    value: LazyLinear,
    out: LazyLinear,
    norm2: LazyNorm,
    fc1: LazyLinear,
    fc2: LazyLinear,
}

/// What a union net has besides the net itself.
pub(super) struct Union {
    kinds: usize,
    width: usize,
    embedding: Vec<f32>,
    blocks: Vec<Block>,
    projection: LazyLinear,
    add1: LazyLinear,
    add2: LazyLinear,
}

impl Union {
    /// `None` for a net of one kind.
    pub fn load(config: &UnetConfig, loader: &Loader) -> Result<Option<Self>, ModelError> {
        let Some(shape) = loader.shape("task_embedding") else { return Ok(None) };
        let &[kinds, width] = shape.as_slice() else {
            let expected = vec![KINDS.len(), config.model_channels];
            return Err(ModelError::Shape { name: "task_embedding".into(), expected, found: shape });
        };
        let mut blocks = Vec::new();
        while loader.has(&format!("transformer_layes.{}.ln_1.weight", blocks.len())) {
            // The published files misspell the name.
            let l = loader.sub("transformer_layes").sub(blocks.len());
            blocks.push(Block {
                norm1: l.norm("ln_1", width)?,
                value: l.packed_rows(
                    ("attn.in_proj_weight", "attn.in_proj_bias"),
                    (3 * width, width),
                    2 * width,
                )?,
                out: l.linear("attn.out_proj", width, width)?,
                norm2: l.norm("ln_2", width)?,
                fc1: l.linear("mlp.c_fc", 4 * width, width)?,
                fc2: l.linear("mlp.c_proj", width, 4 * width)?,
            });
        }
        let emb = config.time_embed_dim;
        Ok(Some(Self {
            embedding: loader.read("task_embedding", &[kinds, width])?,
            projection: loader.linear("spatial_ch_projs", width, width)?,
            add1: loader.linear("control_add_embedding.linear_1", emb, FREQUENCIES * kinds)?,
            add2: loader.linear("control_add_embedding.linear_2", emb, emb)?,
            blocks,
            kinds,
            width,
        }))
    }

    fn expect(&self, kinds: &[usize]) -> Result<(), ModelError> {
        match kinds.iter().find(|kind| **kind >= self.kinds) {
            Some(kind) => {
                let what = "number of the kind of picture (below the number of kinds of the ControlNet)";
                Err(ModelError::Input { what, expected: self.kinds, found: *kind })
            }
            None => Ok(()),
        }
    }

    /// Features `[B, h, w, C]` of a picture, shifted by what the first kind says about their mean.
    pub fn shifted(&self, ops: Ops<'_>, features: &Tensor, kinds: &[usize]) -> Result<Tensor, ModelError> {
        self.expect(kinds)?;
        let Some(&kind) = kinds.first() else { return ops.axpby(1.0, features, 0.0, features) };
        let mut host = ops.download_nchw(features)?;
        let (b, c, plane) = (host.dim(0), host.dim(1), host.dim(2) * host.dim(3));
        let task = &self.embedding[kind * self.width..(kind + 1) * self.width];
        let mean = |i: usize| {
            let sum: f64 = host.data()[i * plane..(i + 1) * plane].iter().map(|v| f64::from(*v)).sum();
            (sum / plane.max(1) as f64) as f32 + task.get(i % c).copied().unwrap_or(0.0)
        };
        let tokens = HostTensor::from_fn(&[b, 1, c], mean);
        let mut x = ops.upload_tokens(&tokens)?;
        for block in &self.blocks {
            let normed = ops.layer_norm(&x, &block.norm1, 1e-5)?;
            let value = ops.linear(&Linear::new(&normed, block.value.get()?))?;
            x = ops.linear(&Linear { residual: Some(&x), ..Linear::new(&value, block.out.get()?) })?;
            let normed = ops.layer_norm(&x, &block.norm2, 1e-5)?;
            let act = Activation::QuickGelu;
            let inner = ops.linear(&Linear { act, ..Linear::new(&normed, block.fc1.get()?) })?;
            x = ops.linear(&Linear { residual: Some(&x), ..Linear::new(&inner, block.fc2.get()?) })?;
        }
        let shift = ops.linear(&Linear { x: Cols::all(&x), ..Linear::new(&x, self.projection.get()?) })?;
        let shift = ops.download_tokens(&shift)?;
        for (i, channel) in host.data_mut().chunks_exact_mut(plane.max(1)).enumerate() {
            channel.iter_mut().for_each(|v| *v += shift.data()[i]);
        }
        ops.upload_nchw(&host)
    }

    /// What the kinds add to the time embedding: `[B, 1, 1, time_embed_dim]`.
    pub fn time_shift(&self, ops: Ops<'_>, kinds: &[usize], batch: usize) -> Result<Tensor, ModelError> {
        self.expect(kinds)?;
        let half = FREQUENCIES / 2;
        let value = |i: usize| {
            let (kind, j) = (i / FREQUENCIES % self.kinds, i % FREQUENCIES);
            let is_set = f32::from(u8::from(kinds.contains(&kind)));
            let frequency = (-(10000f64.ln()) * (j % half) as f64 / half as f64).exp() as f32;
            if j < half { (is_set * frequency).cos() } else { (is_set * frequency).sin() }
        };
        let x = ops.upload_tokens(&HostTensor::from_fn(&[batch, 1, FREQUENCIES * self.kinds], value))?;
        let act = Activation::Silu;
        let inner = ops.linear(&Linear { act, ..Linear::new(&x, self.add1.get()?) })?;
        ops.linear(&Linear::new(&inner, self.add2.get()?))
    }
}
