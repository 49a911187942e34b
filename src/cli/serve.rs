//! `kiln serve`: the server, with ComfyUI's flags.

mod ignored;

use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use tokio::net::TcpListener;
use tokio::signal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

pub use ignored::IgnoredFlags;

use super::setup::{self, RuntimeArgs};
use super::trace::{Trace, TraceArgs};

use crate::backend;
use crate::engine::{Engine, EngineConfig};
use crate::files::{FolderOptions, Folders, Kind};
use crate::nodes::{self, PreviewMethod, Services};
use crate::server::{App, Auth, Limits, LogTail, OriginPolicy, ServerConfig, tls};

/// What `--listen` without an address means.
const EVERYWHERE: &str = "0.0.0.0,::";

/// Open files besides connections: models, uploads, results.
const SPARE_FILES: u64 = 512;

/// `--preview-method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PreviewChoice {
    /// No previews while sampling.
    None,
    /// The best method at hand.
    Auto,
    /// A linear projection of the latent.
    Latent2rgb,
    /// A small decoder; the linear projection where there is none.
    Taesd,
}

/// The flags of `kiln serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Addresses to listen on, separated by commas; without a value on all of them
    #[arg(long, value_name = "IP[,IP]", num_args = 0..=1, default_value = "127.0.0.1",
          default_missing_value = EVERYWHERE)]
    pub listen: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8188)]
    pub port: u16,

    /// Folder of results
    #[arg(long, value_name = "DIR")]
    pub output_directory: Option<PathBuf>,

    /// Folder of uploads
    #[arg(long, value_name = "DIR")]
    pub input_directory: Option<PathBuf>,

    /// Folder in which 'temp' is made
    #[arg(long, value_name = "DIR")]
    pub temp_directory: Option<PathBuf>,

    /// Folder of settings and workflows
    #[arg(long, value_name = "DIR")]
    pub user_directory: Option<PathBuf>,

    /// Folders, device and threads
    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// How previews are made while sampling
    #[arg(long, value_enum, default_value_t = PreviewChoice::None)]
    pub preview_method: PreviewChoice,

    /// Longer side of previews in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub preview_size: u32,

    /// Largest request body
    #[arg(long, value_name = "MB", default_value_t = 100.0)]
    pub max_upload_size: f64,

    /// How much is logged: DEBUG, INFO, WARNING, ERROR, CRITICAL
    #[arg(long, value_name = "LEVEL", num_args = 0..=1, default_value = "INFO", default_missing_value = "DEBUG",
          ignore_case = true, value_parser = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])]
    pub verbose: String,

    /// Don't save prompts in pictures
    #[arg(long)]
    pub disable_metadata: bool,

    /// Let pages of this origin use the server; without a value pages of all origins
    #[arg(long, value_name = "ORIGIN", num_args = 0..=1, default_missing_value = "*")]
    pub enable_cors_header: Option<String>,

    /// Further host names under which this server may be reached
    #[arg(long, value_name = "NAME[,NAME]", value_delimiter = ',')]
    pub allowed_hosts: Vec<String>,

    /// Compress text answers
    #[arg(long)]
    pub enable_compress_response_body: bool,

    /// How long a running prompt may take to end when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub shutdown_timeout: u64,

    /// Prompts that may wait; further ones are refused with 429
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub max_queue: usize,

    /// Keep the data of several users apart
    #[arg(long)]
    pub multi_user: bool,

    /// Prompts of one client (an API key, else an address) that may wait; 0 sets no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_queue_per_client: usize,

    /// File of API keys, 'KEY' or 'NAME KEY' a line; with it every request needs one
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Certificate chain (PEM): serve HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_keyfile")]
    pub tls_certfile: Option<PathBuf>,

    /// Private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_certfile")]
    pub tls_keyfile: Option<PathBuf>,

    /// Let webhooks go to private addresses and to plain HTTP
    #[arg(long)]
    pub allow_private_webhooks: bool,

    /// Folder of a web page to serve instead of the built-in one, such as that of comfyui-frontend-package
    #[arg(long, value_name = "DIR")]
    pub front_end_root: Option<PathBuf>,

    /// Every kernel launch, for Chrome or Perfetto
    #[command(flatten)]
    pub trace: TraceArgs,

    /// ComfyUI's flags without effect here
    #[command(flatten)]
    pub ignored: IgnoredFlags,
}

