//! `/ws`: events to clients.
//!
//! One task a socket reads and writes; [`pump`] turns engine events into frames
//! and puts them into the sockets' bounded queues ([`outbox`]), so that a slow
//! client costs nobody else anything. Registration is per connection: closing
//! one takes nothing from another, and several sockets with one id all hear. The
//! one exception is what looks like a program that connects again while its old
//! connection still closes: the same client id from the same address, user agent
//! and API key. The older of two such sockets falls silent, as in ComfyUI, and
//! hears again when the newer one is gone. Sockets that announced themselves with
//! `feature_flags` (web pages), or asked for it with `?shared=1`, never do.
//!
//! A socket that connects late, or again, is told first what the running prompt
//! of its id has done so far.

mod frames;
mod outbox;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::StatusCode;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION,
    UPGRADE, USER_AGENT,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde_json::{Value as Json, json};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, interval_at, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::App;
use super::connection::is_true;
use super::http::{self, Call, Failure, Peer, Response};
use crate::engine::{Event, EventKind};
use frames::Frames;
pub(super) use frames::preview_jpeg;
use outbox::{Outbox, Weight};

/// Largest message and frame that a client may send.
const MAX_INCOMING: usize = 1024 * 1024;
/// Largest message that may be written: bounds a picture, not what piles up
/// (messages are written one at a time; [`outbox`] bounds what waits).
const MAX_OUTGOING: usize = 256 * 1024 * 1024;
/// Memory that every socket holds for reading; clients say little.
const READ_BUFFER: usize = 4 * 1024;
/// Bytes that are written together.
const WRITE_BUFFER: usize = 16 * 1024;
/// How often an idle connection is kept alive.
const PING_INTERVAL: Duration = Duration::from_secs(25);
/// Longest time for one message; with it a client that reads nothing is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(25);

/// How far apart messages with lines of the log are.
const LOG_INTERVAL: Duration = Duration::from_millis(200);

/// One client's connection.
#[derive(Debug, Default)]
struct Socket {
    outbox: Outbox,
    knows_preview_metadata: AtomicBool,
    /// Whether it goes on hearing when its program connects again.
    shares_id: AtomicBool,
    /// Whether a newer socket of its program hears in its place.
    is_silent: AtomicBool,
    /// Address, user agent and key: with the id they tell a program that connects again.
    program: String,
}

impl Socket {
    fn hears(&self) -> bool {
        !self.is_silent.load(Ordering::Acquire)
    }

    /// Whether a newer socket of that program silences it.
    fn yields_to(&self, program: &str) -> bool {
        self.program == program && !self.shares_id.load(Ordering::Acquire)
    }
}

/// Who connects.
struct Guest {
    client_id: String,
    shares_id: bool,
    program: String,
}

/// The open WebSockets, by client id.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    by_client: Mutex<HashMap<String, Vec<Arc<Socket>>>>,
    /// Clients that want new lines of the log; each is connected.
    want_log: Mutex<HashSet<String>>,
    open: AtomicUsize,
    closing: watch::Sender<bool>,
}

impl Sockets {
    fn by_client(&self) -> MutexGuard<'_, HashMap<String, Vec<Arc<Socket>>>> {
        self.by_client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a socket whose queue begins with the first `status` and what the
    /// running prompt of its id has done so far.
    fn connect(&self, guest: &Guest, app: &App) -> Arc<Socket> {
        let client_id = guest.client_id.as_str();
        let program = guest.program.clone();
        let socket = Arc::new(Socket { shares_id: guest.shares_id.into(), program, ..Socket::default() });
        let mut by_client = self.by_client();
        let queue_remaining = app.engine.queue_remaining();
        let status = EventKind::Status { queue_remaining };
        let mut data = status.data();
        data["sid"] = client_id.into();
        socket.outbox.push(Weight::Vital, message("status", &data));
        for event in app.engine.catch_up(client_id) {
            if let Some(json) = event.to_json() {
                socket.outbox.push(Weight::Vital, Message::text(json.to_string()));
            }
        }
        let of_client = by_client.entry(client_id.to_owned()).or_default();
        for older in of_client.iter().filter(|older| older.yields_to(&guest.program)) {
            older.is_silent.store(true, Ordering::Release);
        }
        of_client.push(socket.clone());
        socket
    }

    fn disconnect(&self, client_id: &str, socket: &Arc<Socket>) {
        let mut by_client = self.by_client();
        let Some(of_client) = by_client.get_mut(client_id) else { return };
        of_client.retain(|other| !Arc::ptr_eq(other, socket));
        let mut of_program = of_client.iter().rev().filter(|other| other.yields_to(&socket.program));
        if let Some(newest) = of_program.next().filter(|_| socket.hears()) {
            newest.is_silent.store(false, Ordering::Release);
        }
        if of_client.is_empty() {
            by_client.remove(client_id);
            self.want_log().remove(client_id);
        }
    }

