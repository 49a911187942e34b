//! What cases run on: kiln's engine with all its node classes, folders with the
//! recorded inputs, and synthetic models.
//!
//! A case goes the way of a client's prompt (validation, conversion, lists,
//! cache). Two node classes are added to the engine's: one gives a value that a
//! case brings along, one keeps whatever is linked to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln::backend::{self, Device, DeviceOptions};
use kiln::engine::{Accepted, CachePolicy, Engine, EngineConfig, Refused, Submission};
use kiln::files::{FolderOptions, Folders};
use kiln::graph::Input;
use kiln::models::ModelStore;
use kiln::nodes::{
    Inputs, Node, NodeCtx, NodeError, NodeOutput, PreviewMethod, Schema, Services, Value, registry,
};
use kiln::tensor::DType;
use kiln::weights::OpenOptions;
use kiln::weights::synth::{self, Manifest};
use serde_json::{Map, Value as Json, json};

use super::report::Outcome;

/// Synthetic model files by the name that workflows use: folder, manifest. A manifest is a built-in one, or
/// lies in `models` beside the golden data.
const MODELS: &[(&str, &str, &str)] = &[
    ("synth-sd15.safetensors", "checkpoints", "sd15"),
    ("synth-sd21-v.safetensors", "checkpoints", "sd21-v"),
    ("synth-sdxl.safetensors", "checkpoints", "sdxl-base"),
    ("synth-embed-xl.safetensors", "embeddings", "sdxl-embedding"),
    ("synth-sd15-lora.safetensors", "loras", "sd15-lora"),
    ("synth-sd15-controlnet.safetensors", "controlnet", "sd15-controlnet"),
    ("synth-esrgan-4x.safetensors", "upscale_models", "esrgan-4x"),
    ("synth-esrgan-4x-oldkeys.safetensors", "upscale_models", "esrgan-4x-oldkeys"),
    ("taesd_decoder.safetensors", "vae_approx", "taesd_decoder"),
    ("taesd_encoder.safetensors", "vae_approx", "taesd_encoder"),
    ("synth-embed.safetensors", "embeddings", "sd15-embedding"),
    ("synth-embed-l.safetensors", "embeddings", "sd15-embedding-clip_l"),
];

/// Values by key: those that cases bring along, or those kept for them.
type Values = Arc<Mutex<HashMap<String, Vec<Value>>>>;

/// Engine, folders and models that cases run on.
pub struct Bench {
    engine: Arc<Engine>,
    /// Names of inputs by class.
    classes: BTreeMap<&'static str, Vec<&'static str>>,
    services: Services,
    base: tempfile::TempDir,
    /// Where manifests that are not built in lie.
    manifests: PathBuf,
    given: Values,
    kept: Values,
}

/// What a prompt gave.
pub struct Ran {
    /// The values on the links asked for, in that order; a list slot has several.
    pub values: Vec<Vec<Value>>,
    /// The engine's `outputs` by node id.
    pub ui: Json,
}

/// A folder that survives between runs, for synthetic models of gigabytes: `$KILN_GOLDEN_MODELS`, or one in
/// the target folder.
fn model_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("KILN_GOLDEN_MODELS") {
        return folder.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target")).join("golden-models")
}

/// A link of a prompt: node id and output slot.
pub fn link(value: &Json) -> Option<(&str, usize)> {
    match value.as_array()?.as_slice() {
        [Json::String(id), slot] => Some((id, usize::try_from(slot.as_u64()?).ok()?)),
        _ => None,
    }
}

impl Bench {
    pub fn new(golden: &Path) -> Self {
        let base = tempfile::tempdir().expect("a temporary folder");
        let inputs = golden.join("inputs");
        let options = FolderOptions {
            base: base.path().to_owned(),
            input: inputs.is_dir().then_some(inputs),
            extra_model_paths: vec![extra_paths(base.path())],
            ..FolderOptions::default()
        };
        let folders = Folders::open(&options).unwrap_or_else(|e| panic!("{e}"));
        let backend = backend::open(DeviceOptions { device: Device::Cpu, ..DeviceOptions::default() })
            .expect("a backend");
        let services = Services {
            folders: Arc::new(folders),
            models: Arc::new(ModelStore::new(backend, OpenOptions::default())),
            save_metadata: true,
            png_level: 1,
            preview: PreviewMethod::None,
        };
        let mut nodes = registry();
        let inputs = |schema: &Schema| schema.inputs.iter().map(|i| i.name).collect();
        let classes = nodes.iter().map(|n| n.schema()).map(|s| (s.class, inputs(&s))).collect();
        let (given, kept) = (Values::default(), Values::default());
        nodes.push(Box::new(Given(given.clone())));
        nodes.push(Box::new(Keep(kept.clone())));
        // Cases share loaders and prompts: what they computed is kept.
        let config =
            EngineConfig { cache: CachePolicy::Lru(256), ..EngineConfig::new(services.clone(), nodes) };
        let manifests = golden.join("../models");
        Self { engine: Engine::new(config), classes, services, base, manifests, given, kept }
    }

