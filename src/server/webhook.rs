//! Webhooks: `extra_data.webhook` `{url, secret}` is told how its prompt ended.
//!
//! One signed POST on success, failure and cancelling, tried again while the receiver
//! can't be reached or is out of order. It runs beside the queue and never holds it up.
//!
//! The address is the client's choice, so the server must not become its tool against
//! machines that only the server can reach: the name is looked up once, private addresses
//! are refused (unless `--allow-private-webhooks`), and the connection goes to exactly the
//! address that was looked at. Redirects are not followed.
//!
//! ```text
//! X-Kiln-Event: job.completed | job.failed | job.cancelled
//! X-Kiln-Delivery: the same UUID on every try
//! X-Kiln-Timestamp: seconds since 1970
//! X-Kiln-Signature: sha256=HMAC-SHA256(secret, timestamp "." body) in hex, if there is a secret
//! ```

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::{Map, Value as Json, json};
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::App;
use super::routes::{job_detail, links};
use crate::engine::{JobStatus, JobView};

/// Tries, and the pause after the first; each further one is four times as long.
const TRIES: u32 = 5;
/// Longest time for one try.
const TRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Deliveries at the same time.
static PLACES: Semaphore = Semaphore::const_new(16);
/// Longest secret and address.
const MAX_TEXT: usize = 2048;

/// Whom to tell.
#[derive(Clone)]
pub(super) struct Webhook {
    uri: Uri,
    host: String,
    port: u16,
    is_tls: bool,
    secret: Option<String>,
    /// This server's address, for links.
    base: String,
}

/// Why a delivery failed.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error("{host} is a private address: webhooks may not go there (--allow-private-webhooks lets them)")]
    Private { host: String },
    #[error("{0} can't be looked up: {1}")]
    Lookup(String, std::io::Error),
    #[error("{0} can't be reached: {1}")]
    Connect(SocketAddr, std::io::Error),
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the request can't be made: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("the receiver answered {0}")]
    Status(hyper::StatusCode),
    #[error("no answer within {} s", TRY_TIMEOUT.as_secs())]
    Timeout,
}

impl DeliveryError {
    /// Whether a later try could go better.
    fn is_passing(&self) -> bool {
        match self {
            Self::Private { .. } | Self::Request(_) => false,
            Self::Status(status) => status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429),
            _ => true,
        }
    }
}

/// Whether an address is none of the public internet's.
fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_broadcast()
                || v4.is_documentation()
                || v4.is_multicast()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b))
                || (a == 198 && (b == 18 || b == 19))
                || (a == 192 && b == 0)
        }
        IpAddr::V6(v6) => {
            let first = v6.segments()[0];
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || first & 0xfe00 == 0xfc00
                || first & 0xffc0 == 0xfe80
                || first & 0xffc0 == 0xfec0
                || first == 0x2001 && v6.segments()[1] == 0x0db8
                // addresses that carry an IPv4 address: 6to4, NAT64, the old "compatible" form
                || first == 0x2002
                || v6.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0]
                || Ipv6Addr::from(v6.to_bits() >> 32).is_unspecified()
        }
    }
}

impl Webhook {
    /// Takes `webhook` out of `extra_data`, so that its secret is stored nowhere.
    pub(super) fn take(
        extra_data: &mut Map<String, Json>,
        base: &str,
        allow_private: bool,
    ) -> Result<Option<Self>, String> {
        let Some(webhook) = extra_data.remove("webhook").filter(|w| !w.is_null()) else { return Ok(None) };
        let text = |key: &str| match webhook.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(text)) if text.len() <= MAX_TEXT => Ok(Some(text.clone())),
            Some(_) => Err(format!("'webhook.{key}' must be a text of at most {MAX_TEXT} bytes")),
        };
        let url = text("url")?.ok_or("'webhook' must be an object with 'url' and, if you like, 'secret'")?;
        let uri: Uri = url.parse().map_err(|e| format!("'webhook.url' is no address: {e}"))?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("'webhook.url' must begin with https:// or http://, not {url}")),
        };
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("'webhook.url' must not hold a user name".to_owned());
        }
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        if !allow_private && (host.parse().is_ok_and(is_private) || host.eq_ignore_ascii_case("localhost")) {
            return Err(DeliveryError::Private { host }.to_string());
        }
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        Ok(Some(Self { host, port, is_tls, secret: text("secret")?, base: base.to_owned(), uri }))
    }
}

