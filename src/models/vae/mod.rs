//! The KL autoencoder of latent diffusion (Kingma & Welling 2014; Rombach et al. 2022).
//!
//! Latents here are *unscaled*: the factor 0.18215 belongs to sampling.

mod blocks;
pub mod tiled;

use std::sync::Arc;

use super::ModelError;
use super::detect::VaeConfig;
use super::layers::{LazyConv, LazyLinear, LazyNorm, Loader, Ops};
use crate::tensor::{Backend, Conv2d, GroupNorm, HostTensor, Linear, Pad, Tensor};
use blocks::{AttnBlock, ResBlock};

struct Mid {
    block1: ResBlock,
    attn: AttnBlock,
    block2: ResBlock,
}

impl Mid {
    fn load(loader: &Loader, groups: usize, c: usize) -> Result<Self, ModelError> {
        Ok(Self {
            block1: ResBlock::load(&loader.sub("block_1"), groups, c, c)?,
            attn: AttnBlock::load(&loader.sub("attn_1"), groups, c)?,
            block2: ResBlock::load(&loader.sub("block_2"), groups, c, c)?,
        })
    }

    fn forward(&self, ops: Ops<'_>, x: Tensor) -> Result<Tensor, ModelError> {
        let x = self.block1.forward(ops, x)?;
        let x = self.attn.forward(ops, x)?;
        self.block2.forward(ops, x)
    }
}

/// One level: ResBlocks, then a convolution that halves or doubles the size.
struct Level {
    blocks: Vec<ResBlock>,
    resample: Option<LazyConv>,
}

struct Coder {
    conv_in: LazyConv,
    /// In the order in which they run.
    levels: Vec<Level>,
    mid: Mid,
    norm_out: LazyNorm,
    conv_out: LazyConv,
    /// 1×1 convolution between latent and network.
    quant: LazyLinear,
}

/// From here on a network's activations are worth giving back to the system.
const LARGE_BYTES: usize = 64 << 20;

/// Keeps the arena from holding the UNet's and the VAE's blocks at the same
/// time: their sizes differ, so neither can use what the other left. For large
/// pictures the arena is emptied before and after.
struct Room<'a>(Option<&'a dyn Backend>);

impl<'a> Room<'a> {
    fn make(backend: &'a dyn Backend, bytes: usize) -> Self {
        let memory = backend.memory();
        // A device with much room need not be asked for memory again and again, which stops it every time.
        let is_roomy = memory.device_total.is_some() && memory.available / 16 > bytes;
        if bytes < LARGE_BYTES || is_roomy {
            return Self(None);
        }
        backend.trim();
        Self(Some(backend))
    }
}

