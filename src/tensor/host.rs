//! Dense f32 tensors in host memory: what crosses node borders.

/// A dense row-major f32 tensor in host memory.
///
/// Latents are `[B, C, h, w]` (NCHW, as in ComfyUI), images `[B, H, W, C]`,
/// masks `[B, H, W]`, text embeddings `[1, tokens, width]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostTensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl HostTensor {
    /// Wraps `data`; `None` unless its length is the product of `shape`.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Option<Self> {
        (shape.iter().product::<usize>() == data.len()).then(|| Self { shape: shape.to_vec(), data })
    }

    /// A tensor filled with `value`.
    pub fn full(shape: &[usize], value: f32) -> Self {
        Self { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    /// A tensor of zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::full(shape, 0.0)
    }

    /// A tensor whose element `i` (row-major) is `f(i)`.
    pub fn from_fn(shape: &[usize], f: impl FnMut(usize) -> f32) -> Self {
        Self { shape: shape.to_vec(), data: (0..shape.iter().product()).map(f).collect() }
    }

    /// Extent of every dimension, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Extent of dimension `i`; 1 if there is no such dimension.
    pub fn dim(&self, i: usize) -> usize {
        self.shape.get(i).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The elements, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The elements, row-major, mutable.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Gives the elements up.
    pub fn into_data(self) -> Vec<f32> {
        self.data
    }

    /// The same elements under another shape; `None` if the counts differ.
    pub fn reshape(mut self, shape: &[usize]) -> Option<Self> {
        if shape.iter().product::<usize>() != self.data.len() {
            return None;
        }
        self.shape = shape.to_vec();
        Some(self)
    }

    /// Elements of one outermost index: the length of a sample.
    pub fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// The elements of outermost index `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        let n = self.row_len();
        &self.data[i * n..(i + 1) * n]
    }

    /// Outermost indices `start..start + count` as a tensor of their own.
    pub fn rows(&self, start: usize, count: usize) -> Self {
        let n = self.row_len();
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = count;
        }
        Self { shape, data: self.data[start * n..(start + count) * n].to_vec() }
    }

    /// `f` of every element.
    pub fn map(&self, f: impl FnMut(f32) -> f32) -> Self {
        Self { shape: self.shape.clone(), data: self.data.iter().copied().map(f).collect() }
    }

    /// `f` of every pair of elements.
    ///
    /// # Panics
    /// If the element counts differ: a bug in the caller.
    pub fn zip(&self, other: &Self, mut f: impl FnMut(f32, f32) -> f32) -> Self {
        assert_eq!(self.len(), other.len(), "zip of {:?} and {:?}", self.shape, other.shape);
        let data = self.data.iter().zip(&other.data).map(|(&a, &b)| f(a, b)).collect();
        Self { shape: self.shape.clone(), data }
    }

    /// Σ coefficient · tensor: the one update form of all samplers, so that a
    /// device can run it as one fused kernel.
    ///
    /// # Panics
    /// If `terms` is empty or the element counts differ: a bug in the caller.
    pub fn lincomb(terms: &[(f32, &Self)]) -> Self {
        let (first, rest) = terms.split_first().expect("at least one term");
        let mut out = first.1.map(|v| first.0 * v);
        for (c, t) in rest {
            assert_eq!(t.len(), out.len(), "lincomb of {:?} and {:?}", out.shape, t.shape);
            for (o, v) in out.data.iter_mut().zip(&t.data) {
                *o += c * v;
            }
        }
        out
    }

    /// Whether every element is zero.
    pub fn is_zero(&self) -> bool {
        self.data.iter().all(|&v| v == 0.0)
    }
}
