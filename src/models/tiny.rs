//! Tiny models of every family: real layouts, small widths, a few megabytes.
//!
//! They are for tests of everything around a model: detection, loaders,
//! conditioning, sampling, backends. Weights are synthetic, so pictures are noise.
//! What shapes cannot tell (heads, groups) stands in the file's metadata.

use std::path::Path;

use super::detect::{Activation, ClipConfig, ClipVariant, Heads, UnetConfig, VaeConfig};
use crate::tensor::DType;
use crate::weights::synth::{self, Manifest, SynthError, Written};

/// A tensor's name and shape.
type Shapes = Vec<(String, Vec<usize>)>;

/// Which networks a tiny file holds.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    unet: Option<UnetRow>,
    /// Encoders with what their names begin with, in OpenCLIP's names for H and G.
    clips: &'static [(ClipVariant, &'static str)],
    vae: Option<&'static str>,
    vision: Option<Vision>,
    metadata: &'static [(&'static str, &'static str)],
}

/// A picture encoder.
#[derive(Clone, Copy)]
struct Vision {
    /// Below `embedder.model.visual.`, in OpenCLIP's names, with the statistics of its embeddings.
    is_of_unclip: bool,
    projection: usize,
}

#[derive(Clone, Copy)]
struct UnetRow {
    prefix: &'static str,
    in_channels: usize,
    model_channels: usize,
    depths: &'static [usize],
    context_dim: usize,
    is_linear: bool,
    adm_channels: Option<usize>,
}

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const SD1: UnetRow = UnetRow {
    prefix: UNET,
    in_channels: 4,
    model_channels: 32,
    depths: &[1, 1, 0],
    context_dim: 32,
    is_linear: false,
    adm_channels: None,
};
const SD2: UnetRow = UnetRow { model_channels: 64, is_linear: true, ..SD1 };
const SDXL: UnetRow = UnetRow { depths: &[0, 1, 2], context_dim: 64, adm_channels: Some(2816), ..SD2 };
const REFINER: UnetRow = UnetRow { depths: &[0, 1, 0], context_dim: 32, adm_channels: Some(2560), ..SD2 };
const L: (ClipVariant, &str) = (ClipVariant::L, "cond_stage_model.transformer.");
const H: (ClipVariant, &str) = (ClipVariant::H, "cond_stage_model.model.");
const XL: &[(ClipVariant, &str)] = &[
    (ClipVariant::L, "conditioner.embedders.0.transformer."),
    (ClipVariant::G, "conditioner.embedders.1.model."),
];
const GROUPS: (&str, &str) = ("group_norm.num_groups", "8");
const TEXT_HEADS: (&str, &str) = ("clip.num_heads", "2");
const SIZES: [(&str, &str); 2] = [("native_width", "64"), ("native_height", "64")];
const ONE_HEADS: &[(&str, &str)] = &[GROUPS, TEXT_HEADS, ("unet.num_heads", "2"), SIZES[0], SIZES[1]];
const MANY_HEADS: &[(&str, &str)] = &[GROUPS, TEXT_HEADS, SIZES[0], SIZES[1]];
const V_HEADS: &[(&str, &str)] = &[GROUPS, TEXT_HEADS, ("prediction", "v"), SIZES[0], SIZES[1]];

const VISION_HEADS: (&str, &str) = ("clip_vision.num_heads", "2");
const UNCLIP: &[(&str, &str)] = &[GROUPS, TEXT_HEADS, VISION_HEADS, ("prediction", "v"), SIZES[0], SIZES[1]];

/// A whole checkpoint.
const fn checkpoint(
    name: &'static str,
    unet: UnetRow,
    clips: &'static [(ClipVariant, &'static str)],
    metadata: &'static [(&'static str, &'static str)],
) -> Row {
    Row { name, unet: Some(unet), clips, vae: Some(VAE), vision: None, metadata }
}

/// A file with one network.
const fn part(
    name: &'static str,
    clips: &'static [(ClipVariant, &'static str)],
    metadata: &'static [(&'static str, &'static str)],
) -> Row {
    Row { name, unet: None, clips, vae: None, vision: None, metadata }
}

