//! Writing models to files: weights as they are under their patches.
//!
//! Types are those that ComfyUI has in memory: diffusion model and VAE in the type
//! that they compute in, text encoders in f16. What unCLIP checkpoints have besides (the picture encoder and the
//! statistics of its embeddings) is copied as it is; ComfyUI leaves it out, and can't use what it saved.

use std::collections::BTreeMap;

use super::image_file::metadata;
use super::loaders::{ClipHandle, VaeHandle};
use super::sd_model::SdModel;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema};
use crate::diffusion::{LatentFormat, ModelHandle};
use crate::files::Kind;
use crate::graph::Input;
use crate::models::detect::{ClipVariant, Family, PLAYGROUND_MARKS, Prediction};
use crate::models::layouts::open_clip::{OpenClipTensor, stored_as};
use crate::models::patch::{DIFFUSION, Values};
use crate::models::text::TextKind;
use crate::tensor::{Backend, DType};
use crate::weights::{SaveEntry, SaveError, save};

/// What names of the parts begin with in a checkpoint.
const UNET: &str = "model.diffusion_model.";
const CLIP: &str = "cond_stage_model.transformer.";
const CLIP_H: &str = "cond_stage_model.model.";
const CLIP_L: &str = "conditioner.embedders.0.transformer.";
const CLIP_G: &str = "conditioner.embedders.1.model.";
const REFINER_CLIP_G: &str = "conditioner.embedders.0.model.";
const VAE: &str = "first_stage_model.";
/// What an unCLIP checkpoint has besides.
const UNCLIP: [&str; 2] = ["embedder.", "noise_augmentor."];
/// Places of a text encoder.
const POSITIONS: usize = 77;
/// The scale of CLIP's comparisons, which no text encoder uses: the reference has one number for all models.
const LOGIT_SCALE: f32 = 4.6055;

/// The saving nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(CheckpointSave), Box::new(ClipSave), Box::new(VaeSave), Box::new(ModelSave)]
}

impl From<SaveError> for NodeError {
    fn from(error: SaveError) -> Self {
        NodeError::failed("OSError", error)
    }
}

fn schema(class: &'static str, about: &'static str) -> Schema {
    Schema::new(class, "advanced/model_merging").module("comfy_extras.nodes_model_merging").describe(about)
}

fn with_file(schema: Schema, prefix: &'static str) -> Schema {
    schema
        .input(Input::string("filename_prefix").opt("default", prefix))
        .input(Input::hidden("prompt", "PROMPT"))
        .input(Input::hidden("extra_pnginfo", "EXTRA_PNGINFO"))
        .sink()
}

/// The type that a backend computes in, as a file holds it.
fn computed_in(backend: &dyn Backend) -> DType {
    if backend.info().element_bytes == 2 { DType::F16 } else { DType::F32 }
}

/// Where the values of a tensor come from.
pub(super) enum Content {
    /// Nowhere: an empty mark.
    Mark,
    /// They are there already.
    Ready(Vec<f32>),
    /// A model.
    Whole(Values),
    /// A model's matrix on its side.
    Transposed(Values),
    /// Several, one after the other.
    Stacked(Vec<Values>),
}

impl Content {
    fn read(&self) -> Vec<f32> {
        match self {
            Content::Mark => Vec::new(),
            Content::Ready(values) => values.clone(),
            Content::Whole(values) => values.read(),
            Content::Stacked(parts) => parts.iter().flat_map(Values::read).collect(),
            Content::Transposed(values) => {
                let (shape, data) = (values.shape(), values.read());
                let &[rows, columns] = shape.as_slice() else { return data };
                let at = |i: usize| data.get(i % rows * columns + i / rows).copied().unwrap_or_default();
                (0..rows * columns).map(at).collect()
            }
        }
    }
}

/// Tensors on their way into a file.
#[derive(Default)]
pub(super) struct Tensors(Vec<(SaveEntry, Content)>);

impl Tensors {
    /// Adds a tensor that is written in half precision.
    pub(super) fn push_f16(&mut self, name: String, shape: Vec<usize>, content: Content) {
        self.0.push((SaveEntry { name, dtype: DType::F16, shape }, content));
    }

    /// Adds values whose names begin with `from`, under names that begin with `to`.
    fn add(&mut self, values: Vec<(String, Values)>, (from, to): (&str, &str), dtype: DType) {
        let renamed = values.into_iter().map(|(name, values)| {
            let name = format!("{to}{}", name.strip_prefix(from).unwrap_or(&name));
            (SaveEntry { name, dtype, shape: values.shape() }, Content::Whole(values))
        });
        self.0.extend(renamed);
    }

