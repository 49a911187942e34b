//! `/free` gives a model's memory back to the system, time after time.
//!
//! The real binary, because memory is a matter of the whole process: heap,
//! threads and code pages. Its resident size is what the kernel says.
#![cfg(target_os = "linux")]

mod process;

use std::fs;

use process::Server;
use serde_json::{Value as Json, json};

/// Prompts, with `/free` after each; a debug build takes seconds for one.
const CYCLES: u64 = if cfg!(debug_assertions) { 5 } else { 50 };

/// The seven-node workflow at its smallest.
fn prompt(seed: u64) -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": seed, "steps": 1, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "linked.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": format!("{seed} blue squares"), "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "free", "images": ["8", 0]}},
    })
}

fn resident_kb(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn memory_is_back_at_idle_after_every_free() {
    let base = tempfile::tempdir().unwrap();
    let checkpoints = base.path().join("models/checkpoints");
    fs::create_dir_all(&checkpoints).unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo-sd.safetensors");
    std::os::unix::fs::symlink(model, checkpoints.join("linked.safetensors")).unwrap();

    let server = Server::start(base.path(), &[]);
    let idle = resident_kb(&server);
    let (mut freed, mut loaded) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        let entry = server.run(&prompt(cycle));
        assert_eq!(entry["status"]["status_str"], "success", "{entry}");
        loaded.push(resident_kb(&server));
        server.post("/free", &json!({"unload_models": true, "free_memory": true}));
        server.wait_for_line("freed memory", cycle as usize + 1);
        freed.push(resident_kb(&server));
    }
    assert_eq!(server.count_lines("freed memory"), freed.len(), "one answer to each request");
    let (worst, least) = (*freed.iter().max().unwrap(), *loaded.iter().min().unwrap());
    eprintln!("idle {idle} kB, with the model at least {least} kB, after /free at most {worst} kB");
    // The demo model is 12 MB: a reading that can't tell it from idle would prove nothing.
    assert!(least > idle + 10_000, "with the model {loaded:?} kB, idle {idle} kB");
    assert!(worst * 100 <= idle * 110, "after /free {freed:?} kB, idle {idle} kB");
}