/// An unCLIP model steered by embeddings of `projection` values.
const fn unclip(name: &'static str, projection: usize) -> Row {
    let unet = UnetRow { adm_channels: Some(2 * projection), ..SD2 };
    Row { vision: Some(Vision { is_of_unclip: true, projection }), ..checkpoint(name, unet, &[H], UNCLIP) }
}

const ROWS: &[Row] = &[
    checkpoint("sd1", SD1, &[L], ONE_HEADS),
    checkpoint("sd1-inpaint", UnetRow { in_channels: 9, ..SD1 }, &[L], ONE_HEADS),
    checkpoint("sd1-ip2p", UnetRow { in_channels: 8, ..SD1 }, &[L], ONE_HEADS),
    checkpoint("sd2", SD2, &[H], MANY_HEADS),
    checkpoint("sd2-v", SD2, &[H], V_HEADS),
    unclip("sd2-unclip-l", 768),
    unclip("sd2-unclip-h", 1024),
    checkpoint("sdxl", SDXL, XL, MANY_HEADS),
    checkpoint("sdxl-inpaint", UnetRow { in_channels: 9, ..SDXL }, XL, MANY_HEADS),
    checkpoint("sdxl-refiner", REFINER, &[(ClipVariant::G, "conditioner.embedders.0.model.")], MANY_HEADS),
    Row { unet: Some(UnetRow { prefix: "", ..SDXL }), ..part("sdxl-unet", &[], MANY_HEADS) },
    Row { unet: Some(UnetRow { prefix: "", ..SD1 }), ..part("sd1-unet", &[], ONE_HEADS) },
    Row { vae: Some(""), ..part("vae", &[], MANY_HEADS) },
    Row {
        vision: Some(Vision { is_of_unclip: false, projection: 768 }),
        ..part("clip-vision", &[], &[VISION_HEADS])
    },
    part("clip-l", &[(ClipVariant::L, "")], &[TEXT_HEADS, ("clip.variant", "l")]),
    part("clip-h", &[(ClipVariant::H, "")], &[TEXT_HEADS, ("clip.variant", "h")]),
    part("clip-g", &[(ClipVariant::G, "")], &[TEXT_HEADS, ("clip.variant", "g")]),
];

/// Names that [`write`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.name)
}

/// Writes the tiny model called `name` to `out`; `None` if there is none of that name.
///
/// # Errors
/// If the file cannot be written.
pub fn write(name: &str, out: &Path, dtype: DType) -> Option<Result<Written, SynthError>> {
    let row = ROWS.iter().find(|row| row.name == name)?;
    let manifest = Manifest::from_shapes(shapes_of(row));
    let metadata: Vec<_> = row.metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    Some(synth::write(&manifest, out, dtype, &metadata, |_, _| {}))
}

fn shapes_of(row: &Row) -> Shapes {
    let mut shapes = row.unet.map(|unet| unet_config(&unet).tensors()).unwrap_or_default();
    for &(variant, prefix) in row.clips {
        let config = clip_config(variant, if variant == ClipVariant::L { prefix } else { "" });
        match variant {
            ClipVariant::L => shapes.extend(config.tensors()),
            ClipVariant::H | ClipVariant::G => shapes.extend(open_clip(&config, prefix)),
        }
    }
    shapes.extend(row.vae.map(|prefix| vae_config(prefix).tensors()).unwrap_or_default());
    shapes.extend(row.vision.map(|vision| vision_shapes(&vision)).unwrap_or_default());
    shapes
}

