//! Which model a weight file holds, from its tensors' names and shapes.
//!
//! Checkpoints don't say what they are. Their tensor names do: the layout of
//! the original latent-diffusion code (`model.diffusion_model.*`,
//! `cond_stage_model.*`, `first_stage_model.*`) is what the SD1.x world stores. [`detect`]
//! walks the blocks, derives each network's configuration, picks the family from a
//! table, and then checks that every tensor the configuration needs is there
//! in the right shape, so that loading cannot fail half-way on a file that was accepted.
//!
//! What shapes cannot tell (heads, groups, scale, schedule) comes from the
//! file's `__metadata__` if it has the keys listed at [`Checkpoint`], otherwise from
//! the family's row. Models of unusual size, like the built-in demo, need those keys.

mod clip;
mod describe;
mod kind;
mod layout;
mod unet;
mod vae;

use std::fmt;
use std::path::PathBuf;

use super::layouts::Names;
use crate::tensor::{DType, RawTensor};
use crate::weights::WeightsFile;

pub use clip::{Activation, ClipConfig, ClipVariant};
pub use describe::{Description, Part, describe};
pub use kind::{Kind, kind_of};
pub use unet::{Heads, UnetConfig};
pub use vae::VaeConfig;

use layout::Layout;

/// A line of models that share architecture and conventions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Stable Diffusion 1.x.
    Sd1,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion XL.
    Sdxl,
    /// The refiner of Stable Diffusion XL.
    SdxlRefiner,
    /// Stable Diffusion 2.x that is steered by pictures.
    Sd2Unclip,
}

impl Family {
    /// Its name as people write it.
    pub fn name(self) -> &'static str {
        row_of(self).name
    }

    /// Whether kiln runs models of this family.
    pub fn is_supported(self) -> bool {
        row_of(self).is_supported
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity, a mix of noise and image.
    V,
    /// The clean picture after EDM's skip connection, of latents in Playground 2.5's format.
    Edm,
}

/// The noise levels a model was trained on: β linear in √β from `start` to `end`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BetaSchedule {
    /// β of the first step.
    pub start: f64,
    /// β of the last step.
    pub end: f64,
    /// Number of training steps.
    pub steps: usize,
}

/// A continuous range of noise levels, from `sigma_min` to `sigma_max`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SigmaRange {
    /// The lowest noise level.
    pub sigma_min: f64,
    /// The highest noise level.
    pub sigma_max: f64,
}

/// What samplers must know about a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingConfig {
    /// What the network predicts.
    pub prediction: Prediction,
    /// Its noise levels.
    pub beta_schedule: BetaSchedule,
    /// Whether the last noise level is pure noise.
    pub has_zero_terminal_snr: bool,
    /// Instead of the schedule: a continuous range of noise levels (EDM).
    pub continuous: Option<SigmaRange>,
    /// Factor between VAE latents and what the network sees.
    pub latent_scale: f64,
    /// Width of the pictures it was trained on.
    pub native_width: usize,
    /// Height of the pictures it was trained on.
    pub native_height: usize,
}

/// Everything needed to build a checkpoint's networks.
///
/// Metadata keys that override the family's defaults: `unet.num_heads`,
/// `clip.num_heads`, `clip.activation`, `clip.variant` (`l`, `h`, `g`), `group_norm.num_groups`, `latent_scale`,
/// `prediction` (`eps`, `v`), `beta_schedule` (`scaled_linear START END STEPS`), `native_width`, `native_height`.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its family.
    pub family: Family,
    /// The diffusion network.
    pub unet: UnetConfig,
    /// The text encoders: none, one, or SDXL's two.
    pub clips: Vec<ClipConfig>,
    /// The image encoder and decoder, if the file has them.
    pub vae: Option<VaeConfig>,
    /// What samplers must know.
    pub sampling: SamplingConfig,
    /// Tensors under the networks' prefixes that no configuration explains. They are not used.
    pub unused: Vec<String>,
}