    fn add_model(&mut self, ctx: &NodeCtx<'_>, model: &SdModel) -> Result<(), NodeError> {
        let dtype = computed_in(ctx.services.models.placement().diffusion.as_ref());
        self.add(model.file().unet_values(model.patches())?, (DIFFUSION, UNET), dtype);
        let mark = |name: &str, shape| SaveEntry { name: name.to_owned(), dtype: DType::F32, shape };
        match model.file().sampling()?.prediction {
            Prediction::Epsilon => {}
            Prediction::V => self.0.push((mark("v_pred", vec![0]), Content::Mark)),
            // ComfyUI leaves these out, and takes what it saved for another model.
            Prediction::Edm => {
                let marks = PLAYGROUND_MARKS.iter().zip(LatentFormat::PLAYGROUND_STATISTICS);
                self.0.extend(marks.map(|(name, values)| {
                    (mark(name, vec![1, values.len(), 1, 1]), Content::Ready(values.to_vec()))
                }));
            }
        }
        Ok(())
    }

    /// The text encoders, each where checkpoints of the family have it.
    fn add_clip(&mut self, clip: &ClipHandle) -> Result<(), NodeError> {
        let kind = clip.kind()?;
        for part in &clip.parts {
            let from = format!("{}.transformer.", part.variant.key());
            let values = part.file.clip_values(part.variant, &part.patches)?;
            match (kind, part.variant) {
                (TextKind::Sdxl, ClipVariant::L) => {
                    let is_projection = |name: &str| name == format!("{from}text_projection.weight");
                    let values = values.into_iter().filter(|(name, _)| !is_projection(name)).collect();
                    self.add(values, (&from, CLIP_L), DType::F16);
                    self.add_position_ids();
                }
                (_, ClipVariant::L) => self.add(values, (&from, CLIP), DType::F16),
                (TextKind::Sdxl, _) => self.add_open_clip(values, (&from, CLIP_G)),
                (TextKind::SdxlRefiner, _) => self.add_open_clip(values, (&from, REFINER_CLIP_G)),
                _ => self.add_open_clip(values, (&from, CLIP_H)),
            }
        }
        Ok(())
    }

    /// The numbers of the first encoder's places, which SDXL's checkpoints hold.
    fn add_position_ids(&mut self) {
        let name = format!("{CLIP_L}text_model.embeddings.position_ids");
        let entry = SaveEntry { name, dtype: DType::I64, shape: vec![1, POSITIONS] };
        self.0.push((entry, Content::Ready((0..POSITIONS).map(|i| i as f32).collect())));
    }

    /// What the file of an unCLIP model has besides, in halves and singles.
    fn add_unclip(&mut self, model: &SdModel) -> Result<(), NodeError> {
        if model.file().family()? != Family::Sd2Unclip {
            return Ok(());
        }
        for (name, dtype, values) in model.file().stored_values(&UNCLIP)? {
            let dtype = if matches!(dtype, DType::F16 | DType::I64) { dtype } else { DType::F32 };
            self.0.push((SaveEntry { name, dtype, shape: values.shape() }, Content::Whole(values)));
        }
        Ok(())
    }

    /// Adds an encoder under OpenCLIP's names.
    fn add_open_clip(&mut self, values: Vec<(String, Values)>, (from, to): (&str, &str)) {
        let mut fused: BTreeMap<String, [Option<Values>; 3]> = BTreeMap::new();
        let mut push = |name: String, shape: Vec<usize>, content: Content| {
            self.0.push((SaveEntry { name: format!("{to}{name}"), dtype: DType::F16, shape }, content));
        };
        for (name, values) in values {
            match stored_as(name.strip_prefix(from).unwrap_or(&name)) {
                Some(OpenClipTensor::Whole(name)) => push(name, values.shape(), Content::Whole(values)),
                Some(OpenClipTensor::Transposed(name)) => {
                    let shape = values.shape().into_iter().rev().collect();
                    push(name, shape, Content::Transposed(values));
                }
                Some(OpenClipTensor::Third(name, index)) => {
                    let thirds = fused.entry(name).or_default();
                    thirds[index] = Some(values);
                }
                None => tracing::warn!("{name} has no place in a checkpoint, not saved"),
            }
        }
        for (name, thirds) in fused {
            let parts: Vec<Values> = thirds.into_iter().flatten().collect();
            let mut shape = parts.first().map(Values::shape).unwrap_or_default();
            if let Some(rows) = shape.first_mut() {
                *rows *= parts.len();
            }
            push(name, shape, Content::Stacked(parts));
        }
        let entry = SaveEntry { name: format!("{to}logit_scale"), dtype: DType::F32, shape: Vec::new() };
        self.0.push((entry, Content::Ready(vec![LOGIT_SCALE])));
    }

    fn add_vae(&mut self, ctx: &NodeCtx<'_>, vae: &VaeHandle, prefix: &str) -> Result<(), NodeError> {
        if vae.tiny.is_some() {
            return Err(NodeError::input("vae", "is a tiny autoencoder, which is no part of a checkpoint"));
        }
        let dtype = computed_in(ctx.services.models.placement().vae.as_ref());
        self.add(vae.file.vae_values()?, ("", prefix), dtype);
        Ok(())
    }

