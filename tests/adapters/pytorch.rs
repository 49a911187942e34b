//! PyTorch files in every loader: the same pictures as from safetensors.

use std::io::Write;
use std::path::Path;

use kiln::models::tiny;
use kiln::tensor::DType;
use kiln::weights::WeightsFile;
use serde_json::{Value as Json, json};

use crate::{Bench, distance, files, with};

/// A text as pickles have it.
fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A whole number as pickles have it.
fn number(number: usize) -> Vec<u8> {
    [b"J", &(number as u32).to_le_bytes()[..]].concat()
}

fn tuple(numbers: impl IntoIterator<Item = usize>) -> Vec<u8> {
    [b"(".to_vec(), numbers.into_iter().flat_map(number).collect(), b"t".to_vec()].concat()
}

/// Writes an f16 or f32 safetensors file as `torch.save` would: texts first, the tensors under `state_dict`.
pub fn as_pytorch(from: &Path, to: &Path) {
    let file = WeightsFile::open(from).unwrap();
    let mut zip = zip::ZipWriter::new(std::fs::File::create(to).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut pickle = b"\x80\x02}(".to_vec();
    for (key, value) in file.metadata() {
        pickle.extend([text(key), text(value)].concat());
    }
    pickle.extend([text("state_dict"), b"}(".to_vec()].concat());
    for (i, info) in file.infos().enumerate() {
        let kind = if info.dtype == DType::F16 { "Half" } else { "Float" };
        let strides = (0..info.shape.len()).map(|axis| info.shape[axis + 1..].iter().product::<usize>());
        pickle.extend(
            [
                text(info.name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
                text("storage"),
                format!("ctorch\n{kind}Storage\n").into_bytes(),
                text(&i.to_string()),
                text("cpu"),
                number(info.numel()),
                b"tQ".to_vec(),
                number(0),
                tuple(info.shape.iter().copied()),
                tuple(strides),
                b"\x89}tR".to_vec(),
            ]
            .concat(),
        );
        zip.start_file(format!("archive/data/{i}"), stored).unwrap();
        zip.write_all(&file.get(info.name).unwrap().bytes).unwrap();
    }
    pickle.extend(b"uu.");
    zip.start_file("archive/data.pkl", stored).unwrap();
    zip.write_all(&pickle).unwrap();
    zip.finish().unwrap();
}

/// A bench with the recorded files of `tests/data/pytorch` in their folders.
fn bench() -> Bench {
    let bench = Bench::new();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/pytorch");
    for (name, folder) in [
        ("word.pt", "embeddings"),
        ("word-old.pt", "embeddings"),
        ("word.bin", "embeddings"),
        ("esrgan.pth", "upscale_models"),
        ("esrgan-old.pth", "upscale_models"),
    ] {
        let folder = bench.folder.path().join("models").join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(data.join(name), folder.join(name)).unwrap();
    }
    bench
}

#[test]
fn every_loader_takes_them() {
    let bench = bench();
    let models = bench.folder.path().join("models");
    let save = |folder: &str, name: &str, to: &str| {
        as_pytorch(&models.join(folder).join(name), &models.join(folder).join(to));
    };
    std::fs::create_dir_all(models.join("checkpoints")).unwrap();
    tiny::write("sd1", &models.join("checkpoints/sd1.safetensors"), DType::F16).unwrap().unwrap();
    save("checkpoints", "sd1.safetensors", "sd1.ckpt");
    save("loras", "tiny-lora.safetensors", "tiny-lora.pt");
    save("controlnet", "tiny-controlnet.safetensors", "tiny-controlnet.pth");
    save("vae_approx", "taesd_decoder.safetensors", "taesd_decoder.pth");

    let checkpoint = |name: &str| with(files::workflow("txt2img"), "4", "ckpt_name", json!(name));
    let (a, b) = (bench.picture(checkpoint("sd1.safetensors")), bench.picture(checkpoint("sd1.ckpt")));
    assert_eq!(a, b);
    let lora = |name: &str| with(files::workflow("lora-stack"), "10", "lora_name", json!(name));
    let (a, b) = (bench.picture(lora("tiny-lora.safetensors")), bench.picture(lora("tiny-lora.pt")));
    assert_eq!(a, b);
    let net = |name: &str| with(files::workflow("controlnet-stack"), "21", "control_net_name", json!(name));
    let (a, b) =
        (bench.picture(net("tiny-controlnet.safetensors")), bench.picture(net("tiny-controlnet.pth")));
    assert_eq!(a, b);
}

#[test]
fn words_of_all_forms_are_the_same() {
    let bench = bench();
    let models = bench.folder.path().join("models");
    std::fs::create_dir_all(models.join("checkpoints")).unwrap();
    tiny::write("sd1", &models.join("checkpoints/sd1.safetensors"), DType::F16).unwrap().unwrap();
    let picture = |text: &str| {
        let prompt = with(files::workflow("txt2img"), "4", "ckpt_name", json!("sd1.safetensors"));
        bench.picture(with(prompt, "6", "text", json!(text)))
    };
    let (plain, word) = (picture("a "), picture("a embedding:word.pt"));
    assert!(distance(&plain, &word) > 0.1, "{}", distance(&plain, &word));
    assert_eq!(picture("a embedding:word-old.pt"), word);
    // Without extension, .pt is tried before .bin, which holds the first of the two vectors only.
    assert_eq!(picture("a embedding:word"), word);
    let first = picture("a embedding:word.bin");
    assert!(distance(&first, &word) > 0.0 && distance(&first, &plain) > 0.0);
}

#[test]
fn upscalers_of_both_layouts_are_the_same() {
    let bench = bench();
    let enlarged = |name: &str| -> image::RgbImage {
        let name: Json = json!(name);
        bench.picture(with(files::workflow("upscale-chain"), "30", "model_name", name))
    };
    let (new, old) = (enlarged("esrgan.pth"), enlarged("esrgan-old.pth"));
    assert_eq!(new, old);
    let (low, high) = new.as_raw().iter().fold((255, 0), |(l, h), v| (*v.min(&l), *v.max(&h)));
    assert!(high > low, "params_ema is taken, not params, which is all zeros");
}