/// Why a file is not a model that can be loaded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DetectError {
    /// The file holds something else.
    #[error("{} is {found}, not {wanted}; {}", file.display(), found.advice())]
    Kind {
        /// The file.
        file: PathBuf,
        /// What it holds.
        found: Kind,
        /// What was asked for.
        wanted: Kind,
    },
    /// A family that kiln does not run.
    #[error("{} is a {family} checkpoint; this version runs {} only", file.display(), supported_names())]
    Family {
        /// The file.
        file: PathBuf,
        /// Its family.
        family: Family,
    },
    /// Nothing in the table fits.
    #[error("the UNet in {} fits no known family ({why}); this version runs {} only", file.display(), supported_names())]
    Unknown {
        /// The file.
        file: PathBuf,
        /// What sets it apart.
        why: String,
    },
    /// A tensor is not there.
    #[error("{} has no tensor {name:?}, which its {network} needs; the file is incomplete, download it again", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The network that needs it.
        network: &'static str,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the rest of the network asks for.
    #[error("tensor {name:?} of {} has shape {found:?} where {wanted} is needed; the file is damaged or of an unknown kind", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// What is needed.
        wanted: String,
    },
    /// A weight is not made of floating-point numbers.
    #[error("tensor {name:?} of {} has element type {dtype:?}; weights must be floating-point, convert it to F16", file.display())]
    DType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
    },
    /// A configuration value does not fit the shapes.
    #[error("{}: {what} {value} does not divide {channels} channels; set {key:?} in the file's __metadata__ to the right value", file.display())]
    Divide {
        /// The file.
        file: PathBuf,
        /// What the value counts.
        what: &'static str,
        /// The value.
        value: usize,
        /// What it should divide.
        channels: usize,
        /// The metadata key that sets it.
        key: &'static str,
    },
    /// A metadata value cannot be read.
    #[error("{}: metadata {key:?} is {value:?} where {wanted} is needed; correct or remove it", file.display())]
    Metadata {
        /// The file.
        file: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is needed.
        wanted: &'static str,
    },
}

/// One row a family; the first whose `fits` holds is taken.
struct FamilyRow {
    family: Family,
    name: &'static str,
    is_supported: bool,
    fits: fn(&UnetConfig) -> bool,
    heads: Heads,
    latent_scale: f64,
    native_size: usize,
    /// A bias of the UNet whose spread tells v-prediction from ε, where both exist and nothing else tells.
    v_bias: Option<&'static str>,
}

const FAMILIES: &[FamilyRow] = &[
    FamilyRow {
        family: Family::Sd1,
        name: "Stable Diffusion 1.x",
        is_supported: true,
        fits: |unet| !unet.use_linear_in_transformer && unet.adm_channels.is_none(),
        heads: Heads::Count(8),
        latent_scale: 0.18215,
        native_size: 512,
        v_bias: None,
    },
    FamilyRow {
        family: Family::Sd2,
        name: "Stable Diffusion 2.x",
        is_supported: true,
        fits: |unet| unet.use_linear_in_transformer && unet.adm_channels.is_none(),
        heads: Heads::Size(64),
        latent_scale: 0.18215,
        native_size: 768,
        v_bias: Some("output_blocks.11.1.transformer_blocks.0.norm1.bias"),
    },
    FamilyRow {
        family: Family::Sdxl,
        name: "Stable Diffusion XL",
        is_supported: true,
        fits: |unet| unet.adm_channels == Some(2816),
        heads: Heads::Size(64),
        latent_scale: 0.13025,
        native_size: 1024,
        v_bias: None,
    },
    FamilyRow {
        family: Family::SdxlRefiner,
        name: "Stable Diffusion XL refiner",
        is_supported: true,
        fits: |unet| unet.adm_channels == Some(2560),
        heads: Heads::Size(64),
        latent_scale: 0.13025,
        native_size: 1024,
        v_bias: None,
    },
    FamilyRow {
        family: Family::Sd2Unclip,
        name: "Stable Diffusion 2.x unCLIP",
        is_supported: true,
        fits: |unet| matches!(unet.adm_channels, Some(1536 | 2048)),
        heads: Heads::Size(64),
        latent_scale: 0.18215,
        native_size: 768,
        v_bias: Some("output_blocks.11.1.transformer_blocks.0.norm1.bias"),
    },
];

/// Above this standard deviation the bias named in a row belongs to a v-prediction model.
const V_BIAS_SPREAD: f64 = 0.09;

fn row_of(family: Family) -> &'static FamilyRow {
    FAMILIES.iter().find(|row| row.family == family).unwrap_or(&FAMILIES[0])
}