/// Runs the server until it is told to stop.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let log = LogTail::default();
    start_log(&args.verbose, log.clone());
    if !args.ignored.given.is_empty() {
        tracing::info!(flags = args.ignored.given.join(" "), "flags without effect in kiln");
    }
    let config = ServerConfig { log, ..config(args)? };
    allow_open_files(config.limits.connections);
    // Sets up the heap, which must come before any thread.
    let (services, trace) = services(args)?;
    if let Some(threads) = args.runtime.device.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.context("--threads: the thread pool exists already")?;
    }
    let folders = services.folders.clone();
    let placement = services.models.placement().clone();
    if placement.diffusion.info().kind == "cpu" {
        std::thread::spawn(move || setup::warm_up(placement));
    } else {
        // One thread at a time works with a GPU.
        setup::warm_up(placement);
    }
    empty(folders.root(Kind::Temp));
    let engine = Engine::new(EngineConfig::new(services, nodes::registry()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("kiln-http")
        .on_thread_start(backend::cpu::answer_promptly)
        .enable_all()
        .build()
        .context("the HTTP threads can't be started")?;
    let outcome = runtime.block_on(serve(args, engine.clone(), folders, config));
    runtime.shutdown_timeout(Duration::from_secs(1));
    engine.shutdown();
    outcome.and(trace.map_or(Ok(()), Trace::finish))
}

/// Every socket is an open file; systems often allow fewer than the server does.
fn allow_open_files(connections: usize) {
    let wanted = connections as u64 + SPARE_FILES;
    match rlimit::increase_nofile_limit(wanted) {
        Ok(allowed) if allowed < wanted => {
            tracing::warn!(allowed, wanted, "the system allows few open files: connections may be refused");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the limit of open files can't be raised"),
    }
}

fn start_log(level: &str, tail: LogTail) {
    let level = match level.to_ascii_uppercase().as_str() {
        "DEBUG" => "debug",
        "WARNING" => "warn",
        "ERROR" | "CRITICAL" => "error",
        _ => "info",
    };
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let stderr = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let tail = fmt::layer().with_writer(tail).with_ansi(false).without_time();
    // an embedding program may have a log of its own
    let _ = tracing_subscriber::registry().with(filter).with(stderr).with(tail).try_init();
}

/// Throws away the temporary results of the last run.
fn empty(temp: &Path) {
    for entry in std::fs::read_dir(temp).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let outcome = if is_folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        if let Err(error) = outcome {
            tracing::warn!(%error, path = %path.display(), "an old temporary file stays");
        }
    }
}

fn services(args: &ServeArgs) -> anyhow::Result<(Services, Option<Trace>)> {
    let options = FolderOptions {
        input: args.input_directory.clone(),
        output: args.output_directory.clone(),
        temp: args.temp_directory.clone(),
        user: args.user_directory.clone(),
        ..args.runtime.folders()
    };
    let (services, trace) = setup::services(&args.runtime, &options, &args.trace)?;
    let preview = match args.preview_method {
        PreviewChoice::None => PreviewMethod::None,
        PreviewChoice::Taesd => PreviewMethod::Taesd,
        _ => PreviewMethod::Latent2Rgb,
    };
    Ok((Services { save_metadata: !args.disable_metadata, preview, ..services }, trace))
}

fn config(args: &ServeArgs) -> anyhow::Result<ServerConfig> {
    let bytes = args.max_upload_size * 1024.0 * 1024.0;
    if !(1.0..1e15).contains(&bytes) {
        bail!("--max-upload-size {}: must be a positive number of megabytes", args.max_upload_size);
    }
    let auth = match &args.api_key_file {
        Some(file) => Auth::from_file(file)?,
        None => Auth::default(),
    };
    let tls = match (&args.tls_certfile, &args.tls_keyfile) {
        (Some(certificates), Some(key)) => Some(tls::load(certificates, key)?),
        _ => None,
    };
    let per_client = args.max_queue_per_client;
    let front_end_root = args.front_end_root.clone();
    if let Some(root) = front_end_root.as_ref().filter(|root| !root.join("index.html").is_file()) {
        bail!("--front-end-root {}: there is no index.html in it", root.display());
    }
    Ok(ServerConfig {
        limits: Limits {
            max_body_bytes: bytes as u64,
            queued_prompts: args.max_queue,
            prompts_per_client: if per_client == 0 { usize::MAX } else { per_client },
            ..Limits::default()
        },
        auth,
        tls,
        allow_private_webhooks: args.allow_private_webhooks,
        origin: OriginPolicy {
            cors: args.enable_cors_header.clone(),
            allowed_hosts: args.allowed_hosts.clone(),
        },
        compress: args.enable_compress_response_body,
        preview_size: Some(args.preview_size),
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
        front_end_root,
        argv: std::env::args().collect(),
        multi_user: args.multi_user,
        ..ServerConfig::default()
    })
}

/// The addresses of `--listen`; IPv6 addresses may stand in brackets.
fn addresses(listen: &str, port: u16) -> anyhow::Result<Vec<SocketAddr>> {
    listen
        .split(',')
        .map(|part| part.trim().trim_start_matches('[').trim_end_matches(']'))
        .filter(|part| !part.is_empty())
        .map(|part| {
            let part = if part.eq_ignore_ascii_case("localhost") { "127.0.0.1" } else { part };
            let ip: IpAddr =
                part.parse().with_context(|| format!("--listen {part}: this is no IP address"))?;
            Ok(SocketAddr::new(ip, port))
        })
        .collect()
}

async fn bind(args: &ServeArgs) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    for address in addresses(&args.listen, args.port)? {
        match TcpListener::bind(address).await {
            Ok(listener) => listeners.push(listener),
            // "::" often covers 0.0.0.0 as well, and some machines have no IPv6
            Err(error) if !listeners.is_empty() && address.ip().is_unspecified() => {
                tracing::debug!(%address, %error, "not bound");
            }
            Err(error) => return Err(error).with_context(|| format!("can't listen on {address}")),
        }
    }
    if listeners.is_empty() {
        bail!("--listen {}: no address", args.listen);
    }
    Ok(listeners)
}

