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
    /// A UNet in the layout of the diffusers library.
    Diffusers,
    /// Image encoder and decoder.
    Vae,
    /// A CLIP text encoder.
    TextEncoder,
    /// A CLIP picture encoder.
    VisionEncoder,
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
    /// Small networks that change a UNet's attention.
    Hypernetwork,
    /// A model, or a part of one, of a family that this version does not run.
    Foreign(&'static str),
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
    (Kind::Lora, Sign::Contains(".oft_blocks")),
    (Kind::Lora, Sign::Contains(".a1.weight")),
    (Kind::ControlNet, Sign::Begins("control_model.")),
    (Kind::ControlNet, Sign::Contains("input_hint_block.")),
    (Kind::ControlNet, Sign::Contains("controlnet_cond_embedding.")),
    (Kind::Checkpoint, Sign::Begins("model.diffusion_model.")),
    (Kind::DiffusionModel, Sign::Is("input_blocks.0.0.weight")),
    (Kind::Vae, Sign::Begins("decoder.up_blocks.0.")),
    (Kind::Diffusers, Sign::Contains("down_blocks.0.")),
    (Kind::Vae, Sign::Is("decoder.conv_in.weight")),
    (Kind::Vae, Sign::Is("first_stage_model.decoder.conv_in.weight")),
    (Kind::TextEncoder, Sign::Begins("text_model.")),
    (Kind::TextEncoder, Sign::Begins("cond_stage_model.")),
    (Kind::TextEncoder, Sign::Begins("conditioner.embedders.")),
    (Kind::TextEncoder, Sign::Begins("transformer.resblocks.")),
    (Kind::VisionEncoder, Sign::Begins("vision_model.")),
    (Kind::VisionEncoder, Sign::Begins("visual.")),
    (Kind::Embedding, Sign::Is("emb_params")),
    (Kind::Embedding, Sign::Is("clip_l")),
    (Kind::Embedding, Sign::Is("clip_g")),
    (Kind::Upscaler, Sign::Is("conv_first.weight")),
    (Kind::Upscaler, Sign::Begins("model.1.sub.")),
    (Kind::Hypernetwork, Sign::Contains(".0.linear.0.weight")),
    (Kind::Embedding, Sign::Begins("string_to_param.")),
    (Kind::Taesd, Sign::Is("3.conv.0.weight")),
    (Kind::Taesd, Sign::Is("4.conv.0.weight")),
];

/// Parts of names that only models of other families have. Asked before the kinds.
const FOREIGN: &[(&str, &str)] = &[
    ("double_blocks.0.img_attn.", "a Flux or Hunyuan video model"),
    ("transformer_blocks.0.attn.norm_added_k.", "a Flux, Stable Diffusion 3 or Qwen-Image model"),
    ("joint_blocks.0.context_block.", "a Stable Diffusion 3 model"),
    ("double_layers.0.attn.w1q.", "an AuraFlow model"),
    ("mlp_t5.0.", "a HunyuanDiT model"),
    ("cap_embedder.1.", "a Lumina 2 model"),
    ("clip_txt_mapper.", "a Stable Cascade model"),
    ("t5_yproj.", "a Mochi model"),
    ("caption_projection.0.linear.", "a HiDream model"),
    ("patchify_proj.", "an LTX-Video model"),
    ("t_block.1.", "a PixArt model"),
    ("cross_attn.norm_k.", "a Wan model"),
    ("blocks.block0.blocks.0.", "a Cosmos model"),
    ("to_timestep_embed.", "a Stable Audio model"),
    (".time_stack.0.", "a Stable Video Diffusion model"),
    (".temporal_transformer.", "an AnimateDiff motion module"),
    ("encoder.block.0.layer.0.SelfAttention.", "a T5 text encoder"),
    ("enc.blk.0.attn_", "a T5 text encoder"),
    ("model.layers.0.self_attn.q_proj.", "a Llama or Qwen text encoder"),
];

/// What `file` holds.
pub fn kind_of(file: &WeightsFile) -> Kind {
    kind_in(&Layout::as_stored(file))
}

pub(super) fn kind_in(layout: &Layout) -> Kind {
    let is_there = |sign: &Sign| match *sign {
        Sign::Begins(prefix) => layout.has_prefix(prefix),
        Sign::Contains(part) => layout.names().any(|name| name.contains(part)),
        Sign::Is(name) => layout.contains(name),
    };
    let kind = SIGNS.iter().find(|(_, sign)| is_there(sign)).map_or(Kind::Unknown, |&(kind, _)| kind);
    // What changes another family's model is told by what it is, a change.
    if matches!(kind, Kind::Lora | Kind::ControlNet) {
        return kind;
    }
    let foreign = FOREIGN.iter().find(|(part, _)| layout.names().any(|name| name.contains(part)));
    foreign.map_or(kind, |&(_, name)| Kind::Foreign(name))
}

impl Kind {
    /// What to do with a file of this kind that was put in the wrong place.
    pub fn advice(self) -> &'static str {
        match self {
            Kind::Checkpoint => "load it with CheckpointLoaderSimple, from models/checkpoints",
            Kind::DiffusionModel => "load it with UNETLoader, from models/diffusion_models",
            Kind::Diffusers => "load it with UNETLoader, from models/diffusion_models",
            Kind::Vae => "load it with VAELoader, from models/vae",
            Kind::TextEncoder => "load it with CLIPLoader, from models/text_encoders",
            Kind::VisionEncoder => "load it with CLIPVisionLoader, from models/clip_vision",
            Kind::Lora => "load it with LoraLoader, from models/loras",
            Kind::ControlNet => "load it with ControlNetLoader, from models/controlnet",
            Kind::Embedding => "write embedding:NAME in a prompt, with the file in models/embeddings",
            Kind::Upscaler => "load it with UpscaleModelLoader, from models/upscale_models",
            Kind::Hypernetwork => "load it with HypernetworkLoader, from models/hypernetworks",
            Kind::Taesd => "it belongs into models/vae_approx",
            Kind::Foreign(_) => "this version runs Stable Diffusion 1.x, 2.x and XL only",
            Kind::Unknown => "look at its tensor names with `kiln info FILE`",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Checkpoint => "a checkpoint",
            Kind::DiffusionModel => "a UNet without text encoder and VAE",
            Kind::Diffusers => "a UNet in the diffusers layout",
            Kind::Vae => "a VAE",
            Kind::TextEncoder => "a text encoder",
            Kind::VisionEncoder => "a CLIP picture encoder",
            Kind::Lora => "a LoRA",
            Kind::ControlNet => "a ControlNet",
            Kind::Embedding => "an embedding",
            Kind::Upscaler => "an upscaler",
            Kind::Hypernetwork => "a hypernetwork",
            Kind::Taesd => "a TAESD autoencoder",
            Kind::Foreign(name) => name,
            Kind::Unknown => "a file of an unknown kind",
        })
    }
}
