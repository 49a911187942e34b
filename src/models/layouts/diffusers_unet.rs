//! The UNet of the diffusers library under the names of latent diffusion.
//!
//! There, a level is a block with residual units (`resnets`), transformers
//! (`attentions`) and a resampler; here, every unit is a numbered block of its
//! own. The numbers follow from the residual units of each level.

/// Names outside the blocks: stored, ours.
const OUTSIDE: [(&str, &str); 9] = [
    ("conv_in.", "input_blocks.0.0."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("class_embedding.linear_1.", "label_emb.0.0."),
    ("class_embedding.linear_2.", "label_emb.0.2."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
];

/// Names inside a residual unit: stored, ours.
const RESIDUAL: [(&str, &str); 6] = [
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
];

/// How many residual units each level has, which of the way up have a transformer.
pub(super) struct Blocks {
    /// Units of every level on the way down, finest first.
    down: Vec<usize>,
    /// For every level on the way up, coarsest first: units, and whether they have transformers.
    up: Vec<(usize, bool)>,
}

impl Blocks {
    pub(super) fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        let has = |prefix: String| names.clone().any(|name| name.starts_with(&prefix));
        let units = |side: &str, level: usize| {
            (0..).take_while(|unit| has(format!("{side}_blocks.{level}.resnets.{unit}."))).count()
        };
        let levels = |side: &str| (0..).map(|l| units(side, l)).take_while(|&n| n > 0).collect::<Vec<_>>();
        let up = levels("up").into_iter().enumerate();
        Self {
            down: levels("down"),
            up: up.map(|(l, n)| (n, has(format!("up_blocks.{l}.attentions.0.")))).collect(),
        }
    }

    /// What `name` becomes, without the prefix; `None` if it is not of a UNet.
    pub(super) fn rename(&self, name: &str) -> Option<String> {
        if let Some((from, to)) = OUTSIDE.iter().find(|(from, _)| name.starts_with(from)) {
            return Some(format!("{to}{}", &name[from.len()..]));
        }
        if let Some(rest) = name.strip_prefix("mid_block.") {
            let (kind, unit, rest) = unit_of(rest)?;
            return Some(match kind {
                "resnets" => format!("middle_block.{}.{}", unit * 2, residual(rest)),
                "attentions" => format!("middle_block.1.{rest}"),
                _ => return None,
            });
        }
        if let Some(rest) = name.strip_prefix("down_blocks.") {
            let (level, rest) = rest.split_once('.')?;
            let level = level.parse::<usize>().ok()?;
            // Block 0 is the first convolution; a level has its units and, but for the last, a downsampler.
            let first = 1 + self.down.iter().take(level).map(|units| units + 1).sum::<usize>();
            let (kind, unit, rest) = unit_of(rest)?;
            return Some(match kind {
                "resnets" => format!("input_blocks.{}.0.{}", first + unit, residual(rest)),
                "attentions" => format!("input_blocks.{}.1.{rest}", first + unit),
                "downsamplers" => {
                    format!(
                        "input_blocks.{}.0.op.{}",
                        first + self.down.get(level)?,
                        rest.strip_prefix("conv.")?
                    )
                }
                _ => return None,
            });
        }
        let (level, rest) = name.strip_prefix("up_blocks.")?.split_once('.')?;
        let level = level.parse::<usize>().ok()?;
        let first = self.up.iter().take(level).map(|(units, _)| units).sum::<usize>();
        let &(units, has_transformers) = self.up.get(level)?;
        let (kind, unit, rest) = unit_of(rest)?;
        Some(match kind {
            "resnets" => format!("output_blocks.{}.0.{}", first + unit, residual(rest)),
            "attentions" => format!("output_blocks.{}.1.{rest}", first + unit),
            // The upsampler follows the level's last unit.
            "upsamplers" => {
                format!(
                    "output_blocks.{}.{}.{rest}",
                    (first + units).checked_sub(1)?,
                    if has_transformers { 2 } else { 1 }
                )
            }
            _ => return None,
        })
    }
}

/// `kind.unit.rest` in its parts.
fn unit_of(name: &str) -> Option<(&str, usize, &str)> {
    let (kind, rest) = name.split_once('.')?;
    let (unit, rest) = rest.split_once('.')?;
    Some((kind, unit.parse().ok()?, rest))
}

fn residual(name: &str) -> String {
    match RESIDUAL.iter().find(|(from, _)| name.starts_with(from)) {
        Some((from, to)) => format!("{to}{}", &name[from.len()..]),
        None => name.to_owned(),
    }
}