async fn serve(
    args: &ServeArgs,
    engine: Arc<Engine>,
    folders: Arc<Folders>,
    config: ServerConfig,
) -> anyhow::Result<()> {
    let listeners = bind(args).await?;
    // Whoever reads that the server listens may stop it at once.
    let signals = Signals::watch();
    for listener in &listeners {
        let address = listener.local_addr()?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        tracing::info!("listening on {scheme}://{address}");
        if let Some(warning) = exposure(address, config.auth.is_on(), config.tls.is_some()) {
            tracing::warn!("{warning}");
        }
    }
    let app = App::new(engine, folders, config)?;
    crate::server::run(listeners, app, stop_signal(signals)).await?;
    Ok(())
}

/// What an operator should know who opens the server to others.
fn exposure(address: SocketAddr, has_keys: bool, has_tls: bool) -> Option<String> {
    if address.ip().is_loopback() {
        return None;
    }
    match (has_keys, has_tls) {
        (false, _) => Some(format!(
            "!! EVERYBODY who can reach {address} can use this server, read its pictures and fill its disk: \
             it asks for no key. Use --api-key-file (and --tls-certfile, --tls-keyfile), or --listen 127.0.0.1"
        )),
        (true, false) => Some(format!(
            "API keys cross the network to {address} in plain text: use --tls-certfile and --tls-keyfile, or a \
             proxy that encrypts"
        )),
        (true, true) => None,
    }
}

/// Resolves at the first SIGTERM or ctrl-c; a second one ends the process at once.
async fn stop_signal(mut signals: Signals) {
    signals.next().await;
    tracing::info!("stopping: the running prompt may end, a second signal ends it at once");
    tokio::spawn(async move {
        signals.next().await;
        std::process::exit(130);
    });
}

/// SIGTERM and ctrl-c, watched from the moment this is made.
#[cfg(unix)]
struct Signals([Option<signal::unix::Signal>; 2]);

#[cfg(unix)]
impl Signals {
    fn watch() -> Self {
        use signal::unix::SignalKind;
        let watched = |kind: SignalKind, name: &str| {
            let failed = |error: &std::io::Error| tracing::warn!(%error, "{name} can't be watched");
            signal::unix::signal(kind).inspect_err(failed).ok()
        };
        Self([watched(SignalKind::terminate(), "SIGTERM"), watched(SignalKind::interrupt(), "SIGINT")])
    }

