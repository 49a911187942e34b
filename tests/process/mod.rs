//! The real binary as a child process: starting it, asking it, reading its log.

#![allow(dead_code, reason = "every test uses its part of this")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

/// Longest wait for anything: hundreds of times what it takes on two free cores.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running `kiln serve`; killed when dropped.
pub struct Server {
    pub child: Child,
    address: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts a server on a free port and waits until its trial prompt is through.
    pub fn start(base: &Path, flags: &[&str]) -> Self {
        let threads: &[&str] = if flags.contains(&"--threads") { &[] } else { &["--threads", "2"] };
        let mut child = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "--cpu", "--port", "0", "--base-directory"])
            .arg(base)
            .args(threads)
            .args(flags)
            .env("KILN_LOG", "info,kiln::cli::setup=debug")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (log.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let mut server = Self { child, address: String::new(), log };
        let listening = server.wait_for_line("listening on http://", 1);
        server.address = listening.rsplit('/').next().unwrap().to_owned();
        server.wait_for_line("warm elapsed=", 1);
        server
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where it listens: address and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How many lines of the log hold `text`.
    pub fn count_lines(&self, text: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits for the `count`th line that holds `text`.
    pub fn wait_for_line(&self, text: &str, count: usize) -> String {
        eventually(|| {
            let log = self.log.lock().unwrap();
            log.iter().filter(|line| line.contains(text)).nth(count - 1).cloned()
        })
        .unwrap_or_else(|| panic!("no {count} lines with {text:?} in {:#?}", self.log.lock().unwrap()))
    }

    /// Runs a prompt to its end; its history entry.
    pub fn run(&self, prompt: &Json) -> Json {
        let accepted = self.post("/prompt", &json!({"prompt": prompt}));
        let id = accepted["prompt_id"].as_str().unwrap_or_else(|| panic!("refused: {accepted}")).to_owned();
        let path = format!("/history/{id}");
        eventually(|| self.ask(&format!("GET {path}"), "").get_mut(&id).map(Json::take))
            .unwrap_or_else(|| panic!("prompt {id} did not end"))
    }

    /// The JSON answer to a POST; null if there is none.
    pub fn post(&self, path: &str, body: &Json) -> Json {
        self.ask(&format!("POST {path}"), &body.to_string())
    }

    fn ask(&self, what: &str, body: &str) -> Json {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (host, length) = (&self.address, body.len());
        let head =
            format!("{what} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}");
        write!(stream, "{head}\r\nContent-Type: application/json\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until there is an answer, or patience ends.
fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}
