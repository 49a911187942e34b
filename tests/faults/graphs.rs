//! Row 7, hostile graphs: answered within a second with ComfyUI's errors, and never a stack overflow
//! or an allocation of the size that a client names.

use std::time::{Duration, Instant};

use serde_json::{Map, Value as Json, json};

use super::process::Server;
use super::wire::{get, memory_kib, post};

/// `length` nodes, each fed by the one before.
fn chain(length: usize) -> Json {
    let mut graph = Map::new();
    let image = json!({"width": 8, "height": 8, "batch_size": 1, "color": 0});
    graph.insert("0".to_owned(), json!({"class_type": "EmptyImage", "inputs": image}));
    for i in 1..length {
        let source = (i - 1).to_string();
        graph.insert(i.to_string(), json!({"class_type": "ImageInvert", "inputs": {"image": [source, 0]}}));
    }
    let last = (length - 1).to_string();
    graph.insert("end".to_owned(), json!({"class_type": "PreviewImage", "inputs": {"images": [last, 0]}}));
    Json::Object(graph)
}

fn image(width: u64, height: u64, batch: u64) -> Json {
    json!({"1": {"class_type": "EmptyImage", "inputs": {"width": width, "height": height, "batch_size": batch, "color": 0}},
           "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
}

fn invert(source: Json) -> Json {
    json!({"1": {"class_type": "ImageInvert", "inputs": {"image": source}},
           "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})
}

#[test]
fn hostile_graphs_get_the_right_errors_in_time() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &[]);
    let mut circle = chain(2000);
    circle["0"] = json!({"class_type": "ImageInvert", "inputs": {"image": ["1999", 0]}});
    let latent = json!({"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 1_000_000, "height": 1_000_000, "batch_size": 10_000}},
                        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}}});
    let cases: Vec<(&str, Json, u16)> = vec![
        ("a chain of 20,000", chain(20_000), 200),
        ("a circle of 2,000", circle, 400),
        ("a link to itself", invert(json!(["1", 0])), 400),
        ("a slot that is not there", invert(json!(["2", 7])), 400),
        ("a slot of 10^18", invert(json!(["1", 1_000_000_000_000_000_000_u64])), 400),
        ("a node that is not there", invert(json!(["gone", 0])), 400),
        ("a batch of 10^4 beyond the limit", image(64, 64, 10_000), 400),
        ("a latent of 10^6 by 10^6", latent, 400),
        ("more nodes than anybody draws", chain(60_000), 400),
        ("no node", json!({}), 400),
        ("null", Json::Null, 400),
    ];
    for (name, graph, status) in cases {
        let began = Instant::now();
        let answer = post(&server, "/prompt?validate_only=1", &json!({"prompt": graph}));
        let took = began.elapsed();
        eprintln!("{name}: {} in {took:?}", answer.status);
        assert_eq!(
            answer.status,
            status,
            "{name}: {:?}",
            String::from_utf8_lossy(&answer.body[..answer.body.len().min(500)])
        );
        assert!(took < Duration::from_secs(1), "{name} took {took:?}");
        if status == 400 {
            assert!(answer.json()["error"]["type"].is_string(), "{name}");
        }
    }
    assert_eq!(get(&server, "/queue").status, 200);
}

/// What validation lets through must not take the machine down when it runs.
#[test]
fn sizes_are_checked_before_memory_is_taken() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &[]);
    let before = memory_kib(&server).0;
    // each side is within its range; together they would take 3 TB
    let body = json!({"prompt": image(16384, 16384, 4096), "wait": 60});
    let job = post(&server, "/prompt", &body).json();
    assert_eq!(job["status"], "failed", "{job}");
    eprintln!("refused with: {}", job["execution_error"]["exception_message"]);
    let peak = memory_kib(&server).1;
    assert!(peak < before + 512 * 1024, "{before} KiB before, {peak} KiB at most");
    let good = post(&server, "/prompt", &json!({"prompt": image(8, 8, 1), "wait": 60})).json();
    assert_eq!(good["status"], "completed", "the next prompt is fine");
}
