//! OpenCLIP's text encoders (SD2.x and SDXL) and picture encoders under the names of the `transformers` library.

use super::{Part, Renamed};

/// Where checkpoints keep an OpenCLIP encoder, and where it is found under this crate's names:
/// ViT-H of SD2.x, ViT-bigG of SDXL, ViT-bigG of the SDXL refiner.
const PLACES: [(&str, &str); 3] = [
    ("cond_stage_model.model.", "clip_h.transformer."),
    ("conditioner.embedders.1.model.", "clip_g.transformer."),
    ("conditioner.embedders.0.model.", "clip_g.transformer."),
];

/// Begins of names inside a layer: stored, ours.
const LAYER: [(&str, &str); 5] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
];

/// How a tensor of an encoder's own names is stored under OpenCLIP's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenClipTensor {
    /// As it is, under this name.
    Whole(String),
    /// On its side, under this name.
    Transposed(String),
    /// As part 0, 1 or 2 of a tensor of this name.
    Third(String, usize),
}

/// The way back: what `text_model.…` and `text_projection.weight` are in OpenCLIP's names.
pub fn stored_as(name: &str) -> Option<OpenClipTensor> {
    let whole = |to: &str| Some(OpenClipTensor::Whole(to.to_owned()));
    let inner = match name {
        "text_projection.weight" => return Some(OpenClipTensor::Transposed("text_projection".to_owned())),
        _ => name.strip_prefix("text_model.")?,
    };
    match inner {
        "embeddings.token_embedding.weight" => return whole("token_embedding.weight"),
        "embeddings.position_embedding.weight" => return whole("positional_embedding"),
        "final_layer_norm.weight" => return whole("ln_final.weight"),
        "final_layer_norm.bias" => return whole("ln_final.bias"),
        _ => {}
    }
    let (layer, rest) = inner.strip_prefix("encoder.layers.")?.split_once('.')?;
    let layer = format!("transformer.resblocks.{layer}.");
    if let Some((to, from)) = LAYER.iter().find(|(_, from)| rest.starts_with(from)) {
        return whole(&format!("{layer}{to}{}", &rest[from.len()..]));
    }
    let (letter, kind) = rest.strip_prefix("self_attn.")?.split_once("_proj.")?;
    let third = ["q", "k", "v"].iter().position(|known| *known == letter)?;
    Some(OpenClipTensor::Third(format!("{layer}attn.in_proj_{kind}"), third))
}

/// What `name` becomes; `None` if it is not of an OpenCLIP encoder. `is_bare`: the file holds one without prefix.
pub(super) fn rename(name: &str, is_bare: bool) -> Option<Renamed> {
    for (from, to) in PLACES {
        if let Some(inner) = name.strip_prefix(from) {
            return inside(inner, to);
        }
    }
    if let Some((prefix, inner)) = name.split_once("visual.")
        && (prefix.is_empty() || prefix == "embedder.model.")
    {
        return visual(inner, prefix);
    }
    // Text encoder files that an old version of the reference saved have a transposed projection among our names.
    if is_bare || name == "text_projection" { inside(name, "") } else { None }
}

/// A picture encoder's tensor.
fn visual(name: &str, prefix: &str) -> Option<Renamed> {
    let whole = |to: &str| Some(vec![(format!("{prefix}vision_model.{to}"), Part::Whole)]);
    match name {
        "class_embedding" => whole("embeddings.class_embedding"),
        "conv1.weight" => whole("embeddings.patch_embedding.weight"),
        "positional_embedding" => whole("embeddings.position_embedding.weight"),
        "ln_pre.weight" => whole("pre_layrnorm.weight"),
        "ln_pre.bias" => whole("pre_layrnorm.bias"),
        "ln_post.weight" => whole("post_layernorm.weight"),
        "ln_post.bias" => whole("post_layernorm.bias"),
        "proj" => Some(vec![(format!("{prefix}visual_projection.weight"), Part::Transposed)]),
        _ => layer(name, &format!("{prefix}vision_model.")),
    }
}

fn inside(name: &str, prefix: &str) -> Option<Renamed> {
    let whole = |to: &str| Some(vec![(format!("{prefix}{to}"), Part::Whole)]);
    match name {
        "token_embedding.weight" => return whole("text_model.embeddings.token_embedding.weight"),
        "positional_embedding" => return whole("text_model.embeddings.position_embedding.weight"),
        "ln_final.weight" => return whole("text_model.final_layer_norm.weight"),
        "ln_final.bias" => return whole("text_model.final_layer_norm.bias"),
        "text_projection" => {
            return Some(vec![(format!("{prefix}text_projection.weight"), Part::Transposed)]);
        }
        "text_projection.weight" => return whole("text_projection.weight"),
        _ => {}
    }
    layer(name, &format!("{prefix}text_model."))
}

/// A tensor of a transformer layer, of an encoder whose names begin with `prefix`.
fn layer(name: &str, prefix: &str) -> Option<Renamed> {
    let (layer, rest) = name.strip_prefix("transformer.resblocks.")?.split_once('.')?;
    let whole = |to: &str| Some(vec![(format!("{prefix}{to}"), Part::Whole)]);
    let layer = format!("encoder.layers.{layer}.");
    if let Some((from, to)) = LAYER.iter().find(|(from, _)| rest.starts_with(from)) {
        return whole(&format!("{layer}{to}{}", &rest[from.len()..]));
    }
    let kind = match rest {
        "attn.in_proj_weight" => "weight",
        "attn.in_proj_bias" => "bias",
        _ => return None,
    };
    let part = |(index, letter)| {
        let to = format!("{prefix}{layer}self_attn.{letter}_proj.{kind}");
        (to, Part::Slice { index, of: 3 })
    };
    Some(["q", "k", "v"].into_iter().enumerate().map(part).collect())
}
