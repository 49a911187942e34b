//! Inputs that don't fit: files for another loader or family, masks and pictures of odd sizes, batches that
//! don't match, weights that are no numbers. Each is what ComfyUI makes of it or a clear error, and the next
//! prompt works.

#[path = "adapters/files.rs"]
#[allow(dead_code, reason = "made for the adapters' tests")]
mod adapter_files;
mod bench;

use bench::{Bench, error_of, fill, txt2img};
use kiln::tensor::DType;
use kiln::weights::synth::{self, Manifest};
use serde_json::{Value as Json, json};

const LATENT: &str = "2";

/// Files of every kind by name, each in every folder that a loader looks into.
fn provide(bench: &Bench) {
    let made = bench.base.path().join("made");
    let adapters = bench.base.path().join("adapters");
    std::fs::create_dir_all(&made).unwrap();
    for family in ["sd1", "sd2", "sdxl", "sdxl-unet", "vae", "clip-l", "clip-g"] {
        bench.write(family, "vae/temporary.safetensors");
        std::fs::rename(bench.path("vae/temporary.safetensors"), made.join(format!("{family}.safetensors")))
            .unwrap();
    }
    adapter_files::write_all(&adapters);
    for (file, name) in [
        ("loras/tiny-lora", "lora"),
        ("controlnet/tiny-controlnet", "controlnet"),
        ("upscale_models/tiny-esrgan", "esrgan"),
        ("vae_approx/taesd_decoder", "taesd"),
    ] {
        let file = adapters.join(format!("{file}.safetensors"));
        std::fs::rename(file, made.join(format!("{name}.safetensors"))).unwrap();
    }
    let embedding = Manifest::from_json(&json!({"emb_params": [2, 32]}).to_string()).unwrap();
    synth::write(&embedding, &made.join("embedding.safetensors"), DType::F16, &[], |_, _| {}).unwrap();
    std::fs::write(made.join("text.safetensors"), "no model at all").unwrap();
    for folder in LOADERS.iter().map(|l| l.2) {
        for file in std::fs::read_dir(&made).unwrap().flatten() {
            std::fs::hard_link(file.path(), bench.path(folder).join(file.file_name())).unwrap();
        }
    }
}

/// Loaders: class, input, folder, and the files that they take.
const LOADERS: &[(&str, &str, &str, &[&str])] = &[
    // As in ComfyUI, a diffusion model alone is a checkpoint without the rest.
    ("CheckpointLoaderSimple", "ckpt_name", "checkpoints", &["sd1", "sd2", "sdxl", "sdxl-unet"]),
    ("UNETLoader", "unet_name", "diffusion_models", &["sd1", "sd2", "sdxl", "sdxl-unet"]),
    ("CLIPLoader", "clip_name", "text_encoders", &["sd1", "sd2", "sdxl", "clip-l", "clip-g"]),
    ("VAELoader", "vae_name", "vae", &["sd1", "sd2", "sdxl", "vae"]),
    ("ControlNetLoader", "control_net_name", "controlnet", &["controlnet"]),
    ("LoraLoaderModelOnly", "lora_name", "loras", &[]),
    ("UpscaleModelLoader", "model_name", "upscale_models", &["esrgan"]),
];

const FILES: &[&str] = &[
    "sd1",
    "sd2",
    "sdxl",
    "sdxl-unet",
    "vae",
    "clip-l",
    "clip-g",
    "lora",
    "controlnet",
    "esrgan",
    "taesd",
    "embedding",
    "text",
];

