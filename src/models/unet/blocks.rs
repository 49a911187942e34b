//! The UNet's building blocks: ResBlock, spatial transformer, upsampling.

use super::hooks::{self, HookScope, SelfAttention, Site};
use crate::models::ModelError;
use crate::models::detect::UnetConfig;
use crate::models::layers::{LazyConv, LazyLinear, LazyNorm, Loader, Ops, head_scale};
use crate::tensor::{Attention, Cols, Conv2d, ConvWeight, Filter, GroupNorm, Linear, Tensor};

/// What all blocks of one forward pass share.
pub(in crate::models) struct Scope<'a, 'p> {
    pub ops: Ops<'a>,
    /// All time biases side by side.
    pub time: &'a Tensor,
    /// Keys and values of every cross-attention.
    pub context: &'a [&'a Tensor],
    pub probe: &'p mut dyn FnMut(&str, &Tensor),
    pub hooks: Option<&'a HookScope<'a>>,
}

/// GroupNorm-SiLU-conv twice, with the time bias in the middle and a skip connection.
pub(in crate::models) struct ResBlock {
    groups: usize,
    norm1: LazyNorm,
    conv1: LazyConv,
    norm2: LazyNorm,
    conv2: LazyConv,
    skip: Option<LazyLinear>,
    cout: usize,
    /// Where this block's columns start in the fused time biases.
    time_start: usize,
}

impl ResBlock {
    pub fn load(
        loader: &Loader,
        groups: usize,
        cin: usize,
        cout: usize,
        time_start: usize,
    ) -> Result<Self, ModelError> {
        let skip = if cin == cout && !loader.has("skip_connection.weight") {
            None
        } else {
            Some(loader.linear("skip_connection", cout, cin)?)
        };
        Ok(Self {
            groups,
            norm1: loader.norm("in_layers.0", cin)?,
            conv1: loader.conv("in_layers.2", cout, cin, 3)?,
            norm2: loader.norm("out_layers.0", cout)?,
            conv2: loader.conv("out_layers.3", cout, cout, 3)?,
            skip,
            cout,
            time_start,
        })
    }

    /// `x2` are the channels of the skip connection from the way down, if any.
    pub fn forward(
        &self,
        scope: &Scope<'_, '_>,
        x: &Tensor,
        x2: Option<&Tensor>,
    ) -> Result<Tensor, ModelError> {
        let ops = scope.ops;
        let norm = |x, x2, w| GroupNorm { x, x2, w, groups: self.groups, eps: 1e-5, silu: true };
        let normed = ops.group_norm(&norm(x, x2, self.norm1.get()?))?;
        let time_bias = Some(Cols::range(scope.time, self.time_start, self.cout));
        let h = ops.conv(&Conv2d { time_bias, ..Conv2d::new(&normed, self.conv1.get()?) })?;
        drop(normed);
        let normed = ops.group_norm(&norm(&h, None, self.norm2.get()?))?;
        drop(h);
        let skipped = match &self.skip {
            Some(w) => {
                let op = Linear { x2: x2.map(Cols::all), ..Linear::new(x, w.get()?) };
                Some(ops.linear(&op)?)
            }
            None => None,
        };
        let residual = Some(skipped.as_ref().unwrap_or(x));
        ops.conv(&Conv2d { residual, ..Conv2d::new(&normed, self.conv2.get()?) })
    }
}

struct TransformerBlock {
    norm1: LazyNorm,
    qkv: LazyLinear,
    out1: LazyLinear,
    norm2: LazyNorm,
    q: LazyLinear,
    kv: LazyLinear,
    out2: LazyLinear,
    norm3: LazyNorm,
    ff1: LazyLinear,
    ff2: LazyLinear,
}

/// Transformer blocks over the positions of a feature map, with cross-attention to the text.
pub(in crate::models) struct SpatialTransformer {
    groups: usize,
    heads: usize,
    norm: LazyNorm,
    proj_in: LazyLinear,
    blocks: Vec<TransformerBlock>,
    proj_out: LazyLinear,
    /// Index of the first block's keys and values.
    context_start: usize,
}

impl SpatialTransformer {
    pub fn load(
        loader: &Loader,
        config: &UnetConfig,
        channels: usize,
        depth: usize,
        context_start: usize,
    ) -> Result<Self, ModelError> {
        let (c, context) = (channels, config.context_dim);
        let mut blocks = Vec::with_capacity(depth);
        for i in 0..depth {
            let b = loader.sub("transformer_blocks").sub(i);
            blocks.push(TransformerBlock {
                norm1: b.norm("norm1", c)?,
                qkv: b.fused(&["attn1.to_q", "attn1.to_k", "attn1.to_v"], c, c)?,
                out1: b.linear("attn1.to_out.0", c, c)?,
                norm2: b.norm("norm2", c)?,
                q: b.linear("attn2.to_q", c, c)?,
                kv: b.fused(&["attn2.to_k", "attn2.to_v"], c, context)?,
                out2: b.linear("attn2.to_out.0", c, c)?,
                norm3: b.norm("norm3", c)?,
                ff1: b.geglu("ff.net.0.proj", 4 * c, c)?,
                ff2: b.linear("ff.net.2", c, 4 * c)?,
            });
        }
        Ok(Self {
            groups: config.norm_groups,
            heads: config.heads_of(c),
            norm: loader.norm("norm", c)?,
            proj_in: loader.linear("proj_in", c, c)?,
            blocks,
            proj_out: loader.linear("proj_out", c, c)?,
            context_start,
        })
    }

