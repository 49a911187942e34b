//! OpenCLIP's text encoders (SD2.x and SDXL) under the names of the `transformers` library.

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

/// What `name` becomes; `None` if it is not of an OpenCLIP encoder. `is_bare`: the file holds one without prefix.
pub(super) fn rename(name: &str, is_bare: bool) -> Option<Renamed> {
    for (from, to) in PLACES {
        if let Some(inner) = name.strip_prefix(from) {
            return inside(inner, to);
        }
    }
    // Text encoder files that an old version of the reference saved have a transposed projection among our names.
    if is_bare || name == "text_projection" { inside(name, "") } else { None }
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
    let (layer, rest) = name.strip_prefix("transformer.resblocks.")?.split_once('.')?;
    let layer = format!("text_model.encoder.layers.{layer}.");
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
