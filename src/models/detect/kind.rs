//! What sort of file this is, from the first telling name: a table.

use std::fmt;

use super::layout::Layout;
use crate::weights::WeightsFile;

/// What a weight file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UNet, usually with text encoder and VAE, in the latent-diffusion layout.
    Checkpoint,
    /// A UNet alone, in the latent-diffusion layout.
    DiffusionModel,
    /// A network in the layout of the diffusers library.
    Diffusers,
    /// Image encoder and decoder.
    Vae,
    /// A CLIP text encoder.
    TextEncoder,
    /// Low-rank changes to another model.
    Lora,
    /// A network that steers a UNet by a picture.
    ControlNet,
    /// Learned words (textual inversion).
    Embedding,
    /// A picture upscaler.
    Upscaler,
    /// A tiny autoencoder for previews.
    Taesd,
    /// Nothing the table knows.
    Unknown,
}

/// How a name tells.
enum Sign {
    Begins(&'static str),
    Contains(&'static str),
    Is(&'static str),
}

/// First hit wins: what changes other models before what it changes, wholes before parts.
const SIGNS: &[(Kind, Sign)] = &[
    (Kind::Lora, Sign::Contains(".lora_down.")),
    (Kind::Lora, Sign::Contains(".lora_up.")),
    (Kind::Lora, Sign::Contains(".lora_A.")),
    (Kind::Lora, Sign::Contains(".hada_w1_a")),
    (Kind::Lora, Sign::Contains(".lokr_w1")),
    (Kind::ControlNet, Sign::Begins("control_model.")),
    (Kind::ControlNet, Sign::Contains("input_hint_block.")),
    (Kind::ControlNet, Sign::Contains("controlnet_cond_embedding.")),
    (Kind::Checkpoint, Sign::Begins("model.diffusion_model.")),
    (Kind::DiffusionModel, Sign::Is("input_blocks.0.0.weight")),
    (Kind::Diffusers, Sign::Contains("down_blocks.0.")),
    (Kind::Vae, Sign::Is("decoder.conv_in.weight")),
    (Kind::Vae, Sign::Is("first_stage_model.decoder.conv_in.weight")),
    (Kind::TextEncoder, Sign::Begins("text_model.")),
    (Kind::TextEncoder, Sign::Begins("cond_stage_model.")),
    (Kind::Embedding, Sign::Is("emb_params")),
    (Kind::Embedding, Sign::Is("clip_l")),
    (Kind::Embedding, Sign::Is("clip_g")),
    (Kind::Upscaler, Sign::Is("conv_first.weight")),
    (Kind::Upscaler, Sign::Begins("model.1.sub.")),
    (Kind::Taesd, Sign::Is("3.conv.0.weight")),
    (Kind::Taesd, Sign::Is("4.conv.0.weight")),
];

/// What `file` holds.
pub fn kind_of(file: &WeightsFile) -> Kind {
    kind_in(&Layout::of(file))
}

pub(super) fn kind_in(layout: &Layout) -> Kind {
    let is_there = |sign: &Sign| match *sign {
        Sign::Begins(prefix) => layout.has_prefix(prefix),
        Sign::Contains(part) => layout.names().any(|name| name.contains(part)),
        Sign::Is(name) => layout.contains(name),
    };
    SIGNS.iter().find(|(_, sign)| is_there(sign)).map_or(Kind::Unknown, |&(kind, _)| kind)
}

impl Kind {
    /// What to do with a file of this kind that was put in the wrong place.
    pub fn advice(self) -> &'static str {
        match self {
            Kind::Checkpoint => "load it with CheckpointLoaderSimple, from models/checkpoints",
            Kind::DiffusionModel => "get the full checkpoint, which also has text encoder and VAE",
            Kind::Diffusers => "get the model's single-file checkpoint instead of the diffusers folder",
            Kind::Vae => "load it with VAELoader, from models/vae",
            Kind::TextEncoder => "load it with CLIPLoader, from models/text_encoders",
            Kind::Lora => "load it with LoraLoader, from models/loras",
            Kind::ControlNet => "load it with ControlNetLoader, from models/controlnet",
            Kind::Embedding => "write embedding:NAME in a prompt, with the file in models/embeddings",
            Kind::Upscaler => "load it with UpscaleModelLoader, from models/upscale_models",
            Kind::Taesd => "it belongs into models/vae_approx",
            Kind::Unknown => "look at its tensor names with `kiln info FILE`",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Checkpoint => "a checkpoint",
            Kind::DiffusionModel => "a UNet without text encoder and VAE",
            Kind::Diffusers => "a network in the diffusers layout",
            Kind::Vae => "a VAE",
            Kind::TextEncoder => "a text encoder",
            Kind::Lora => "a LoRA",
            Kind::ControlNet => "a ControlNet",
            Kind::Embedding => "an embedding",
            Kind::Upscaler => "an upscaler",
            Kind::Taesd => "a TAESD autoencoder",
            Kind::Unknown => "a file of an unknown kind",
        })
    }
}
