//! TAESD (Bohan 2023): a tiny autoencoder of convolutions and ReLUs, for previews and quick decoding.
//!
//! Encoder and decoder are files of their own whose tensors are numbered by their
//! place in the sequence of layers. Pictures are 0..1 here, latents in the
//! *diffusion model's* scale: the nodes' scales are applied in [`Taesd`].

use std::sync::Arc;

use super::ModelError;
use super::layers::{LazyConv, Loader, Ops};
use super::store::{Network, Opening};
use super::vae::Autoencoder;
use crate::tensor::{Activation, Backend, Conv2d, HostTensor, Tensor};

/// Channels inside the network.
const WIDTH: usize = 64;
/// Pixels to a latent cell, in each direction.
const DOWNSCALE: usize = 8;

/// Three convolutions and a skip connection.
struct Block([LazyConv; 3]);

impl Block {
    fn load(loader: &Loader) -> Result<Self, ModelError> {
        let conv = |i: usize| loader.conv(&format!("conv.{i}"), WIDTH, WIDTH, 3);
        Ok(Self([conv(0)?, conv(2)?, conv(4)?]))
    }

    fn forward(&self, ops: Ops<'_>, x: &Tensor) -> Result<Tensor, ModelError> {
        let [first, second, third] = &self.0;
        let relu = Activation::Relu;
        let h = ops.conv(&Conv2d { act: relu, ..Conv2d::new(x, first.get()?) })?;
        let h = ops.conv(&Conv2d { act: relu, ..Conv2d::new(&h, second.get()?) })?;
        let h = ops.conv(&Conv2d { residual: Some(x), ..Conv2d::new(&h, third.get()?) })?;
        ops.activate(&h, relu)
    }
}

enum Layer {
    Conv(LazyConv),
    ConvRelu(LazyConv),
    /// Halves the size.
    Down(LazyConv),
    /// Doubles the size, nearest neighbour.
    Up(LazyConv),
    Block(Block),
}

/// An encoder or a decoder.
pub struct Tiny {
    backend: Arc<dyn Backend>,
    layers: Vec<Layer>,
    in_channels: usize,
}

impl Network for Tiny {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let backend = opening.placement.vae.clone();
        let loader = Loader::new(opening.source.clone(), backend.clone(), "");
        match () {
            () if loader.has("19.weight") => Self::decoder(backend, &loader),
            () if loader.has("14.weight") => Self::encoder(backend, &loader),
            () => Err(opening.is_not("a TAESD autoencoder")),
        }
    }
}

impl Tiny {
    /// The decoder under `loader`.
    pub fn decoder(backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let in_channels = loader.shape("1.weight").and_then(|s| s.get(1).copied()).unwrap_or(4);
        let mut layers = vec![Layer::ConvRelu(loader.conv("1", WIDTH, in_channels, 3)?)];
        for at in [3, 8, 13] {
            for i in at..at + 3 {
                layers.push(Layer::Block(Block::load(&loader.sub(i))?));
            }
            layers.push(Layer::Up(loader.bare_conv(&(at + 4).to_string(), WIDTH, WIDTH, 3)?));
        }
        layers.push(Layer::Block(Block::load(&loader.sub(18))?));
        layers.push(Layer::Conv(loader.conv("19", 3, WIDTH, 3)?));
        Ok(Self { backend, layers, in_channels })
    }

    /// The encoder under `loader`.
    pub fn encoder(backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let mut layers = vec![Layer::Conv(loader.conv("0", WIDTH, 3, 3)?)];
        layers.push(Layer::Block(Block::load(&loader.sub(1))?));
        for at in [2, 6, 10] {
            layers.push(Layer::Down(loader.bare_conv(&at.to_string(), WIDTH, WIDTH, 3)?));
            for i in at + 1..at + 4 {
                layers.push(Layer::Block(Block::load(&loader.sub(i))?));
            }
        }
        let channels = loader.shape("14.weight").and_then(|s| s.first().copied()).unwrap_or(4);
        layers.push(Layer::Conv(loader.conv("14", channels, WIDTH, 3)?));
        Ok(Self { backend, layers, in_channels: 3 })
    }

    /// Runs the network on `[B, C, h, w]`.
    pub fn forward(&self, x: &HostTensor) -> Result<HostTensor, ModelError> {
        if x.dim(1) != self.in_channels {
            let (expected, found) = (self.in_channels, x.dim(1));
            return Err(ModelError::Input { what: "channels for TAESD", expected, found });
        }
        let ops = Ops(self.backend.as_ref());
        let mut x = ops.upload_nchw(x)?;
        let Some((last, inner)) = self.layers.split_last() else { return ops.download_nchw(&x) };
        for layer in inner {
            x = match layer {
                Layer::Conv(conv) => ops.conv(&Conv2d::new(&x, conv.get()?))?,
                Layer::ConvRelu(conv) => {
                    ops.conv(&Conv2d { act: Activation::Relu, ..Conv2d::new(&x, conv.get()?) })?
                }
                Layer::Down(conv) => ops.conv(&Conv2d { stride: 2, ..Conv2d::new(&x, conv.get()?) })?,
                Layer::Up(conv) => ops.conv(&Conv2d { upsample2x: true, ..Conv2d::new(&x, conv.get()?) })?,
                Layer::Block(block) => block.forward(ops, &x)?,
            };
        }
        let Layer::Conv(conv) = last else { return ops.download_nchw(&x) };
        ops.download_nchw(&ops.conv_result(&Conv2d::new(&x, conv.get()?))?)
    }
}

/// Limits latents softly to −3..3, as the decoder expects them.
fn squeezed(latent: &HostTensor) -> HostTensor {
    latent.map(|v| (v / 3.0).tanh() * 3.0)
}

/// A picture in 0..1 (not clamped) of a latent in the diffusion model's scale.
pub fn decode(decoder: &Tiny, latent: &HostTensor) -> Result<HostTensor, ModelError> {
    decoder.forward(&squeezed(latent))
}

/// An encoder and a decoder as an autoencoder like any other.
pub struct Taesd {
    /// The encoder.
    pub encoder: Arc<Tiny>,
    /// The decoder.
    pub decoder: Arc<Tiny>,
    /// Factor from latents on links to the diffusion model's scale.
    pub latent_scale: f32,
}

impl Autoencoder for Taesd {
    fn downscale(&self) -> usize {
        DOWNSCALE
    }

    fn latent_channels(&self) -> usize {
        self.decoder.in_channels
    }

    fn decode_raw(&self, latent: &HostTensor) -> Result<HostTensor, ModelError> {
        let picture = decode(&self.decoder, &latent.map(|v| v * self.latent_scale))?;
        ModelError::check_numbers("TAESD decoder", latent.data(), picture.data())?;
        Ok(picture.map(|v| (v - 0.5) * 2.0))
    }

    fn encode_raw(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        let latent = self.encoder.forward(&picture.map(|v| v * 0.5 + 0.5))?;
        ModelError::check_numbers("TAESD encoder", picture.data(), latent.data())?;
        Ok(latent.map(|v| v / self.latent_scale))
    }

    fn decode_bytes(&self, h: usize, w: usize, element_bytes: usize) -> usize {
        let cells = h.saturating_mul(w).saturating_mul(DOWNSCALE * DOWNSCALE);
        cells.saturating_mul(WIDTH * 3).saturating_mul(element_bytes)
    }
}
