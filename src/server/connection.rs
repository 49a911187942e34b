//! Accepting connections, serving them, ending them.
//!
//! Shutdown: refuse new prompts; let the engine finish what runs (up to
//! `--shutdown-timeout`) while the server still answers, so that clients can
//! fetch their results; then stop accepting, close WebSockets with 1001, let
//! open requests end, return.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::App;
use super::http::Peer;
use super::router;
use super::stream::GuardedStream;

/// Largest request head, and hyper's read buffer.
const HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 100;

/// Serves until `shutdown` resolves and everything has ended.
pub async fn run(listeners: Vec<TcpListener>, app: Arc<App>, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(app.config.limits.connections));
    let mut tasks = JoinSet::new();
    for listener in listeners {
        tasks.spawn(accept(listener, app.clone(), places.clone(), graceful.watcher()));
    }
    let pump = tokio::spawn(super::ws::pump(app.clone()));
    shutdown.await;
    app.begin_shutdown();
    app.drain_engine().await;
    tasks.shutdown().await;
    app.sockets.close_all();
    if timeout(app.config.limits.drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests were still open when the server stopped");
    }
    app.sockets.wait_closed(app.config.limits.drain_timeout).await;
    pump.abort();
    Ok(())
}

async fn accept(listener: TcpListener, app: Arc<App>, places: Arc<Semaphore>, watcher: Watcher) {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve(stream, app.clone(), place, watcher.clone()));
            }
            Err(error) => {
                // out of file descriptors, or the peer is gone already: neither ends the server
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, app: Arc<App>, place: OwnedSemaphorePermit, watcher: Watcher) {
    let via_loopback = stream.local_addr().is_ok_and(|a| a.ip().to_canonical().is_loopback());
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let limits = &app.config.limits;
    let io = TokioIo::new(GuardedStream::new(stream, limits.write_timeout));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEAD_BYTES);
    let peer = Peer { via_loopback, place: Arc::new(place) };
    let service = service_fn(|request| {
        let (app, peer) = (app.clone(), peer.clone());
        async move { Ok::<_, Infallible>(router::answer(app, peer, request).await) }
    });
    let connection = builder.serve_connection(io, service).with_upgrades();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "connection ended");
    }
}
