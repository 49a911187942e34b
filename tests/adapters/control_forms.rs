//! ControlNets in the layout of the diffusers library and as control-LoRAs: the same picture, bit for bit, as with the
//! same net in the standard layout.

use std::path::Path;

use kiln::models::lora::Lora;
use kiln::models::patch::Patches;
use kiln::models::tiny;
use kiln::tensor::DType;
use kiln::weights::WeightsFile;
use serde_json::{Value as Json, json};

use crate::pipeline_files::UNET;
use crate::{Bench, control_files, distance, files, with};

/// The stack of ControlNets with this one for both.
fn steered(net: &str, checkpoint: &str) -> Json {
    let prompt = with(files::workflow("controlnet-stack"), "21", "control_net_name", json!(net));
    with(prompt, "4", "ckpt_name", json!(checkpoint))
}

/// The tiny SDXL among the checkpoints.
fn sdxl(models: &Path) -> std::sync::Arc<WeightsFile> {
    std::fs::create_dir_all(models.join("checkpoints")).unwrap();
    let path = models.join("checkpoints/sdxl.safetensors");
    tiny::write("sdxl", &path, DType::F16).unwrap().unwrap();
    WeightsFile::open(&path).unwrap()
}

#[test]
fn nets_of_the_diffusers_library_are_the_same_nets() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    let nets = models.join("controlnet");
    control_files::net(&sdxl(&models), &nets.join("xl.safetensors"), None);
    for (standard, checkpoint) in [("tiny-controlnet", "demo-sd.safetensors"), ("xl", "sdxl.safetensors")] {
        let whole = nets.join(format!("{standard}.safetensors"));
        let theirs = format!("{standard}-theirs.safetensors");
        control_files::as_diffusers(&whole, &nets.join(&theirs));
        let picture = |name: &str| bench.picture(steered(name, checkpoint));
        let ours = picture(&format!("{standard}.safetensors"));
        let plain = bench.picture(with(files::workflow("txt2img"), "4", "ckpt_name", json!(checkpoint)));
        println!("{checkpoint}: the net moves values by {:.2}", distance(&ours, &plain));
        assert!(distance(&ours, &plain) > 0.1);
        assert_eq!(picture(&theirs), ours, "{checkpoint}");
    }
}

#[test]
fn a_control_lora_is_the_net_that_it_makes_of_the_model() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    let nets = models.join("controlnet");
    let (demo, sdxl) = (control_files::demo(), sdxl(&models));
    for (model, checkpoint) in [(&demo, "demo-sd.safetensors"), (&sdxl, "sdxl.safetensors")] {
        // Names of their own: loaders are not run again for a file that changed.
        let (lora, whole) = (format!("lora-of-{checkpoint}"), format!("net-of-{checkpoint}"));
        control_files::lora(model, &nets.join(&lora));
        let base = |name: &str| model.get(&format!("{UNET}{name}")).unwrap().to_f32();
        control_files::merged(&nets.join(&lora), model, base, &nets.join(&whole));
        let picture = |name: &str| bench.picture(steered(name, checkpoint));
        let whole = picture(&whole);
        let plain = bench.picture(with(files::workflow("txt2img"), "4", "ckpt_name", json!(checkpoint)));
        println!("{checkpoint}: the net moves values by {:.2}", distance(&whole, &plain));
        assert!(distance(&whole, &plain) > 0.1);
        assert_eq!(picture(&lora), whole, "{checkpoint}");
    }
}

/// The net follows the model that is sampled, with its patches.
#[test]
fn a_control_lora_changes_the_patched_model() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    let nets = models.join("controlnet");
    let demo = control_files::demo();
    let control = nets.join("lora.safetensors");
    control_files::lora(&demo, &control);

    let file = files::demo();
    let targets = file.unet_targets().unwrap();
    let lora = Lora::open(&models.join("loras/tiny-lora.safetensors"), &targets).unwrap();
    let patched = file.unet_values(&Patches::default().with(lora.at(0.75))).unwrap();
    let base = |name: &str| {
        let name = format!("diffusion_model.{name}");
        patched.iter().find(|(n, _)| *n == name).unwrap().1.read()
    };
    control_files::merged(&control, &demo, base, &nets.join("merged.safetensors"));
    let picture = |net: &str| {
        let mut prompt = steered(net, "demo-sd.safetensors");
        prompt["40"] = json!({"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4", 0],
            "lora_name": "tiny-lora.safetensors", "strength_model": 0.75}});
        bench.picture(with(prompt, "3", "model", json!(["40", 0])))
    };
    assert_eq!(picture("lora.safetensors"), picture("merged.safetensors"));
}

#[test]
fn a_control_lora_for_another_family_is_refused() {
    let bench = Bench::new();
    let models = bench.folder.path().join("models");
    control_files::lora(&sdxl(&models), &models.join("controlnet/lora.safetensors"));
    let plain = bench.picture(files::workflow("txt2img"));
    let error = bench.error(steered("lora.safetensors", "demo-sd.safetensors"));
    assert!(error.contains("another family") && error.contains("lora.safetensors"), "{error}");
    assert_eq!(bench.picture(files::workflow("txt2img")), plain, "the next prompt works");
}
