//! Configuration of a latent-diffusion UNet from its tensors.
//!
//! Architecture: Rombach et al. 2022, "High-Resolution Image Synthesis with
//! Latent Diffusion Models" (arXiv 2112.10752), appendix; names as in its published weights.

use super::DetectError;
use super::layout::{Layout, Needed, affine};

const NETWORK: &str = "UNet";
/// More levels than any UNet has; each halves the picture.
const MAX_LEVELS: usize = 8;

/// How attention is cut into heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heads {
    /// So many heads at every width.
    Count(usize),
    /// Heads of so many channels.
    Size(usize),
}

/// Configuration of a UNet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnetConfig {
    /// What its tensors' names begin with.
    pub prefix: String,
    /// Channels of its input: 4 latents (9 with mask and masked latents for inpainting).
    pub in_channels: usize,
    /// Channels of its output.
    pub out_channels: usize,
    /// Channels of the first level.
    pub model_channels: usize,
    /// Width of the time embedding.
    pub time_embed_dim: usize,
    /// Channels of every level, in multiples of `model_channels`, finest first.
    pub channel_mult: Vec<usize>,
    /// Residual blocks of every level on the way down (one more on the way up).
    pub num_res_blocks: Vec<usize>,
    /// Transformer blocks after every residual block on the way down, in order.
    pub input_depth: Vec<usize>,
    /// Transformer blocks in the middle.
    pub middle_depth: usize,
    /// Transformer blocks of `output_blocks.0`, `.1`, …: coarsest level first.
    pub output_depth: Vec<usize>,
    /// Width of the text encoding.
    pub context_dim: usize,
    /// Heads of all attentions.
    pub heads: Heads,
    /// Groups of all group norms.
    pub norm_groups: usize,
    /// Whether transformers are entered and left through linear layers rather than 1×1 convolutions.
    pub use_linear_in_transformer: bool,
    /// Width of the vector conditioning, in families that have one.
    pub adm_channels: Option<usize>,
}

impl UnetConfig {
    /// Channels of `level`; 0 if there is no such level.
    pub fn level_channels(&self, level: usize) -> usize {
        self.channel_mult.get(level).map_or(0, |mult| mult * self.model_channels)
    }

    /// Heads of an attention over `channels`.
    pub fn heads_of(&self, channels: usize) -> usize {
        match self.heads {
            Heads::Count(count) => count,
            Heads::Size(size) => channels / size.max(1),
        }
    }

    /// Names and shapes of all tensors it needs.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut plan = Plan { config: self, needed: Vec::new() };
        plan.write();
        plan.needed
    }

    /// Checks heads, groups and every tensor against the file.
    pub(super) fn check(&self, layout: &Layout) -> Result<(), DetectError> {
        for level in 0..self.channel_mult.len() {
            let channels = self.level_channels(level);
            layout.divides(
                "the number of norm groups",
                self.norm_groups,
                channels,
                "group_norm.num_groups",
            )?;
            match self.heads {
                Heads::Count(count) => {
                    layout.divides("the number of attention heads", count, channels, "unet.num_heads")?;
                }
                Heads::Size(size) => {
                    layout.divides("the size of a head", size, channels, "unet.num_heads")?
                }
            }
        }
        layout.check(NETWORK, &self.tensors())
    }
}

