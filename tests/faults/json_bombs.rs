//! Row 6, JSON bombs: 400 in ComfyUI's shape within 100 ms, no growth of memory, and the server lives.

use std::time::{Duration, Instant};

use super::process::Server;
use super::wire::{get, memory_kib, send};

#[test]
fn bombs_are_refused_quickly() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &[]);
    let keys: Vec<String> = (0..1_000_000).map(|i| format!("\"{i}\":0")).collect();
    let long = "x".repeat(1024 * 1024);
    let with_int = |value: &str| {
        format!(
            "{{\"prompt\": {{\"1\": {{\"class_type\": \"EmptyImage\", \"inputs\": {{\"width\": {value}, \
             \"height\": 8, \"batch_size\": 1, \"color\": 0}}}}, \"2\": {{\"class_type\": \"PreviewImage\", \
             \"inputs\": {{\"images\": [\"1\", 0]}}}}}}}}"
        )
    };
    let bombs: Vec<(&str, String)> = vec![
        ("10,000 lists deep", "[".repeat(10_000) + &"]".repeat(10_000)),
        ("10,000 objects deep", "{\"a\":".repeat(10_000) + "0" + &"}".repeat(10_000)),
        ("never closed", "[".repeat(1_000_000)),
        ("a million keys", format!("{{{}}}", keys.join(","))),
        ("NaN", with_int("NaN")),
        ("Infinity", with_int("-Infinity")),
        ("1e400", with_int("1e400")),
        ("half a surrogate", with_int("\"\\ud800\"")),
        ("a megabyte of text in an INT", with_int(&format!("\"{long}\""))),
        ("2^64", with_int("18446744073709551616")),
        ("a list in an INT", with_int("[1, 2, 3]")),
        ("no JSON", "{prompt: 1}".to_owned()),
        ("a number", "7".to_owned()),
        ("nothing", String::new()),
    ];
    let before = memory_kib(&server).0;
    for (name, body) in &bombs {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let began = Instant::now();
            let answer = send(&server, "POST", "/prompt", &[], body.as_bytes());
            best = best.min(began.elapsed());
            assert_eq!(answer.status, 400, "{name}: {answer:?}");
            let json = answer.json();
            assert!(
                json["error"]["type"].is_string() && json["error"]["message"].is_string(),
                "{name}: {json}"
            );
            assert!(
                json["node_errors"].is_object() || json["node_errors"] == serde_json::json!([]),
                "{name}"
            );
        }
        eprintln!("{name}: {best:?}");
        // a busy machine may hold up one try, not three
        assert!(best <= Duration::from_millis(100), "{name} took {best:?}");
    }
    let after = memory_kib(&server).0;
    assert!(after < before + 64 * 1024, "{before} KiB before, {after} KiB after");
    assert_eq!(get(&server, "/queue").status, 200);
}