    fn want_log(&self) -> MutexGuard<'_, HashSet<String>> {
        self.want_log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a client wants new lines of the log, or no longer; one that is not connected can't.
    pub(super) fn set_wants_log(&self, client_id: &str, wants: bool) {
        let by_client = self.by_client();
        if !wants {
            self.want_log().remove(client_id);
        } else if by_client.contains_key(client_id) {
            self.want_log().insert(client_id.to_owned());
        }
    }

    fn log_readers(&self) -> Vec<Arc<Socket>> {
        let by_client = self.by_client();
        let readers = self.want_log();
        let sockets = readers.iter().filter_map(|id| by_client.get(id)).flatten();
        sockets.filter(|socket| socket.hears()).cloned().collect()
    }

    /// The sockets that an event is for.
    fn targets(&self, event: &Event) -> Vec<Arc<Socket>> {
        let by_client = self.by_client();
        let hearing = |sockets: &Vec<Arc<Socket>>| -> Vec<Arc<Socket>> {
            sockets.iter().filter(|socket| socket.hears()).cloned().collect()
        };
        match &event.client_id {
            Some(id) => by_client.get(&**id).map(hearing).unwrap_or_default(),
            None => by_client.values().flat_map(hearing).collect(),
        }
    }

    /// Asks every socket to close with 1001.
    pub(super) fn close_all(&self) {
        self.closing.send_replace(true);
    }
}

fn message(kind: &str, data: &Json) -> Message {
    Message::text(json!({"type": kind, "data": data}).to_string())
}

/// Distributes engine events until the engine ends.
pub(super) async fn pump(app: Arc<App>, mut events: broadcast::Receiver<Arc<Event>>) {
    let preview_size = app.config.preview_size;
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Closed) => return,
            Err(broadcast::error::RecvError::Lagged(count)) => {
                tracing::warn!(count, "events were lost: the sockets could not be served in time");
                app.endings.catch_up(&app.engine);
                continue;
            }
        };
        app.endings.note(&event);
        let targets = app.sockets.targets(&event);
        if targets.is_empty() {
            continue;
        }
        let frames = if event.kind.has_picture() {
            let event = event.clone();
            tokio::task::spawn_blocking(move || Frames::new(&event, preview_size)).await.unwrap_or_default()
        } else {
            Frames::new(&event, preview_size)
        };
        for socket in targets {
            let knows_metadata = socket.knows_preview_metadata.load(Ordering::Acquire);
            for (weight, message) in frames.for_client(knows_metadata) {
                socket.outbox.push(weight, message);
            }
        }
    }
}

/// Sends new lines of the log to the clients that want them, a few times a second.
pub(super) async fn pump_log(app: Arc<App>) {
    let log = &app.config.log;
    let (mut seen, _) = log.since(u64::MAX);
    loop {
        log.changed().await;
        tokio::time::sleep(LOG_INTERVAL).await;
        let readers = app.sockets.log_readers();
        let (count, entries) = log.since(if readers.is_empty() { u64::MAX } else { seen });
        seen = count;
        for socket in readers {
            let data = json!({"entries": entries, "size": super::log::size()});
            socket.outbox.push(Weight::Progress, message("logs", &data));
        }
    }
}

/// Whether a comma separated header holds a token.
fn has_token(headers: &HeaderMap, name: hyper::header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|t| t.trim().eq_ignore_ascii_case(token))
}