/// Walks the blocks under `prefix`. Heads are a placeholder until the family is known.
pub(super) fn derive(layout: &Layout, prefix: &str) -> Result<UnetConfig, DetectError> {
    let [model_channels, in_channels, ..] =
        layout.dims::<4>(NETWORK, &format!("{prefix}input_blocks.0.0.weight"))?;
    // The half UNet of a ControlNet has no output; a whole one is checked for it later.
    let out = format!("{prefix}out.2.weight");
    let out_channels = match layout.contains(&out) {
        true => layout.dims::<4>(NETWORK, &out)?[0],
        false => in_channels,
    };
    let [time_embed_dim, _] = layout.dims::<2>(NETWORK, &format!("{prefix}time_embed.0.weight"))?;
    let mut config = UnetConfig {
        prefix: prefix.to_owned(),
        in_channels,
        out_channels,
        model_channels,
        time_embed_dim,
        channel_mult: vec![],
        num_res_blocks: vec![],
        input_depth: vec![],
        middle_depth: layout.count(&format!("{prefix}middle_block.1.transformer_blocks.")),
        output_depth: vec![],
        context_dim: 0,
        heads: Heads::Count(8),
        norm_groups: layout.norm_groups()?,
        use_linear_in_transformer: false,
        adm_channels: None,
    };
    walk_down(layout, &mut config)?;
    let outputs: usize = config.num_res_blocks.iter().map(|n| n + 1).sum();
    config.output_depth = (0..outputs)
        .map(|i| layout.count(&format!("{prefix}output_blocks.{i}.1.transformer_blocks.")))
        .collect();

    // Every model has a transformer in the middle; it stands for the others, which are checked against it.
    let middle = format!("{prefix}middle_block.1");
    let [_, context_dim] =
        layout.dims::<2>(NETWORK, &format!("{middle}.transformer_blocks.0.attn2.to_k.weight"))?;
    config.context_dim = context_dim;
    let proj_in = format!("{middle}.proj_in.weight");
    config.use_linear_in_transformer = match layout.shape(&proj_in).map(<[usize]>::len) {
        Some(2) => true,
        Some(4) => false,
        Some(_) => return Err(layout.odd(&proj_in, "2 or 4 dimensions".into())),
        None => return Err(layout.missing(NETWORK, &proj_in)),
    };
    let label = format!("{prefix}label_emb.0.0.weight");
    if layout.contains(&label) {
        let [_, channels] = layout.dims::<2>(NETWORK, &label)?;
        config.adm_channels = Some(channels);
    }
    Ok(config)
}

/// Reads levels, residual blocks and transformer depths off `input_blocks.1`, `.2`, ….
fn walk_down(layout: &Layout, config: &mut UnetConfig) -> Result<(), DetectError> {
    let (mut mult, mut blocks) = (0, 0);
    let count = layout.count(&format!("{}input_blocks.", config.prefix));
    for i in 1..count {
        let block = format!("{}input_blocks.{i}", config.prefix);
        let op = format!("{block}.0.op.weight");
        if layout.contains(&op) {
            if config.channel_mult.len() + 1 == MAX_LEVELS {
                return Err(layout.odd(&op, format!("at most {MAX_LEVELS} levels")));
            }
            config.channel_mult.push(mult);
            config.num_res_blocks.push(blocks);
            blocks = 0;
            continue;
        }
        let conv = format!("{block}.0.in_layers.2.weight");
        let [channels, ..] = layout.dims::<4>(NETWORK, &conv)?;
        let is_level_start = blocks == 0;
        if !channels.is_multiple_of(config.model_channels)
            || (!is_level_start && mult != channels / config.model_channels)
        {
            let wanted = format!("a multiple of {} channels, the same in a level,", config.model_channels);
            return Err(layout.odd(&conv, wanted));
        }
        mult = channels / config.model_channels;
        blocks += 1;
        config.input_depth.push(layout.count(&format!("{block}.1.transformer_blocks.")));
    }
    config.channel_mult.push(mult);
    config.num_res_blocks.push(blocks);
    if config.num_res_blocks.contains(&0) {
        let first = config.num_res_blocks.iter().take_while(|&&n| n > 0).map(|n| n + 1).sum::<usize>() + 1;
        return Err(
            layout.missing(NETWORK, &format!("{}input_blocks.{first}.0.in_layers.2.weight", config.prefix))
        );
    }
    Ok(())
}

/// Lists a UNet's tensors.
struct Plan<'c> {
    config: &'c UnetConfig,
    needed: Vec<Needed>,
}

