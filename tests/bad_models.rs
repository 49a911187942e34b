//! Wrong and damaged model files: each is a clear error of its own prompt, and the next prompt works.

mod bench;

use bench::{Bench, spoil, txt2img};
use serde_json::{Value as Json, json};

/// One loader whose output is looked at by a sink.
fn load(class: &str, inputs: Json) -> Json {
    let sink = match class {
        "UNETLoader" => json!({"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["3", 0],
            "negative": ["3", 0], "latent_image": ["2", 0], "seed": 1, "steps": 1, "cfg": 2.0,
            "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}}),
        "VAELoader" => json!({"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}}),
        _ => json!({"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["1", 0]}}),
    };
    let mut prompt = json!({
        "1": {"class_type": class, "inputs": inputs},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "8": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "good.safetensors"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["8", 1]}},
        "4": sink,
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["8", 2]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "x"}},
    });
    match class {
        "UNETLoader" => prompt["9"]["inputs"]["samples"] = json!(["4", 0]),
        "VAELoader" => prompt["6"]["inputs"]["images"] = json!(["4", 0]),
        _ => {
            prompt["5"] = json!({"class_type": "KSampler", "inputs": {"model": ["8", 0], "positive": ["4", 0],
                "negative": ["3", 0], "latent_image": ["2", 0], "seed": 1, "steps": 1, "cfg": 2.0,
                "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}});
            prompt["9"]["inputs"]["samples"] = json!(["5", 0]);
        }
    }
    prompt
}

#[test]
fn a_file_of_another_family_or_kind_is_named() {
    let bench = Bench::new();
    for (tensor, name) in [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a Flux or Hunyuan video model"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("lora_unet_x.lora_down.weight", "a LoRA"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("emb_params", "an embedding"),
        ("nothing.known", "a file of an unknown kind"),
    ] {
        // A new name each time: a loader's result may be cached by its name.
        let file = format!("{}.safetensors", tensor.replace('.', "_"));
        bench.write_named(tensor, &format!("checkpoints/{file}"));
        bench.fails(txt2img(&file), &[name, &file]);
    }
    bench.write_named("double_blocks.0.img_attn.norm.key_norm.scale", "diffusion_models/flux.safetensors");
    let inputs = json!({"unet_name": "flux.safetensors", "weight_dtype": "default"});
    bench.fails(
        load("UNETLoader", inputs),
        &["a Flux or Hunyuan video model", "Stable Diffusion 1.x, 2.x and XL only"],
    );
    bench.write_named("encoder.block.0.layer.0.SelfAttention.q.weight", "text_encoders/t5.safetensors");
    let inputs = json!({"clip_name": "t5.safetensors", "type": "stable_diffusion"});
    bench.fails(load("CLIPLoader", inputs), &["a T5 text encoder"]);
}

#[test]
fn a_file_for_another_loader_is_named() {
    let bench = Bench::new();
    bench.write("vae", "diffusion_models/vae.safetensors");
    let inputs = json!({"unet_name": "vae.safetensors", "weight_dtype": "default"});
    bench.fails(load("UNETLoader", inputs), &["vae.safetensors", "no diffusion model"]);
    bench.write("clip-l", "vae/clip.safetensors");
    bench.fails(load("VAELoader", json!({"vae_name": "clip.safetensors"})), &["clip.safetensors", "no VAE"]);
    bench.write("sd1-unet", "text_encoders/unet.safetensors");
    let inputs = json!({"clip_name": "unet.safetensors", "type": "stable_diffusion"});
    bench.fails(
        load("CLIPLoader", inputs),
        &["unet.safetensors", "not a text encoder", "load it with UNETLoader"],
    );
}

#[test]
fn text_encoders_that_do_not_belong_together_are_named() {
    let bench = Bench::new();
    for variant in ["l", "h", "g"] {
        bench.write(&format!("clip-{variant}"), &format!("text_encoders/{variant}.safetensors"));
    }
    let dual = |a: &str, b: &str, kind: &str| {
        let inputs = json!({"clip_name1": format!("{a}.safetensors"), "clip_name2": format!("{b}.safetensors"), "type": kind});
        load("DualCLIPLoader", inputs)
    };
    bench.fails(dual("l", "h", "sdxl"), &["no model family has the text encoders clip_l and clip_h"]);
    bench.fails(dual("g", "g", "sdxl"), &["clip_g and clip_g"]);
    bench.fails(dual("l", "g", "flux"), &["'type'", "flux", "sdxl"]);
    let inputs = json!({"clip_name": "l.safetensors", "type": "wan"});
    bench.fails(load("CLIPLoader", inputs), &["wan", "stable_diffusion"]);
}

#[test]
fn a_prompt_of_another_family_s_text_encoder_is_a_clear_error() {
    let bench = Bench::new();
    bench.write("sdxl", "checkpoints/xl.safetensors");
    let mut prompt = txt2img("xl.safetensors");
    prompt["7"] =
        json!({"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "good.safetensors"}});
    prompt["3"]["inputs"]["clip"] = json!(["7", 1]);
    bench.fails(prompt, &["width of the text conditioning must be 64, found 32"]);
}

#[test]
fn weights_that_are_no_numbers_are_a_clear_error() {
    let bench = Bench::new();
    for (tensor, network) in [
        ("model.diffusion_model.middle_block.1.proj_in.weight", "diffusion model"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text encoder"),
        ("first_stage_model.decoder.conv_out.bias", "VAE decoder"),
    ] {
        let file = format!("{}.safetensors", network.replace(' ', "_"));
        bench.write("sd1", &format!("checkpoints/{file}"));
        spoil(&bench.path(&format!("checkpoints/{file}")), tensor);
        bench.fails(txt2img(&file), &[network, "not a number"]);
    }
}

#[test]
fn a_file_that_is_cut_short_or_lacks_a_tensor_is_a_clear_error() {
    let bench = Bench::new();
    bench.write("sdxl", "checkpoints/cut.safetensors");
    let bytes = std::fs::read(bench.path("checkpoints/cut.safetensors")).unwrap();
    std::fs::write(bench.path("checkpoints/cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    bench.fails(txt2img("cut.safetensors"), &["cut.safetensors"]);
    bench.write("sdxl-unet", "diffusion_models/lacks.safetensors");
    let text = std::fs::read(bench.path("diffusion_models/lacks.safetensors")).unwrap();
    let header = u64::from_le_bytes(text[..8].try_into().unwrap()) as usize;
    let renamed = String::from_utf8(text[8..8 + header].to_vec())
        .unwrap()
        .replace("label_emb.0.2.bias", "label_emb.0.2.soap");
    let bytes = [&text[..8], renamed.as_bytes(), &text[8 + header..]].concat();
    std::fs::write(bench.path("diffusion_models/lacks.safetensors"), bytes).unwrap();
    let inputs = json!({"unet_name": "lacks.safetensors", "weight_dtype": "default"});
    bench.fails(load("UNETLoader", inputs), &["label_emb.0.2.bias", "incomplete"]);
}

#[test]
fn pictures_and_batches_without_a_cell_are_clear_errors() {
    let bench = Bench::new();
    let mut prompt = txt2img("good.safetensors");
    prompt["2"]["inputs"]["batch_size"] = json!(0);
    bench.fails(prompt, &["batch_size"]);
    let mut prompt = txt2img("good.safetensors");
    prompt["2"] = json!({"class_type": "VAEEncode", "inputs": {"pixels": ["7", 0], "vae": ["1", 2]}});
    prompt["7"] =
        json!({"class_type": "EmptyImage", "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0}});
    bench.fails(prompt, &["1x1", "at least 8 pixels"]);
}

#[test]
fn a_pickle_that_is_damaged_or_holds_something_else_is_a_clear_error() {
    let bench = Bench::new();
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pytorch");
    for (name, what) in [
        ("sparse.pt", "torch._utils._rebuild_sparse_tensor"),
        ("empty.pt", "no tensors"),
        ("complex.pt", "ComplexFloatStorage"),
        ("word.pt", "an embedding"),
        ("hypernetwork.pt", "a hypernetwork"),
        ("esrgan.pth", "an upscaler"),
    ] {
        std::fs::copy(data.join(name), bench.path(&format!("checkpoints/{name}"))).unwrap();
        bench.fails(txt2img(name), &[name, what]);
    }
    let bytes = std::fs::read(data.join("checkpoint-old.ckpt")).unwrap();
    std::fs::write(bench.path("checkpoints/cut.ckpt"), &bytes[..bytes.len() - 5]).unwrap();
    bench.fails(txt2img("cut.ckpt"), &["cut.ckpt", "the file ends inside its storages"]);
}
