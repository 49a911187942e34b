//! Checkpoints of SD2.x and SDXL that CheckpointSave writes: the same names, the same picture when loaded again.

use std::collections::BTreeSet;
use std::path::Path;

use kiln::models::tiny;
use kiln::tensor::DType;
use kiln::weights::WeightsFile;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};

use crate::{Bench, files, with};

fn names(file: &WeightsFile) -> BTreeSet<&str> {
    // The mark of v-prediction is all that a saved file has besides.
    file.names().filter(|name| *name != "v_pred").collect()
}

/// The tensors of `from` with the texts of `texts`: what shapes don't tell about tiny models.
fn with_texts(from: &WeightsFile, texts: &WeightsFile, to: &Path) {
    let raw: Vec<_> = from.names().map(|name| (name, from.get(name).unwrap())).collect();
    let views = raw.iter().map(|(name, raw)| {
        let dtype = if raw.dtype == DType::F16 { Dtype::F16 } else { Dtype::F32 };
        (*name, TensorView::new(dtype, raw.shape.to_vec(), &raw.bytes).unwrap())
    });
    let metadata = texts.metadata().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    safetensors::serialize_to_file(views, Some(metadata), to).unwrap();
}

#[test]
fn saved_checkpoints_load_again_as_the_same_model() {
    let bench = Bench::new();
    let folder = bench.folder.path().join("models/checkpoints");
    std::fs::create_dir_all(&folder).unwrap();
    for family in ["sd2", "sd2-v", "sdxl", "sdxl-refiner"] {
        let original = folder.join(format!("{family}.safetensors"));
        tiny::write(family, &original, DType::F16).unwrap().unwrap();
        let prompt = |name: String| with(files::workflow("txt2img"), "4", "ckpt_name", json!(name));
        let picture = bench.picture(prompt(format!("{family}.safetensors")));
        let save: Json = json!({
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": format!("{family}.safetensors")}},
            "9": {"class_type": "CheckpointSave", "inputs": {"model": ["4", 0], "clip": ["4", 1], "vae": ["4", 2],
                "filename_prefix": format!("saved/{family}")}},
        });
        let entry = bench.run(save);
        assert_eq!(entry["status"]["status_str"], "success", "{}", entry["status"]);
        let saved = bench.folder.path().join(format!("output/saved/{family}_00001_.safetensors"));
        let (saved, original) = (WeightsFile::open(&saved).unwrap(), WeightsFile::open(&original).unwrap());
        assert_eq!(names(&saved), names(&original), "{family}");
        for info in original.infos() {
            assert_eq!(saved.info(info.name).unwrap().shape, info.shape, "{family} {}", info.name);
        }
        with_texts(&saved, &original, &folder.join(format!("{family}-again.safetensors")));
        assert_eq!(bench.picture(prompt(format!("{family}-again.safetensors"))), picture, "{family}");
    }
}