impl Room<'_> {
    /// Empties the arena: what comes next has other sizes.
    fn clear(&self) {
        if let Some(backend) = self.0 {
            backend.trim();
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// An image encoder and decoder.
///
/// Pictures are `[B, 3, H, W]` in about −1..1, latents as they travel on links.
pub trait Autoencoder: Send + Sync {
    /// Pixels to a latent cell, in each direction.
    fn downscale(&self) -> usize;

    /// Channels of a latent.
    fn latent_channels(&self) -> usize;

    /// Decodes `[B, z, h, w]` to the network's raw output `[B, 3, H, W]`.
    fn decode_raw(&self, latent: &HostTensor) -> Result<HostTensor, ModelError>;

    /// Encodes `[B, 3, H, W]`, with sides that are multiples of the downscale.
    fn encode_raw(&self, picture: &HostTensor) -> Result<HostTensor, ModelError>;

    /// Bytes of activations that decoding one `h`×`w` latent takes at its peak, about.
    fn decode_bytes(&self, h: usize, w: usize, element_bytes: usize) -> usize;
}

impl Autoencoder for Vae {
    fn downscale(&self) -> usize {
        self.config.downscale()
    }

    fn latent_channels(&self) -> usize {
        self.config.z_channels
    }

    fn decode_raw(&self, latent: &HostTensor) -> Result<HostTensor, ModelError> {
        Vae::decode_raw(self, latent)
    }

    fn encode_raw(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        Vae::encode_raw(self, picture)
    }

    fn decode_bytes(&self, h: usize, w: usize, element_bytes: usize) -> usize {
        Vae::decode_bytes(self, h, w, element_bytes)
    }
}

/// A VAE on a backend. Encoder and decoder are loaded when first used.
pub struct Vae {
    config: VaeConfig,
    backend: Arc<dyn Backend>,
    encoder: Option<Coder>,
    decoder: Option<Coder>,
}

impl Vae {
    /// Checks the tensors under `loader` (`first_stage_model.`); packs nothing yet.
    /// A file may hold only one of encoder and decoder.
    pub fn load(config: VaeConfig, backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let encoder =
            loader.has("encoder.conv_in.weight").then(|| load_encoder(&config, loader)).transpose()?;
        let decoder =
            loader.has("decoder.conv_in.weight").then(|| load_decoder(&config, loader)).transpose()?;
        if encoder.is_none() && decoder.is_none() {
            return Err(ModelError::Missing { name: "decoder.conv_in.weight".into() });
        }
        Ok(Self { config, backend, encoder, decoder })
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Decodes `[B, z, h, w]` to the network's raw output `[B, 3, H, W]` (about -1..1).
    pub fn decode_raw(&self, latent: &HostTensor) -> Result<HostTensor, ModelError> {
        let room = Room::make(self.backend.as_ref(), self.bytes_at(latent.dim(2), latent.dim(3)));
        let decoder =
            self.decoder.as_ref().ok_or(ModelError::Missing { name: "decoder.conv_in.weight".into() })?;
        self.expect_channels(latent, self.config.z_channels, "latent channels")?;
        let ops = Ops(self.backend.as_ref());
        let x = ops.upload_nchw(latent)?;
        let z = ops.linear(&Linear::new(&x, decoder.quant.get()?))?;
        drop(x);
        let x = ops.conv(&Conv2d::new(&z, decoder.conv_in.get()?))?;
        let mut x = decoder.mid.forward(ops, x)?;
        for level in &decoder.levels {
            for block in &level.blocks {
                x = block.forward(ops, x)?;
            }
            if let Some(conv) = &level.resample {
                x = ops.conv(&Conv2d { upsample2x: true, ..Conv2d::new(&x, conv.get()?) })?;
                room.clear();
            }
        }
        let normed = self.norm_out(ops, decoder, x)?;
        let picture = ops.download_nchw(&ops.conv_result(&Conv2d::new(&normed, decoder.conv_out.get()?))?)?;
        ModelError::check_numbers("VAE decoder", latent.data(), picture.data())?;
        Ok(picture)
    }

    /// Encodes the network's raw input `[B, 3, H, W]` (-1..1; sides multiples of the downscale)
    /// to the mean of the latent's distribution `[B, z, h, w]`.
    pub fn encode_raw(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        let scale = self.config.downscale();
        let room =
            Room::make(self.backend.as_ref(), self.bytes_at(picture.dim(2) / scale, picture.dim(3) / scale));
        let encoder =
            self.encoder.as_ref().ok_or(ModelError::Missing { name: "encoder.conv_in.weight".into() })?;
        self.expect_channels(picture, 3, "picture channels")?;
        let ops = Ops(self.backend.as_ref());
        let x = ops.upload_nchw(picture)?;
        let mut x = ops.conv(&Conv2d::new(&x, encoder.conv_in.get()?))?;
        let pad = Pad { top: 0, left: 0, bottom: 1, right: 1 };
        for level in &encoder.levels {
            for block in &level.blocks {
                x = block.forward(ops, x)?;
            }
            if let Some(conv) = &level.resample {
                x = ops.conv(&Conv2d { stride: 2, pad, ..Conv2d::new(&x, conv.get()?) })?;
                room.clear();
            }
        }
        let x = encoder.mid.forward(ops, x)?;
        let normed = self.norm_out(ops, encoder, x)?;
        let moments = ops.conv(&Conv2d::new(&normed, encoder.conv_out.get()?))?;
        drop(normed);
        let moments = ops.download_nchw(&ops.linear(&Linear::new(&moments, encoder.quant.get()?))?)?;
        ModelError::check_numbers("VAE encoder", picture.data(), moments.data())?;
        let (batch, z, plane) = (moments.dim(0), self.config.z_channels, moments.dim(2) * moments.dim(3));
        let mut mean = Vec::with_capacity(batch * z * plane);
        for sample in moments.data().chunks_exact(2 * z * plane) {
            mean.extend_from_slice(&sample[..z * plane]);
        }
        HostTensor::new(&[batch, z, moments.dim(2), moments.dim(3)], mean).ok_or(ModelError::Input {
            what: "channels of the encoder's output",
            expected: 2 * z,
            found: moments.dim(1),
        })
    }

    /// Bytes of activations that decoding one `h`×`w` latent takes at its peak, about.
    ///
    /// The widest point is the last level but one after doubling: three maps of
    /// its width at full size (input, normalised input, output).
    pub fn decode_bytes(&self, h: usize, w: usize, element_bytes: usize) -> usize {
        let scale = self.config.downscale();
        let wide = self.config.ch * self.config.ch_mult.get(1).or(self.config.ch_mult.first()).unwrap_or(&1);
        h.saturating_mul(w)
            .saturating_mul(scale * scale)
            .saturating_mul(wide * 3)
            .saturating_mul(element_bytes)
    }

    fn bytes_at(&self, h: usize, w: usize) -> usize {
        self.decode_bytes(h, w, self.backend.info().element_bytes)
    }

    fn norm_out(&self, ops: Ops<'_>, coder: &Coder, x: Tensor) -> Result<Tensor, ModelError> {
        let w = coder.norm_out.get()?;
        ops.group_norm(&GroupNorm {
            x: &x,
            x2: None,
            w,
            groups: self.config.norm_groups,
            eps: 1e-6,
            silu: true,
        })
    }

    fn expect_channels(&self, x: &HostTensor, expected: usize, what: &'static str) -> Result<(), ModelError> {
        let found = x.dim(1);
        if found == expected { Ok(()) } else { Err(ModelError::Input { what, expected, found }) }
    }
}

fn load_encoder(config: &VaeConfig, loader: &Loader) -> Result<Coder, ModelError> {
    let e = loader.sub("encoder");
    let (ch, groups, z) = (config.ch, config.norm_groups, config.z_channels);
    let mut levels = Vec::new();
    let mut channels = ch;
    for (i, mult) in config.ch_mult.iter().enumerate() {
        let down = e.sub("down").sub(i);
        let mut blocks = Vec::new();
        for b in 0..config.num_res_blocks {
            blocks.push(ResBlock::load(&down.sub("block").sub(b), groups, channels, ch * mult)?);
            channels = ch * mult;
        }
        let is_last = i + 1 == config.ch_mult.len();
        let resample = (!is_last).then(|| down.conv("downsample.conv", channels, channels, 3)).transpose()?;
        levels.push(Level { blocks, resample });
    }
    Ok(Coder {
        conv_in: e.conv("conv_in", ch, 3, 3)?,
        levels,
        mid: Mid::load(&e.sub("mid"), groups, channels)?,
        norm_out: e.norm("norm_out", channels)?,
        conv_out: e.conv("conv_out", 2 * z, channels, 3)?,
        quant: loader.linear("quant_conv", 2 * z, 2 * z)?,
    })
}

fn load_decoder(config: &VaeConfig, loader: &Loader) -> Result<Coder, ModelError> {
    let d = loader.sub("decoder");
    let (ch, groups, z) = (config.ch, config.norm_groups, config.z_channels);
    let top = ch * config.ch_mult.last().copied().unwrap_or(1);
    let mut channels = top;
    let mut levels = Vec::new();
    for (i, mult) in config.ch_mult.iter().enumerate().rev() {
        let up = d.sub("up").sub(i);
        let mut blocks = Vec::new();
        for b in 0..=config.num_res_blocks {
            blocks.push(ResBlock::load(&up.sub("block").sub(b), groups, channels, ch * mult)?);
            channels = ch * mult;
        }
        let resample = (i > 0).then(|| up.conv("upsample.conv", channels, channels, 3)).transpose()?;
        levels.push(Level { blocks, resample });
    }
    Ok(Coder {
        conv_in: d.conv("conv_in", top, z, 3)?,
        levels,
        mid: Mid::load(&d.sub("mid"), groups, top)?,
        norm_out: d.norm("norm_out", channels)?,
        conv_out: d.conv("conv_out", 3, channels, 3)?,
        quant: loader.linear("post_quant_conv", z, z)?,
    })
}