impl Plan<'_> {
    fn write(&mut self) {
        let config = self.config;
        let (p, base, embed) = (&config.prefix, config.model_channels, config.time_embed_dim);
        self.affine(&format!("{p}time_embed.0"), &[embed, base]);
        self.affine(&format!("{p}time_embed.2"), &[embed, embed]);
        if let Some(adm) = config.adm_channels {
            self.affine(&format!("{p}label_emb.0.0"), &[embed, adm]);
            self.affine(&format!("{p}label_emb.0.2"), &[embed, embed]);
        }
        self.affine(&format!("{p}input_blocks.0.0"), &[base, config.in_channels, 3, 3]);
        let mut skips = self.down();
        let deepest = config.level_channels(config.channel_mult.len().saturating_sub(1));
        self.residual(&format!("{p}middle_block.0"), deepest, deepest);
        self.transformer(&format!("{p}middle_block.1"), deepest, config.middle_depth);
        self.residual(&format!("{p}middle_block.2"), deepest, deepest);
        self.up(deepest, &mut skips);
        self.affine(&format!("{p}out.0"), &[base]);
        self.affine(&format!("{p}out.2"), &[config.out_channels, base, 3, 3]);
    }

    /// The way down; the channels that each block hands over to the way up.
    fn down(&mut self) -> Vec<usize> {
        let config = self.config;
        let mut channels = config.model_channels;
        let mut skips = vec![channels];
        let mut depths = config.input_depth.iter();
        for (level, &blocks) in config.num_res_blocks.iter().enumerate() {
            let out = config.level_channels(level);
            for _ in 0..blocks {
                let block = format!("{}input_blocks.{}", config.prefix, skips.len());
                self.residual(&format!("{block}.0"), channels, out);
                self.transformer(&format!("{block}.1"), out, depths.next().copied().unwrap_or(0));
                channels = out;
                skips.push(channels);
            }
            if level + 1 < config.num_res_blocks.len() {
                let op = format!("{}input_blocks.{}.0.op", config.prefix, skips.len());
                self.affine(&op, &[channels, channels, 3, 3]);
                skips.push(channels);
            }
        }
        skips
    }

    fn up(&mut self, mut channels: usize, skips: &mut Vec<usize>) {
        let config = self.config;
        let mut index = 0;
        for (level, &blocks) in config.num_res_blocks.iter().enumerate().rev() {
            let out = config.level_channels(level);
            for i in 0..=blocks {
                let block = format!("{}output_blocks.{index}", config.prefix);
                let depth = config.output_depth.get(index).copied().unwrap_or(0);
                self.residual(&format!("{block}.0"), channels + skips.pop().unwrap_or(0), out);
                self.transformer(&format!("{block}.1"), out, depth);
                if level > 0 && i == blocks {
                    let place = if depth > 0 { 2 } else { 1 };
                    self.affine(&format!("{block}.{place}.conv"), &[out, out, 3, 3]);
                }
                channels = out;
                index += 1;
            }
        }
    }

    fn residual(&mut self, name: &str, from: usize, to: usize) {
        self.affine(&format!("{name}.in_layers.0"), &[from]);
        self.affine(&format!("{name}.in_layers.2"), &[to, from, 3, 3]);
        self.affine(&format!("{name}.emb_layers.1"), &[to, self.config.time_embed_dim]);
        self.affine(&format!("{name}.out_layers.0"), &[to]);
        self.affine(&format!("{name}.out_layers.3"), &[to, to, 3, 3]);
        if from != to {
            self.affine(&format!("{name}.skip_connection"), &[to, from, 1, 1]);
        }
    }

    fn transformer(&mut self, name: &str, c: usize, depth: usize) {
        if depth == 0 {
            return;
        }
        let matrix: &[usize] = if self.config.use_linear_in_transformer { &[c, c] } else { &[c, c, 1, 1] };
        self.affine(&format!("{name}.norm"), &[c]);
        self.affine(&format!("{name}.proj_in"), matrix);
        self.affine(&format!("{name}.proj_out"), matrix);
        for i in 0..depth {
            let block = format!("{name}.transformer_blocks.{i}");
            for norm in ["norm1", "norm2", "norm3"] {
                self.affine(&format!("{block}.{norm}"), &[c]);
            }
            for (attention, from) in [("attn1", c), ("attn2", self.config.context_dim)] {
                self.needed.push((format!("{block}.{attention}.to_q.weight"), vec![c, c]));
                self.needed.push((format!("{block}.{attention}.to_k.weight"), vec![c, from]));
                self.needed.push((format!("{block}.{attention}.to_v.weight"), vec![c, from]));
                self.affine(&format!("{block}.{attention}.to_out.0"), &[c, c]);
            }
            self.affine(&format!("{block}.ff.net.0.proj"), &[8 * c, c]);
            self.affine(&format!("{block}.ff.net.2"), &[c, 4 * c]);
        }
    }

    fn affine(&mut self, name: &str, shape: &[usize]) {
        affine(&mut self.needed, name, shape);
    }
}
