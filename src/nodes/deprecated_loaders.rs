//! Loaders of older forms of models: a checkpoint with the config file of its training, and a folder of the
//! diffusers library.
//!
//! Both are put together from what other loaders use. As in the reference, a
//! config file tells two things only, what the model predicts and which layer of the
//! text encoder it was trained on, and of a folder's files the configurations are not read: tensors say all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;

use super::loaders::{CheckpointLoaderSimple, ClipHandle, VaeHandle};
use super::sd_model::SdModel;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value};
use crate::diffusion::ModelHandle;
use crate::diffusion::schedule::{ModelSampling, Prediction};
use crate::files::ModelPath;
use crate::graph::{FileList, Input};
use crate::models::{ModelFile, ModelSource};

/// The loaders.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(CheckpointLoader), Box::new(DiffusersLoader)]
}

/// What a config file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Config {
    /// The model predicts v; what it predicts otherwise is the checkpoint's to say.
    predicts_v: bool,
    /// The text encoder's layer, from the end.
    layer: Option<i64>,
}

/// Config files that come with the reference, and so are named by workflows, and what they say.
const KNOWN: [(&str, Config); 11] = {
    const PLAIN: Config = Config { predicts_v: false, layer: None };
    const SKIP: Config = Config { predicts_v: false, layer: Some(-2) };
    const V: Config = Config { predicts_v: true, layer: None };
    [
        ("anything_v3.yaml", SKIP),
        ("v1-inference.yaml", PLAIN),
        ("v1-inference_clip_skip_2.yaml", SKIP),
        ("v1-inference_clip_skip_2_fp16.yaml", SKIP),
        ("v1-inference_fp16.yaml", PLAIN),
        ("v1-inpainting-inference.yaml", PLAIN),
        ("v2-inference-v.yaml", V),
        ("v2-inference-v_fp32.yaml", V),
        ("v2-inference.yaml", PLAIN),
        ("v2-inference_fp32.yaml", PLAIN),
        ("v2-inpainting-inference.yaml", PLAIN),
    ]
};

/// Largest config file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

impl Config {
    /// The config of that name: a file, or one of [`KNOWN`].
    fn open(services: &Services, name: &str) -> Result<Self, NodeError> {
        match services.folders.model_path("configs", name) {
            Ok(ModelPath::File(path)) => Self::read(&path)
                .map_err(|why| NodeError::failed("ValueError", format!("{}: {why}", path.display()))),
            Ok(ModelPath::Embedded { .. }) => Ok(Self::default()),
            Err(error) => {
                let known = KNOWN.iter().find(|(known, _)| *known == name).map(|(_, config)| *config);
                known.ok_or_else(|| NodeError::failed("FileNotFoundError", error))
            }
        }
    }

    fn read(path: &Path) -> Result<Self, String> {
        let size = std::fs::metadata(path).map_err(|e| format!("can't be read: {e}"))?.len();
        if size > MAX_CONFIG_BYTES {
            return Err(format!("has {size} bytes, at most {MAX_CONFIG_BYTES} are read"));
        }
        let text = std::fs::read_to_string(path).map_err(|e| format!("can't be read: {e}"))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Json = serde_saphyr::from_str(text).map_err(|e| format!("is no YAML: {e}"))?;
        let entry = |at: &str| {
            config.pointer(at).ok_or_else(|| {
                let name = at.trim_start_matches('/').replace('/', ".");
                format!("has no {name}, which the config of a checkpoint needs")
            })
        };
        let params = entry("/model/params")?;
        let text_encoder = entry("/model/params/cond_stage_config")?;
        let layer = match text_encoder.pointer("/params/layer_idx") {
            None | Some(Json::Null) => None,
            Some(layer) => {
                let sound = layer.as_i64().filter(|layer| (-24..=-1).contains(layer));
                Some(sound.ok_or_else(|| format!("has layer_idx {layer}: it must be from -24 to -1"))?)
            }
        };
        Ok(Self { predicts_v: params.get("parameterization").is_some_and(|p| p == "v"), layer })
    }
}

/// `CheckpointLoader`.
pub struct CheckpointLoader;

impl Node for CheckpointLoader {
    fn schema(&self) -> Schema {
        let extra = KNOWN.iter().map(|(name, _)| (*name).to_owned()).collect();
        Schema::new("CheckpointLoader", "advanced/loaders")
            .display("Load Checkpoint With Config (DEPRECATED)")
            .describe("Loads a checkpoint; its config file says what the model predicts and where its text encoder ends.")
            .input(Input::files("config_name", FileList::Models { folder: "configs", extra }).bare())
            .input(Input::model_file("ckpt_name", "checkpoints").bare())
            .output("MODEL")
            .output("CLIP")
            .output("VAE")
            .flag("deprecated", true)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let config = Config::open(ctx.services, inputs.string("config_name")?)?;
        let mut output = CheckpointLoaderSimple.execute(ctx, inputs)?;
        let [model, clip, _] = output.values.as_mut_slice() else { return Ok(output) };
        if config.predicts_v
            && let Some(handle) = model.downcast::<ModelHandle>()
        {
            let loaded = SdModel::of(&handle)?;
            let v = loaded.with_sampling(ModelSampling::discrete(Prediction::V, loaded.betas()?));
            *model = Value::object("MODEL", handle.with_network(Arc::new(v)));
        }
        if let (Some(layer), Some(handle)) = (config.layer, clip.downcast::<ClipHandle>()) {
            *clip = Value::object("CLIP", ClipHandle { layer: Some(layer), ..handle.as_ref().clone() });
        }
        Ok(output)
    }
}

