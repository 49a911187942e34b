//! A small HTTP and WebSocket client: what `kiln demo` needs to be a client of its own server.

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value as Json;
use std::net::SocketAddr;
use tokio::net::TcpStream;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// A client of one server on this machine.
pub struct Client {
    address: SocketAddr,
}

impl Client {
    /// A client of the server at `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect(self.address).await.context("connecting to the server")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok((status, bytes))
    }

    /// `GET path`, which must succeed.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        let (status, bytes) = self.send(Method::GET, path, Bytes::new()).await?;
        if !status.is_success() {
            bail!("GET {path}: {status}: {}", String::from_utf8_lossy(&bytes));
        }
        Ok(bytes)
    }

    /// `GET path` as JSON.
    pub async fn get_json(&self, path: &str) -> Result<Json> {
        Ok(serde_json::from_slice(&self.get(path).await?)?)
    }

    /// `POST path` with a JSON body; the answer is JSON.
    pub async fn post_json(&self, path: &str, body: &Json) -> Result<Json> {
        let (status, bytes) = self.send(Method::POST, path, serde_json::to_vec(body)?.into()).await?;
        if !status.is_success() {
            bail!("POST {path}: {status}: {}", String::from_utf8_lossy(&bytes));
        }
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Opens `/ws` under a client id.
    pub async fn socket(&self, client_id: &str) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>> {
        let url = format!("ws://{}/ws?clientId={client_id}", self.address);
        let (socket, _) = tokio_tungstenite::connect_async(url).await.context("opening /ws")?;
        Ok(socket)
    }
}
