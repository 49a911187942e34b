//! A tensor that a patch brings along, read when it is needed.

use std::fmt;
use std::sync::Arc;

use super::low_rank::Matrix;
use crate::models::layers::WeightSource;

/// A tensor of a weight source: a LoRA file's, or another model's (patched or not).
#[derive(Clone)]
pub struct Values {
    source: Arc<dyn WeightSource>,
    name: String,
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)
    }
}

impl Values {
    /// Tensor `name` of `source`; `None` if there is none.
    pub fn of(source: &Arc<dyn WeightSource>, name: &str) -> Option<Self> {
        source.shape(name)?;
        Some(Self { source: source.clone(), name: name.to_owned() })
    }

    /// Its extents.
    pub fn shape(&self) -> Vec<usize> {
        self.source.shape(&self.name).unwrap_or_default().to_vec()
    }

    /// One of its extents; 1 if it has fewer dimensions.
    pub(super) fn extent(&self, i: usize) -> usize {
        self.shape().get(i).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub(super) fn count(&self) -> usize {
        self.shape().iter().product()
    }

    /// Kernel places, if it is a convolution; 1 if not.
    pub(super) fn taps(&self) -> usize {
        self.shape().iter().skip(2).product()
    }

    /// Its elements; none if the source has lost it.
    pub fn read(&self) -> Vec<f32> {
        let values = self.source.raw(&self.name).map(|raw| raw.to_f32()).unwrap_or_default();
        self.source.packed(&self.name);
        values
    }

    /// As a matrix: the first extent, and all others.
    pub(super) fn matrix(&self) -> Matrix {
        let shape = self.shape();
        let rows = shape.first().copied().unwrap_or(1);
        Matrix { rows, columns: shape.iter().skip(1).product(), data: self.read() }
    }
}
