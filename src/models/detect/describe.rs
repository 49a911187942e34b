//! A summary of a weight file for people.

use std::collections::BTreeMap;
use std::fmt;

use super::layout::Layout;
use super::{Checkpoint, ClipConfig, DetectError, Family, Heads, Kind, Prediction, UnetConfig, VaeConfig};
use crate::models::layouts::Names;
use crate::tensor::DType;
use crate::weights::WeightsFile;

/// Longest metadata value shown; trainers store whole tag lists there.
const SHOWN_CHARS: usize = 100;
/// Most unused tensors named.
const SHOWN_UNUSED: usize = 5;

/// Names' beginnings and what they belong to; the first that fits counts.
const PARTS: &[(&str, &str)] = &[
    ("model.diffusion_model.", "UNet"),
    ("cond_stage_model.", "text encoder"),
    ("conditioner.", "text encoders"),
    ("first_stage_model.", "VAE"),
    ("model_ema.", "EMA copy"),
    ("control_model.", "ControlNet"),
    ("text_model.", "text encoder"),
    ("encoder.", "VAE"),
    ("decoder.", "VAE"),
    ("quant_conv.", "VAE"),
    ("post_quant_conv.", "VAE"),
    ("", "other"),
];

/// Tensors that belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements.
    pub parameters: u64,
    /// Size of the data.
    pub bytes: u64,
}

/// What a weight file holds, in numbers.
#[derive(Clone, Debug)]
pub struct Description {
    /// The file.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// What it holds.
    pub kind: Kind,
    /// The family of a checkpoint, also of one that cannot be run.
    pub family: Option<Family>,
    /// The networks' configuration, if a checkpoint can be run.
    pub checkpoint: Option<Checkpoint>,
    /// The configuration of a VAE alone.
    pub vae: Option<VaeConfig>,
    /// The configuration of text encoders alone.
    pub clips: Vec<ClipConfig>,
    /// What hinders its use.
    pub problem: Option<DetectError>,
    /// Its parts by name, largest first.
    pub parts: Vec<(&'static str, Part)>,
    /// All of it by element type, largest first.
    pub dtypes: Vec<(DType, Part)>,
    /// The strings stored with it.
    pub metadata: BTreeMap<String, String>,
}

/// Summarises `file`. Reads its header only.
pub fn describe(file: &WeightsFile) -> Description {
    let names = Names::of(file);
    let mut description = Description {
        file: file.path().display().to_string(),
        bytes: file.len_bytes(),
        kind: super::kind_of(file),
        family: super::family_of(&Layout::of(file, &names)).ok().map(|(row, _)| row.family),
        checkpoint: None,
        vae: None,
        clips: Vec::new(),
        problem: None,
        parts: totals(file, |name, _| {
            PARTS.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or("other", |(_, part)| part)
        }),
        dtypes: totals(file, |_, dtype| dtype),
        metadata: file.metadata().clone(),
    };
    let d = &mut description;
    match d.kind {
        Kind::Checkpoint | Kind::DiffusionModel | Kind::Diffusers => {
            (d.checkpoint, d.problem) = split(super::detect(file));
        }
        Kind::Vae => (d.vae, d.problem) = split(super::detect_vae(file)),
        Kind::TextEncoder => {
            let (clips, problem) = split(super::detect_text_encoders(file));
            (d.clips, d.problem) = (clips.unwrap_or_default(), problem);
        }
        _ => {}
    }
    description
}

fn split<T>(result: Result<T, DetectError>) -> (Option<T>, Option<DetectError>) {
    match result {
        Ok(value) => (Some(value), None),
        Err(error) => (None, Some(error)),
    }
}

/// Sums over tensors with the same `key`, largest first.
fn totals<K: PartialEq>(file: &WeightsFile, key: impl Fn(&str, DType) -> K) -> Vec<(K, Part)> {
    let mut totals: Vec<(K, Part)> = Vec::new();
    for tensor in file.infos() {
        let k = key(tensor.name, tensor.dtype);
        let at = totals.iter().position(|(other, _)| *other == k).unwrap_or_else(|| {
            totals.push((k, Part::default()));
            totals.len() - 1
        });
        let part = &mut totals[at].1;
        part.tensors += 1;
        part.parameters += tensor.numel() as u64;
        part.bytes += tensor.bytes as u64;
    }
    totals.sort_by_key(|(_, part)| std::cmp::Reverse(part.bytes));
    totals
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", printable(&self.file))?;
        write!(f, "  {}", self.kind)?;
        if let Some(family) = self.family {
            write!(f, " of the family {family}")?;
        }
        let parameters: u64 = self.dtypes.iter().map(|(_, part)| part.parameters).sum();
        let tensors: usize = self.dtypes.iter().map(|(_, part)| part.tensors).sum();
        writeln!(f, ": {} parameters in {tensors} tensors, {}", counted(parameters), sized(self.bytes))?;
        if let Some(problem) = &self.problem {
            writeln!(f, "  cannot be used: {}", printable(&problem.to_string()))?;
        }
        for (name, part) in &self.parts {
            let (count, size) = (counted(part.parameters), sized(part.bytes));
            writeln!(f, "  {name:<14} {count:>9} parameters, {:>5} tensors, {size}", part.tensors)?;
        }
        for (dtype, part) in &self.dtypes {
            writeln!(f, "  {:<14} {:>9} parameters", format!("{dtype:?}"), counted(part.parameters))?;
        }
        if let Some(checkpoint) = &self.checkpoint {
            write_checkpoint(f, checkpoint)?;
        }
        self.clips.iter().try_for_each(|clip| write_clip(f, clip))?;
        if let Some(vae) = &self.vae {
            write_vae(f, vae)?;
        }
        for (key, value) in &self.metadata {
            writeln!(f, "  metadata {} = {}", shortened(key), shortened(value))?;
        }
        Ok(())
    }
}

