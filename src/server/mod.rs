//! HTTP and WebSocket: ComfyUI's API over an [`Engine`].
//!
//! ```text
//! connection (limits, timeouts) ─▶ router (origin, /api alias) ─▶ routes/* ─▶ Engine, Folders
//!                                                            └─▶ ws ◀── engine events
//! ```
//!
//! | module | what |
//! | --- | --- |
//! | [`connection`] | accept, serve, shut down |
//! | [`stream`], [`limits`] | what a peer may cost: time, bytes, memory |
//! | [`auth`], [`tls`] | who may come in, and that nobody listens |
//! | [`endings`] | who waits for the end of a prompt |
//! | [`router`], [`origin`], [`compress`] | what every request and answer passes |
//! | [`users`], [`log`] | whose data it is; the last lines of the log |
//! | [`http`], [`json`], [`download`], [`outputs`] | bodies and answers |
//! | [`frontend`] | files of an installed web page |
//! | [`routes`], [`openapi`] | one file a group of routes; their description |
//! | [`ws`], [`webhook`] | events to clients |
//!
//! hyper is used directly: four middlewares are clearer as four functions.
//! Nothing here waits for a node, and whatever takes CPU time (validation,
//! images, large JSON) or touches files runs on blocking threads.
//!
//! A program that embeds kiln binds its own listener and calls [`run`]:
//!
//! ```no_run
//! # async fn example(engine: std::sync::Arc<kiln::engine::Engine>, folders: std::sync::Arc<kiln::files::Folders>)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! use kiln::server::{App, ServerConfig, run};
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let app = App::new(engine, folders, ServerConfig::default())?;
//! run(vec![listener], app, std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```

mod auth;
mod compress;
mod connection;
mod download;
mod endings;
mod frontend;
mod host;
mod http;
mod json;
mod limits;
mod log;
mod openapi;
mod origin;
mod outputs;
mod router;
mod routes;
mod stream;
#[cfg(test)]
mod tests;
pub mod tls;
mod users;
mod webhook;
mod ws;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::files::Folders;
use crate::files::assets::AssetStore;
pub use auth::{Auth, KeyFileError};
pub use connection::run;
use endings::Endings;
use limits::BodyBudget;
pub use limits::Limits;
pub use log::LogTail;
pub use origin::OriginPolicy;
use router::Router;
use routes::Idempotency;
use users::Users;
pub use users::UsersError;
use ws::Sockets;

/// The ComfyUI version whose API this is; clients compare it.
pub const COMFYUI_VERSION: &str = "0.3.64";

/// Pictures decoded at the same time.
const IMAGE_SLOTS: usize = 2;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// What peers may cost.
    pub limits: Limits,
    /// Which web pages may talk to the server.
    pub origin: OriginPolicy,
    /// The API keys; without any, everybody may use the server.
    pub auth: Auth,
    /// Certificate and key, if connections are encrypted (see [`tls::load`]).
    pub tls: Option<Arc<tokio_rustls::rustls::ServerConfig>>,
    /// Whether webhooks may go to private addresses and to plain HTTP.
    pub allow_private_webhooks: bool,
    /// Pause before a webhook is told again; each further one is four times as long.
    pub webhook_pause: Duration,
    /// Whether text answers are compressed for clients that accept gzip.
    pub compress: bool,
    /// Longer side of previews in pixels; the node's own choice if not given.
    pub preview_size: Option<u32>,
    /// How long a running prompt may take to end at shutdown.
    pub shutdown_timeout: Duration,
    /// A folder whose files are served where there is no route, `index.html` at `/`.
    pub front_end_root: Option<PathBuf>,
    /// The command line, shown in `/system_stats`.
    pub argv: Vec<String>,
    /// Whether clients name the user whose data they ask for.
    pub multi_user: bool,
    /// What `/internal/logs` shows.
    pub log: LogTail,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            origin: OriginPolicy::default(),
            auth: Auth::default(),
            tls: None,
            allow_private_webhooks: false,
            webhook_pause: Duration::from_secs(1),
            compress: false,
            preview_size: None,
            shutdown_timeout: Duration::from_secs(60),
            front_end_root: None,
            argv: Vec::new(),
            multi_user: false,
            log: LogTail::default(),
        }
    }
}

/// A server's state: what handlers share.
pub struct App {
    engine: Arc<Engine>,
    folders: Arc<Folders>,
    users: Users,
    config: ServerConfig,
    router: Router,
    sockets: Sockets,
    body_budget: BodyBudget,
    /// Uploads and results, by id and by hash.
    assets: Arc<AssetStore>,
    /// Who waits for the end of a prompt.
    endings: Endings,
    /// Keys of submissions that were taken.
    idempotency: Idempotency,
    /// Places for live event streams.
    event_streams: Arc<Semaphore>,
    /// Places for decoding pictures, which takes memory in proportion to their size.
    image_slots: Semaphore,
    is_stopping: AtomicBool,
}

/// A server that can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Two routes claim one path.
    #[error("the routes contradict each other: {0}")]
    Routes(#[from] matchit::InsertError),
    /// The list of users can't be used.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// The list of uploads is there but can't be read.
    #[error("the list of assets can't be read: {0}")]
    Assets(#[from] std::io::Error),
}

impl App {
    /// A server over an engine; [`run`] starts it.
    pub fn new(
        engine: Arc<Engine>,
        folders: Arc<Folders>,
        config: ServerConfig,
    ) -> Result<Arc<Self>, SetupError> {
        Ok(Arc::new(Self {
            engine,
            users: Users::open(folders.clone(), config.multi_user)?,
            assets: Arc::new(AssetStore::open(folders.clone())?),
            folders,
            endings: Endings::default(),
            idempotency: Idempotency::default(),
            event_streams: Arc::new(Semaphore::new(config.limits.event_streams)),
            body_budget: BodyBudget::new(config.limits.buffered_bytes),
            config,
            router: routes::all().build()?,
            sockets: Sockets::default(),
            image_slots: Semaphore::new(IMAGE_SLOTS),
            is_stopping: AtomicBool::new(false),
        }))
    }

    /// What the server can do, for `/features` and the WebSocket's `feature_flags`.
    fn features(&self) -> Json {
        json!({"supports_preview_metadata": true, "max_upload_size": self.config.limits.max_body_bytes})
    }

    /// Whether new prompts are refused because the server stops.
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    fn begin_shutdown(&self) {
        self.is_stopping.store(true, Ordering::Release);
    }

    /// Drops what waits, lets what runs end within the shutdown timeout, then stops it.
    async fn drain_engine(&self) {
        let waiting = self.engine.queue().pending.len();
        if waiting > 0 {
            tracing::warn!(waiting, "prompts were waiting; the server stops without running them");
            self.engine.clear_pending();
        }
        let deadline = Instant::now() + self.config.shutdown_timeout;
        while self.engine.queue_remaining() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if self.engine.queue_remaining() > 0 {
            tracing::warn!("the running prompt did not end in time and is stopped");
            self.engine.interrupt(None);
        }
        // lets the closing events reach the sockets
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