/// A picture encoder's tensors: 4×4 patches of 16 pixels.
fn vision_shapes(vision: &Vision) -> Shapes {
    let (w, mlp, layers, patch, tokens) = (32, 64, 3, 16, 17);
    if !vision.is_of_unclip {
        let mut shapes: Shapes = vec![
            ("vision_model.embeddings.class_embedding".into(), vec![w]),
            ("vision_model.embeddings.patch_embedding.weight".into(), vec![w, 3, patch, patch]),
            ("vision_model.embeddings.position_embedding.weight".into(), vec![tokens, w]),
            ("visual_projection.weight".into(), vec![vision.projection, w]),
        ];
        let mut affine = |name: String, shape: &[usize]| {
            shapes.push((format!("vision_model.{name}.weight"), shape.to_vec()));
            shapes.push((format!("vision_model.{name}.bias"), shape[..1].to_vec()));
        };
        affine("pre_layrnorm".into(), &[w]);
        affine("post_layernorm".into(), &[w]);
        for i in 0..layers {
            for (part, shape) in [
                ("layer_norm1", &[w][..]),
                ("layer_norm2", &[w]),
                ("self_attn.q_proj", &[w, w]),
                ("self_attn.k_proj", &[w, w]),
                ("self_attn.v_proj", &[w, w]),
                ("self_attn.out_proj", &[w, w]),
                ("mlp.fc1", &[mlp, w]),
                ("mlp.fc2", &[w, mlp]),
            ] {
                affine(format!("encoder.layers.{i}.{part}"), shape);
            }
        }
        return shapes;
    }
    let mut shapes: Shapes = vec![
        ("class_embedding".into(), vec![w]),
        ("conv1.weight".into(), vec![w, 3, patch, patch]),
        ("positional_embedding".into(), vec![tokens, w]),
        ("proj".into(), vec![w, vision.projection]),
    ];
    for name in ["ln_pre", "ln_post"] {
        shapes.extend([(format!("{name}.weight"), vec![w]), (format!("{name}.bias"), vec![w])]);
    }
    shapes.extend(open_clip_layers((w, mlp, layers)));
    let mut shapes: Shapes =
        shapes.into_iter().map(|(name, shape)| (format!("embedder.model.visual.{name}"), shape)).collect();
    for name in ["data_mean", "data_std"] {
        shapes.push((format!("noise_augmentor.{name}"), vec![vision.projection]));
    }
    shapes
}

fn unet_config(row: &UnetRow) -> UnetConfig {
    let output_depth = row.depths.iter().rev().flat_map(|&depth| [depth; 2]).collect();
    UnetConfig {
        prefix: row.prefix.to_owned(),
        in_channels: row.in_channels,
        out_channels: 4,
        model_channels: row.model_channels,
        time_embed_dim: 4 * row.model_channels,
        channel_mult: vec![1, 2, 2],
        num_res_blocks: vec![1; 3],
        input_depth: row.depths.to_vec(),
        middle_depth: 1,
        output_depth,
        context_dim: row.context_dim,
        heads: Heads::Count(1),
        norm_groups: 8,
        use_linear_in_transformer: row.is_linear,
        adm_channels: row.adm_channels,
    }
}

fn clip_config(variant: ClipVariant, prefix: &str) -> ClipConfig {
    ClipConfig {
        variant,
        prefix: format!("{prefix}text_model."),
        projection: None,
        width: 32,
        layers: 3,
        heads: 2,
        mlp: 64,
        vocab: 49408,
        max_positions: 77,
        activation: Activation::Gelu,
        layer_norm_eps: 1e-5,
    }
}

fn vae_config(prefix: &str) -> VaeConfig {
    VaeConfig {
        prefix: prefix.to_owned(),
        ch: 16,
        ch_mult: vec![1, 2, 2, 4],
        num_res_blocks: 1,
        z_channels: 4,
        in_channels: 3,
        out_channels: 3,
        norm_groups: 8,
        has_attention: true,
        has_quant_conv: true,
    }
}

/// The encoder's tensors as OpenCLIP stores them, with a projection to the width that SDXL's vector needs.
fn open_clip(config: &ClipConfig, prefix: &str) -> Shapes {
    let (w, mlp) = (config.width, config.mlp);
    let pooled = if config.variant == ClipVariant::G { 1280 } else { w };
    let mut shapes = vec![
        ("token_embedding.weight".to_owned(), vec![config.vocab, w]),
        ("positional_embedding".to_owned(), vec![config.max_positions, w]),
        ("text_projection".to_owned(), vec![w, pooled]),
    ];
    shapes.extend([("ln_final.weight".to_owned(), vec![w]), ("ln_final.bias".to_owned(), vec![w])]);
    shapes.extend(open_clip_layers((w, mlp, config.layers)));
    shapes.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect()
}

