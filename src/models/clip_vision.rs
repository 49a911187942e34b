//! CLIP's picture encoder (Radford et al. 2021): ViT-L, ViT-H and ViT-bigG, told apart by their depth.
//!
//! Pictures come prepared ([`side`](ClipVision::side) pixels, normalised). Patches, the
//! class token and places are put together on the host: once a picture, that is
//! little. Files are in the `transformers` library's names, or in OpenCLIP's, which
//! [`layouts`](super::layouts) translates; unCLIP checkpoints have one below `embedder.model.`.

use std::sync::Arc;

use super::ModelError;
use super::clip::{Layer, LayerKind};
use super::detect::Activation;
use super::layers::{LazyLinear, LazyNorm, Loader, Ops};
use super::store::{Network, Opening};
use crate::tensor::{Backend, HostTensor, Linear, Tensor};

/// Where files keep the encoder.
const PLACES: [&str; 2] = ["", "embedder.model."];
/// Heads of all published picture encoders.
const HEADS: usize = 16;
/// Metadata key for models of unusual size.
const HEADS_KEY: &str = "clip_vision.num_heads";
const EPS: f32 = 1e-5;
/// Patches are filled up to a multiple of this many values, for the backends' sake.
const STEP: usize = 32;
/// ViT-L has fewer layers than this, and another activation than its larger successors.
const LARGE: usize = 30;

/// What the encoder makes of pictures.
#[derive(Clone, Debug)]
pub struct VisionOutput {
    /// Tokens after the last layer `[B, S, C]`.
    pub last_hidden_state: HostTensor,
    /// Tokens before it.
    pub penultimate_hidden_states: HostTensor,
    /// The projected class token `[B, P]`.
    pub image_embeds: HostTensor,
}

/// A picture encoder on a backend.
pub struct ClipVision {
    backend: Arc<dyn Backend>,
    kind: LayerKind,
    width: usize,
    /// Patches in each direction, pixels of a patch in each direction.
    grid: usize,
    patch: usize,
    patches: LazyLinear,
    class: Vec<f32>,
    places: Vec<f32>,
    pre_norm: LazyNorm,
    layers: Vec<Layer>,
    post_norm: LazyNorm,
    projection: LazyLinear,
}

impl Network for ClipVision {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let backend = opening.placement.text.clone();
        let loader = Loader::new(opening.source.clone(), backend.clone(), "");
        let is_there = |place: &&str| loader.has(&format!("{place}vision_model.embeddings.class_embedding"));
        let place = PLACES.into_iter().find(is_there);
        let place = place.ok_or_else(|| opening.is_not("a CLIP picture encoder"))?;
        let heads = match opening.file.metadata().get(HEADS_KEY) {
            Some(text) => text.parse().map_err(|_| {
                ModelError::File(format!("metadata {HEADS_KEY} is {text:?}, not a number of heads"))
            })?,
            None => HEADS,
        };
        Self::load(
            backend,
            &Loader::new(opening.source.clone(), opening.placement.text.clone(), place),
            heads,
        )
    }
}

impl ClipVision {
    /// Checks the tensors under `loader`; packs nothing yet.
    ///
    /// # Errors
    /// If one is missing or has another shape than the others ask for.
    pub fn load(backend: Arc<dyn Backend>, loader: &Loader, heads: usize) -> Result<Self, ModelError> {
        let model = loader.sub("vision_model");
        let shape = |name: &str| {
            model.shape(name).ok_or_else(|| ModelError::Missing { name: format!("vision_model.{name}") })
        };
        let extent = |shape: &[usize], i: usize| shape.get(i).copied().unwrap_or(1).max(1);
        let patches = shape("embeddings.patch_embedding.weight")?;
        let (width, channels, patch) = (extent(&patches, 0), extent(&patches, 1), extent(&patches, 2));
        let tokens = extent(&shape("embeddings.position_embedding.weight")?, 0);
        let grid = (tokens - 1).isqrt();
        if grid == 0 || grid * grid + 1 != tokens || channels != 3 {
            let what = "places of a square of patches and a class token";
            return Err(ModelError::Input { what, expected: grid * grid + 1, found: tokens });
        }
        if heads == 0 || !width.is_multiple_of(heads) {
            let what =
                "attention heads of the picture encoder (clip_vision.num_heads in the file's metadata)";
            return Err(ModelError::Input { what, expected: HEADS, found: heads });
        }
        let mlp = extent(&shape("encoder.layers.0.mlp.fc1.weight")?, 0);
        let layer = |i: usize| model.sub("encoder.layers").sub(i);
        let depth = (0..).take_while(|&i| layer(i).has("layer_norm1.weight")).count();
        let activation = if depth < LARGE { Activation::QuickGelu } else { Activation::Gelu };
        let name = "visual_projection.weight";
        let projection = loader.shape(name).ok_or_else(|| ModelError::Missing { name: name.to_owned() })?;
        let padded = (channels * patch * patch).next_multiple_of(STEP);
        Ok(Self {
            kind: LayerKind { heads, activation, is_causal: false, eps: EPS },
            patches: model.patches("embeddings.patch_embedding", (width, channels, patch), padded)?,
            class: model.read("embeddings.class_embedding", &[width])?,
            places: model.read("embeddings.position_embedding.weight", &[tokens, width])?,
            pre_norm: model.norm("pre_layrnorm", width)?,
            layers: (0..depth).map(|i| Layer::load(&layer(i), width, mlp)).collect::<Result<_, _>>()?,
            post_norm: model.norm("post_layernorm", width)?,
            projection: loader.linear("visual_projection", extent(&projection, 0), width)?,
            width,
            grid,
            patch,
            backend,
        })
    }