/// Waits for the end of a prompt and tells its webhook.
pub(super) async fn tell_when_over(
    app: Arc<App>,
    webhook: Webhook,
    id: String,
    ended: oneshot::Receiver<()>,
) {
    if ended.await.is_err() {
        return;
    }
    let engine = app.engine.clone();
    let job = {
        let id = id.clone();
        tokio::task::spawn_blocking(move || engine.job(&id)).await
    };
    let Ok(Some(job)) = job else {
        tracing::warn!(prompt_id = id, "a webhook can't be told: the prompt is not in the history");
        return;
    };
    let Ok(_place) = PLACES.acquire().await else { return };
    deliver(&webhook, job, app.config.allow_private_webhooks, app.config.webhook_pause).await;
}

fn event_name(job: &JobView) -> &'static str {
    match job.status {
        JobStatus::Completed => "job.completed",
        JobStatus::Cancelled => "job.cancelled",
        _ => "job.failed",
    }
}

async fn deliver(webhook: &Webhook, job: JobView, allow_private: bool, first_pause: Duration) {
    let (event, id) = (event_name(&job), job.id.clone());
    let files = links(&webhook.base, &job);
    let mut detail = job_detail(job);
    if let Json::Object(detail) = &mut detail {
        detail.remove("workflow");
    }
    let body =
        Bytes::from(json!({"event": event, "prompt_id": id, "job": detail, "files": files}).to_string());
    let delivery = uuid::Uuid::new_v4().to_string();
    let mut pause = first_pause;
    for attempt in 1..=TRIES {
        let sent = timeout(TRY_TIMEOUT, send(webhook, event, &delivery, body.clone(), allow_private)).await;
        let error = match sent.unwrap_or(Err(DeliveryError::Timeout)) {
            Ok(()) => return,
            Err(error) => error,
        };
        if attempt == TRIES || !error.is_passing() {
            tracing::warn!(prompt_id = id, %error, attempt, "a webhook could not be told");
            return;
        }
        tracing::debug!(prompt_id = id, %error, attempt, "a webhook will be told later");
        sleep(pause).await;
        pause *= 4;
    }
}

/// The signature of a body: `sha256=` and hex.
pub(super) fn signature(secret: &str, timestamp: u64, body: &[u8]) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok()?;
    mac.update(format!("{timestamp}.").as_bytes());
    mac.update(body);
    Some(format!("sha256={}", HEXLOWER.encode(&mac.finalize().into_bytes())))
}

async fn send(
    webhook: &Webhook,
    event: &str,
    delivery: &str,
    body: Bytes,
    allow_private: bool,
) -> Result<(), DeliveryError> {
    let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let path = webhook.uri.path_and_query().map_or("/", |p| p.as_str());
    let host = webhook.uri.authority().map_or("", |a| a.as_str());
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("host", host)
        .header("content-type", "application/json")
        .header("user-agent", concat!("kiln/", env!("CARGO_PKG_VERSION")))
        .header("x-kiln-event", event)
        .header("x-kiln-delivery", delivery)
        .header("x-kiln-timestamp", timestamp);
    if let Some(signature) = webhook.secret.as_deref().and_then(|s| signature(s, timestamp, &body)) {
        request = request.header("x-kiln-signature", signature);
    }
    let request = request.body(Full::new(body))?;
    let stream = connect(webhook, allow_private).await?;
    let status = if webhook.is_tls {
        let name = ServerName::try_from(webhook.host.clone());
        let bad = |e: &dyn std::fmt::Display| std::io::Error::other(e.to_string());
        let address = stream.peer_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], webhook.port)));
        let name = name.map_err(|e| DeliveryError::Connect(address, bad(&e)))?;
        let config = CLIENT.clone().map_err(|e| DeliveryError::Connect(address, bad(&e)))?;
        let stream = TlsConnector::from(config).connect(name, stream).await;
        exchange(stream.map_err(|e| DeliveryError::Connect(address, e))?, request).await?
    } else {
        exchange(stream, request).await?
    };
    if status.is_success() { Ok(()) } else { Err(DeliveryError::Status(status)) }
}