/// Files of a UNet or VAE in a folder of the diffusers library, in the reference's order.
const NETWORK_FILES: [&str; 4] = [
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin",
];
/// Files of a text encoder there.
const TEXT_FILES: [&str; 4] =
    ["model.fp16.safetensors", "model.safetensors", "pytorch_model.fp16.bin", "pytorch_model.bin"];

/// A pipeline of the diffusers library.
struct Pipeline(PathBuf);

impl Pipeline {
    /// The first of these files in one of its folders.
    fn find(&self, part: &str, names: &[&str]) -> Option<PathBuf> {
        names.iter().map(|name| self.0.join(part).join(name)).find(|path| path.is_file())
    }

    /// As [`find`](Self::find), of what every pipeline needs.
    fn expect(&self, part: &str, names: &[&str], what: &str) -> Result<PathBuf, NodeError> {
        self.find(part, names).ok_or_else(|| {
            let (folder, names) = (self.0.join(part), names.join(", "));
            let message = format!("no {what} in {}: there must be one of {names}", folder.display());
            NodeError::failed("FileNotFoundError", message)
        })
    }
}

/// `DiffusersLoader`.
pub struct DiffusersLoader;

impl Node for DiffusersLoader {
    fn schema(&self) -> Schema {
        Schema::new("DiffusersLoader", "advanced/loaders/deprecated")
            .describe("Loads a model that is stored as a folder of the diffusers library.")
            .input(Input::files("model_path", FileList::Pipelines).bare())
            .output("MODEL")
            .output("CLIP")
            .output("VAE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let folder = ctx.services.folders.pipeline(inputs.string("model_path")?);
        let pipeline = Pipeline(folder.map_err(|e| NodeError::failed("FileNotFoundError", e))?);
        let open = |path| ctx.services.models.file(ModelSource::File(path));
        let unet = open(pipeline.expect("unet", &NETWORK_FILES, "diffusion model")?);
        let vae = open(pipeline.expect("vae", &NETWORK_FILES, "VAE")?);
        let second = pipeline.find("text_encoder_2", &TEXT_FILES);
        let mut texts: Vec<Arc<ModelFile>> = Vec::new();
        // The refiner of SDXL has the second encoder only.
        match (pipeline.expect("text_encoder", &TEXT_FILES, "text encoder"), &second) {
            (Ok(path), _) => texts.push(open(path)),
            (Err(_), Some(_)) => {}
            (Err(error), None) => return Err(error),
        }
        texts.extend(second.map(open));
        for file in &texts {
            if file.clip_variants()?.is_empty() {
                return Err(file.is_not("a text encoder").into());
            }
        }
        let clip = ClipHandle::of(&texts)?;
        clip.kind()?;
        let vae = VaeHandle::new(vae);
        vae.open()?;
        Ok(NodeOutput::many(vec![
            Value::object("MODEL", ModelHandle(Arc::new(SdModel::new(unet)?))),
            Value::object("CLIP", clip),
            Value::object("VAE", vae),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    fn parsed(params: &str) -> Result<Config, String> {
        Config::parse(&format!("model:\n  target: a.b.C\n  params:\n    scale_factor: 0.18215\n{params}"))
    }

    #[test]
    fn a_config_says_what_is_predicted_and_where_the_text_encoder_ends() {
        let plain = "    cond_stage_config:\n      target: x.Y\n";
        assert_eq!(parsed(plain), Ok(Config::default()));
        let v = parsed(&format!("    parameterization: \"v\"\n{plain}"));
        assert_eq!(v, Ok(Config { predicts_v: true, layer: None }));
        assert_eq!(parsed(&format!("    parameterization: eps\n{plain}")), Ok(Config::default()));
        let skip =
            parsed(&format!("{plain}      params:\n        layer: \"hidden\"\n        layer_idx: -2\n"));
        assert_eq!(skip, Ok(Config { predicts_v: false, layer: Some(-2) }));
        let penultimate = parsed(&format!("{plain}      params:\n        layer: \"penultimate\"\n"));
        assert_eq!(penultimate, Ok(Config::default()));
    }

    #[test]
    fn what_a_config_lacks_is_named() {
        let error = |text: &str| Config::parse(text).unwrap_err();
        assert!(error("model: {}").contains("no model.params,"), "{}", error("model: {}"));
        assert!(error("model: {params: {}}").contains("cond_stage_config"));
        assert!(error("a: [").contains("YAML"));
        let odd = "model: {params: {cond_stage_config: {params: {layer_idx: 3}}}}";
        assert!(error(odd).contains("layer_idx 3"), "{}", error(odd));
    }
}
