//! Configuration of a latent-diffusion VAE from its tensors.
//!
//! Architecture: the KL-regularised autoencoder of Rombach et al. 2022 (arXiv
//! 2112.10752), a convolutional encoder and decoder with attention at the lowest resolution only.

use super::DetectError;
use super::layout::{Layout, Needed, affine};

const NETWORK: &str = "VAE";
/// More levels than any VAE has; each halves the picture.
const MAX_LEVELS: usize = 8;

/// Configuration of a VAE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaeConfig {
    /// What its tensors' names begin with.
    pub prefix: String,
    /// Channels of the first level.
    pub ch: usize,
    /// Channels of every level, in multiples of `ch`, finest first.
    pub ch_mult: Vec<usize>,
    /// Residual blocks a level in the encoder (one more in the decoder).
    pub num_res_blocks: usize,
    /// Channels of a latent.
    pub z_channels: usize,
    /// Channels of pictures going in.
    pub in_channels: usize,
    /// Channels of pictures coming out.
    pub out_channels: usize,
    /// Groups of all group norms.
    pub norm_groups: usize,
    /// Whether there is attention in the middle of encoder and decoder.
    pub has_attention: bool,
    /// Whether 1×1 convolutions stand between encoder, latents and decoder.
    pub has_quant_conv: bool,
}

impl VaeConfig {
    /// Channels of `level`; 0 if there is no such level.
    pub fn level_channels(&self, level: usize) -> usize {
        self.ch_mult.get(level).map_or(0, |mult| mult * self.ch)
    }

    /// Pixels a latent cell stands for, in each direction.
    pub fn downscale(&self) -> usize {
        1 << self.ch_mult.len().saturating_sub(1)
    }

    /// Names and shapes of all tensors it needs.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut plan = Plan { config: self, needed: Vec::new() };
        plan.encoder();
        plan.decoder();
        if self.has_quant_conv {
            let (p, z) = (&self.prefix, self.z_channels);
            affine(&mut plan.needed, &format!("{p}quant_conv"), &[2 * z, 2 * z, 1, 1]);
            affine(&mut plan.needed, &format!("{p}post_quant_conv"), &[z, z, 1, 1]);
        }
        plan.needed
    }

    fn deepest(&self) -> usize {
        self.level_channels(self.ch_mult.len().saturating_sub(1))
    }
}

/// Reads the VAE under `prefix` and checks it.
pub(super) fn derive(layout: &Layout, prefix: &str) -> Result<VaeConfig, DetectError> {
    let [ch, in_channels, ..] = layout.dims::<4>(NETWORK, &format!("{prefix}encoder.conv_in.weight"))?;
    let [_, z_channels, ..] = layout.dims::<4>(NETWORK, &format!("{prefix}decoder.conv_in.weight"))?;
    let [out_channels, ..] = layout.dims::<4>(NETWORK, &format!("{prefix}decoder.conv_out.weight"))?;
    let mut ch_mult = Vec::new();
    for level in 0..layout.count(&format!("{prefix}encoder.down.")) {
        let conv = format!("{prefix}encoder.down.{level}.block.0.conv1.weight");
        let [channels, ..] = layout.dims::<4>(NETWORK, &conv)?;
        if !channels.is_multiple_of(ch) {
            return Err(layout.odd(&conv, format!("a multiple of {ch} channels")));
        }
        ch_mult.push(channels / ch);
    }
    if ch_mult.len() > MAX_LEVELS {
        let conv = format!("{prefix}encoder.down.{MAX_LEVELS}.block.0.conv1.weight");
        return Err(layout.odd(&conv, format!("at most {MAX_LEVELS} levels")));
    }
    if ch_mult.is_empty() {
        return Err(layout.missing(NETWORK, &format!("{prefix}encoder.down.0.block.0.conv1.weight")));
    }
    let config = VaeConfig {
        prefix: prefix.to_owned(),
        ch,
        num_res_blocks: layout.count(&format!("{prefix}encoder.down.0.block.")),
        ch_mult,
        z_channels,
        in_channels,
        out_channels,
        norm_groups: layout.norm_groups()?,
        has_attention: layout.has_prefix(&format!("{prefix}decoder.mid.attn_1.")),
        has_quant_conv: layout.has_prefix(&format!("{prefix}post_quant_conv.")),
    };
    for level in 0..config.ch_mult.len() {
        let (groups, channels) = (config.norm_groups, config.level_channels(level));
        layout.divides("the number of norm groups", groups, channels, "group_norm.num_groups")?;
    }
    layout.check(NETWORK, &config.tensors())?;
    Ok(config)
}

/// Lists a VAE's tensors.
struct Plan<'c> {
    config: &'c VaeConfig,
    needed: Vec<Needed>,
}

impl Plan<'_> {
    fn encoder(&mut self) {
        let config = self.config;
        let p = format!("{}encoder", config.prefix);
        self.affine(&format!("{p}.conv_in"), &[config.ch, config.in_channels, 3, 3]);
        let mut channels = config.ch;
        for level in 0..config.ch_mult.len() {
            let out = config.level_channels(level);
            for block in 0..config.num_res_blocks {
                self.residual(&format!("{p}.down.{level}.block.{block}"), channels, out);
                channels = out;
            }
            if level + 1 < config.ch_mult.len() {
                self.affine(&format!("{p}.down.{level}.downsample.conv"), &[out, out, 3, 3]);
            }
        }
        self.middle(&p);
        self.affine(&format!("{p}.norm_out"), &[channels]);
        self.affine(&format!("{p}.conv_out"), &[2 * config.z_channels, channels, 3, 3]);
    }

    fn decoder(&mut self) {
        let config = self.config;
        let p = format!("{}decoder", config.prefix);
        let mut channels = config.deepest();
        self.affine(&format!("{p}.conv_in"), &[channels, config.z_channels, 3, 3]);
        self.middle(&p);
        for level in (0..config.ch_mult.len()).rev() {
            let out = config.level_channels(level);
            for block in 0..=config.num_res_blocks {
                self.residual(&format!("{p}.up.{level}.block.{block}"), channels, out);
                channels = out;
            }
            if level > 0 {
                self.affine(&format!("{p}.up.{level}.upsample.conv"), &[out, out, 3, 3]);
            }
        }
        self.affine(&format!("{p}.norm_out"), &[channels]);
        self.affine(&format!("{p}.conv_out"), &[config.out_channels, channels, 3, 3]);
    }

    fn middle(&mut self, p: &str) {
        let c = self.config.deepest();
        self.residual(&format!("{p}.mid.block_1"), c, c);
        if self.config.has_attention {
            self.affine(&format!("{p}.mid.attn_1.norm"), &[c]);
            for projection in ["q", "k", "v", "proj_out"] {
                self.affine(&format!("{p}.mid.attn_1.{projection}"), &[c, c, 1, 1]);
            }
        }
        self.residual(&format!("{p}.mid.block_2"), c, c);
    }

    fn residual(&mut self, name: &str, from: usize, to: usize) {
        self.affine(&format!("{name}.norm1"), &[from]);
        self.affine(&format!("{name}.conv1"), &[to, from, 3, 3]);
        self.affine(&format!("{name}.norm2"), &[to]);
        self.affine(&format!("{name}.conv2"), &[to, to, 3, 3]);
        if from != to {
            self.affine(&format!("{name}.nin_shortcut"), &[to, from, 1, 1]);
        }
    }

    fn affine(&mut self, name: &str, shape: &[usize]) {
        affine(&mut self.needed, name, shape);
    }
}
