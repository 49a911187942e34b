//! Older forms of a model: folders of the diffusers library, and checkpoints with a config file.

use std::path::Path;

use kiln::models::tiny;
use kiln::tensor::DType;
use serde_json::{Value as Json, json};

use crate::pytorch::as_pytorch;
use crate::{Bench, distance, files, pipeline_files, with};

/// The same workflow with another loader.
fn loaded_by(class: &str, inputs: Json) -> Json {
    let mut prompt = files::workflow("txt2img");
    prompt["4"] = json!({"class_type": class, "inputs": inputs});
    prompt
}

fn from_folder(name: &str) -> Json {
    loaded_by("DiffusersLoader", json!({"model_path": name}))
}

/// The tiny model as a checkpoint, and below `models/diffusers/group` as a folder.
fn written(models: &Path, family: &str) {
    std::fs::create_dir_all(models.join("checkpoints")).unwrap();
    let checkpoint = models.join(format!("checkpoints/{family}.safetensors"));
    tiny::write(family, &checkpoint, DType::F16).unwrap().unwrap();
    pipeline_files::write(&checkpoint, &models.join("diffusers/group").join(family));
}

#[test]
fn a_folder_is_the_same_model_as_its_checkpoint() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    for family in ["sd1", "sd1-inpaint", "sd2", "sd2-v", "sdxl", "sdxl-refiner"] {
        written(&models, family);
        let prompt =
            with(files::workflow("txt2img"), "4", "ckpt_name", json!(format!("{family}.safetensors")));
        let (one, folder) = (bench.picture(prompt), bench.picture(from_folder(&format!("group/{family}"))));
        println!("{family}: {} apart", distance(&one, &folder));
        assert_eq!(one, folder, "{family}");
    }
}

#[test]
fn half_precision_comes_first_and_pytorch_files_are_read() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    written(&models, "sdxl");
    let folder = models.join("diffusers/group/sdxl");
    let picture = bench.picture(from_folder("group/sdxl"));
    for (part, name) in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ] {
        let at = |name: String| folder.join(part).join(name);
        let stored = at(format!("{name}.safetensors"));
        // A file that is no model shows that it is not looked at.
        std::fs::copy(&stored, at(format!("{name}.fp16.safetensors"))).unwrap();
        std::fs::write(&stored, "damaged").unwrap();
    }
    assert_eq!(bench.picture(from_folder("group/sdxl")), picture);
    for (part, from, to) in [
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
        ("text_encoder_2", "model", "pytorch_model"),
    ] {
        let at = |name: String| folder.join(part).join(name);
        let half = at(format!("{from}.fp16.safetensors"));
        as_pytorch(&half, &at(format!("{to}.bin")));
        std::fs::remove_file(half).unwrap();
        std::fs::remove_file(at(format!("{from}.safetensors"))).unwrap();
    }
    assert_eq!(bench.picture(from_folder("group/sdxl")), picture);
}

#[test]
fn what_a_folder_lacks_is_named() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    written(&models, "sd1");
    let folder = models.join("diffusers/group/sd1");
    for (part, name, what) in [
        ("text_encoder", "model.safetensors", "text encoder"),
        ("vae", "diffusion_pytorch_model.safetensors", "VAE"),
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion model"),
    ] {
        let (file, away) = (folder.join(part).join(name), folder.join(part).join("away"));
        std::fs::rename(&file, &away).unwrap();
        let error = bench.error(from_folder("group/sd1"));
        assert!(error.contains(&format!("no {what} in ")) && error.contains(name), "{error}");
        assert!(error.contains(&folder.join(part).display().to_string()), "{error}");
        std::fs::rename(&away, &file).unwrap();
    }
    // A VAE in the place of the text encoder.
    let vae = folder.join("vae/diffusion_pytorch_model.safetensors");
    std::fs::copy(vae, folder.join("text_encoder/model.safetensors")).unwrap();
    let error = bench.error(from_folder("group/sd1"));
    assert!(error.contains("is a VAE") && error.contains("text encoder"), "{error}");
}

fn with_config(config: &str, checkpoint: &str) -> Json {
    loaded_by("CheckpointLoader", json!({"config_name": config, "ckpt_name": checkpoint}))
}

#[test]
fn a_config_file_sets_prediction_and_clip_skip() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    written(&models, "sd2");
    let plain = with(files::workflow("txt2img"), "4", "ckpt_name", json!("sd2.safetensors"));
    let picture = bench.picture(plain.clone());
    assert_eq!(bench.picture(with_config("v2-inference.yaml", "sd2.safetensors")), picture);

    let mut patched = plain.clone();
    patched["40"] = json!({"class_type": "ModelSamplingDiscrete",
        "inputs": {"model": ["4", 0], "sampling": "v_prediction", "zsnr": false}});
    let v = bench.picture(with(patched, "3", "model", json!(["40", 0])));
    assert!(distance(&v, &picture) > 1.0, "{}", distance(&v, &picture));
    assert_eq!(bench.picture(with_config("v2-inference-v.yaml", "sd2.safetensors")), v);

    let mut skipped = plain;
    skipped["41"] = json!({"class_type": "CLIPSetLastLayer",
        "inputs": {"clip": ["4", 1], "stop_at_clip_layer": -3}});
    let skipped = with(with(skipped, "6", "clip", json!(["41", 0])), "7", "clip", json!(["41", 0]));
    let skipped = bench.picture(skipped);
    assert!(distance(&skipped, &picture) > 0.1, "{}", distance(&skipped, &picture));
    // A file of one's own has precedence over what is known by its name.
    std::fs::create_dir_all(models.join("configs")).unwrap();
    let config = "model:\n  params:\n    cond_stage_config:\n      params: {layer_idx: -3}\n";
    std::fs::write(models.join("configs/v2-inference-v.yaml"), config).unwrap();
    assert_eq!(bench.picture(with_config("v2-inference-v.yaml", "sd2.safetensors")), skipped);

    std::fs::write(models.join("configs/mine.yaml"), "model: {}").unwrap();
    let error = bench.error(with_config("mine.yaml", "sd2.safetensors"));
    assert!(error.contains("mine.yaml") && error.contains("model.params"), "{error}");
}
