//! Latents from files and to files (`*.latent`: safetensors).
//!
//! The tensor is called `latent_tensor`. An empty tensor
//! `latent_format_version_0` marks files with unscaled values; older files
//! without it hold values multiplied by 0.18215.

use std::collections::HashMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value as Json};

use super::image_file::{file_hash, input_path, metadata, save_next, validate_file};
use super::shapes::{check_size, latent, latent_output, tensor};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services};
use crate::diffusion::Latent;
use crate::files::{Kind, PathError};
use crate::graph::{FileList, Input};
use crate::tensor::HostTensor;

const TENSOR: &str = "latent_tensor";
const VERSION_0: &str = "latent_format_version_0";
/// Factor inside files without a version mark.
const OLD_SCALE: f32 = 0.18215;

/// The nodes that read and write latent files.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(SaveLatent), Box::new(LoadLatent)]
}

fn broken(error: impl std::fmt::Display) -> NodeError {
    NodeError::failed("SafetensorError", format!("not a usable .latent file: {error}"))
}

fn to_f32(view: &TensorView<'_>) -> Result<HostTensor, NodeError> {
    check_size(view.shape())?;
    let bytes = view.data();
    let data: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::BF16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        other => return Err(broken(format!("{TENSOR} has type {other:?}; F32, F16 or BF16 are needed"))),
    };
    tensor(view.shape(), data)
}

/// `SaveLatent`.
pub struct SaveLatent;

impl Node for SaveLatent {
    fn schema(&self) -> Schema {
        Schema::new("SaveLatent", "_for_testing")
            .describe("Writes latents to a file in the output folder.")
            .input(Input::link("samples", "LATENT").bare())
            .input(Input::string("filename_prefix").opt("default", "latents/ComfyUI"))
            .input(Input::hidden("prompt", "PROMPT"))
            .input(Input::hidden("extra_pnginfo", "EXTRA_PNGINFO"))
            .sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = latent(inputs, "samples")?;
        let bytes: Vec<u8> = x.samples.data().iter().flat_map(|v| v.to_le_bytes()).collect();
        let samples = TensorView::new(Dtype::F32, x.samples.shape().to_vec(), &bytes).map_err(broken)?;
        let mark = TensorView::new(Dtype::F32, vec![0], &[]).map_err(broken)?;
        let texts: HashMap<String, String> = metadata(ctx).into_iter().collect();
        let texts = (!texts.is_empty()).then_some(texts);
        let file = safetensors::serialize([(TENSOR, samples), (VERSION_0, mark)], texts).map_err(broken)?;
        let prefix = inputs.string("filename_prefix")?;
        let mut target = ctx.services.folders.save_path(Kind::Output, prefix, 0, 0)?;
        let saved = save_next(&mut target, (0, "latent"), Kind::Output, &file)?;
        Ok(NodeOutput::ui(Map::from_iter([("latents".to_owned(), Json::Array(vec![saved]))])))
    }
}

/// `LoadLatent`.
pub struct LoadLatent;

impl Node for LoadLatent {
    fn schema(&self) -> Schema {
        Schema::new("LoadLatent", "_for_testing")
            .describe("Reads latents from a file of the input folder.")
            .input(Input::files("latent", FileList::InputLatents).bare())
            .output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let path = input_path(ctx.services, inputs.string("latent")?)?;
        let bytes = std::fs::read(&path).map_err(|source| PathError::Io { path, source })?;
        let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let samples = to_f32(&file.tensor(TENSOR).map_err(broken)?)?;
        let factor = if file.tensor(VERSION_0).is_ok() { 1.0 } else { 1.0 / OLD_SCALE };
        latent_output(Latent::new(samples.map(|v| v * factor)))
    }

    fn validate(&self, services: &Services, inputs: &Map<String, Json>) -> Result<(), String> {
        validate_file(services, inputs, "latent", "latent")
    }

    fn validated_inputs(&self) -> &'static [&'static str] {
        &["latent"]
    }

    fn fingerprint(&self, services: &Services, inputs: &Map<String, Json>) -> Option<String> {
        file_hash(services, inputs, "latent")
    }
}
