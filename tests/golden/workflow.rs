//! Cases that are workflows: run the nodes, compare the recorded outputs.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln::backend::{self, DeviceOptions};
use kiln::diffusion::{Conditioning, Latent};
use kiln::files::{FolderOptions, Folders};
use kiln::models::ModelStore;
use kiln::nodes::{
    Inputs, Node, NodeCtx, PreviewFrame, PreviewMethod, ProgressSink, Services, Value, registry,
};
use kiln::tensor::{DType, HostTensor};
use kiln::weights::OpenOptions;
use kiln::weights::synth::{self, Manifest};
use serde_json::{Map, Value as Json};

use super::Group;
use super::compare::{self, Measure};
use super::report::Outcome;

/// Nodes, folders and models that cases run on.
pub struct Bench {
    nodes: HashMap<&'static str, Box<dyn Node>>,
    services: Services,
    base: tempfile::TempDir,
    /// Node outputs by class, inputs and upstream outputs: a loader runs once for all cases.
    cache: RefCell<HashMap<String, Vec<Value>>>,
}

/// Synthetic model files by the name that workflows use: folder, manifest.
const MODELS: &[(&str, &str, &str)] = &[
    ("synth-sd15.safetensors", "checkpoints", "sd15"),
    ("synth-embed.safetensors", "embeddings", "sd15-embedding"),
    ("synth-embed-l.safetensors", "embeddings", "sd15-embedding-clip_l"),
];

struct Silent;