    /// Writes the file under the next free name of the output folder.
    pub(super) fn write(
        &self,
        ctx: &NodeCtx<'_>,
        prefix: &str,
        texts: &[(String, String)],
    ) -> Result<NodeOutput, NodeError> {
        let mut target = ctx.services.folders.save_path(Kind::Output, prefix, 0, 0)?;
        let entries: Vec<SaveEntry> = self.0.iter().map(|(entry, _)| entry.clone()).collect();
        let read = |i: usize| self.0.get(i).map(|(_, content)| content.read()).unwrap_or_default();
        loop {
            let name = target.next_name(0, "safetensors");
            let path = target.folder.join(name);
            // Another prompt may have taken the name since the folder was read.
            match save(&path, &entries, texts, read) {
                Err(SaveError::Exists(_)) => {}
                result => return Ok(result.map(|()| NodeOutput::default())?),
            }
        }
    }
}

/// What the model predicts, then prompt and workflow.
fn texts(ctx: &NodeCtx<'_>, model: &SdModel) -> Result<Vec<(String, String)>, NodeError> {
    let predicts = match model.file().sampling()?.prediction {
        Prediction::Epsilon => Some("epsilon"),
        Prediction::V => Some("v"),
        Prediction::Edm => None,
    };
    let key = |predicts: &str| ("modelspec.predict_key".to_owned(), predicts.to_owned());
    let mut texts: Vec<(String, String)> = predicts.map(key).into_iter().collect();
    texts.extend(metadata(ctx));
    Ok(texts)
}

/// `CheckpointSave`.
pub struct CheckpointSave;

impl Node for CheckpointSave {
    fn schema(&self) -> Schema {
        let schema = schema("CheckpointSave", "Writes model, text encoder and VAE as one checkpoint file; of an unCLIP model also its picture encoder.")
            .display("Save Checkpoint")
            .input(Input::link("model", "MODEL").bare())
            .input(Input::link("clip", "CLIP").bare())
            .input(Input::link("vae", "VAE").bare());
        with_file(schema, "checkpoints/ComfyUI")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let handle = inputs.object::<ModelHandle>("model")?;
        let (model, clip) = (SdModel::of(&handle)?, inputs.object::<ClipHandle>("clip")?);
        let mut tensors = Tensors::default();
        tensors.add_model(ctx, model)?;
        tensors.add_clip(&clip)?;
        tensors.add_vae(ctx, &*inputs.object::<VaeHandle>("vae")?, VAE)?;
        tensors.add_unclip(model)?;
        tensors.write(ctx, inputs.string("filename_prefix")?, &texts(ctx, model)?)
    }
}

/// `ModelSave`.
pub struct ModelSave;

impl Node for ModelSave {
    fn schema(&self) -> Schema {
        let schema = schema("ModelSave", "Writes a diffusion model to a file.");
        with_file(schema.input(Input::link("model", "MODEL").bare()), "diffusion_models/ComfyUI")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let handle = inputs.object::<ModelHandle>("model")?;
        let model = SdModel::of(&handle)?;
        let mut tensors = Tensors::default();
        tensors.add_model(ctx, model)?;
        tensors.write(ctx, inputs.string("filename_prefix")?, &texts(ctx, model)?)
    }
}

/// `CLIPSave`.
pub struct ClipSave;

impl Node for ClipSave {
    fn schema(&self) -> Schema {
        let schema = schema("CLIPSave", "Writes a text encoder to a file.");
        with_file(schema.input(Input::link("clip", "CLIP").bare()), "clip/ComfyUI")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let mut texts = metadata(ctx);
        if !texts.is_empty() {
            texts.insert(0, ("format".to_owned(), "pt".to_owned()));
        }
        let name = inputs.string("filename_prefix")?;
        for part in &clip.parts {
            let key = part.variant.key();
            let mut tensors = Tensors::default();
            let values = part.file.clip_values(part.variant, &part.patches)?;
            tensors.add(values, (&format!("{key}.transformer."), ""), DType::F16);
            tensors.write(ctx, &format!("{name}_{key}"), &texts)?;
        }
        Ok(NodeOutput::default())
    }
}

/// `VAESave`.
pub struct VaeSave;

impl Node for VaeSave {
    fn schema(&self) -> Schema {
        let schema = schema("VAESave", "Writes a VAE to a file.");
        with_file(schema.input(Input::link("vae", "VAE").bare()), "vae/ComfyUI_vae")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let mut tensors = Tensors::default();
        tensors.add_vae(ctx, &*inputs.object::<VaeHandle>("vae")?, "")?;
        tensors.write(ctx, inputs.string("filename_prefix")?, &metadata(ctx))
    }
}