/// Every kind of file in every loader: taken, or refused with the file's name and what to do.
#[test]
fn every_loader_with_every_kind_of_file() {
    let bench = Bench::new();
    provide(&bench);
    let mut wrong = Vec::new();
    for &(class, input, _, taken) in LOADERS {
        for file in FILES {
            let name = format!("{file}.safetensors");
            let mut prompt = json!({
                "1": {"class_type": class, "inputs": {input: name, "weight_dtype": "default",
                    "type": "stable_diffusion", "strength_model": 1.0, "model": ["8", 0]}},
                "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
            });
            if class.starts_with("Lora") {
                prompt["8"] = json!({"class_type": "CheckpointLoaderSimple",
                    "inputs": {"ckpt_name": "good.safetensors"}});
            }
            let result = bench.run(prompt);
            println!("{class:24} {file:10} {}", result.as_ref().err().map_or("taken", |e| e));
            let is_right = match &result {
                Ok(()) => taken.contains(file),
                Err(message) => {
                    let has_advice = ["choose ", "load ", "belongs ", "write ", "damaged"];
                    !taken.contains(file)
                        && message.contains(&name)
                        && has_advice.iter().any(|a| message.contains(a))
                }
            };
            if !is_right {
                wrong.push(format!("{class}, {file}: {result:?}"));
            }
        }
        bench.run(txt2img("good.safetensors")).expect("the next prompt works");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn solid(width: usize, height: usize) -> Json {
    json!({"class_type": "SolidMask", "inputs": {"value": 0.75, "width": width, "height": height}})
}

fn empty_image(width: usize, height: usize, batch: usize, color: u32) -> Json {
    let inputs = json!({"width": width, "height": height, "batch_size": batch, "color": color});
    json!({"class_type": "EmptyImage", "inputs": inputs})
}

/// A prompt that uses the mask of node "mask" in one class, on pictures of 64×48.
fn masked(class: &str) -> Json {
    let mut prompt = txt2img("good.safetensors");
    prompt["a"] = empty_image(64, 48, 1, 0x20_40_c0);
    prompt["b"] = empty_image(64, 48, 1, 0xe0_80_10);
    let save = |prompt: &mut Json, from: Json| prompt["6"]["inputs"]["images"] = from;
    match class {
        "SetLatentNoiseMask" => {
            prompt["m"] =
                json!({"class_type": class, "inputs": {"samples": [LATENT, 0], "mask": ["mask", 0]}});
            prompt["4"]["inputs"]["latent_image"] = json!(["m", 0]);
        }
        "ConditioningSetMask" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"conditioning": ["3", 0], "mask": ["mask", 0],
                "strength": 1.0, "set_cond_area": "default"}});
            prompt["4"]["inputs"]["positive"] = json!(["m", 0]);
        }
        "VAEEncodeForInpaint" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"pixels": ["a", 0], "vae": ["1", 2],
                "mask": ["mask", 0], "grow_mask_by": 3}});
            prompt["4"]["inputs"]["latent_image"] = json!(["m", 0]);
        }
        "InpaintModelConditioning" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"positive": ["3", 0], "negative": ["3", 0],
                "vae": ["1", 2], "pixels": ["a", 0], "mask": ["mask", 0], "noise_mask": true}});
            prompt["4"]["inputs"]["latent_image"] = json!(["m", 2]);
            prompt["4"]["inputs"]["positive"] = json!(["m", 0]);
        }
        "LatentCompositeMasked" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"destination": [LATENT, 0], "source": ["4", 0],
                "x": 8, "y": 0, "resize_source": false, "mask": ["mask", 0]}});
            prompt["5"]["inputs"]["samples"] = json!(["m", 0]);
        }
        "ImageCompositeMasked" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"destination": ["a", 0], "source": ["b", 0],
                "x": 5, "y": 7, "resize_source": false, "mask": ["mask", 0]}});
            save(&mut prompt, json!(["m", 0]));
        }
        "JoinImageWithAlpha" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"image": ["a", 0], "alpha": ["mask", 0]}});
            prompt["s"] = json!({"class_type": "SplitImageWithAlpha", "inputs": {"image": ["m", 0]}});
            prompt["t"] = json!({"class_type": "MaskToImage", "inputs": {"mask": ["s", 1]}});
            save(&mut prompt, json!(["t", 0]));
        }
        "PorterDuffImageComposite" => {
            prompt["m"] = json!({"class_type": class, "inputs": {"source": ["b", 0], "source_alpha": ["mask", 0],
                "destination": ["a", 0], "destination_alpha": ["mask", 0], "mode": "SRC_OVER"}});
            save(&mut prompt, json!(["m", 0]));
        }
        other => panic!("no workflow for {other}"),
    }
    prompt
}

