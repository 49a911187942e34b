//! The VAE's building blocks.

use crate::models::ModelError;
use crate::models::layers::{LazyConv, LazyLinear, LazyNorm, Loader, Ops, fused_self_attention};
use crate::tensor::{Conv2d, GroupNorm, Linear, NormWeight, Tensor};

/// GroupNorm-SiLU-conv twice with a skip connection.
pub(super) struct ResBlock {
    groups: usize,
    norm1: LazyNorm,
    conv1: LazyConv,
    norm2: LazyNorm,
    conv2: LazyConv,
    shortcut: Option<LazyLinear>,
}

impl ResBlock {
    pub fn load(loader: &Loader, groups: usize, cin: usize, cout: usize) -> Result<Self, ModelError> {
        let shortcut = (cin != cout).then(|| loader.linear("nin_shortcut", cout, cin)).transpose()?;
        Ok(Self {
            groups,
            norm1: loader.norm("norm1", cin)?,
            conv1: loader.conv("conv1", cout, cin, 3)?,
            norm2: loader.norm("norm2", cout)?,
            conv2: loader.conv("conv2", cout, cout, 3)?,
            shortcut,
        })
    }

    fn norm<'a>(&self, x: &'a Tensor, w: &'a NormWeight) -> GroupNorm<'a> {
        GroupNorm { x, x2: None, w, groups: self.groups, eps: 1e-6, silu: true }
    }

    /// Takes `x` by value so that its memory is free before the second convolution.
    pub fn forward(&self, ops: Ops<'_>, x: Tensor) -> Result<Tensor, ModelError> {
        let normed = ops.group_norm(&self.norm(&x, self.norm1.get()?))?;
        let h = ops.conv(&Conv2d::new(&normed, self.conv1.get()?))?;
        drop(normed);
        let skip = match &self.shortcut {
            Some(w) => {
                let skip = ops.linear(&Linear::new(&x, w.get()?))?;
                drop(x);
                skip
            }
            None => x,
        };
        let normed = ops.group_norm(&self.norm(&h, self.norm2.get()?))?;
        drop(h);
        ops.conv(&Conv2d { residual: Some(&skip), ..Conv2d::new(&normed, self.conv2.get()?) })
    }
}

/// Single-head self-attention over all positions.
pub(super) struct AttnBlock {
    groups: usize,
    norm: LazyNorm,
    qkv: LazyLinear,
    proj_out: LazyLinear,
}

impl AttnBlock {
    pub fn load(loader: &Loader, groups: usize, c: usize) -> Result<Self, ModelError> {
        Ok(Self {
            groups,
            norm: loader.norm("norm", c)?,
            qkv: loader.fused(&["q", "k", "v"], c, c)?,
            proj_out: loader.linear("proj_out", c, c)?,
        })
    }

    pub fn forward(&self, ops: Ops<'_>, x: Tensor) -> Result<Tensor, ModelError> {
        let w = self.norm.get()?;
        let mut normed =
            ops.group_norm(&GroupNorm { x: &x, x2: None, w, groups: self.groups, eps: 1e-6, silu: false })?;
        normed.reshape(x.shape().as_tokens())?;
        let qkv = ops.linear(&Linear::new(&normed, self.qkv.get()?))?;
        drop(normed);
        let mut attended = ops.attention(&fused_self_attention(&qkv, 1, false))?;
        drop(qkv);
        attended.reshape(x.shape())?;
        ops.linear(&Linear { residual: Some(&x), ..Linear::new(&attended, self.proj_out.get()?) })
    }
}