/// Transformer layers of a width and an inner width as OpenCLIP stores them.
fn open_clip_layers((w, mlp, layers): (usize, usize, usize)) -> Shapes {
    let mut shapes = Shapes::new();
    let mut affine = |name: String, shape: &[usize]| {
        shapes.push((format!("{name}.weight"), shape.to_vec()));
        shapes.push((format!("{name}.bias"), shape[..1].to_vec()));
    };
    for i in 0..layers {
        let layer = format!("transformer.resblocks.{i}");
        affine(format!("{layer}.ln_1"), &[w]);
        affine(format!("{layer}.ln_2"), &[w]);
        affine(format!("{layer}.attn.out_proj"), &[w, w]);
        affine(format!("{layer}.mlp.c_fc"), &[mlp, w]);
        affine(format!("{layer}.mlp.c_proj"), &[w, mlp]);
    }
    for i in 0..layers {
        let fused = format!("transformer.resblocks.{i}.attn.in_proj");
        shapes.push((format!("{fused}_weight"), vec![3 * w, w]));
        shapes.push((format!("{fused}_bias"), vec![3 * w]));
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::detect::{self, Family, Kind, Prediction};
    use crate::weights::WeightsFile;

    fn written(name: &str) -> std::sync::Arc<WeightsFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.safetensors");
        write(name, &path, DType::F16).unwrap().unwrap();
        WeightsFile::open(&path).unwrap()
    }

    #[test]
    fn every_tiny_checkpoint_is_detected_as_what_it_is() {
        use ClipVariant::{G, H, L};
        use Prediction::{Epsilon, V};
        let expected: [(&str, Family, Prediction, usize, &[ClipVariant]); 10] = [
            ("sd1", Family::Sd1, Epsilon, 4, &[L]),
            ("sd1-inpaint", Family::Sd1, Epsilon, 9, &[L]),
            ("sd1-ip2p", Family::Sd1, Epsilon, 8, &[L]),
            ("sd2", Family::Sd2, Epsilon, 4, &[H]),
            ("sd2-v", Family::Sd2, V, 4, &[H]),
            ("sd2-unclip-l", Family::Sd2Unclip, V, 4, &[H]),
            ("sd2-unclip-h", Family::Sd2Unclip, V, 4, &[H]),
            ("sdxl", Family::Sdxl, Epsilon, 4, &[L, G]),
            ("sdxl-inpaint", Family::Sdxl, Epsilon, 9, &[L, G]),
            ("sdxl-refiner", Family::SdxlRefiner, Epsilon, 4, &[G]),
        ];
        for (name, family, prediction, channels, variants) in expected {
            let file = written(name);
            let found = detect::detect(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
            let clips: Vec<_> = found.clips.iter().map(|c| c.variant).collect();
            assert_eq!(
                (found.family, found.sampling.prediction, found.unet.in_channels, clips.as_slice()),
                (family, prediction, channels, variants),
                "{name}"
            );
            assert!(found.vae.is_some() && found.unused.is_empty(), "{name}: {:?}", found.unused);
            assert!(file.len_bytes() < 24 << 20, "{name}: {} bytes", file.len_bytes());
        }
    }

    #[test]
    fn every_tiny_part_is_detected_as_what_it_is() {
        for (name, kind) in [
            ("sdxl-unet", Kind::DiffusionModel),
            ("sd1-unet", Kind::DiffusionModel),
            ("vae", Kind::Vae),
            ("clip-vision", Kind::VisionEncoder),
            ("clip-l", Kind::TextEncoder),
            ("clip-h", Kind::TextEncoder),
            ("clip-g", Kind::TextEncoder),
        ] {
            assert_eq!(detect::kind_of(&written(name)), kind, "{name}");
        }
        assert_eq!(detect::detect(&written("sdxl-unet")).unwrap().family, Family::Sdxl);
        let clips = detect::detect_text_encoders(&written("clip-g")).unwrap();
        let found = clips.iter().map(|c| (c.variant, c.projection.as_ref().map(|(_, w)| *w)));
        assert_eq!(found.collect::<Vec<_>>(), [(ClipVariant::G, Some(1280))]);
    }
}