/// A mask of one value gives the same result whatever its size: each node fits it to the picture or latent,
/// as ComfyUI does (bilinear, or bicubic with a crop for Porter-Duff).
#[test]
fn masks_of_another_size_are_fitted() {
    let bench = Bench::new();
    for class in [
        "SetLatentNoiseMask",
        "ConditioningSetMask",
        "VAEEncodeForInpaint",
        "InpaintModelConditioning",
        "LatentCompositeMasked",
        "ImageCompositeMasked",
        "JoinImageWithAlpha",
        "PorterDuffImageComposite",
    ] {
        let with = |width, height| {
            let mut prompt = masked(class);
            prompt["mask"] = solid(width, height);
            bench.picture(prompt)
        };
        let fitting = with(64, 48);
        for (width, height) in [(1, 1), (7, 130), (300, 2)] {
            let got = with(width, height);
            assert_eq!(got.dimensions(), fitting.dimensions());
            let worst = got.as_raw().iter().zip(fitting.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst <= Some(1), "{class} with a mask of {width}x{height}: {worst:?}");
        }
        println!("{class}: any size");
    }
}

/// Masks of more or fewer samples than pictures are repeated or cut, as in ComfyUI.
#[test]
fn masks_of_another_batch_are_repeated() {
    let bench = Bench::new();
    for class in ["SetLatentNoiseMask", "LatentCompositeMasked", "ImageCompositeMasked", "JoinImageWithAlpha"]
    {
        let mut prompt = masked(class);
        prompt["mask"] = solid(64, 48);
        let single = bench.picture(prompt.clone());
        prompt["grey"] = empty_image(64, 48, 3, 0xbf_bf_bf);
        prompt["mask"] =
            json!({"class_type": "ImageToMask", "inputs": {"image": ["grey", 0], "channel": "red"}});
        let many = bench.picture(prompt);
        let worst = single.as_raw().iter().zip(many.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst <= Some(1), "{class}: {worst:?}");
    }
}

/// A mask placed outside another, larger than it, or beside it.
#[test]
fn combined_masks_are_cut_to_the_destination() {
    let bench = Bench::new();
    let combined = |size: (usize, usize), at: (usize, usize)| {
        bench.picture(json!({
            "1": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 10, "height": 6}},
            "2": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": size.0, "height": size.1}},
            "3": {"class_type": "MaskComposite", "inputs": {"destination": ["1", 0], "source": ["2", 0],
                "x": at.0, "y": at.1, "operation": "add"}},
            "4": {"class_type": "MaskToImage", "inputs": {"mask": ["3", 0]}},
            "6": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "x"}},
        }))
    };
    let white = |picture: &image::RgbImage| picture.pixels().filter(|p| p.0 == [255; 3]).count();
    assert_eq!(white(&combined((3, 2), (0, 0))), 6);
    assert_eq!(white(&combined((100, 100), (0, 0))), 60);
    assert_eq!(white(&combined((100, 100), (8, 5))), 2);
    assert_eq!(white(&combined((3, 2), (10, 0))), 0);
    assert_eq!(white(&combined((3, 2), (16_000, 16_000))), 0);
}

