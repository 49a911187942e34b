//! Token merging on the device, see [`crate::tensor::merge`].

use super::backend::{CudaBackend, Operand};
use super::launch::merge::{self, Match, Mean, Picture, Spread, Targets};
use crate::driver::DevicePtr;
use crate::tensor::{Cols, DType, MatchTokens, RowNumbers, Shape, Storage, Tensor, TensorError, TokenRows};

/// The address of i32 numbers.
fn numbers(op: &'static str, x: &Tensor) -> Result<DevicePtr, TensorError> {
    match (x.storage(), x.dtype()) {
        (Storage::Device(buffer), DType::I32) => Ok(DevicePtr(buffer.address())),
        _ => Err(TensorError::Unsupported { op, what: "rows of tokens that are elsewhere".into() }),
    }
}

/// The picture of some rows, their numbers, and the targets' tokens.
fn parts(op: &'static str, rows: &TokenRows) -> Result<(Picture, DevicePtr, DevicePtr), TensorError> {
    let RowNumbers::Device { rows: row, places } = &rows.numbers else {
        return Err(TensorError::Unsupported { op, what: "rows of tokens in host memory".into() });
    };
    let (height, width) = rows.size;
    let merged = rows.tokens() - rows.rows;
    Ok((Picture { samples: rows.samples, height, width, merged }, numbers(op, row)?, numbers(op, places)?))
}

impl CudaBackend {
    pub(super) fn rows_of_tokens(&self, op: &MatchTokens<'_>) -> Result<TokenRows, TensorError> {
        const OP: &str = "match_tokens";
        op.check()?;
        let (s, (height, width)) = (op.x.shape(), op.size);
        let picture = Picture { samples: s.n, height, width, merged: op.merged() };
        let tokens = picture.tokens();
        let integers =
            |samples: usize, each: usize| self.alloc_as(Shape::tokens(samples, each, 1), DType::I32);
        let (rows, places, role) =
            (integers(s.n, tokens)?, integers(1, op.targets.len())?, integers(1, tokens)?);
        let x = self.own(OP, op.x)?;
        let launch = Match {
            targets: Targets {
                picture,
                draws: op.targets,
                role: numbers(OP, &role)?,
                place: numbers(OP, &places)?,
            },
            x: x.rows(),
            channels: s.c,
            element: x.element,
            row: numbers(OP, &rows)?,
        };
        if !s.is_empty() {
            let scratch = self.shared().lend(launch.scratch())?;
            merge::match_tokens(self.shared().gpu(), &launch, DevicePtr(scratch.address()))?;
        }
        let numbers = RowNumbers::Device { rows, places };
        Ok(TokenRows { samples: s.n, size: op.size, rows: picture.rows(), numbers })
    }

    pub(super) fn rows_from_tokens(
        &self,
        x: &Cols<'_>,
        rows: &TokenRows,
        out: &Tensor,
    ) -> Result<(), TensorError> {
        const OP: &str = "merge_tokens";
        rows.check_merge(x, out.shape())?;
        let (picture, row, place) = parts(OP, rows)?;
        let Operand { ptr, element, .. } = self.own(OP, out)?;
        let launch = Mean {
            picture,
            x: self.own_columns(OP, x)?.rows(),
            channels: x.width,
            row,
            place,
            out: ptr,
            element,
        };
        if !out.shape().is_empty() {
            merge::mean(self.shared().gpu(), &launch)?;
        }
        Ok(())
    }

    pub(super) fn tokens_from_rows(
        &self,
        x: &Tensor,
        rows: &TokenRows,
        out: &Tensor,
    ) -> Result<(), TensorError> {
        const OP: &str = "spread_tokens";
        rows.check_spread(x, out.shape())?;
        let (picture, row, _) = parts(OP, rows)?;
        let Operand { ptr, element, .. } = self.own(OP, x)?;
        let launch =
            Spread { picture, x: ptr, channels: x.shape().c, row, out: self.own(OP, out)?.ptr, element };
        if !out.shape().is_empty() {
            merge::spread(self.shared().gpu(), &launch)?;
        }
        Ok(())
    }
}
