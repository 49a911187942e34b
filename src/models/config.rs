//! What tells one model of a family from another: widths, depths, heads.

/// How many attention heads a transformer of some width has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadRule {
    /// Always this many heads (SD1.x: 8).
    Count(usize),
    /// Heads of this many channels (SD2, SDXL: 64).
    Dim(usize),
}

impl HeadRule {
    /// Number of heads at `channels` channels.
    pub fn heads(self, channels: usize) -> usize {
        match self {
            HeadRule::Count(n) => n,
            HeadRule::Dim(d) => (channels / d.max(1)).max(1),
        }
    }
}

/// An LDM UNet.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetConfig {
    /// Channels of the latent that comes in.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of the first level.
    pub model_channels: usize,
    /// Channels of each level as a multiple of `model_channels`.
    pub channel_mult: Vec<usize>,
    /// ResBlocks on the way down, each level.
    pub num_res_blocks: Vec<usize>,
    /// Transformer blocks behind each ResBlock on the way down, in order; 0 = no transformer.
    pub input_depths: Vec<usize>,
    /// Transformer blocks in the middle; 0 = no transformer.
    pub middle_depth: usize,
    /// Transformer blocks behind each ResBlock on the way up, in order.
    pub output_depths: Vec<usize>,
    /// Width of the text conditioning.
    pub context_dim: usize,
    /// Attention heads.
    pub heads: HeadRule,
    /// Groups of every GroupNorm.
    pub norm_groups: usize,
}

/// A CLIP text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Width of the hidden states.
    pub width: usize,
    /// Number of transformer layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// Rows of the token table.
    pub vocab: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Whether the MLP uses quick-GELU (CLIP-L) rather than exact GELU.
    pub is_quick_gelu: bool,
}

/// A KL autoencoder.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of the first level.
    pub channels: usize,
    /// Channels of each level as a multiple of `channels`.
    pub channel_mult: Vec<usize>,
    /// ResBlocks of an encoder level; a decoder level has one more.
    pub num_res_blocks: usize,
    /// Latent channels.
    pub z_channels: usize,
    /// Groups of every GroupNorm.
    pub norm_groups: usize,
}

impl VaeConfig {
    /// Pixels of one latent cell, in each direction.
    pub fn downscale(&self) -> usize {
        1 << self.channel_mult.len().saturating_sub(1)
    }
}