impl ProgressSink for Silent {
    fn progress(&self, _: &str, _: u64, _: u64, _: Option<PreviewFrame>) {}
    fn picture(&self, _: &str, _: &HostTensor) {}
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// A folder that survives between runs, for synthetic models of gigabytes.
pub fn model_folder() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target")).join("golden-models")
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
        let services = Services {
            folders: Arc::new(folders),
            models: Arc::new(ModelStore::new(
                backend::open(DeviceOptions::default()).expect("a backend"),
                OpenOptions::default(),
            )),
            save_metadata: true,
            png_level: 1,
            preview: PreviewMethod::None,
        };
        let nodes = registry().into_iter().map(|n| (n.schema().class, n)).collect();
        Self { nodes, services, base, cache: RefCell::default() }
    }

    /// Services that cases run on.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Writes the synthetic models that a workflow names and that don't exist yet.
    pub fn provide_models(&self, text: &str) {
        for (file, folder, manifest) in MODELS {
            let path = model_folder().join(folder).join(file);
            if !text.contains(file.trim_end_matches(".safetensors")) || path.exists() {
                continue;
            }
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("making the model folder");
            let manifest = Manifest::built_in(manifest).unwrap_or_else(|| panic!("no manifest {manifest}"));
            println!("writing {}", path.display());
            synth::write(&manifest, &path, DType::F16, &[], |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// The values of node `id`, running what it needs first.
    fn evaluate(&self, prompt: &Map<String, Json>, id: &str) -> Result<(String, Vec<Value>), String> {
        let node = prompt.get(id).ok_or_else(|| format!("no node {id}"))?;
        let class = node["class_type"].as_str().unwrap_or_default();
        let mut inputs = Inputs::default();
        let mut key = format!("{class}(");
        for (name, value) in node["inputs"].as_object().into_iter().flatten() {
            match link(value) {
                Some((from, slot)) => {
                    let (upstream, values) = self.evaluate(prompt, from)?;
                    key += &format!("{name}={upstream}#{slot},");
                    let value =
                        values.get(slot).ok_or_else(|| format!("node {from} has no output {slot}"))?;
                    inputs.insert(name.clone(), value.clone());
                }
                None => {
                    key += &format!("{name}={value},");
                    inputs.insert(name.clone(), Value::Json(value.clone()));
                }
            }
        }
        key += ")";
        if let Some(values) = self.cache.borrow().get(&key) {
            return Ok((key.clone(), values.clone()));
        }
        let node = self.nodes.get(class).ok_or_else(|| format!("no node class {class}"))?;
        let stored = Json::Object(prompt.clone());
        let mut ctx = NodeCtx {
            services: &self.services,
            node_id: id,
            prompt: &stored,
            extra_pnginfo: None,
            sink: &Silent,
        };
        let output = node.execute(&mut ctx, &inputs).map_err(|e| format!("node {id} ({class}): {e}"))?;
        self.cache.borrow_mut().insert(key.clone(), output.values.clone());
        Ok((key, output.values))
    }

    fn missing(&self, prompt: &Map<String, Json>) -> Vec<String> {
        let classes = prompt.values().filter_map(|n| n["class_type"].as_str());
        let missing: BTreeSet<_> = classes.filter(|c| !self.nodes.contains_key(c)).collect();
        missing.into_iter().map(str::to_owned).collect()
    }
}

/// Tells the folders about the model folder that survives between runs.
fn extra_paths(base: &Path) -> PathBuf {
    let path = base.join("golden.yaml");
    let text = format!(
        "golden:\n  base_path: {}\n  checkpoints: checkpoints\n  embeddings: embeddings\n  vae: vae\n",
        model_folder().display()
    );
    std::fs::write(&path, text).expect("writing the model paths");
    path
}

fn link(value: &Json) -> Option<(&str, usize)> {
    match value.as_array()?.as_slice() {
        [Json::String(id), slot] => Some((id, slot.as_u64()? as usize)),
        _ => None,
    }
}

/// Runs a case and compares all its outputs.
pub fn run(group: &Group, name: &str, case: &Json, bench: &mut Bench) -> Outcome {
    let Some(prompt) = case["workflow"].as_object() else { return Outcome::Skip("no workflow".into()) };
    let missing = bench.missing(prompt);
    if !missing.is_empty() {
        return Outcome::Later(missing);
    }
    bench.provide_models(&case["workflow"].to_string());
    let mut outcome: Option<Outcome> = None;
    for (label, output) in case["outputs"].as_object().into_iter().flatten() {
        let compared = output_of(group, name, prompt, output, bench)
            .unwrap_or_else(|e| Outcome::Fail(format!("{label}: {e}")));
        outcome = Some(match outcome {
            None => compared,
            Some(o) => o.and(compared),
        });
    }
    for (index, file) in case["png"].as_array().into_iter().flatten().filter_map(Json::as_str).enumerate() {
        let compared =
            png(group, prompt, file, index, bench).unwrap_or_else(|e| Outcome::Fail(format!("{file}: {e}")));
        outcome = Some(match outcome {
            None => compared,
            Some(o) => o.and(compared),
        });
    }
    outcome.unwrap_or_else(|| Outcome::Skip("no outputs recorded".into()))
}

fn output_of(
    group: &Group,
    case: &str,
    prompt: &Map<String, Json>,
    output: &Json,
    bench: &Bench,
) -> Result<Outcome, String> {
    let (id, slot) = link(&output["link"]).ok_or("no link")?;
    let (_, values) = bench.evaluate(prompt, id)?;
    let value = values.get(slot).ok_or("no such output slot")?;
    let type_name = output["type"].as_str().unwrap_or_default();
    let measure = compare::tolerance(&group.name, type_name, case);
    let golden = |name: &str| group.tensors.get(name).ok_or_else(|| format!("no recorded tensor {name}"));
    let recorded = output["tensors"].as_object();
    match type_name {
        "CONDITIONING" => conditioning(value, &output["entries"], measure, &golden),
        "LATENT" => {
            let latent = value.downcast::<Latent>().ok_or("not a latent")?;
            let mut outcome: Option<Outcome> = None;
            for (part, name) in recorded.into_iter().flatten() {
                let (ours, measure) = match part.as_str() {
                    "samples" => (Some(latent.samples.clone()), measure),
                    "noise_mask" => (latent.noise_mask.clone(), Measure::Absolute(1e-6)),
                    other => return Err(format!("unknown part {other} of a latent")),
                };
                let ours = ours.ok_or_else(|| format!("the latent has no {part}"))?;
                let compared = compare::tensors(&ours, &golden(name.as_str().unwrap_or_default())?, measure);
                outcome = Some(match outcome {
                    None => compared,
                    Some(o) => o.and(compared),
                });
            }
            outcome.ok_or_else(|| "nothing recorded".into())
        }
        _ => {
            let ours = value
                .downcast::<HostTensor>()
                .ok_or_else(|| format!("not a tensor: {}", value.describe()))?;
            let name = recorded.and_then(|r| r.get("")).and_then(Json::as_str).ok_or("nothing recorded")?;
            let golden = golden(name)?;
            if name.ends_with("_u8") {
                let rounded =
                    |t: &HostTensor| t.data().iter().map(|v| (v * 255.0).round() as u8).collect::<Vec<_>>();
                let recorded: Vec<u8> = golden.data().iter().map(|v| *v as u8).collect();
                return Ok(compare::pictures(&rounded(&ours), &recorded));
            }
            Ok(compare::tensors(&ours, &golden, measure))
        }
    }
}

fn conditioning(
    value: &Value,
    entries: &Json,
    measure: Measure,
    golden: &dyn Fn(&str) -> Result<HostTensor, String>,
) -> Result<Outcome, String> {
    let ours = value.downcast::<Conditioning>().ok_or("not a conditioning")?;
    let entries = entries.as_array().ok_or("no entries recorded")?;
    if ours.len() != entries.len() {
        return Err(format!("{} entries, recorded {}", ours.len(), entries.len()));
    }
    let mut outcome: Option<Outcome> = None;
    for (ours, entry) in ours.iter().zip(entries) {
        let mut compared =
            compare::tensors(&ours.cond, &golden(entry["cond"].as_str().unwrap_or_default())?, measure);
        if let Some(name) = entry["tensors"]["pooled_output"].as_str() {
            let pooled = ours.pooled.as_ref().ok_or("no pooled output")?;
            compared = compared.and(compare::tensors(pooled, &golden(name)?, measure));
        }
        outcome = Some(match outcome {
            None => compared,
            Some(o) => o.and(compared),
        });
    }
    outcome.ok_or_else(|| "no entries recorded".into())
}

/// Runs the workflow's SaveImage and compares the file's pixels with the recorded PNG.
fn png(
    group: &Group,
    prompt: &Map<String, Json>,
    file: &str,
    index: usize,
    bench: &Bench,
) -> Result<Outcome, String> {
    let (_, node) =
        prompt.iter().find(|(_, n)| n["class_type"] == "SaveImage").ok_or("the workflow has no SaveImage")?;
    let (id, slot) = link(&node["inputs"]["images"]).ok_or("SaveImage has no link")?;
    let (_, values) = bench.evaluate(prompt, id)?;
    let image = values.get(slot).and_then(Value::downcast::<HostTensor>).ok_or("no picture")?;
    let ours: Vec<u8> = image.row(index).iter().map(|v| (v * 255.0).clamp(0.0, 255.0) as u8).collect();
    let bytes = std::fs::read(group.folder.join(file)).map_err(|e| e.to_string())?;
    let recorded = kiln::image::decode(&bytes, &kiln::image::Limits::default()).map_err(|e| e.to_string())?;
    let recorded: Vec<u8> = recorded.images().data().iter().map(|v| (v * 255.0).round() as u8).collect();
    debug_assert!(bench.base.path().is_dir());
    Ok(compare::pictures(&ours, &recorded))
}
