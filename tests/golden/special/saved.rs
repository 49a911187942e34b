//! What CheckpointSave writes: names, types and shapes of the tensors, and the texts.

use std::collections::BTreeMap;

use kiln::tensor::DType;
use kiln::weights::WeightsFile;
use serde_json::{Map, Value as Json, json};

use super::super::Group;
use super::super::bench::Bench;
use super::super::report::Outcome;

fn prompt() -> Map<String, Json> {
    let prompt = json!({
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "synth-sd15.safetensors"}},
        "9": {"class_type": "CheckpointSave", "inputs": {"model": ["4", 0], "clip": ["4", 1], "vae": ["4", 2],
            "filename_prefix": "ComfyUI"}},
    });
    prompt.as_object().cloned().unwrap_or_default()
}

/// Saves the synthetic checkpoint and compares the file's header with the recorded one.
pub fn compare(group: &Group, bench: &Bench) -> Result<Outcome, Outcome> {
    let fail = |what: String| Outcome::Fail(what);
    bench.run(&prompt(), &[])?;
    let path = bench.output_folder().join(group.json["file"].as_str().unwrap_or_default());
    let file = WeightsFile::open(&path).map_err(|e| fail(e.to_string()))?;
    let name_of = |dtype| if dtype == DType::F16 { "float16" } else { "float32" };
    let saved: BTreeMap<String, Json> =
        file.infos().map(|t| (t.name.to_owned(), json!([name_of(t.dtype), t.shape]))).collect();
    let recorded = group.json["keys"].as_object().ok_or_else(|| fail("no keys".to_owned()))?;
    let metadata: Vec<&String> =
        group.json["metadata"].as_object().into_iter().flatten().map(|(k, _)| k).collect();
    // The recorded prompt came with an empty workflow, which this prompt has not.
    let wanted = metadata.iter().filter(|key| **key != "workflow");
    let lacks: Vec<_> = wanted.filter(|key| !file.metadata().contains_key(key.as_str())).collect();
    let predicts = file.metadata().get("modelspec.predict_key").map(String::as_str);
    drop(std::fs::remove_file(&path));
    if !lacks.is_empty() || predicts != group.json["metadata"]["modelspec.predict_key"].as_str() {
        return Err(fail(format!("metadata lacks {lacks:?}, predict_key {predicts:?}")));
    }
    let wrong = recorded.iter().find(|(key, value)| saved.get(*key) != Some(*value));
    match wrong {
        Some((key, value)) => Err(fail(format!("{key}: {:?}, recorded {value}", saved.get(key)))),
        None if saved.len() != recorded.len() => {
            Err(fail(format!("{} tensors, recorded {}", saved.len(), recorded.len())))
        }
        None => {
            let detail = format!("; {} tensors of the recorded names, types and shapes", saved.len());
            Ok(Outcome::Compared { error: 0.0, tolerance: 0.0, measure: "differences", detail })
        }
    }
}
