//! What every backend checks before it runs an op: shapes that fit together.

use super::{
    Activation, Attention, AttentionDrawn, Cols, Conv2d, Embed, GroupNorm, LayerNorm, Linear, Shape,
    SwapTokens, TensorError,
};

/// Fails unless `found == expected`.
pub fn size(op: &'static str, what: &'static str, expected: usize, found: usize) -> Result<(), TensorError> {
    if expected == found { Ok(()) } else { Err(TensorError::Size { op, what, expected, found }) }
}

/// Fails unless `found == expected`.
pub fn shape(op: &'static str, expected: Shape, found: Shape) -> Result<(), TensorError> {
    if expected == found { Ok(()) } else { Err(TensorError::Shape { op, expected, found }) }
}

/// Fails unless a map of shape `from` can be resized to `to`.
pub fn resize(from: Shape, to: Shape) -> Result<(), TensorError> {
    const OP: &str = "resize";
    shape(OP, Shape { h: to.h, w: to.w, ..from }, to)?;
    if to.is_empty() {
        return Ok(());
    }
    size(OP, "pixels of the input (at least)", 1, from.positions().min(1))
}

/// Fails unless the parts have rows alike and `out` the rows and all columns.
pub fn concat(parts: &[Cols<'_>], out: Shape) -> Result<(), TensorError> {
    const OP: &str = "concat";
    for part in parts {
        part.check(OP)?;
        shape(OP, out, part.tensor.shape().with_channels(out.c))?;
    }
    size(OP, "columns of the parts", out.c, parts.iter().map(|part| part.width).sum())
}

impl SwapTokens<'_> {
    /// Fails unless the tokens can be cut so and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "swap_tokens";
        self.x.check(OP)?;
        shape(OP, self.out_shape(), out)?;
        let block = self.rows.saturating_mul(self.columns).saturating_mul(self.run);
        let tokens = self.x.tensor.shape().positions();
        if block == 0 || !tokens.is_multiple_of(block) {
            let what = "tokens as a multiple of the block";
            return Err(TensorError::Size { op: OP, what, expected: block, found: tokens });
        }
        Ok(())
    }
}

impl Cols<'_> {
    /// Fails if the columns leave their tensor.
    pub fn check(&self, op: &'static str) -> Result<(), TensorError> {
        let end = self.start.saturating_add(self.width);
        size(op, "end of the columns", end.min(self.tensor.shape().c), end)
    }
}

impl Conv2d<'_> {
    /// Fails unless the operands fit together and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "conv2d";
        let s = self.x.shape();
        size(OP, "stride (at least 1)", self.stride.max(1), self.stride)?;
        let Some(expected) = self.out_shape() else {
            let (expected, found) = (self.w.kh, s.h.min(s.w));
            return Err(TensorError::Size { op: OP, what: "height and width", expected, found });
        };
        shape(OP, expected, out)?;
        let mut channels = s.c;
        if let Some(x2) = self.x2 {
            shape(OP, s.with_channels(x2.shape().c), x2.shape())?;
            channels += x2.shape().c;
        }
        size(OP, "input channels", self.w.cin, channels)?;
        if let Some(cols) = &self.time_bias {
            size(OP, "time bias width", self.w.cout, cols.width)?;
            size(OP, "time bias rows", s.n, cols.tensor.shape().rows())?;
            cols.check(OP)?;
        }
        self.residual.map_or(Ok(()), |r| shape(OP, out, r.shape()))
    }
}

impl Linear<'_> {
    /// Fails unless the operands fit together and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "linear";
        let s = self.x.tensor.shape();
        shape(OP, s.with_channels(self.w.n), out)?;
        if self.w.is_geglu && self.act != Activation::None {
            let what = format!("{:?} behind a GEGLU weight", self.act);
            return Err(TensorError::Unsupported { op: OP, what });
        }
        self.x.check(OP)?;
        let mut k = self.x.width;
        if let Some(x2) = &self.x2 {
            size(OP, "rows of the second input", s.rows(), x2.tensor.shape().rows())?;
            x2.check(OP)?;
            k += x2.width;
        }
        size(OP, "input features", self.w.k, k)?;
        self.residual.map_or(Ok(()), |r| shape(OP, out, r.shape()))
    }
}