fn write_checkpoint(f: &mut fmt::Formatter<'_>, checkpoint: &Checkpoint) -> fmt::Result {
    write_unet(f, &checkpoint.unet)?;
    checkpoint.clips.iter().try_for_each(|clip| write_clip(f, clip))?;
    if checkpoint.clips.is_empty() {
        writeln!(f, "  no text encoder: load one separately")?;
    }
    match &checkpoint.vae {
        Some(vae) => write_vae(f, vae)?,
        None => writeln!(f, "  no VAE: load one separately")?,
    }
    let sampling = &checkpoint.sampling;
    let predicts = match sampling.prediction {
        Prediction::Epsilon => "noise (eps)",
        Prediction::V => "velocity (v)",
        Prediction::Edm => "the clean picture (EDM, Playground 2.5)",
    };
    let betas = &sampling.beta_schedule;
    writeln!(
        f,
        "  predicts {predicts}; betas {} to {} in {} steps; latents x {}; made for {} x {} pixels",
        betas.start,
        betas.end,
        betas.steps,
        sampling.latent_scale,
        sampling.native_width,
        sampling.native_height
    )?;
    if !checkpoint.unused.is_empty() {
        let shown = &checkpoint.unused[..checkpoint.unused.len().min(SHOWN_UNUSED)];
        let dots = if checkpoint.unused.len() > shown.len() { ", …" } else { "" };
        writeln!(
            f,
            "  {} tensors not used: {}{dots}",
            checkpoint.unused.len(),
            printable(&shown.join(", "))
        )?;
    }
    Ok(())
}

fn write_unet(f: &mut fmt::Formatter<'_>, unet: &UnetConfig) -> fmt::Result {
    let heads = match unet.heads {
        Heads::Count(count) => format!("{count} heads"),
        Heads::Size(size) => format!("heads of {size}"),
    };
    writeln!(
        f,
        "  UNet: {} channels x {:?}, {:?} residual blocks, transformers {:?} + {} + {:?}, {heads}, context {}, {} groups, {} -> {} channels",
        unet.model_channels,
        unet.channel_mult,
        unet.num_res_blocks,
        unet.input_depth,
        unet.middle_depth,
        unet.output_depth,
        unet.context_dim,
        unet.norm_groups,
        unet.in_channels,
        unet.out_channels
    )
}

fn write_clip(f: &mut fmt::Formatter<'_>, clip: &ClipConfig) -> fmt::Result {
    writeln!(
        f,
        "  text encoder: {} layers of width {}, {} heads, MLP {}, {} tokens, {} places, {:?}",
        clip.layers, clip.width, clip.heads, clip.mlp, clip.vocab, clip.max_positions, clip.activation
    )
}

fn write_vae(f: &mut fmt::Formatter<'_>, vae: &VaeConfig) -> fmt::Result {
    let attention = if vae.has_attention { "with" } else { "without" };
    writeln!(
        f,
        "  VAE: {} channels x {:?}, {} residual blocks, {} latent channels at 1/{}, {attention} attention, {} groups",
        vae.ch,
        vae.ch_mult,
        vae.num_res_blocks,
        vae.z_channels,
        vae.downscale(),
        vae.norm_groups
    )
}

/// Without control characters, which a file could use to deceive a terminal.
fn printable(text: &str) -> String {
    text.chars().flat_map(escaped).collect()
}

/// [`printable`], and not endless.
fn shortened(text: &str) -> String {
    let dots = if text.chars().nth(SHOWN_CHARS).is_some() { "…" } else { "" };
    text.chars().take(SHOWN_CHARS).flat_map(escaped).chain(dots.chars()).collect()
}

fn escaped(c: char) -> impl Iterator<Item = char> {
    let is_harmless = !c.is_control()
        && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let kept = is_harmless.then_some(c);
    let escape = (!is_harmless).then(|| c.escape_default());
    kept.into_iter().chain(escape.into_iter().flatten())
}

/// A count with a unit.
fn counted(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} G", n as f64 / 1e9),
    }
}

/// A size with a unit.
fn sized(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