    async fn next(&mut self) {
        async fn received(signal: &mut Option<signal::unix::Signal>) {
            match signal {
                Some(signal) => {
                    signal.recv().await;
                }
                None => std::future::pending().await,
            }
        }
        let [terminate, interrupt] = &mut self.0;
        tokio::select! {
            () = received(terminate) => {}
            () = received(interrupt) => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn watch() -> Self {
        Self
    }

    async fn next(&mut self) {
        let _ = signal::ctrl_c().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn parse(line: &str) -> Result<ServeArgs, clap::Error> {
        Line::try_parse_from(std::iter::once("kiln").chain(line.split_whitespace())).map(|l| l.args)
    }

    #[test]
    fn defaults_are_comfyuis() {
        let args = parse("").unwrap();
        assert_eq!((args.listen.as_str(), args.port), ("127.0.0.1", 8188));
        assert_eq!((args.preview_method, args.preview_size), (PreviewChoice::None, 512));
        assert_eq!((args.max_upload_size, args.verbose.as_str()), (100.0, "INFO"));
        assert_eq!((args.enable_cors_header, args.ignored.given.len()), (None, 0));
        assert_eq!(config(&parse("").unwrap()).unwrap().limits.max_body_bytes, 104_857_600);
    }

    #[test]
    fn values_may_be_left_out_where_comfyui_lets_them() {
        let args = parse("--listen --enable-cors-header --verbose").unwrap();
        assert_eq!(args.listen, "0.0.0.0,::");
        assert_eq!(args.enable_cors_header.as_deref(), Some("*"));
        assert_eq!(args.verbose, "DEBUG");
        let args = parse("--listen 10.0.0.1,[::1] --port 0 --max-upload-size 0.5 --verbose warning").unwrap();
        assert_eq!(
            addresses(&args.listen, args.port).unwrap(),
            ["10.0.0.1:0".parse::<SocketAddr>().unwrap(), "[::1]:0".parse().unwrap()]
        );
        assert_eq!(config(&args).unwrap().limits.max_body_bytes, 524_288);
        assert!(config(&parse("--max-upload-size 0").unwrap()).is_err());
        assert!(addresses("somewhere", 1).is_err());
    }

    #[test]
    fn who_opens_the_server_is_warned() {
        let (here, everywhere) = ("127.0.0.1:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap());
        assert_eq!(exposure(here, false, false), None);
        assert!(exposure(everywhere, false, true).is_some_and(|w| w.contains("EVERYBODY")));
        assert!(exposure(everywhere, true, false).is_some_and(|w| w.contains("plain text")));
        assert_eq!(exposure(everywhere, true, true), None);
        assert!(parse("--tls-keyfile key.pem").is_err(), "the certificate is missing");
        assert_eq!(config(&parse("--max-queue-per-client 3").unwrap()).unwrap().limits.prompts_per_client, 3);
        assert_eq!(config(&parse("").unwrap()).unwrap().limits.prompts_per_client, usize::MAX);
    }

    #[test]
    fn the_temp_folder_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/c.png"), b"x").unwrap();
        std::fs::write(dir.path().join("d.png"), b"x").unwrap();
        empty(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_front_end_root_must_hold_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let args = parse(&format!("--front-end-root {}", dir.path().display())).unwrap();
        let refused = config(&args).unwrap_err().to_string();
        assert!(refused.contains("there is no index.html"), "{refused}");
        std::fs::write(dir.path().join("index.html"), "x").unwrap();
        assert_eq!(config(&args).unwrap().front_end_root.as_deref(), Some(dir.path()));
    }

    #[test]
    fn gpu_flags_are_accepted_and_named() {
        let args =
            parse("--fp16-vae --reserve-vram 1.5 --cuda-device 0 --fast fp16_accumulation --lowvram --cpu")
                .unwrap();
        assert_eq!(args.ignored.given, ["lowvram", "reserve-vram", "fast"]);
        assert!(args.runtime.device.cpu && args.runtime.device.fp16_vae);
        assert_eq!(args.runtime.device.options().device, crate::backend::Device::Cpu);
        assert!(parse("--no-such-flag").is_err());
        assert!(parse("--tls-keyfile x").is_err(), "what can't be done is not ignored");
    }
}
