//! The server over real sockets: every test binds port 0 and speaks raw HTTP,
//! so that what goes over the wire is what is asserted.

mod access;
mod assets;
mod edges;
mod files;
mod hostile;
mod jobs;
mod nodes;
mod openapi;
mod routes;
mod sockets;
mod user;
mod v2;
mod waiting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{App, ServerConfig, run};
use crate::engine::{Engine, EngineConfig};

/// Longest time for anything that should happen soon.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running server with the nodes of [`nodes`].
struct Server {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
    dir: tempfile::TempDir,
}

/// An answer as it came over the wire.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    /// Splits an answer that ended with the connection.
    fn parse(raw: &[u8]) -> Self {
        let end = raw.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {raw:?}"));
        let head = String::from_utf8_lossy(&raw[..end]).into_owned();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Self { status, head, body: raw[end + 4..].to_vec() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Server {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folders = Arc::new(nodes::folders(dir.path()));
        let engine = Engine::new(EngineConfig::new(nodes::services(folders.clone()), nodes::all()));
        let mut config = ServerConfig { argv: vec!["kiln".to_owned()], ..ServerConfig::default() };
        change(&mut config);
        let app = App::new(engine, folders, config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(run(vec![listener], app, async {
            let _ = stopped.await;
        }));
        Self { addr, stop: Some(stop), serving, dir }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    /// Sends bytes, reads to the end of the connection.
    async fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        answer
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            request.push_str(&format!("Host: {}\r\n", self.addr));
        }
        if !body.is_empty() || matches!(method, "POST" | "PATCH") {
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
        request.push_str("\r\n");
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        Answer::parse(&self.raw(&bytes).await)
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"").await
    }

    async fn post(&self, path: &str, body: &Json) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes()).await
    }

    /// Queues a prompt that must be accepted; returns its id.
    async fn queue(&self, prompt: Json, client: Option<&str>) -> String {
        let mut body = json!({"prompt": prompt});
        if let Some(client) = client {
            body["client_id"] = client.into();
        }
        let answer = self.post("/prompt", &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["prompt_id"].as_str().unwrap().to_owned()
    }

    /// Waits until a prompt is in the history.
    async fn finished(&self, id: &str) -> Json {
        self.eventually(&format!("/history/{id}"), |body| body.get(id).cloned()).await
    }

    async fn eventually<T>(&self, path: &str, what: impl Fn(&Json) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            let body = self.get(path).await.json();
            if let Some(found) = what(&body) {
                return found;
            }
            assert!(Instant::now() < end, "{path}: {body}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops the server and waits for its end.
    async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        timeout(PATIENCE, &mut self.serving).await.unwrap().unwrap().unwrap();
    }
}