fn supported_names() -> String {
    FAMILIES.iter().filter(|row| row.is_supported).map(|row| row.name).collect::<Vec<_>>().join(", ")
}

/// Where a checkpoint keeps its UNet.
const UNET_PREFIX: &str = "model.diffusion_model.";
/// Where checkpoints keep their text encoders, and which they are; the second is how early files name it.
const CLIP_PLACES: [(&str, ClipVariant); 5] = [
    ("cond_stage_model.transformer.text_model.", ClipVariant::L),
    ("cond_stage_model.transformer.", ClipVariant::L),
    ("conditioner.embedders.0.transformer.text_model.", ClipVariant::L),
    ("clip_h.transformer.text_model.", ClipVariant::H),
    ("clip_g.transformer.text_model.", ClipVariant::G),
];
/// Where a text encoder's own file keeps it.
const CLIP_FILE_PREFIX: &str = "text_model.";
/// Where checkpoints keep their VAE.
const VAE_PREFIX: &str = "first_stage_model.";
/// Where a VAE's own file keeps it.
const VAE_FILE_PREFIXES: [&str; 2] = ["", VAE_PREFIX];

/// The checkpoint in `file`, with every tensor it needs accounted for.
///
/// # Errors
/// If the file is no checkpoint, of a family that is not supported, or incomplete.
pub fn detect(file: &WeightsFile) -> Result<Checkpoint, DetectError> {
    let names = Names::of(file);
    let layout = Layout::of(file, &names);
    let (row, unet) = family_of(&layout)?;
    if !row.is_supported {
        return Err(DetectError::Family { file: layout.file.clone(), family: row.family });
    }
    let mut found = checkpoint(&layout, row, unet, |name| spread_of(&names.get(file, name)?))?;
    if found.sampling.continuous.is_some() && found.sampling.prediction == Prediction::V {
        found.sampling.continuous = Some(edm_range(file, &names));
    }
    Ok(found)
}

/// Where ControlNet files keep the net.
const CONTROL_PREFIXES: [&str; 2] = ["control_model.", ""];

/// What the names of a ControlNet's tensors begin with.
pub fn control_prefix(file: &WeightsFile) -> &'static str {
    let is_it = |prefix: &&str| file.contains(&format!("{prefix}zero_convs.0.0.weight"));
    CONTROL_PREFIXES.into_iter().find(is_it).unwrap_or_default()
}

/// The half UNet of the ControlNet in `file`.
///
/// # Errors
/// If there is none, it is of a family that is not supported, or incomplete.
pub fn detect_control_net(file: &WeightsFile) -> Result<UnetConfig, DetectError> {
    let names = Names::of(file);
    let layout = Layout::of(file, &names);
    let prefix = CONTROL_PREFIXES
        .into_iter()
        .find(|prefix| layout.contains(&format!("{prefix}zero_convs.0.0.weight")))
        .ok_or_else(|| layout.is_not(Kind::ControlNet))?;
    let mut unet = unet::derive(&layout, prefix)?;
    // The way up is missing, which no row asks for.
    unet.heads = match layout.number("unet.num_heads", "a whole number of heads")? {
        Some(count) => Heads::Count(count),
        None => row_for(&layout, &unet)?.heads,
    };
    Ok(unet)
}

/// The VAE in `file`, which holds nothing else, or in a checkpoint.
///
/// # Errors
/// If there is none or it is incomplete.
pub fn detect_vae(file: &WeightsFile) -> Result<VaeConfig, DetectError> {
    let names = Names::of(file);
    let layout = Layout::of(file, &names);
    match VAE_FILE_PREFIXES.into_iter().find(|prefix| layout.has_prefix(&format!("{prefix}decoder."))) {
        Some(prefix) => vae::derive(&layout, prefix),
        None => Err(layout.is_not(Kind::Vae)),
    }
}

/// The text encoders in `file`, which holds nothing else, or in a checkpoint.
///
/// # Errors
/// If there is none or one is incomplete.
pub fn detect_text_encoders(file: &WeightsFile) -> Result<Vec<ClipConfig>, DetectError> {
    let names = Names::of(file);
    let layout = Layout::of(file, &names);
    if layout.has_prefix(&format!("{CLIP_FILE_PREFIX}encoder.layers.")) {
        return Ok(vec![clip::derive(&layout, CLIP_FILE_PREFIX, None)?]);
    }
    match clips_of(&layout)? {
        clips if clips.is_empty() => Err(layout.is_not(Kind::TextEncoder)),
        clips => Ok(clips),
    }
}

