//! Row 12, more prompts than can run: the cap is honoured with 429 and Retry-After, a waiting prompt
//! costs less than 2 KiB and its body, `/queue` answers within 50 ms (p99), and nothing accepted is lost.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::process::Server;
use super::wire::{endless, get, memory_kib, post, quantile};

const CAP: usize = 9_000;
const SENT: usize = 10_000;
const SENDERS: usize = 8;

fn small(color: usize) -> Json {
    json!({"prompt": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": color}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}})
}

#[test]
fn ten_thousand_prompts_at_once() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &["--max-queue", &CAP.to_string()]);
    post(&server, "/prompt", &json!({"prompt": endless(1)}));
    let running = |queue: &Json| queue["queue_running"].as_array().unwrap().len() == 1;
    while !running(&get(&server, "/queue").json()) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // What eight senders at once cost whatever they send (threads, connections, heap for parsing) is no cost of waiting.
    std::thread::scope(|scope| {
        for sender in 0..SENDERS {
            let server = &server;
            scope.spawn(move || {
                for i in 0..SENT / 10 / SENDERS {
                    let answer = post(server, "/prompt?validate_only=1", &small(i * SENDERS + sender));
                    assert_eq!(answer.status, 200, "{answer:?}");
                }
            });
        }
    });
    let before = memory_kib(&server).0;
    let (accepted, refused) = (Mutex::new(Vec::new()), Mutex::new(0));
    std::thread::scope(|scope| {
        for sender in 0..SENDERS {
            let (server, accepted, refused) = (&server, &accepted, &refused);
            scope.spawn(move || {
                for i in (sender..SENT).step_by(SENDERS) {
                    let answer = post(server, "/prompt", &small(i));
                    match answer.status {
                        200 => accepted
                            .lock()
                            .unwrap()
                            .push(answer.json()["prompt_id"].as_str().unwrap().to_owned()),
                        429 => {
                            assert!(answer.header("retry-after").is_some(), "{answer:?}");
                            assert_eq!(answer.json()["error"]["type"], "queue_full");
                            *refused.lock().unwrap() += 1;
                        }
                        _ => panic!("{answer:?}"),
                    }
                }
            });
        }
    });
    let (mut accepted, refused) = (accepted.into_inner().unwrap(), refused.into_inner().unwrap());
    assert_eq!((accepted.len(), refused), (CAP - 1, SENT - CAP + 1), "one place is the running prompt's");
    let after = memory_kib(&server).0;
    let each = (after.saturating_sub(before)) as usize * 1024 / accepted.len();
    let body = small(CAP).to_string().len();
    let mut times: Vec<Duration> = (0..100)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(get(&server, "/queue").status, 200);
            began.elapsed()
        })
        .collect();
    let p99 = quantile(&mut times, 990);
    eprintln!("{each} bytes a prompt of {body}, /queue p50 {:?}, p99 {p99:?}", times[50]);
    assert!(each < 2048 + body, "a waiting prompt of {body} bytes costs {each}");

    let queue = get(&server, "/queue").json();
    let mut waiting: Vec<String> = queue["queue_pending"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row[1].as_str().unwrap().to_owned())
        .collect();
    waiting.sort();
    accepted.sort();
    assert!(waiting == accepted, "nothing accepted is lost");
    assert!(p99 < Duration::from_millis(50), "/queue took {p99:?}");
}