    /// Services that cases run on.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Whether a node class has an input of that name.
    pub fn takes(&self, class: &str, input: &str) -> bool {
        self.classes.get(class).is_some_and(|inputs| inputs.contains(&input))
    }

    /// Where nodes write their files.
    pub fn output_folder(&self) -> PathBuf {
        self.base.path().join("output")
    }

    /// The path of a synthetic model, written first if it isn't there yet; `None`
    /// if this build has no model of that name.
    pub fn model(&self, name: &str) -> Option<PathBuf> {
        let (file, folder, manifest) = MODELS.iter().find(|(file, ..)| *file == name)?;
        let path = model_folder().join(folder).join(file);
        if !path.exists() {
            let manifest = self.manifest(manifest)?;
            std::fs::create_dir_all(path.parent()?).expect("making the model folder");
            println!("writing {}", path.display());
            synth::write(&manifest, &path, DType::F16, &[], |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
        }
        Some(path)
    }

    /// A built-in manifest, or one beside the golden data; `None` without either.
    fn manifest(&self, name: &str) -> Option<Manifest> {
        Manifest::built_in(name).or_else(|| {
            let text = std::fs::read_to_string(self.manifests.join(format!("{name}.json"))).ok()?;
            Some(Manifest::from_json(&text).unwrap_or_else(|e| panic!("{name}: {e}")))
        })
    }

    /// Frees the memory of all models, so that groups with large ones need it one after the other.
    pub fn release(&self) {
        self.services.models.unload_all();
    }

    /// Writes the embeddings that prompts may name.
    fn provide_embeddings(&self, text: &str) {
        let named = |file: &str| text.contains(file.trim_end_matches(".safetensors"));
        for (file, ..) in MODELS.iter().filter(|(file, folder, _)| *folder == "embeddings" && named(file)) {
            self.model(file);
        }
    }

    /// Node classes and models of a prompt that this build doesn't have, in words.
    fn missing(&self, prompt: &Map<String, Json>) -> Vec<String> {
        let class = |n: &Json| n["class_type"].as_str().unwrap_or_default().to_owned();
        let classes: BTreeSet<String> =
            prompt.values().map(class).filter(|c| !self.classes.contains_key(c.as_str())).collect();
        if !classes.is_empty() {
            return classes.into_iter().collect();
        }
        let mut models = BTreeSet::new();
        if Json::Object(prompt.clone()).to_string().contains("\"taesd\"") {
            self.model("taesd_encoder.safetensors");
            self.model("taesd_decoder.safetensors");
        }
        for node in prompt.values().filter(|n| class(n).contains("Loader")) {
            for name in node["inputs"].as_object().into_iter().flat_map(Map::values).filter_map(Json::as_str)
            {
                if name != "taesd" && self.model(name).is_none() {
                    models.insert(format!("{} of {name}", class(node)));
                }
            }
        }
        models.into_iter().collect()
    }

    /// A node that gives `value`, for a prompt.
    pub fn give(&self, key: &str, value: Value) -> Json {
        self.given.lock().expect("no panic holds it").insert(key.to_owned(), vec![value]);
        json!({"class_type": Given::CLASS, "inputs": {"key": key}})
    }

    /// Runs a prompt and gives the values on `links`.
    ///
    /// # Errors
    /// [`Outcome::Later`] if node classes or models are missing, [`Outcome::Fail`]
    /// if the engine refuses the prompt or a node fails.
    pub fn run(&self, prompt: &Map<String, Json>, links: &[(&str, usize)]) -> Result<Ran, Outcome> {
        let own = |n: &Json| n["class_type"] == Given::CLASS;
        let theirs = prompt.iter().filter(|(_, n)| !own(n)).map(|(id, n)| (id.clone(), n.clone())).collect();
        let missing = self.missing(&theirs);
        if !missing.is_empty() {
            return Err(Outcome::Later(missing));
        }
        self.provide_embeddings(&Json::Object(theirs).to_string());
        let mut prompt = prompt.clone();
        for (place, (id, slot)) in links.iter().enumerate() {
            let inputs = json!({"value": [id, slot], "key": place.to_string()});
            prompt.insert(format!("keep {place}"), json!({"class_type": Keep::CLASS, "inputs": inputs}));
        }
        let accepted = self
            .submit(&prompt)
            .or_else(|refused| {
                self.loosen(&mut prompt, &refused.node_errors);
                self.submit(&prompt)
            })
            .map_err(|r| Outcome::Fail(format!("refused: {} {}", r.error["message"], r.node_errors)))?;
        if accepted.node_errors.as_object().is_some_and(|e| !e.is_empty()) {
            return Err(Outcome::Fail(format!("refused in part: {}", accepted.node_errors)));
        }
        let ui = self.wait(&accepted.prompt_id)?;
        let mut kept = self.kept.lock().expect("no panic holds it");
        let values =
            (0..links.len()).map(|place| kept.remove(&place.to_string()).unwrap_or_default()).collect();
        Ok(Ran { values, ui })
    }

    fn submit(&self, prompt: &Map<String, Json>) -> Result<Accepted, Box<Refused>> {
        self.engine.submit(Submission { prompt: Json::Object(prompt.clone()), ..Submission::default() })
    }

    /// Passes numbers outside an input's range over links, which have no range: the
    /// reference was recorded by calling nodes, without the checks of a server.
    fn loosen(&self, prompt: &mut Map<String, Json>, errors: &Json) {
        for (id, node) in errors.as_object().into_iter().flatten() {
            for error in node["errors"].as_array().into_iter().flatten() {
                let is_range = matches!(
                    error["type"].as_str(),
                    Some("value_smaller_than_min" | "value_bigger_than_max")
                );
                let Some(name) = error["extra_info"]["input_name"].as_str().filter(|_| is_range) else {
                    continue;
                };
                let key = format!("{id} {name}");
                let given = self.give(&key, Value::Json(error["extra_info"]["received_value"].clone()));
                prompt.insert(key.clone(), given);
                if let Some(input) = prompt.get_mut(id).and_then(|n| n["inputs"].get_mut(name)) {
                    *input = json!([key, 0]);
                }
            }
        }
    }

    /// Waits for a prompt's end and gives its `outputs`.
    fn wait(&self, id: &str) -> Result<Json, Outcome> {
        let entry = loop {
            let history = self.engine.history_one(id);
            if let Some(entry) = history.get(id) {
                break entry.clone();
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        self.engine.delete_history(&[id.to_owned()]);
        if entry["status"]["completed"] == true {
            return Ok(entry["outputs"].clone());
        }
        let messages = entry["status"]["messages"].as_array().into_iter().flatten();
        let error = messages.map(|m| &m[1]).find(|m| m.get("exception_message").is_some());
        Err(Outcome::Fail(error.map_or_else(
            || "the prompt did not complete".to_owned(),
            |e| format!("node {} ({}): {}", e["node_id"], e["node_type"], e["exception_message"]),
        )))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

/// Model folder types that synthetic models lie in.
const FOLDERS: &[&str] =
    &["checkpoints", "embeddings", "vae", "loras", "controlnet", "upscale_models", "vae_approx"];

/// Tells the folders about the model folder that survives between runs.
fn extra_paths(base: &Path) -> PathBuf {
    let path = base.join("golden.yaml");
    let text = format!(
        "golden:\n  base_path: {}\n{}",
        model_folder().display(),
        FOLDERS.iter().map(|folder| format!("  {folder}: {folder}\n")).collect::<String>()
    );
    std::fs::write(&path, text).expect("writing the model paths");
    path
}

/// Gives a value that a case brings along.
struct Given(Values);

impl Given {
    const CLASS: &str = "golden given";
}

impl Node for Given {
    fn schema(&self) -> Schema {
        Schema::new(Self::CLASS, "golden").input(Input::string("key")).output("*")
    }

    fn execute(&self, _: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let values = self.0.lock().expect("no panic holds it");
        let value = values.get(inputs.string("key")?).and_then(|v| v.first()).cloned();
        value.map(NodeOutput::one).ok_or_else(|| NodeError::input("key", "names no value"))
    }

    fn is_cacheable(&self) -> bool {
        false
    }
}

/// Keeps the values on a link.
struct Keep(Values);

impl Keep {
    const CLASS: &str = "golden keep";
}

impl Node for Keep {
    fn schema(&self) -> Schema {
        let mut schema = Schema::new(Self::CLASS, "golden")
            .input(Input::link("value", "*"))
            .input(Input::string("key"))
            .sink();
        schema.input_is_list = true;
        schema
    }

    fn execute(&self, _: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let key =
            inputs.list("key")?.first().and_then(Value::json).and_then(Json::as_str).unwrap_or_default();
        let values = inputs.list("value")?.to_vec();
        self.0.lock().expect("no panic holds it").insert(key.to_owned(), values);
        Ok(NodeOutput::default())
    }

    fn is_cacheable(&self) -> bool {
        false
    }
}
