//! SRVGG, the compact network of RealESRGAN (Wang et al. 2021): plain convolutions, PReLU, pixel shuffle.

use super::shuffle::shuffle;
use super::{Device, dims};
use crate::models::ModelError;
use crate::models::layers::{LazyConv, LazyLinear, Loader, Ops};
use crate::tensor::{Activation, Cols, Conv2d, HostTensor, Linear};

/// SRVGG on a backend.
pub(super) struct Srvgg {
    backend: Device,
    /// Convolutions with the slopes of the PReLU behind them.
    inner: Vec<(LazyConv, LazyLinear)>,
    last: LazyConv,
    channels: usize,
    scale: usize,
}

impl Srvgg {
    /// Checks the tensors under `loader`; packs nothing yet.
    pub fn load(backend: Device, loader: &Loader) -> Result<Self, ModelError> {
        let first = dims(loader, "body.0.weight")?;
        let (&[width, channels, ..], true) = (first.as_slice(), first.len() == 4) else {
            return Err(ModelError::Shape {
                name: "body.0.weight".into(),
                expected: vec![64, 3, 3, 3],
                found: first,
            });
        };
        let mut inner = Vec::new();
        let mut cin = channels;
        let mut at = 0;
        while loader.has(&format!("body.{}.weight", at + 1)) {
            let conv = loader.conv(&format!("body.{at}"), width, cin, 3)?;
            inner.push((conv, loader.prelu(&format!("body.{}", at + 1), width)?));
            (cin, at) = (width, at + 2);
        }
        let name = format!("body.{at}");
        let outputs = dims(loader, &format!("{name}.weight"))?.first().copied().unwrap_or(0);
        let factor = outputs / channels.max(1);
        let scale = (1..=8).find(|s| s * s == factor).ok_or(ModelError::Input {
            what: "outputs of the upscaler's last layer (channels times a square)",
            expected: channels * 16,
            found: outputs,
        })?;
        Ok(Self { last: loader.conv(&name, outputs, cin, 3)?, inner, channels, scale, backend })
    }

    /// How many times larger the result is.
    pub fn scale(&self) -> usize {
        self.scale
    }

    /// Enlarges `[B, C, H, W]`.
    pub fn forward(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        if picture.dim(1) != self.channels {
            let (expected, found) = (self.channels, picture.dim(1));
            return Err(ModelError::Input { what: "channels of the picture to enlarge", expected, found });
        }
        let ops = Ops(self.backend.as_ref());
        let mut x = ops.upload_nchw(picture)?;
        for (conv, slopes) in &self.inner {
            let y = ops.conv(&Conv2d::new(&x, conv.get()?))?;
            let positive = ops.activate(&y, Activation::Relu)?;
            x = ops.linear(&Linear { x2: Some(Cols::all(&positive)), ..Linear::new(&y, slopes.get()?) })?;
        }
        let change = ops.download_nchw(&ops.conv_result(&Conv2d::new(&x, self.last.get()?))?)?;
        let change = shuffle(&change, self.scale);
        let (h, w, s) = (picture.dim(2), picture.dim(3), self.scale);
        Ok(HostTensor::from_fn(change.shape(), |i| {
            let (plane, y, k) = (i / (h * s * w * s), i / (w * s) % (h * s), i % (w * s));
            change.data()[i] + picture.data()[(plane * h + y / s) * w + k / s]
        }))
    }
}
