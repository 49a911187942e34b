//! LoRA loaders: files of small changes to a model's and a text encoder's weights.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::loaders::ClipHandle;
use super::sd_model::SdModel;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value};
use crate::diffusion::ModelHandle;
use crate::files::ModelPath;
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::lora::{Lora, Target};
use crate::weights::WeightsFile;

/// The LoRA loaders.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(LoraLoader), Box::new(LoraLoaderModelOnly)]
}

fn strength(name: &'static str) -> Input {
    Input::float(name, 1.0, -100.0, 100.0).opt("step", 0.01)
}

fn open(services: &Services, name: &str) -> Result<Arc<WeightsFile>, NodeError> {
    let path = services.folders.model_path("loras", name);
    match path.map_err(|e| NodeError::failed("FileNotFoundError", e))? {
        ModelPath::File(path) => Ok(WeightsFile::open(&path).map_err(ModelError::from)?),
        ModelPath::Embedded { name, bytes } => {
            Ok(WeightsFile::from_static(bytes, name).map_err(ModelError::from)?)
        }
    }
}

/// The names in the file that neither model knows, as one line in the log.
fn report_unused(name: &str, loras: &[Lora]) {
    let Some((first, rest)) = loras.split_first() else { return };
    let mut unused: BTreeSet<&String> = first.unused.iter().collect();
    unused.retain(|name| rest.iter().all(|lora| lora.unused.contains(name)));
    for key in &unused {
        tracing::debug!("lora key not loaded: {key}");
    }
    if let Some(first) = unused.first() {
        tracing::warn!("{name}: {} lora keys not loaded, such as {first}", unused.len());
    }
}

/// Fails if the file was made for another family: nothing in it fits, or much of
/// what has the right name has another shape.
fn expect_fit(name: &str, file: &WeightsFile, loras: &[Lora]) -> Result<(), NodeError> {
    let fitting: usize = loras.iter().map(|lora| lora.changes.len()).sum();
    let misfits: Vec<&String> = loras.iter().flat_map(|lora| &lora.misfits).collect();
    let why = match (file.names().next(), misfits.first()) {
        (_, Some(misfit)) if misfits.len() * 4 > fitting => {
            format!(
                "{} of its changes have another shape than the model's tensor, such as '{misfit}'",
                misfits.len()
            )
        }
        (Some(first), _) if fitting == 0 => {
            format!("none of its tensors belongs to this model (the first is '{first}')")
        }
        _ => {
            misfits
                .iter()
                .for_each(|misfit| tracing::warn!("{name}: {misfit} has another shape, not changed"));
            return Ok(());
        }
    };
    let advice = "it was made for another family of models; choose a LoRA for this one";
    Err(NodeError::failed("ModelError", format!("LoRA '{name}' doesn't fit: {why}; {advice}")))
}

fn read(file: &Arc<WeightsFile>, targets: Result<Vec<Target>, ModelError>) -> Result<Lora, NodeError> {
    Ok(Lora::read(file, &targets?))
}

/// `LoraLoader`.
pub struct LoraLoader;

impl Node for LoraLoader {
    fn schema(&self) -> Schema {
        Schema::new("LoraLoader", "loaders")
            .display("Load LoRA")
            .describe("Changes the weights of a diffusion model and its text encoder by a LoRA file. Can be chained.")
            .input(Input::link("model", "MODEL"))
            .input(Input::link("clip", "CLIP"))
            .input(Input::model_file("lora_name", "loras"))
            .input(strength("strength_model"))
            .input(strength("strength_clip"))
            .output("MODEL")
            .output("CLIP")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (model, clip) = (inputs.object::<ModelHandle>("model")?, inputs.object::<ClipHandle>("clip")?);
        let (on_model, on_clip) = (inputs.float("strength_model")?, inputs.float("strength_clip")?);
        if on_model == 0.0 && on_clip == 0.0 {
            return Ok(NodeOutput::many(vec![Value::shared("MODEL", model), Value::shared("CLIP", clip)]));
        }
        let name = inputs.string("lora_name")?;
        let file = open(ctx.services, name)?;
        let network = SdModel::of(&model)?;
        let for_model = read(&file, network.file().unet_targets())?;
        let mut clip = clip.as_ref().clone();
        let mut loras = vec![for_model];
        for (i, part) in clip.parts.iter_mut().enumerate() {
            let lora = read(&file, part.file.clip_targets(part.variant, i > 0))?;
            part.patches = part.patches.with(lora.at(on_clip));
            loras.push(lora);
        }
        report_unused(name, &loras);
        expect_fit(name, &file, &loras)?;
        let model = model.with_base(Arc::new(network.patched(loras[0].at(on_model))));
        Ok(NodeOutput::many(vec![Value::object("MODEL", model), Value::object("CLIP", clip)]))
    }
}

/// `LoraLoaderModelOnly`.
pub struct LoraLoaderModelOnly;

impl Node for LoraLoaderModelOnly {
    fn schema(&self) -> Schema {
        Schema::new("LoraLoaderModelOnly", "loaders")
            .describe("Changes the weights of a diffusion model by a LoRA file. Can be chained.")
            .input(Input::link("model", "MODEL").bare())
            .input(Input::model_file("lora_name", "loras").bare())
            .input(strength("strength_model"))
            .output("MODEL")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let model = inputs.object::<ModelHandle>("model")?;
        let strength = inputs.float("strength_model")?;
        if strength == 0.0 {
            return Ok(NodeOutput::one(Value::shared("MODEL", model)));
        }
        let name = inputs.string("lora_name")?;
        let file = open(ctx.services, name)?;
        let network = SdModel::of(&model)?;
        let lora = read(&file, network.file().unet_targets())?;
        report_unused(name, std::slice::from_ref(&lora));
        expect_fit(name, &file, std::slice::from_ref(&lora))?;
        let model = model.with_base(Arc::new(network.patched(lora.at(strength))));
        Ok(NodeOutput::one(Value::object("MODEL", model)))
    }
}