/// The text encoders of a checkpoint, in the order in which their outputs are joined.
fn clips_of(layout: &Layout) -> Result<Vec<ClipConfig>, DetectError> {
    let is_there = |prefix: &str| layout.has_prefix(&format!("{prefix}encoder.layers."));
    let places = CLIP_PLACES.iter().filter(|(prefix, _)| is_there(prefix));
    places.map(|&(prefix, variant)| clip::derive(layout, prefix, Some(variant))).collect()
}

/// The row that fits the UNet, and the UNet with that row's defaults.
fn family_of(layout: &Layout) -> Result<(&'static FamilyRow, UnetConfig), DetectError> {
    if kind::kind_in(layout) != Kind::Checkpoint {
        return Err(layout.is_not(Kind::Checkpoint));
    }
    let mut unet = unet::derive(layout, UNET_PREFIX)?;
    let row = row_for(layout, &unet)?;
    // Beside the latents: nothing, the latents of a picture, or those and a mask.
    let beside = unet.in_channels.checked_sub(unet.out_channels);
    if !beside.is_some_and(|n| n == 0 || n == unet.out_channels || n == unet.out_channels + 1) {
        let why = format!("{} input channels, {} output channels", unet.in_channels, unet.out_channels);
        return Err(DetectError::Unknown { file: layout.file.clone(), why });
    }
    unet.heads = match layout.number("unet.num_heads", "a whole number of heads")? {
        Some(count) => Heads::Count(count),
        None => row.heads,
    };
    Ok((row, unet))
}

/// The row that fits a UNet, whole or half.
fn row_for(layout: &Layout, unet: &UnetConfig) -> Result<&'static FamilyRow, DetectError> {
    FAMILIES.iter().find(|row| (row.fits)(unet)).ok_or_else(|| {
        let proj = if unet.use_linear_in_transformer { "linear" } else { "1x1 convolution" };
        let why = format!(
            "context width {}, vector conditioning {:?}, {proj} projections",
            unet.context_dim, unet.adm_channels
        );
        DetectError::Unknown { file: layout.file.clone(), why }
    })
}

fn checkpoint(
    layout: &Layout,
    row: &FamilyRow,
    unet: UnetConfig,
    spread: impl Fn(&str) -> Option<f64>,
) -> Result<Checkpoint, DetectError> {
    unet.check(layout)?;
    let prediction = prediction_of(layout, row, &unet, spread)?;
    let clips = clips_of(layout)?;
    let vae = layout.has_prefix(VAE_PREFIX).then(|| vae::derive(layout, VAE_PREFIX)).transpose()?;
    let beta_schedule = beta_schedule_of(layout)?;
    let latent_scale = layout.number("latent_scale", "a positive number")?.unwrap_or(row.latent_scale);
    if !(latent_scale.is_finite() && latent_scale > 0.0) {
        return Err(layout.bad_metadata("latent_scale", "a positive number"));
    }
    let size = |key| -> Result<usize, DetectError> {
        match layout.number(key, "a number of pixels from 8 to 8192")? {
            Some(pixels) if !(8..=8192usize).contains(&pixels) => {
                Err(layout.bad_metadata(key, "a number of pixels from 8 to 8192"))
            }
            given => Ok(given.unwrap_or(row.native_size)),
        }
    };
    let sampling = SamplingConfig {
        prediction,
        beta_schedule,
        has_zero_terminal_snr: prediction == Prediction::V && layout.contains("ztsnr"),
        continuous: match prediction {
            Prediction::Edm => Some(PLAYGROUND_RANGE),
            _ => layout.contains(EDM_SIGMA_MAX).then_some(DEFAULT_EDM_RANGE),
        },
        latent_scale,
        native_width: size("native_width")?,
        native_height: size("native_height")?,
    };
    let mut explained = unet.tensors();
    explained.extend(clips.iter().flat_map(ClipConfig::tensors));
    explained.extend(vae.iter().flat_map(VaeConfig::tensors));
    let unused =
        layout.unexplained(&[UNET_PREFIX, "cond_stage_model.", "conditioner.", VAE_PREFIX], &explained);
    Ok(Checkpoint { family: row.family, unet, clips, vae, sampling, unused })
}