/// The handshake's answer key; fails if this is no WebSocket handshake.
fn accept_key(headers: &HeaderMap) -> Result<HeaderValue, Failure> {
    let refuse =
        |what: &str| Failure::Text(StatusCode::BAD_REQUEST, format!("no WebSocket handshake: {what}"));
    if !has_token(headers, UPGRADE, "websocket") || !has_token(headers, CONNECTION, "upgrade") {
        return Err(refuse("the Upgrade header is missing"));
    }
    if headers.get(SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes) != Some(b"13") {
        return Err(refuse("only version 13 is spoken"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or_else(|| refuse("the key is missing"))?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(Failure::internal)
}

/// Counts an open socket for as long as it lives.
struct OpenCount(Arc<App>);

impl OpenCount {
    fn new(app: Arc<App>) -> Result<Self, Failure> {
        let open = app.sockets.open.fetch_add(1, Ordering::AcqRel) + 1;
        let count = Self(app);
        if open > count.0.config.limits.web_sockets {
            let busy = "all places for WebSockets are taken".to_owned();
            return Err(Failure::Text(StatusCode::SERVICE_UNAVAILABLE, busy));
        }
        Ok(count)
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.sockets.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// `GET /ws?clientId=…&shared=1`
pub(super) async fn upgrade(mut call: Call) -> Result<Response, Failure> {
    let accept = accept_key(call.headers())?;
    let client_id = call
        .query("clientId")
        .filter(|id| !id.is_empty())
        .unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let shares_id = call.query("shared").is_some_and(|value| value == "1" || value == "true");
    let agent = call.headers().get(USER_AGENT).map_or(&b""[..], HeaderValue::as_bytes);
    let program = format!("{:?} {}", call.owner(), String::from_utf8_lossy(agent));
    let guest = Guest { client_id, shares_id, program };
    let count = OpenCount::new(call.app.clone())?;
    let upgrade = hyper::upgrade::on(&mut call.request);
    tokio::spawn(serve(upgrade, count, call.peer, guest));
    let mut response = http::empty(StatusCode::SWITCHING_PROTOCOLS);
    http::set(&mut response, CONNECTION, "Upgrade");
    http::set(&mut response, UPGRADE, "websocket");
    response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    Ok(response)
}

async fn serve(upgrade: OnUpgrade, count: OpenCount, peer: Peer, guest: Guest) {
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => {
            tracing::debug!(%error, "the WebSocket handshake was not completed");
            return;
        }
    };
    let app = &count.0;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_INCOMING))
        .max_frame_size(Some(MAX_INCOMING))
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(MAX_OUTGOING);
    let stream = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
    let socket = app.sockets.connect(&guest, app);
    let client_id = &guest.client_id;
    let end = converse(stream, &socket, app).await;
    app.sockets.disconnect(client_id, &socket);
    tracing::debug!(client_id, end, "WebSocket closed");
    drop(peer);
}

type Stream = WebSocketStream<TokioIo<Upgraded>>;

/// Reads and writes until one side is done; says why it ended.
async fn converse(mut stream: Stream, socket: &Socket, app: &App) -> &'static str {
    let mut closing = app.sockets.closing.subscribe();
    let mut ping = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
    let mut is_first_message = true;
    if !flush(&mut stream, socket).await {
        return "the first message could not be sent";
    }
    loop {
        tokio::select! {
            incoming = stream.next() => match incoming {
                None | Some(Ok(Message::Close(_))) => return "the client closed",
                Some(Err(error)) => {
                    tracing::debug!(%error, "WebSocket");
                    return "a protocol error, or the connection broke";
                }
                Some(Ok(Message::Text(text))) => {
                    if std::mem::take(&mut is_first_message) {
                        negotiate(&text, socket, app);
                    }
                }
                Some(Ok(_)) => {}
            },
            () = socket.outbox.changed() => {}
            _ = ping.tick() => {
                let sent = timeout(SEND_TIMEOUT, stream.send(Message::Ping(Bytes::new()))).await;
                if !matches!(sent, Ok(Ok(()))) {
                    return "the client reads nothing";
                }
            }
            () = is_true(&mut closing) => {
                close(&mut stream, CloseCode::Away, "the server stops").await;
                return "the server stops";
            }
        }
        if socket.outbox.is_closed() {
            close(&mut stream, CloseCode::Policy, "too slow").await;
            return "the client is too slow";
        }
        if !flush(&mut stream, socket).await {
            return "the client reads nothing";
        }
    }
}

/// Sends what waits; `false` if the client does not take it.
async fn flush(stream: &mut Stream, socket: &Socket) -> bool {
    while let Some(message) = socket.outbox.pop() {
        match timeout(SEND_TIMEOUT, stream.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, "WebSocket");
                return false;
            }
            Err(_) => return false,
        }
    }
    true
}

async fn close(stream: &mut Stream, code: CloseCode, reason: &'static str) {
    let frame = CloseFrame { code, reason: reason.into() };
    // the connection ends in any case; a client that is gone can't be told
    let _ = timeout(Duration::from_secs(1), stream.close(Some(frame))).await;
}

/// `feature_flags` as the first message of a connection: notes the client's, answers with ours.
fn negotiate(text: &str, socket: &Socket, app: &App) {
    let Ok(message) = super::json::parse(text.as_bytes()) else { return };
    if message["type"] != "feature_flags" {
        return;
    }
    let knows_metadata = message["data"]["supports_preview_metadata"] == true;
    socket.knows_preview_metadata.store(knows_metadata, Ordering::Release);
    socket.shares_id.store(true, Ordering::Release);
    socket.outbox.push(Weight::Vital, self::message("feature_flags", &app.features()));
}