/// What cannot be combined says what it has and what it needs.
#[test]
fn batches_that_do_not_match() {
    let bench = Bench::new();
    let saved = |node: Json| {
        json!({
            "1": empty_image(8, 8, 3, 255), "2": empty_image(8, 8, 2, 255),
            "m1": {"class_type": "ImageToMask", "inputs": {"image": ["1", 0], "channel": "red"}},
            "m2": {"class_type": "ImageToMask", "inputs": {"image": ["2", 0], "channel": "red"}},
            "n": node,
            "t": {"class_type": "MaskToImage", "inputs": {"mask": ["n", 0]}},
            "6": {"class_type": "SaveImage", "inputs": {"images": ["t", 0], "filename_prefix": "x"}},
        })
    };
    let masks = json!({"class_type": "MaskComposite", "inputs": {"destination": ["m1", 0], "source": ["m2", 0],
        "x": 0, "y": 0, "operation": "add"}});
    bench.fails(saved(masks), &["source", "has 2 masks", "destination 3"]);
    // Latents of different batches: the shorter is repeated; noise masks too.
    let mut prompt = txt2img("good.safetensors");
    prompt["7"] =
        json!({"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 3}});
    prompt["8"] = json!({"class_type": "LatentAdd", "inputs": {"samples1": ["7", 0], "samples2": ["4", 0]}});
    prompt["5"]["inputs"]["samples"] = json!(["8", 0]);
    assert_eq!(bench.picture(prompt).dimensions(), (64, 32));
    // A batch of one picture size beside another: the second is resized.
    let prompt = json!({
        "1": empty_image(8, 8, 3, 255), "2": empty_image(30, 5, 2, 255),
        "3": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0], "image2": ["2", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
    });
    assert_eq!(bench.picture(prompt).dimensions(), (8, 8));
    // Of other channels: in ComfyUI a VAE of three sees three.
    let mut prompt = txt2img("good.safetensors");
    prompt["7"] = empty_image(64, 64, 1, 255);
    prompt["8"] = json!({"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 64, "height": 64}});
    prompt["9"] =
        json!({"class_type": "JoinImageWithAlpha", "inputs": {"image": ["7", 0], "alpha": ["8", 0]}});
    prompt["2"] = json!({"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}});
    assert_eq!(bench.picture(prompt).dimensions(), (64, 64));
}

/// Batch sizes and sides outside their range are refused before anything runs; the refusal names the bound.
#[test]
fn sizes_outside_their_range_are_refused() {
    let bench = Bench::new();
    for (class, inputs, input, bound) in [
        ("EmptyLatentImage", json!({"width": 64, "height": 64, "batch_size": 0}), "batch_size", "1"),
        ("EmptyLatentImage", json!({"width": 64, "height": 64, "batch_size": 4097}), "batch_size", "4096"),
        ("EmptyLatentImage", json!({"width": 0, "height": 64, "batch_size": 1}), "width", "16"),
        ("EmptyLatentImage", json!({"width": 64, "height": 16_392, "batch_size": 1}), "height", "16384"),
        ("EmptyLatentImage", json!({"width": -8, "height": 64, "batch_size": 1}), "width", "16"),
    ] {
        let mut prompt = txt2img("good.safetensors");
        prompt[LATENT] = json!({"class_type": class, "inputs": inputs});
        bench.fails(prompt, &[input, bound, "than"]);
    }
    for (class, inputs) in [
        ("RepeatLatentBatch", json!({"samples": ["2", 0], "amount": 0})),
        ("LatentFromBatch", json!({"samples": ["2", 0], "batch_index": 0, "length": 0})),
    ] {
        let mut prompt = txt2img("good.safetensors");
        prompt["7"] = json!({"class_type": class, "inputs": inputs});
        prompt["4"]["inputs"]["latent_image"] = json!(["7", 0]);
        bench.fails(prompt, &["than min", "1"]);
    }
}

/// One pixel through everything that looks at pictures.
#[test]
fn pictures_of_one_pixel() {
    let bench = Bench::new();
    let input = bench.base.path().join("input");
    std::fs::create_dir_all(&input).unwrap();
    image::RgbImage::from_pixel(1, 1, image::Rgb([200, 100, 50])).save(input.join("one.png")).unwrap();
    let through = |class: &str, inputs: Json, size: (u32, u32)| {
        let mut node = json!({"class_type": class, "inputs": inputs});
        node["inputs"]["image"] = json!(["1", 0]);
        let prompt = json!({
            "1": {"class_type": "LoadImage", "inputs": {"image": "one.png"}}, "2": node,
            "6": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
        });
        let picture = bench.picture(prompt);
        assert_eq!(picture.dimensions(), size, "{class}");
        picture
    };
    for method in ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"] {
        let inputs = json!({"upscale_method": method, "width": 9, "height": 4, "crop": "center"});
        let picture = through("ImageScale", inputs, (9, 4));
        // The cubic's four weights add up to 1 but for a rounding, which takes a whole step of 8 bits.
        let step = u8::from(method == "bicubic");
        let is_near = |p: &image::Rgb<u8>| p.0.iter().zip([200, 100, 50]).all(|(a, b)| a.abs_diff(b) <= step);
        assert!(picture.pixels().all(is_near), "{method}: {:?}", picture.get_pixel(0, 0));
    }
    through("ImageScaleBy", json!({"upscale_method": "area", "scale_by": 8.0}), (8, 8));
    through("ImageScaleToTotalPixels", json!({"upscale_method": "area", "megapixels": 0.01}), (102, 102));
    through("ImageScaleToMaxDimension", json!({"upscale_method": "area", "largest_size": 5}), (5, 5));
    through("ImageInvert", json!({}), (1, 1));
    through("ImageQuantize", json!({"colors": 4, "dither": "none"}), (1, 1));
    let pad = json!({"left": 8, "top": 0, "right": 0, "bottom": 16, "feathering": 40});
    through("ImagePadForOutpaint", pad, (9, 17));
    let crop = json!({"width": 512, "height": 512, "x": 400, "y": 0});
    through("ImageCrop", crop, (1, 1));
    // Blurs and networks need more: the error says how much.
    let blurred = |node: Json| {
        json!({
            "1": {"class_type": "LoadImage", "inputs": {"image": "one.png"}}, "2": node,
            "6": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
        })
    };
    let node =
        json!({"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 3, "sigma": 1.0}});
    bench.fails(blurred(node), &["radius 3", "at least 4", "1x1"]);
    let half = json!({"class_type": "ImageScaleBy",
        "inputs": {"image": ["1", 0], "upscale_method": "area", "scale_by": 0.01}});
    bench.fails(blurred(half), &["1x1", "0x0", "a side is zero"]);
    for class in ["VAEEncode", "VAEEncodeTiled", "VAEEncodeForInpaint"] {
        let mut prompt = txt2img("good.safetensors");
        prompt["7"] = json!({"class_type": "LoadImage", "inputs": {"image": "one.png"}});
        prompt[LATENT] = json!({"class_type": class, "inputs": {"pixels": ["7", 0], "vae": ["1", 2],
            "mask": ["7", 1], "grow_mask_by": 6, "tile_size": 64, "overlap": 0, "temporal_size": 8,
            "temporal_overlap": 4}});
        bench.fails(prompt, &["pixels", "1x1", "at least 8 pixels"]);
    }
}

/// Pictures of 8192 pixels: loaded, made and resized; too large for the device's memory is an error that says so.
#[test]
fn pictures_of_8192_pixels() {
    let bench = Bench::with_limit(Some(64 << 20));
    let input = bench.base.path().join("input");
    std::fs::create_dir_all(&input).unwrap();
    image::GrayImage::from_pixel(8192, 8, image::Luma([90])).save(input.join("wide.png")).unwrap();
    let prompt = json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "wide.png"}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": "bilinear",
            "width": 16, "height": 8192, "crop": "disabled"}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    });
    let picture = bench.picture(prompt);
    assert_eq!(picture.dimensions(), (16, 8192));
    assert!(picture.pixels().all(|p| p.0 == [90; 3]));
    // Both sides, batch by batch until no memory holds it: refused or an error, never a crash.
    let prompt = json!({
        "1": empty_image(8192, 8192, 64, 0),
        "6": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    });
    bench.fails(prompt, &["[64, 8192, 8192, 3]"]);
    // The latent of 8192² is small, sampling it is not.
    let mut prompt = txt2img("good.safetensors");
    prompt[LATENT]["inputs"] = json!({"width": 8192, "height": 8192, "batch_size": 1});
    let entry = bench.entry(prompt).unwrap();
    let error = error_of(&entry).expect("an error");
    assert_eq!(
        (&error["node_type"], &error["exception_type"]),
        (&json!("KSampler"), &json!("OutOfMemoryError"))
    );
    let message = error["exception_message"].as_str().unwrap();
    assert!(message.contains("out of memory") && message.contains("use a smaller picture"), "{message}");
    bench.run(txt2img("good.safetensors")).expect("the next prompt works");
}

/// Prompts on the demo model with each kind of adapter, by the file that the adapter is in.
fn adapted(kind: &str, file: &str) -> Json {
    let mut prompt = adapter_files::workflow(match kind {
        "loras" => "lora-stack",
        "controlnet" => "controlnet-stack",
        _ => "upscale-chain",
    });
    match kind {
        "loras" => prompt["10"]["inputs"]["lora_name"] = json!(file),
        "controlnet" => prompt["21"]["inputs"]["control_net_name"] = json!(file),
        _ => prompt["30"]["inputs"]["model_name"] = json!(file),
    }
    prompt
}

/// NaN and infinity in each network: the error names the network that is damaged, not the one that suffers.
#[test]
fn weights_that_are_no_numbers_name_their_network() {
    const NAN: u16 = 0x7e00;
    const INFINITY: u16 = 0x7c00;
    let bench = Bench::new();
    adapter_files::write_all(&bench.base.path().join("models"));
    for bits in [NAN, INFINITY] {
        for (tensor, network) in [
            ("model.diffusion_model.out.2.weight", "diffusion model"),
            ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "text encoder"),
            ("first_stage_model.decoder.conv_in.weight", "VAE decoder"),
            ("first_stage_model.encoder.conv_in.weight", "VAE encoder"),
        ] {
            let file = format!("{}-{bits}.safetensors", network.replace(' ', "_"));
            bench.write("sd1", &format!("checkpoints/{file}"));
            fill(&bench.path(&format!("checkpoints/{file}")), tensor, bits);
            let mut prompt = txt2img(&file);
            if network == "VAE encoder" {
                prompt["7"] = empty_image(64, 64, 1, 255);
                prompt[LATENT] =
                    json!({"class_type": "VAEEncode", "inputs": {"pixels": ["7", 0], "vae": ["1", 2]}});
            }
            bench.fails(prompt, &[network, "not a number", "get the file again"]);
        }
        for (folder, from, tensor, parts) in [
            (
                "controlnet",
                "tiny-controlnet",
                "control_model.zero_convs.0.0.weight",
                ["ControlNet", "get the file"],
            ),
            (
                "controlnet",
                "tiny-controlnet",
                "control_model.input_hint_block.0.bias",
                ["ControlNet", "get the file"],
            ),
            ("upscale_models", "tiny-esrgan", "conv_first.weight", ["upscaler", "get the file"]),
            (
                "loras",
                "tiny-lora",
                "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
                ["diffusion model", "LoRAs"],
            ),
            (
                "loras",
                "tiny-lora",
                "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
                ["text encoder", "LoRAs"],
            ),
        ] {
            let file = format!("bad-{bits}-{}.safetensors", tensor.replace('.', "_"));
            let path = bench.path(&format!("{folder}/{file}"));
            std::fs::copy(bench.path(&format!("{folder}/{from}.safetensors")), &path).unwrap();
            fill(&path, tensor, bits);
            bench.fails(adapted(folder, &file), &["not a number", parts[0], parts[1]]);
        }
    }
}

/// A LoRA for another family, on the model and on the text encoder alone.
#[test]
fn a_lora_for_another_family_is_named() {
    let bench = Bench::new();
    adapter_files::write_all(&bench.base.path().join("models"));
    for class in ["LoraLoader", "LoraLoaderModelOnly"] {
        let mut prompt = txt2img("good.safetensors");
        prompt["7"] = json!({"class_type": class, "inputs": {"model": ["1", 0], "clip": ["1", 1],
            "lora_name": "foreign-lora.safetensors", "strength_model": 1.0, "strength_clip": 1.0}});
        prompt["4"]["inputs"]["model"] = json!(["7", 0]);
        bench.fails(prompt, &["foreign-lora.safetensors", "another family", "choose a LoRA"]);
    }
}

/// Latents, conditioning and VAE of families that don't belong together.
#[test]
fn parts_of_different_families() {
    let bench = Bench::new();
    bench.write("sdxl", "checkpoints/sdxl.safetensors");
    let mut prompt = txt2img("sdxl.safetensors");
    prompt["7"] =
        json!({"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "good.safetensors"}});
    prompt["4"]["inputs"]["model"] = json!(["7", 0]);
    bench.fails(prompt, &["text conditioning", "must be 32", "found 64"]);
    // A latent of 16 channels: an empty one is fitted as in ComfyUI.
    let mut prompt = txt2img("good.safetensors");
    prompt[LATENT] =
        json!({"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}});
    assert_eq!(bench.picture(prompt).dimensions(), (64, 64));
}
