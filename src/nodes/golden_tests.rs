//! The model-free nodes against recorded numbers.
//!
//! The recorded cases (`image_ops`, `latent_ops`, `mask_ops`) are too large
//! for the repository: `KILN_GOLDEN` names their folder (default
//! `../shared/golden`); without it those tests say that they were skipped.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value as Json};

use super::*;
use crate::diffusion::Latent;
use crate::files::{FolderOptions, Folders};
use crate::tensor::HostTensor;

struct NoSink;

impl ProgressSink for NoSink {
    fn progress(&self, _: &str, _: u64, _: u64, _: Option<PreviewFrame>) {}
    fn picture(&self, _: &str, _: &HostTensor) {}
    fn is_interrupted(&self) -> bool {
        false
    }
}

fn services(input: &Path, base: &Path) -> Services {
    let options = FolderOptions { base: base.into(), input: Some(input.into()), ..Default::default() };
    Services {
        folders: Arc::new(Folders::open(&options).unwrap()),
        models: file_tests::no_models(),
        save_metadata: true,
        png_level: 1,
        preview: PreviewMethod::None,
    }
}

/// Runs a workflow node by node, without executor.
struct Runner<'a> {
    classes: &'a HashMap<&'static str, Box<dyn Node>>,
    services: &'a Services,
    workflow: &'a Map<String, Json>,
    done: HashMap<String, Vec<Value>>,
}

impl Runner<'_> {
    fn output(&mut self, id: &str, slot: usize) -> Result<Value, String> {
        if !self.done.contains_key(id) {
            let values = self.run(id)?;
            self.done.insert(id.to_owned(), values);
        }
        self.done[id].get(slot).cloned().ok_or_else(|| format!("node {id} has no slot {slot}"))
    }

    fn run(&mut self, id: &str) -> Result<Vec<Value>, String> {
        let entry = &self.workflow[id];
        let class = entry["class_type"].as_str().unwrap();
        let node = self.classes.get(class).ok_or_else(|| format!("no class {class}"))?;
        let mut inputs = Inputs::default();
        for (name, value) in entry["inputs"].as_object().unwrap() {
            let value = match value.as_array().map(Vec::as_slice) {
                Some([from, slot]) => self.output(from.as_str().unwrap(), slot.as_u64().unwrap() as usize)?,
                _ => Value::Json(value.clone()),
            };
            inputs.insert(name, value);
        }
        let prompt = Json::Object(self.workflow.clone());
        let mut ctx = NodeCtx {
            services: self.services,
            node_id: id,
            prompt: &prompt,
            extra_pnginfo: None,
            sink: &NoSink,
        };
        node.execute(&mut ctx, &inputs).map(|output| output.values).map_err(|e| format!("{class}: {e}"))
    }
}

fn golden_folder() -> Option<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    let folder = std::env::var_os("KILN_GOLDEN").map_or_else(default, PathBuf::from);
    folder.join("image_ops.json").is_file().then_some(folder)
}

fn recorded(file: &SafeTensors<'_>, name: &str) -> HostTensor {
    let view = file.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F32);
    let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    HostTensor::new(view.shape(), data).unwrap()
}

/// The tensor of an output that is recorded under `key` (`""`: the only one).
fn part(value: &Value, key: &str) -> Option<HostTensor> {
    match key {
        "samples" => value.downcast::<Latent>().map(|x| x.samples.clone()),
        "noise_mask" => value.downcast::<Latent>()?.noise_mask.clone(),
        _ => value.downcast::<HostTensor>().map(|x| HostTensor::clone(&x)),
    }
}

/// Largest difference allowed. Recorded values come from the same f32
/// arithmetic in another order: 1e-5. What passes through 8-bit pictures only
/// is exact.
fn tolerance(case: &str) -> f32 {
    if case.starts_with("LoadImage") || case.contains("lanczos") { 0.0 } else { 1e-5 }
}

fn compare(case: &str, output: &Json, value: &Value, file: &SafeTensors<'_>) -> Result<f32, String> {
    let mut worst = 0f32;
    for (key, name) in output["tensors"].as_object().unwrap() {
        let want = recorded(file, name.as_str().unwrap());
        let got = part(value, key).ok_or_else(|| format!("no {key:?}"))?;
        if got.shape() != want.shape() {
            return Err(format!("{key:?} has shape {:?}, recorded {:?}", got.shape(), want.shape()));
        }
        let difference = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
        worst = got.data().iter().zip(want.data()).map(difference).fold(worst, f32::max);
    }
    if let Some(wanted) = output["fields"]["batch_index"].as_array() {
        let latent = value.downcast::<Latent>().ok_or("no latent")?;
        let got: Vec<Json> = latent.batch_index.iter().flatten().map(|&i| i.into()).collect();
        if got != *wanted {
            return Err(format!("batch_index {got:?}, recorded {wanted:?}"));
        }
    }
    if worst <= tolerance(case) { Ok(worst) } else { Err(format!("differs by {worst:e}")) }
}

fn run_group(name: &str, at_least: usize) {
    let Some(folder) = golden_folder() else {
        eprintln!("skipped: no recorded numbers (set KILN_GOLDEN)");
        return;
    };
    let cases: Json =
        serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap();
    let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let base = tempfile::tempdir().unwrap();
    let services = services(&folder.join("inputs"), base.path());
    let classes: HashMap<_, _> = registry().into_iter().map(|n| (n.schema().class, n)).collect();
    let (mut passed, mut worst, mut failed) = (0, 0f32, Vec::new());
    let mut missing: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (case, entry) in cases["cases"].as_object().unwrap() {
        let workflow = entry["workflow"].as_object().unwrap();
        let names = workflow.values().map(|n| n["class_type"].as_str().unwrap());
        let unknown: Vec<&str> = names.filter(|c| !classes.contains_key(c)).collect();
        if let Some(class) = unknown.first() {
            missing.entry((*class).to_owned()).or_default().insert(case.clone());
            continue;
        }
        let mut runner = Runner { classes: &classes, services: &services, workflow, done: HashMap::new() };
        for (label, output) in entry["outputs"].as_object().unwrap() {
            let link = output["link"].as_array().unwrap();
            let value = runner.output(link[0].as_str().unwrap(), link[1].as_u64().unwrap() as usize);
            match value.and_then(|value| compare(case, output, &value, &file)) {
                Ok(difference) => worst = worst.max(if tolerance(case) > 1e-4 { 0.0 } else { difference }),
                Err(message) => failed.push(format!("{case}.{label}: {message}")),
            }
        }
        passed += 1;
    }
    eprintln!("{name}: {passed} cases, worst {worst:e}; without node class: {missing:?}");
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
    assert!(passed >= at_least, "only {passed} cases ran");
}

#[test]
fn image_ops_equal_the_recorded_numbers() {
    run_group("image_ops", 60);
}

#[test]
fn mask_ops_equal_the_recorded_numbers() {
    run_group("mask_ops", 20);
}

#[test]
fn latent_ops_equal_the_recorded_numbers() {
    run_group("latent_ops", 50);
}
