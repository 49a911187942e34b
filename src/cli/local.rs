//! A server on a free loopback port, for commands that are their own client.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::setup::{self, RuntimeArgs};
use super::trace::TraceArgs;
use crate::engine::{Engine, EngineConfig};
use crate::server::{self, App, ServerConfig};

/// A running server.
pub struct LocalServer {
    address: SocketAddr,
    engine: Arc<Engine>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl LocalServer {
    /// Starts a server whose files lie in `folder`.
    pub async fn start(args: &RuntimeArgs, folder: &Path) -> Result<Self> {
        let folders = setup::local_folders(args, &folder.join("output"), folder);
        let (services, _) = setup::services(args, &folders, &TraceArgs::default())?;
        let folders = services.folders.clone();
        let engine = Engine::new(EngineConfig::new(services, crate::nodes::registry()));
        let listener = TcpListener::bind("127.0.0.1:0").await.context("binding a loopback port")?;
        let address = listener.local_addr()?;
        let app = App::new(engine.clone(), folders, ServerConfig::default())?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let shutdown = async {
                // An error means that the handle is gone, which ends the server too.
                let _ = stopped.await;
            };
            if let Err(error) = server::run(vec![listener], app, shutdown).await {
                tracing::error!(%error, "the server stopped");
            }
        });
        Ok(Self { address, engine, stop, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it.
    pub async fn stop(self) {
        // Errors mean that it has stopped already.
        let _ = self.stop.send(());
        let _ = self.task.await;
        self.engine.shutdown();
    }
}
