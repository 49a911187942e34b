//! Row 8, WebSocket clients that read nothing: 100 of them under 1,000 previews cost less than
//! 64 MiB, an honest client hears each event within 100 ms (p99), and all slow ones are closed
//! once they have taken nothing for 25 s.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value as Json, json};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use super::process::Server;
use super::wire::{endless, get, memory_kib, post, quantile, reset_peak};

const SILENT: usize = 100;
const PREVIEWS: usize = 1000;

#[test]
fn silent_clients_cost_little_and_delay_nobody() {
    let _alone = super::alone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let base = tempfile::tempdir().unwrap();
        let server = Server::start(base.path(), &["--preview-method", "latent2rgb", "--preview-size", "256"]);
        let url = |id: &str| format!("ws://{}/ws?clientId={id}", server.address());
        let mut silent = Vec::new();
        for i in 0..SILENT {
            silent.push(connect_async(url(&format!("silent{i}"))).await.unwrap().0);
        }
        let mut honest = connect_async(url("honest")).await.unwrap().0;
        let before = memory_kib(&server).0;
        reset_peak(&server);
        // without a client id a prompt's events go to everybody
        post(&server, "/prompt", &json!({"prompt": endless(1)}));
        let (mut previews, mut last, mut gaps) = (0, Instant::now(), Vec::new());
        let mut step_times: Vec<Duration> = Vec::new();
        while previews < PREVIEWS {
            let message = tokio::time::timeout(Duration::from_secs(60), honest.next()).await.unwrap();
            match message.unwrap().unwrap() {
                Message::Binary(_) => {
                    previews += 1;
                    // the preview comes right after the text of its step
                    gaps.push(last.elapsed());
                }
                Message::Text(text) => {
                    let message: Json = serde_json::from_str(&text).unwrap();
                    if message["type"] == "progress" {
                        step_times.push(last.elapsed());
                        last = Instant::now();
                    }
                }
                _ => {}
            }
        }
        let (now, peak) = memory_kib(&server);
        let p99 = quantile(&mut gaps, 990);
        let step = quantile(&mut step_times, 500);
        eprintln!("{before} KiB before, {now} KiB after {PREVIEWS} previews, peak {peak} KiB; p99 {p99:?}, a step {step:?}");
        assert!(peak < before + 64 * 1024, "memory rose from {before} to {peak} KiB");
        assert!(p99 < Duration::from_millis(100), "an event took {p99:?}");
        let answer = get(&server, "/queue");
        assert_eq!(answer.status, 200);
        // the prompt goes on, so what the silent ones don't read piles up until they are given up
        let open = || std::fs::read_dir(format!("/proc/{}/fd", server.child.id())).unwrap().count();
        let (began, with_all) = (Instant::now(), open());
        while open() > with_all - SILENT {
            assert!(began.elapsed() < Duration::from_secs(30), "{} of {with_all} descriptors are open", open());
            let _ = tokio::time::timeout(Duration::from_millis(100), honest.next()).await;
        }
        eprintln!("closed {:?} after the thousandth preview", began.elapsed());
        post(&server, "/interrupt", &json!({}));
        drop(silent);
    });
}
