//! Configuration of a CLIP text encoder from its tensors.
//!
//! Architecture: Radford et al. 2021, "Learning Transferable Visual Models
//! From Natural Language Supervision" (arXiv 2103.00020); names as in the `transformers` library's files.

use super::DetectError;
use super::layout::{Layout, Needed, affine};

const NETWORK: &str = "text encoder";
/// Channels of a head in all published CLIP text encoders.
const HEAD_CHANNELS: usize = 64;
/// Ids the tokenizer can give.
const VOCABULARY: usize = 49408;
/// Tokens the tokenizer puts into a chunk.
const CHUNK: usize = 77;

/// The nonlinearity between the two layers of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(1.702 x)`, of OpenAI's models.
    QuickGelu,
    /// `x · Φ(x)`, of OpenCLIP's models.
    Gelu,
}

/// Which of the published text encoders it is, or is shaped like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClipVariant {
    /// OpenAI's ViT-L: SD1.x, and the first encoder of SDXL.
    L,
    /// OpenCLIP's ViT-H: SD2.x.
    H,
    /// OpenCLIP's ViT-bigG: the second encoder of SDXL, the only one of its refiner.
    G,
}

impl ClipVariant {
    /// All of them.
    pub const ALL: [ClipVariant; 3] = [ClipVariant::L, ClipVariant::H, ClipVariant::G];

    /// The name under which embedding files hold their vectors for it.
    pub fn key(self) -> &'static str {
        match self {
            ClipVariant::L => "clip_l",
            ClipVariant::H => "clip_h",
            ClipVariant::G => "clip_g",
        }
    }

    /// The token behind a text's end.
    pub fn pad_token(self) -> u32 {
        if self == ClipVariant::L { 49407 } else { 0 }
    }

    /// Its nonlinearity.
    fn activation(self) -> Activation {
        if self == ClipVariant::L { Activation::QuickGelu } else { Activation::Gelu }
    }

    /// By the number of layers, as the reference tells files apart.
    fn by_layers(layers: usize) -> Self {
        match layers {
            31.. => ClipVariant::G,
            23.. => ClipVariant::H,
            _ => ClipVariant::L,
        }
    }
}

/// Configuration of a CLIP text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Which encoder it is.
    pub variant: ClipVariant,
    /// What its tensors' names begin with.
    pub prefix: String,
    /// Name and width of the projection of the pooled state, if it has one.
    pub projection: Option<(String, usize)>,
    /// Channels of a token.
    pub width: usize,
    /// Number of transformer layers.
    pub layers: usize,
    /// Attention heads of every layer.
    pub heads: usize,
    /// Channels inside the MLPs.
    pub mlp: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Nonlinearity of the MLPs.
    pub activation: Activation,
    /// ε of all layer norms.
    pub layer_norm_eps: f32,
}

impl ClipConfig {
    /// Names and shapes of all tensors it needs.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (p, w) = (&self.prefix, self.width);
        let mut needed: Vec<Needed> = vec![
            (format!("{p}embeddings.token_embedding.weight"), vec![self.vocab, w]),
            (format!("{p}embeddings.position_embedding.weight"), vec![self.max_positions, w]),
        ];
        for i in 0..self.layers {
            let layer = format!("{p}encoder.layers.{i}");
            affine(&mut needed, &format!("{layer}.layer_norm1"), &[w]);
            for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                affine(&mut needed, &format!("{layer}.self_attn.{projection}"), &[w, w]);
            }
            affine(&mut needed, &format!("{layer}.layer_norm2"), &[w]);
            affine(&mut needed, &format!("{layer}.mlp.fc1"), &[self.mlp, w]);
            affine(&mut needed, &format!("{layer}.mlp.fc2"), &[w, self.mlp]);
        }
        affine(&mut needed, &format!("{p}final_layer_norm"), &[w]);
        needed.extend(self.projection.iter().map(|(name, to)| (name.clone(), vec![*to, w])));
        needed
    }
}

/// Reads the encoder under `prefix` and checks it. Its size tells the variant unless its place does.
pub(super) fn derive(
    layout: &Layout,
    prefix: &str,
    variant: Option<ClipVariant>,
) -> Result<ClipConfig, DetectError> {
    let tokens = format!("{prefix}embeddings.token_embedding.weight");
    let positions = format!("{prefix}embeddings.position_embedding.weight");
    let [vocab, width] = layout.dims::<2>(NETWORK, &tokens)?;
    let [max_positions, _] = layout.dims::<2>(NETWORK, &positions)?;
    if vocab < VOCABULARY {
        return Err(layout.odd(&tokens, format!("at least {VOCABULARY} rows, one a token id,")));
    }
    if max_positions < CHUNK {
        return Err(layout.odd(&positions, format!("at least {CHUNK} rows, one a place,")));
    }
    let layers = layout.count(&format!("{prefix}encoder.layers."));
    let [mlp, _] = layout.dims::<2>(NETWORK, &format!("{prefix}encoder.layers.0.mlp.fc1.weight"))?;
    let heads = match layout.number("clip.num_heads", "a whole number of heads")? {
        Some(heads) => heads,
        None => {
            layout.divides("the size of a head", HEAD_CHANNELS, width, "clip.num_heads")?;
            width / HEAD_CHANNELS
        }
    };
    layout.divides("the number of attention heads", heads, width, "clip.num_heads")?;
    let variant = match (variant, layout.metadata.get("clip.variant").map(String::as_str)) {
        (Some(variant), _) => variant,
        (None, None) => ClipVariant::by_layers(layers),
        (None, Some("l")) => ClipVariant::L,
        (None, Some("h")) => ClipVariant::H,
        (None, Some("g")) => ClipVariant::G,
        (None, Some(_)) => return Err(layout.bad_metadata("clip.variant", "l, h or g")),
    };
    let activation = match layout.metadata.get("clip.activation").map(String::as_str) {
        None => variant.activation(),
        Some("quick_gelu") => Activation::QuickGelu,
        Some("gelu") => Activation::Gelu,
        Some(_) => return Err(layout.bad_metadata("clip.activation", "quick_gelu or gelu")),
    };
    let projection = format!("{}text_projection.weight", prefix.trim_end_matches("text_model."));
    let projection = match layout.contains(&projection) {
        true => {
            let [to, _] = layout.dims::<2>(NETWORK, &projection)?;
            Some((projection, to))
        }
        false => None,
    };
    let config = ClipConfig {
        variant,
        prefix: prefix.to_owned(),
        projection,
        width,
        layers,
        heads,
        mlp,
        vocab,
        max_positions,
        activation,
        layer_norm_eps: 1e-5,
    };
    layout.check(NETWORK, &config.tensors())?;
    Ok(config)
}