/// From the metadata, from a tensor put there as a mark, from the spread of the row's telling bias, or ε.
///
/// A UNet with more than latents as its input (inpainting) never predicts v where only the bias would say so.
fn prediction_of(
    layout: &Layout,
    row: &FamilyRow,
    unet: &UnetConfig,
    spread: impl Fn(&str) -> Option<f64>,
) -> Result<Prediction, DetectError> {
    match layout.metadata.get("prediction").map(String::as_str) {
        Some("eps" | "epsilon") => Ok(Prediction::Epsilon),
        Some("v" | "v_prediction") => Ok(Prediction::V),
        Some(_) => Err(layout.bad_metadata("prediction", "eps or v")),
        None if PLAYGROUND_MARKS.iter().all(|mark| layout.contains(mark)) => Ok(Prediction::Edm),
        None if layout.contains("v_pred") || layout.contains(EDM_SIGMA_MAX) => Ok(Prediction::V),
        None => {
            let telling = row.v_bias.filter(|_| unet.in_channels == unet.out_channels);
            let spread = telling.and_then(|name| spread(&format!("{UNET_PREFIX}{name}")));
            Ok(if spread.is_some_and(|s| s > V_BIAS_SPREAD) { Prediction::V } else { Prediction::Epsilon })
        }
    }
}

/// Means and standard deviations of its latents' channels, which Playground 2.5's files hold and are known by.
pub const PLAYGROUND_MARKS: [&str; 2] = ["edm_mean", "edm_std"];
const PLAYGROUND_RANGE: SigmaRange = SigmaRange { sigma_min: 0.002, sigma_max: 80.0 };

/// Marks a model that predicts v over a continuous range of noise levels, and holds the highest.
const EDM_SIGMA_MAX: &str = "edm_vpred.sigma_max";
/// Holds the lowest, if it is there.
const EDM_SIGMA_MIN: &str = "edm_vpred.sigma_min";
/// What the reference assumes where the file does not say.
const DEFAULT_EDM_RANGE: SigmaRange = SigmaRange { sigma_min: 0.002, sigma_max: 120.0 };

/// The range of noise levels that the file's marks hold.
fn edm_range(file: &WeightsFile, names: &Names) -> SigmaRange {
    let value = |name| names.get(file, name).and_then(|raw| raw.to_f32().first().copied());
    let sound = |name, default: f64| {
        value(name).map(f64::from).filter(|v| v.is_finite() && *v > 0.0).unwrap_or(default)
    };
    SigmaRange {
        sigma_min: sound(EDM_SIGMA_MIN, DEFAULT_EDM_RANGE.sigma_min),
        sigma_max: sound(EDM_SIGMA_MAX, DEFAULT_EDM_RANGE.sigma_max),
    }
}

/// Standard deviation (of the population) of a tensor's values.
fn spread_of(raw: &RawTensor<'_>) -> Option<f64> {
    let values = raw.to_f32();
    let count = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
    Some(variance.sqrt())
}

fn beta_schedule_of(layout: &Layout) -> Result<BetaSchedule, DetectError> {
    const KEY: &str = "beta_schedule";
    let Some(text) = layout.metadata.get(KEY) else {
        return Ok(BetaSchedule { start: 0.00085, end: 0.012, steps: 1000 });
    };
    let words: Vec<&str> = text.split_whitespace().collect();
    let read = || -> Option<BetaSchedule> {
        let ["scaled_linear", start, end, steps] = words.as_slice() else { return None };
        let schedule =
            BetaSchedule { start: start.parse().ok()?, end: end.parse().ok()?, steps: steps.parse().ok()? };
        let is_sound = schedule.start > 0.0
            && schedule.start < schedule.end
            && schedule.end < 1.0
            && (2..=100_000).contains(&schedule.steps);
        is_sound.then_some(schedule)
    };
    read()
        .ok_or_else(|| layout.bad_metadata(KEY, "\"scaled_linear START END STEPS\" with 0 < START < END < 1"))
}

#[cfg(test)]
mod tests;
