//! A server inside another program, with that program's own nodes.
//!
//! ```no_run
//! # struct MyNode;
//! # impl kiln::nodes::Node for MyNode {
//! #     fn schema(&self) -> kiln::graph::Schema { kiln::graph::Schema::new("MyNode", "mine") }
//! #     fn execute(&self, _: &mut kiln::nodes::NodeCtx<'_>, _: &kiln::nodes::Inputs)
//! #         -> Result<kiln::nodes::NodeOutput, kiln::nodes::NodeError> { Ok(Default::default()) }
//! # }
//! kiln::Server::builder().node(MyNode).listen("127.0.0.1:8188").run()?;
//! # Ok::<(), kiln::ServerError>(())
//! ```
//!
//! The program's nodes stand in `/object_info` after the built-in ones, and are checked, cached and
//! run like them; a node with a built-in one's class name takes its place. Whoever needs more control
//! makes an [`Engine`] and an [`App`] and calls [`crate::server::run`].

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::backend::{self, DeviceOptions};
use crate::engine::{Engine, EngineConfig};
use crate::files::{FolderOptions, Folders};
use crate::models::ModelStore;
use crate::nodes::{self, Node, PreviewMethod, Services};
use crate::server::{self, App, ServerConfig};
use crate::weights::OpenOptions;

/// A server that can't start, or ended badly.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct ServerError {
    what: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> ServerError {
    let what = what.into();
    move |source| ServerError { what, source: source.into() }
}

/// See the [module](self).
pub struct Server;

impl Server {
    /// A server with kiln's nodes, on the current folder and `127.0.0.1:8188`.
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            nodes: nodes::registry(),
            folders: FolderOptions { base: PathBuf::from("."), ..FolderOptions::default() },
            device: DeviceOptions::default(),
            address: "127.0.0.1:8188".to_owned(),
            config: ServerConfig::default(),
        }
    }
}

/// How the server will be.
pub struct ServerBuilder {
    nodes: Vec<Box<dyn Node>>,
    folders: FolderOptions,
    device: DeviceOptions,
    address: String,
    config: ServerConfig,
}

impl ServerBuilder {
    /// Adds a node class.
    pub fn node(mut self, node: impl Node + 'static) -> Self {
        self.nodes.push(Box::new(node));
        self
    }

    /// The folder that holds models, input, output, temp and user.
    pub fn base_directory(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folders.base = folder.into();
        self
    }

    /// Every folder by itself.
    pub fn folders(mut self, folders: FolderOptions) -> Self {
        self.folders = folders;
        self
    }

    /// The device that models run on.
    pub fn device(mut self, device: DeviceOptions) -> Self {
        self.device = device;
        self
    }

    /// Address and port; port 0 takes a free one.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.address = address.into();
        self
    }

    /// Limits, keys, TLS and the like.
    pub fn config(mut self, config: ServerConfig) -> Self {
        self.config = config;
        self
    }

    /// Serves until ctrl-c.
    ///
    /// # Errors
    /// [`ServerError`] if the server can't start.
    pub fn run(self) -> Result<(), ServerError> {
        let running = self.start()?;
        let waited = running.runtime.block_on(tokio::signal::ctrl_c());
        running.stop();
        waited.map_err(failed("ctrl-c can't be watched"))
    }

    /// Starts the server and comes back.
    ///
    /// # Errors
    /// [`ServerError`] if the server can't start.
    pub fn start(self) -> Result<RunningServer, ServerError> {
        let folders = Folders::open(&self.folders).map_err(failed("the folders can't be set up"))?;
        let placement = backend::open(self.device).map_err(failed("the device can't be used"))?;
        let folders = Arc::new(folders);
        let services = Services {
            folders: folders.clone(),
            models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
            save_metadata: true,
            png_level: 1,
            preview: PreviewMethod::default(),
        };
        let engine = Engine::new(EngineConfig::new(services, self.nodes));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("kiln-http")
            .on_thread_start(backend::cpu::answer_promptly)
            .enable_all()
            .build()
            .map_err(failed("the HTTP threads can't be started"))?;
        let address = self.address;
        let wanted: Vec<SocketAddr> = address
            .to_socket_addrs()
            .map_err(failed(format!("{address} is no address to listen on")))?
            .collect();
        let listener = runtime
            .block_on(TcpListener::bind(wanted.as_slice()))
            .map_err(failed(format!("can't listen on {address}")))?;
        let address = listener.local_addr().map_err(failed("the listening address is not known"))?;
        let app =
            App::new(engine.clone(), folders, self.config).map_err(failed("the server can't be set up"))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = runtime.spawn(async move {
            let shutdown = async {
                // An error means that the handle is gone, which ends the server too.
                let _ = stopped.await;
            };
            if let Err(error) = server::run(vec![listener], app, shutdown).await {
                tracing::error!(%error, "the server stopped");
            }
        });
        Ok(RunningServer { address, engine, stop, serving, runtime })
    }
}

/// A server at work; dropping it ends it at once, [`stop`](Self::stop) lets it end well.
pub struct RunningServer {
    address: SocketAddr,
    engine: Arc<Engine>,
    stop: oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
    runtime: tokio::runtime::Runtime,
}

impl RunningServer {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its queue and executor.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Lets the running prompt end, then stops.
    pub fn stop(self) {
        let Self { engine, stop, serving, runtime, .. } = self;
        // Errors mean that it has stopped already.
        let _ = stop.send(());
        let _ = runtime.block_on(serving);
        engine.shutdown();
    }
}