    /// Height and width of the pictures that the encoder takes.
    pub fn side(&self) -> usize {
        self.grid * self.patch
    }

    /// Encodes pictures `[B, 3, side, side]`.
    ///
    /// # Errors
    /// If the pictures have another size, or the backend fails.
    pub fn encode(&self, pictures: &HostTensor) -> Result<VisionOutput, ModelError> {
        let side = self.side();
        let (expected, found) = (3 * side * side, pictures.len() / pictures.dim(0).max(1));
        if pictures.shape().len() != 4 || expected != found {
            return Err(ModelError::Input { what: "values of a picture to encode", expected, found });
        }
        let ops = Ops(self.backend.as_ref());
        let mut x = self.tokens(ops, pictures)?;
        let mut penultimate: Option<HostTensor> = None;
        for (i, layer) in self.layers.iter().enumerate() {
            if i + 1 == self.layers.len() {
                penultimate = Some(ops.download_tokens(&x)?);
            }
            x = layer.forward(ops, self.kind, &x)?;
        }
        let last = ops.download_tokens(&x)?;
        ModelError::check_numbers("picture encoder", pictures.data(), last.data())?;
        let class = (0..last.dim(0)).flat_map(|i| last.row(i)[..self.width].iter().copied()).collect();
        let pooled = sized(&[last.dim(0), 1, self.width], class)?;
        let pooled = ops.layer_norm(&ops.upload_tokens(&pooled)?, &self.post_norm, EPS)?;
        let w = self.projection.get()?;
        let embeds = ops.download_tokens(&ops.linear(&Linear::new(&pooled, w))?)?;
        Ok(VisionOutput {
            image_embeds: sized(&[last.dim(0), w.n], embeds.into_data())?,
            penultimate_hidden_states: penultimate.unwrap_or_else(|| last.clone()),
            last_hidden_state: last,
        })
    }

    /// The class token and the patches with their places, normalised.
    fn tokens(&self, ops: Ops<'_>, pictures: &HostTensor) -> Result<Tensor, ModelError> {
        let (batch, grid, patch, side) = (pictures.dim(0), self.grid, self.patch, self.side());
        let w = self.patches.get()?;
        let used = 3 * patch * patch;
        let padded = used.next_multiple_of(STEP);
        let patches = HostTensor::from_fn(&[batch, grid * grid, padded], |i| {
            let (picture, place, k) = (i / (padded * grid * grid), i / padded % (grid * grid), i % padded);
            if k >= used {
                return 0.0;
            }
            let (channel, row, column) = (k / (patch * patch), k / patch % patch, k % patch);
            let (y, x) = (place / grid * patch + row, place % grid * patch + column);
            pictures.data()[((picture * 3 + channel) * side + y) * side + x]
        });
        let embedded = ops.download_tokens(&ops.linear(&Linear::new(&ops.upload_tokens(&patches)?, w))?)?;
        let tokens = grid * grid + 1;
        let mut data = Vec::with_capacity(batch * tokens * self.width);
        for picture in 0..batch {
            let first = self.class.iter().chain(embedded.row(picture));
            data.extend(first.zip(&self.places).map(|(value, place)| value + place));
        }
        let x = ops.upload_tokens(&sized(&[batch, tokens, self.width], data)?)?;
        ops.layer_norm(&x, &self.pre_norm, EPS)
    }
}

fn sized(shape: &[usize], data: Vec<f32>) -> Result<HostTensor, ModelError> {
    let (expected, found) = (shape.iter().product(), data.len());
    HostTensor::new(shape, data).ok_or(ModelError::Input {
        what: "values of encoded pictures",
        expected,
        found,
    })
}