    /// Appends keys and values of `context` for each block: keys of the first, values of the second, if there
    /// are two.
    pub fn context_kv(
        &self,
        ops: Ops<'_>,
        context: &[Tensor],
        out: &mut Vec<Tensor>,
    ) -> Result<(), ModelError> {
        for block in &self.blocks {
            let kv = |x| ops.linear(&Linear::new(x, block.kv.get()?));
            match context {
                [both] => out.push(kv(both)?),
                _ => {
                    let parts = context.iter().map(kv).collect::<Result<Vec<_>, _>>()?;
                    out.push(hooks::spliced(ops, &parts.iter().collect::<Vec<_>>())?);
                }
            }
        }
        Ok(())
    }

    pub fn forward(&self, scope: &mut Scope<'_, '_>, x: &Tensor, stage: &str) -> Result<Tensor, ModelError> {
        let ops = scope.ops;
        let w = self.norm.get()?;
        let mut normed =
            ops.group_norm(&GroupNorm { x, x2: None, w, groups: self.groups, eps: 1e-6, silu: false })?;
        normed.reshape(x.shape().as_tokens())?;
        let mut h = ops.linear(&Linear::new(&normed, self.proj_in.get()?))?;
        drop(normed);
        for (i, block) in self.blocks.iter().enumerate() {
            h = self.block(scope, block, h, self.context_start + i, Site { stage, index: i })?;
        }
        h.reshape(x.shape())?;
        let y = ops.linear(&Linear { residual: Some(x), ..Linear::new(&h, self.proj_out.get()?) })?;
        (scope.probe)(&format!("{stage}.1"), &y);
        Ok(y)
    }

    fn block(
        &self,
        scope: &mut Scope<'_, '_>,
        block: &TransformerBlock,
        x: Tensor,
        context: usize,
        site: Site<'_>,
    ) -> Result<Tensor, ModelError> {
        let (ops, heads, c) = (scope.ops, self.heads, x.shape().c);
        let normed = ops.layer_norm(&x, &block.norm1, 1e-5)?;
        (scope.probe)(&format!("{}.1.tb{}.norm1", site.stage, site.index), &normed);
        let mut qkv = ops.linear(&Linear::new(&normed, block.qkv.get()?))?;
        if let Some(hooks) = scope.hooks
            && let Some([keys, values]) = hooks::sources(hooks.list, ops, &normed)?
        {
            let project = |x| ops.linear(&Linear::new(x, block.qkv.get()?));
            qkv = hooks::spliced(ops, &[&qkv, &project(&keys)?, &project(&values)?])?;
        }
        let attention = SelfAttention { normed: &normed, qkv: &qkv, heads };
        let attended = match scope.hooks {
            Some(hooks) => hooks.attend(site, &attention)?,
            None => attention.plain(ops)?,
        };
        drop(qkv);
        let x = ops.linear(&Linear { residual: Some(&x), ..Linear::new(&attended, block.out1.get()?) })?;

        let normed = ops.layer_norm(&x, &block.norm2, 1e-5)?;
        let q = ops.linear(&Linear::new(&normed, block.q.get()?))?;
        let (expected, found) = (context + 1, scope.context.len());
        let kv = scope.context.get(context).ok_or(ModelError::Input {
            what: "cross-attentions in the prepared text conditioning",
            expected,
            found,
        })?;
        let attended = ops.attention(&Attention {
            q: Cols::all(&q),
            k: Cols::range(kv, 0, c),
            v: Cols::range(kv, c, c),
            heads,
            is_causal: false,
            scale: head_scale(c, heads),
        })?;
        let x = ops.linear(&Linear { residual: Some(&x), ..Linear::new(&attended, block.out2.get()?) })?;

        let normed = ops.layer_norm(&x, &block.norm3, 1e-5)?;
        let inner = ops.linear(&Linear::new(&normed, block.ff1.get()?))?;
        ops.linear(&Linear { residual: Some(&x), ..Linear::new(&inner, block.ff2.get()?) })
    }
}

/// Nearest-neighbour enlargement to `h`×`w`, then the convolution.
///
/// Twice the size is fused into the convolution. Another size occurs when a
/// level's side was odd: the doubled map is then one row or column larger than
/// the skip connection, and nearest-neighbour resizing differs from doubling
/// in which pixels repeat.
pub(super) fn upsample(
    ops: Ops<'_>,
    x: &Tensor,
    conv: &ConvWeight,
    h: usize,
    w: usize,
) -> Result<Tensor, ModelError> {
    let s = x.shape();
    if (h, w) == (s.h * 2, s.w * 2) {
        return ops.conv(&Conv2d { upsample2x: true, ..Conv2d::new(x, conv) });
    }
    let enlarged = ops.resize(x, Filter::Nearest, (h, w))?;
    ops.conv(&Conv2d::new(&enlarged, conv))
}
