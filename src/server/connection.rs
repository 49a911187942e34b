//! Accepting connections, serving them, ending them.
//!
//! Shutdown: refuse new prompts; let the engine finish what runs (up to
//! `--shutdown-timeout`) while the server still answers, so that clients can
//! fetch their results; then stop accepting, close WebSockets with 1001, let
//! open requests end, return.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::App;
use super::http::Peer;
use super::router;
use super::stream::GuardedStream;

/// Largest request head, and hyper's read buffer.
const HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 100;

/// Serves until `shutdown` resolves and everything has ended.
pub async fn run(
    listeners: Vec<TcpListener>,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let capacity = app.config.limits.connections;
    let places = Arc::new(Semaphore::new(capacity));
    let (stop, stopping) = watch::channel(false);
    let pump = tokio::spawn(super::ws::pump(app.clone(), app.engine.subscribe()));
    let log_pump = tokio::spawn(super::ws::pump_log(app.clone()));
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn(accept(listener, app.clone(), places.clone(), stopping.clone()));
    }
    shutdown.await;
    app.begin_shutdown();
    app.drain_engine().await;
    accepting.shutdown().await;
    stop.send_replace(true);
    app.sockets.close_all();
    // every connection and every WebSocket holds a place
    let all = u32::try_from(capacity).map_err(io::Error::other)?;
    if timeout(app.config.limits.drain_timeout, places.acquire_many(all)).await.is_err() {
        tracing::warn!("connections were still open when the server stopped");
    }
    pump.abort();
    log_pump.abort();
    Ok(())
}

async fn accept(
    listener: TcpListener,
    app: Arc<App>,
    places: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
) {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, address)) => {
                let address = address.ip().to_canonical();
                tokio::spawn(open(stream, address, app.clone(), place, stopping.clone()));
            }
            Err(error) => {
                // out of file descriptors, or the peer is gone already: neither ends the server
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Shakes hands if the connection is to be encrypted, then serves it.
async fn open(
    stream: TcpStream,
    address: IpAddr,
    app: Arc<App>,
    place: OwnedSemaphorePermit,
    stopping: watch::Receiver<bool>,
) {
    let via_loopback = stream.local_addr().is_ok_and(|a| a.ip().to_canonical().is_loopback());
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let stream = GuardedStream::new(stream, app.config.limits.write_timeout);
    let is_tls = app.config.tls.is_some();
    let peer = Peer { via_loopback, is_tls, address: Some(address), _place: Arc::new(place) };
    let Some(tls) = app.config.tls.clone() else { return serve(stream, app, peer, stopping).await };
    let handshake = TlsAcceptor::from(tls).accept(stream);
    match timeout(app.config.limits.header_timeout, handshake).await {
        Ok(Ok(stream)) => serve(stream, app, peer, stopping).await,
        Ok(Err(error)) => tracing::debug!(%error, "no TLS handshake"),
        Err(_) => tracing::debug!("the TLS handshake took too long"),
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: Arc<App>,
    peer: Peer,
    mut stopping: watch::Receiver<bool>,
) {
    let limits = &app.config.limits;
    let io = TokioIo::new(stream);
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEAD_BYTES);
    let service = service_fn(|request| {
        let (app, peer) = (app.clone(), peer.clone());
        async move { Ok::<_, Infallible>(router::answer(app, peer, request).await) }
    });
    let mut connection = pin!(builder.serve_connection(io, service).with_upgrades());
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = is_true(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}

/// Waits until the value is true, or its sender is gone.
pub(super) async fn is_true(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|value| *value).await;
}
