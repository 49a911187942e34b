//! Short of memory, `VAEDecode` works in tiles; with too little even for those
//! it says so, and the server goes on.

mod process;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use image::RgbImage;
use kiln::backend::{self, DeviceOptions};
use kiln::files::{DEMO_BYTES, DEMO_CHECKPOINT};
use kiln::models::{ModelSource, ModelStore};
use kiln::weights::OpenOptions;
use process::Server;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value as Json, json};

/// Sides of the latent: half as much again as the fallback's largest tile.
const CELLS: usize = 80;
/// Sides of that tile.
const TILE_CELLS: usize = 64;

/// Largest allowed mean difference of tiled and whole decoding, in steps of 1/255; twice the measured one.
const MEAN_TOLERANCE: f64 = 0.3;
/// Largest allowed difference of one value; twice the measured one.
const WORST_TOLERANCE: u8 = 10;

/// What decoding `cells`×`cells` takes, in MiB, by the estimate that the fallback goes by.
fn decode_mib(cells: usize) -> usize {
    let backend = backend::open(DeviceOptions::default()).unwrap();
    let store = ModelStore::new(backend, OpenOptions::default());
    let file = store.file(ModelSource::Embedded { name: DEMO_CHECKPOINT, bytes: DEMO_BYTES });
    file.vae().unwrap().decode_bytes(cells, cells, size_of::<f32>()) >> 20
}

/// A base folder with a smooth latent of values as pictures have them.
fn folder() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    fs::create_dir_all(base.path().join("input")).unwrap();
    let wave = |i: usize| {
        let (c, y, x) = (i / (CELLS * CELLS), i / CELLS % CELLS, i % CELLS);
        let (fx, fy) = ((c + 1) as f32 * 0.07, (4 - c) as f32 * 0.05);
        1.2 * (x as f32 * fx + y as f32 * fy).sin() + 0.4 * (y as f32 * 0.31).cos()
    };
    let bytes: Vec<u8> = (0..4 * CELLS * CELLS).flat_map(|i| wave(i).to_le_bytes()).collect();
    let latent = TensorView::new(Dtype::F32, vec![1, 4, CELLS, CELLS], &bytes).unwrap();
    let mark = TensorView::new(Dtype::F32, vec![0], &[]).unwrap();
    let tensors = HashMap::from([("latent_tensor", latent), ("latent_format_version_0", mark)]);
    fs::write(base.path().join("input/wave.latent"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    base
}

/// Decodes the latent with a node of this class and these inputs besides `samples` and `vae`.
fn prompt(class: &str, inputs: Json) -> Json {
    let mut decode = json!({"class_type": class, "inputs": inputs});
    decode["inputs"]["samples"] = json!(["1", 0]);
    decode["inputs"]["vae"] = json!(["4", 2]);
    json!({
        "1": {"class_type": "LoadLatent", "inputs": {"latent": "wave.latent"}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "8": decode,
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "wave", "images": ["8", 0]}},
    })
}

/// A picture small enough for any limit here, through all seven nodes.
fn small_prompt() -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a green circle", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "small", "images": ["8", 0]}},
    })
}

/// The picture that a successful prompt saved.
fn picture(base: &Path, entry: &Json) -> RgbImage {
    assert_eq!(entry["status"]["status_str"], "success", "{entry}");
    let name = entry["outputs"]["9"]["images"][0]["filename"].as_str().unwrap();
    image::open(base.join("output").join(name)).unwrap().into_rgb8()
}

/// Mean and largest difference of two pictures, in steps of 1/255.
fn difference(a: &RgbImage, b: &RgbImage) -> (f64, u8) {
    assert_eq!(a.dimensions(), b.dimensions());
    let steps = || a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b));
    let sum: u64 = steps().map(u64::from).sum();
    (sum as f64 / a.as_raw().len() as f64, steps().max().unwrap_or(0))
}

#[test]
fn decoding_falls_back_to_tiles_and_then_to_an_error() {
    let (whole_mib, tile_mib) = (decode_mib(CELLS), decode_mib(TILE_CELLS));
    let base = folder();
    let decode = prompt("VAEDecode", json!({}));

    let server = Server::start(base.path(), &[]);
    let whole = picture(base.path(), &server.run(&decode));
    assert_eq!(server.count_lines("decoding in tiles"), 0);
    let tiling = json!({"tile_size": 512, "overlap": 128, "temporal_size": 64, "temporal_overlap": 8});
    let by_hand = prompt("VAEDecodeTiled", tiling);
    let by_hand = picture(base.path(), &server.run(&by_hand));
    drop(server);

    let limit = whole_mib.midpoint(tile_mib).to_string();
    let server = Server::start(base.path(), &["--memory-limit", &limit]);
    let fallback = picture(base.path(), &server.run(&decode));
    assert_eq!(server.count_lines("decoding in tiles"), 1);
    assert_eq!(difference(&fallback, &by_hand), (0.0, 0), "not the picture of VAEDecodeTiled");
    // Tiles are normalised by their own mean and spread, so the pictures aren't the same.
    let (mean, worst) = difference(&fallback, &whole);
    eprintln!("tiles against the whole: {mean:.3} of 255 on average, {worst} at most");
    assert!(mean < MEAN_TOLERANCE && worst <= WORST_TOLERANCE, "mean {mean}, worst {worst}");
    drop(server);

    let limit = (tile_mib / 3).to_string();
    let server = Server::start(base.path(), &["--memory-limit", &limit]);
    let entry = server.run(&decode);
    let (name, error) = match &entry["status"]["messages"].as_array().unwrap()[..] {
        [.., last] => (&last[0], &last[1]),
        [] => panic!("{entry}"),
    };
    assert_eq!(name, "execution_error");
    assert_eq!(
        (&error["node_type"], &error["exception_type"]),
        (&json!("VAEDecode"), &json!("OutOfMemoryError"))
    );
    let message = error["exception_message"].as_str().unwrap();
    assert!(message.contains("out of memory") && message.contains("use a smaller picture"), "{message}");
    picture(base.path(), &server.run(&small_prompt()));
}
