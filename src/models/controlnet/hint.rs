//! From a picture to features of the UNet's first level: eight convolutions, three of which halve the size.

use std::sync::{Arc, Mutex, PoisonError};

use crate::models::ModelError;
use crate::models::layers::{LazyConv, Loader, Ops};
use crate::tensor::{Activation, Conv2d, HostTensor, Tensor};

/// Places of the convolutions in the sequence (SiLU stands between them), and their strides.
const LAYERS: [(usize, usize); 8] = [(0, 1), (2, 1), (4, 2), (6, 1), (8, 2), (10, 1), (12, 2), (14, 1)];

/// The convolutions.
pub(super) struct HintEncoder {
    layers: Vec<(LazyConv, usize)>,
    channels: usize,
}

impl HintEncoder {
    /// The convolutions under `loader`, which end at `width` channels.
    pub fn load(loader: &Loader, width: usize) -> Result<Self, ModelError> {
        let mut layers = Vec::with_capacity(LAYERS.len());
        let (mut cin, mut channels) = (0, 0);
        for (i, (at, stride)) in LAYERS.into_iter().enumerate() {
            let name = format!("{at}.weight");
            let shape = loader.shape(&name).ok_or(ModelError::Missing { name })?;
            let extent = |i: usize| shape.get(i).copied().unwrap_or(0);
            if i == 0 {
                (channels, cin) = (extent(1), extent(1));
            }
            let cout = if i + 1 == LAYERS.len() { width } else { extent(0) };
            layers.push((loader.conv(&at.to_string(), cout, cin, 3)?, stride));
            cin = cout;
        }
        Ok(Self { layers, channels })
    }

    /// Channels of the picture.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Features of `[B, C, H, W]`.
    pub fn forward(&self, ops: Ops<'_>, picture: &HostTensor) -> Result<Tensor, ModelError> {
        let mut x = ops.upload_nchw(picture)?;
        for (i, (conv, stride)) in self.layers.iter().enumerate() {
            let act = if i + 1 < self.layers.len() { Activation::Silu } else { Activation::None };
            x = ops.conv(&Conv2d { stride: *stride, act, ..Conv2d::new(&x, conv.get()?) })?;
        }
        Ok(x)
    }
}

/// How many pictures' features are kept.
const KEPT: usize = 4;

struct Entry<T> {
    /// Held, so that its address can't be another picture's.
    picture: Arc<HostTensor>,
    shape: Vec<usize>,
    kinds: Vec<usize>,
    features: Arc<T>,
}

/// What was made of the last pictures; it is the same for all steps.
pub(super) struct Kept<T>(Mutex<Vec<Entry<T>>>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Kept<T> {
    /// The features of a picture at the shape that a call needs, made by `make` if they are not there.
    pub fn get(
        &self,
        (picture, shape): (&Arc<HostTensor>, &[usize]),
        kinds: &[usize],
        make: impl FnOnce() -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |k: &Entry<T>| Arc::ptr_eq(&k.picture, picture) && k.shape == shape && k.kinds == kinds;
        if let Some(at) = kept.iter().position(is_it) {
            let entry = kept.remove(at);
            let features = entry.features.clone();
            kept.push(entry);
            return Ok(features);
        }
        let features = Arc::new(make()?);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        let (shape, kinds) = (shape.to_vec(), kinds.to_vec());
        kept.push(Entry { picture: picture.clone(), shape, kinds, features: features.clone() });
        Ok(features)
    }
}