impl Attention<'_> {
    /// Fails unless the operands fit together and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "attention";
        let (sq, sk) = (self.q.tensor.shape(), self.k.tensor.shape());
        shape(OP, sq.with_channels(self.q.width), out)?;
        size(OP, "width of the keys", self.q.width, self.k.width)?;
        size(OP, "width of the values", self.q.width, self.v.width)?;
        shape(OP, sk.with_channels(self.v.tensor.shape().c), self.v.tensor.shape())?;
        if sk.n == 0 || !sq.n.is_multiple_of(sk.n) {
            let (expected, found) = (sq.n, sk.n);
            return Err(TensorError::Size { op: OP, what: "divisor of the batch", expected, found });
        }
        if sq.n > sk.n && self.is_causal {
            let what = "a causal mask over keys that several samples share".to_owned();
            return Err(TensorError::Unsupported { op: OP, what });
        }
        if self.heads == 0 || !self.q.width.is_multiple_of(self.heads) {
            let (expected, found) = (self.heads, self.q.width);
            return Err(TensorError::Size {
                op: OP,
                what: "width as a multiple of the heads",
                expected,
                found,
            });
        }
        if sk.positions() == 0 && !out.is_empty() {
            return Err(TensorError::Size { op: OP, what: "number of keys", expected: 1, found: 0 });
        }
        [&self.q, &self.k, &self.v].iter().try_for_each(|cols| cols.check(OP))
    }
}

impl AttentionDrawn<'_> {
    /// Fails unless the operands fit together and `out` is the shape of a result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "attention_drawn";
        let (sq, sk) = (self.q.tensor.shape(), self.k.tensor.shape());
        size(OP, "samples of the keys", sq.n, sk.n)?;
        size(OP, "width of the keys", self.q.width, self.k.width)?;
        let end = self.first.saturating_add(out.n);
        size(OP, "end of the samples", end.min(sq.n), end)?;
        let keys = sk.positions();
        shape(OP, Shape::nhwc(out.n, 1, keys, 1), out)?;
        for (what, found) in [("queries (at least)", sq.positions()), ("keys (at least)", keys)] {
            size(OP, what, 1, found.min(1))?;
        }
        if self.heads == 0 || self.q.width == 0 || !self.q.width.is_multiple_of(self.heads) {
            let (expected, found) = (self.heads, self.q.width);
            let what = "width as a multiple of the heads";
            return Err(TensorError::Size { op: OP, what, expected, found });
        }
        [&self.q, &self.k].iter().try_for_each(|cols| cols.check(OP))
    }
}

impl GroupNorm<'_> {
    /// Fails unless the operands fit together and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "group_norm";
        let s = self.x.shape();
        let mut channels = s.c;
        if let Some(x2) = self.x2 {
            shape(OP, s.with_channels(x2.shape().c), x2.shape())?;
            channels += x2.shape().c;
        }
        shape(OP, s.with_channels(channels), out)?;
        size(OP, "channels", self.w.c, channels)?;
        if self.groups == 0 || !channels.is_multiple_of(self.groups) {
            let (expected, found) = (self.groups, channels);
            let what = "channels as a multiple of the groups";
            return Err(TensorError::Size { op: OP, what, expected, found });
        }
        Ok(())
    }
}

impl LayerNorm<'_> {
    /// Fails unless the operands fit together and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "layer_norm";
        shape(OP, self.x.shape(), out)?;
        size(OP, "channels", self.w.c, self.x.shape().c)
    }
}

impl Embed<'_> {
    /// Fails unless the operands fit together, every token has a row, and `out` is the shape of the result.
    pub fn check(&self, out: Shape) -> Result<(), TensorError> {
        const OP: &str = "embed";
        let width = self.table.width;
        size(OP, "width of the position table", width, self.positions.width)?;
        shape(OP, out.with_channels(width), out)?;
        size(OP, "tokens", out.rows(), self.tokens.len())?;
        if out.w > self.positions.rows {
            let (expected, found) = (self.positions.rows, out.w);
            return Err(TensorError::Size {
                op: OP,
                what: "tokens of a sequence (at most)",
                expected,
                found,
            });
        }
        self.tokens.iter().try_for_each(|token| match token {
            super::EmbedRow::Id(id) if *id as usize >= self.table.rows => {
                let (expected, found) = (self.table.rows, *id as usize);
                Err(TensorError::Size { op: OP, what: "token id (below)", expected, found })
            }
            super::EmbedRow::Id(_) => Ok(()),
            super::EmbedRow::Vector(v) => size(OP, "width of a vector", width, v.len()),
        })
    }
}
