//! The main job, end to end over HTTP on the demo model, against pictures that ComfyUI computed.
//!
//! f32: at most 1/255 apart in 99.9 % of the values (the two differ in the last
//! bits of sums, and a value on the edge of two levels may fall either way).
//! bf16: 35 dB PSNR; bf16 keeps 8 bits of a value, so single pixels move by more.

mod local;

use std::path::{Path, PathBuf};

use kiln::cli::client::Client;
use kiln::cli::device::DeviceArgs;
use serde_json::{Value as Json, json};

use local::{on_cpu, with_server};

struct Job {
    positive: String,
    negative: &'static str,
    seed: u64,
    steps: u64,
    cfg: f64,
    sampler: String,
    size: u64,
}

impl Job {
    /// The workflow of ComfyUI's API document.
    fn document(size: u64) -> Self {
        Self {
            positive: "beautiful landscape, mountains, lake, sunset, detailed, realistic".into(),
            negative: "blurry, bad quality, low resolution, ugly",
            seed: 1234,
            steps: 20,
            cfg: 7.0,
            sampler: "euler_ancestral".into(),
            size,
        }
    }

    fn prompt(&self) -> Json {
        json!({
            "3": {"class_type": "KSampler", "inputs": {
                "seed": self.seed, "steps": self.steps, "cfg": self.cfg, "sampler_name": self.sampler,
                "scheduler": "normal", "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0],
                "negative": ["7", 0], "latent_image": ["5", 0]}},
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "demo-sd.safetensors"}},
            "5": {"class_type": "EmptyLatentImage",
                  "inputs": {"width": self.size, "height": self.size, "batch_size": 1}},
            "6": {"class_type": "CLIPTextEncode", "inputs": {"text": self.positive, "clip": ["4", 1]}},
            "7": {"class_type": "CLIPTextEncode", "inputs": {"text": self.negative, "clip": ["4", 1]}},
            "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
            "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "kiln", "images": ["8", 0]}},
        })
    }
}

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-model")
}

fn samples() -> Vec<(String, Job)> {
    let text = std::fs::read_to_string(assets().join("samples.json")).unwrap();
    let list: Vec<Json> = serde_json::from_str(&text).unwrap();
    list.iter()
        .map(|s| {
            let seed = s["seed"].as_u64().unwrap();
            let job = Job {
                positive: s["prompt"].as_str().unwrap().to_owned(),
                negative: "",
                seed,
                steps: s["steps"].as_u64().unwrap(),
                cfg: s["cfg"].as_f64().unwrap(),
                sampler: s["sampler"].as_str().unwrap().to_owned(),
                size: s["width"].as_u64().unwrap(),
            };
            (format!("{seed:02}.png"), job)
        })
        .collect()
}

/// Posts the job, waits for it, fetches the picture: RGB bytes.
async fn draw(client: &Client, job: &Job) -> Vec<u8> {
    let accepted = client.post_json("/prompt", &json!({"prompt": job.prompt()})).await.unwrap();
    let id = accepted["prompt_id"].as_str().unwrap();
    let entry = loop {
        let history = client.get_json(&format!("/history/{id}")).await.unwrap();
        if !history[id].is_null() {
            break history[id].clone();
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(entry["status"]["status_str"], "success", "{}", entry["status"]);
    let name = entry["outputs"]["9"]["images"][0]["filename"].as_str().unwrap();
    rgb(&client.get(&format!("/view?filename={name}&type=output")).await.unwrap())
}

fn rgb(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).unwrap().to_rgb8().into_raw()
}

fn reference(name: &str) -> Vec<u8> {
    rgb(&std::fs::read(assets().join("reference").join(name)).unwrap())
}

fn assert_same_picture(name: &str, ours: &[u8]) {
    let golden = reference(name);
    assert_eq!(ours.len(), golden.len(), "{name}: size");
    let off = ours.iter().zip(&golden).filter(|(a, b)| a.abs_diff(**b) > 1).count();
    let share = off as f64 / golden.len() as f64;
    println!("{name}: {off} of {} values off by more than 1/255", golden.len());
    assert!(share <= 1e-3, "{name}: {:.3} % of the values are off by more than 1/255", share * 100.0);
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) / (sum / a.len() as f64).max(1e-12)).log10()
}

#[test]
fn samples_equal_the_reference_pictures() {
    let folder = tempfile::tempdir().unwrap();
    with_server(&on_cpu(DeviceArgs::default()), folder.path(), async |client| {
        for (name, job) in samples() {
            assert_same_picture(&name, &draw(client, &job).await);
        }
    });
}

#[test]
fn the_documents_workflow_equals_the_reference_at_both_sizes() {
    let folder = tempfile::tempdir().unwrap();
    with_server(&on_cpu(DeviceArgs::default()), folder.path(), async |client| {
        for size in [128, 512] {
            let ours = draw(client, &Job::document(size)).await;
            assert_same_picture(&format!("document-{size}.png"), &ours);
        }
    });
}

#[test]
fn bf16_pictures_are_close() {
    let args = on_cpu(DeviceArgs { cpu_bf16: true, ..DeviceArgs::default() });
    let folder = tempfile::tempdir().unwrap();
    with_server(&args, folder.path(), async |client| {
        let mut jobs = samples();
        jobs.push(("document-128.png".into(), Job::document(128)));
        jobs.push(("document-512.png".into(), Job::document(512)));
        for (name, job) in jobs {
            let db = psnr(&draw(client, &job).await, &reference(&name));
            println!("{name}: {db:.1} dB");
            assert!(db >= 35.0, "{name}: {db:.1} dB");
        }
    });
}