/// Connects to an address of the host that may be used.
async fn connect(webhook: &Webhook, allow_private: bool) -> Result<TcpStream, DeliveryError> {
    let found = lookup_host((webhook.host.as_str(), webhook.port)).await;
    let found: Vec<SocketAddr> = found.map_err(|e| DeliveryError::Lookup(webhook.host.clone(), e))?.collect();
    let allowed: Vec<_> = found.into_iter().filter(|a| allow_private || !is_private(a.ip())).collect();
    let Some(address) = allowed.first() else {
        return Err(DeliveryError::Private { host: webhook.host.clone() });
    };
    TcpStream::connect(address).await.map_err(|e| DeliveryError::Connect(*address, e))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<hyper::StatusCode, DeliveryError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let response: Result<hyper::Response<Incoming>, _> = sender.send_request(request).await;
    // the answer's body is of no interest
    connection.abort();
    Ok(response?.status())
}

/// The TLS client: the public certificate authorities, no files of this machine.
static CLIENT: LazyLock<Result<Arc<ClientConfig>, rustls::Error>> = LazyLock::new(|| {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses() {
        for private in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "198.18.0.1",
            "192.0.0.8",
            "240.0.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "ff02::1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "::10.0.0.1",
            "2001:db8::1",
        ] {
            assert!(is_private(private.parse().unwrap()), "{private}");
        }
        for public in ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "172.32.0.1", "100.128.0.1"] {
            assert!(!is_private(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn what_is_taken() {
        let take = |webhook: Json, allow| {
            let mut extra = Map::from_iter([("webhook".to_owned(), webhook), ("a".to_owned(), json!(1))]);
            let outcome = Webhook::take(&mut extra, "http://x", allow);
            assert_eq!(extra.len(), 1, "the webhook is stored nowhere");
            outcome.map(|w| w.map(|w| (w.host, w.port, w.secret)))
        };
        let some = |host: &str, port, secret: Option<&str>| {
            Ok(Some((host.to_owned(), port, secret.map(str::to_owned))))
        };
        assert_eq!(take(json!(null), false), Ok(None));
        assert_eq!(
            take(json!({"url": "https://a.example/x?y=1", "secret": "s"}), false),
            some("a.example", 443, Some("s"))
        );
        assert_eq!(take(json!({"url": "http://127.0.0.1:9/"}), true), some("127.0.0.1", 9, None));
        for bad in [
            json!({"url": "http://127.0.0.1:9/"}),
            json!({"url": "http://LOCALHOST/"}),
            json!({"url": "http://[::1]/"}),
            json!({"url": "https://169.254.169.254/latest"}),
            json!({"url": "ftp://a.example/"}),
            json!({"url": "/x"}),
            json!({"url": "https://user:pw@a.example/"}),
            json!({"url": 1}),
            json!({"secret": "s"}),
            json!("https://a.example"),
        ] {
            assert!(take(bad.clone(), false).is_err(), "{bad}");
        }
    }

    #[test]
    fn signatures_are_hmac_sha256_of_time_and_body() {
        // echo -n '1700000000.{}' | openssl dgst -sha256 -hmac key
        assert_eq!(
            signature("key", 1_700_000_000, b"{}").as_deref(),
            Some("sha256=9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae")
        );
    }
}
