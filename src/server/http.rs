//! What a handler takes and gives: [`Call`] in, [`Response`] or [`Failure`] out.
//!
//! The one table from errors to HTTP is [`Failure::into_response`]; [`ErrorStyle`] says in which form.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::header::{
    ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{HeaderMap, StatusCode, http};
use percent_encoding::percent_decode_str;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::App;
use super::json::{self, JsonError};
use super::limits::{BodyError, BodyReader};

/// An answer.
pub type Response = hyper::Response<Body>;

/// The content type of every JSON answer.
pub(super) const JSON_TYPE: &str = "application/json; charset=utf-8";
/// Bytes read from a file at a time; all that an answer holds in memory.
const FILE_CHUNK: usize = 128 * 1024;

/// The body of an answer.
pub enum Body {
    /// In memory.
    Bytes(Bytes),
    /// `left` bytes of a file, read as the client takes them.
    File {
        /// The file, at its starting position.
        file: Box<tokio::fs::File>,
        /// Bytes still to send.
        left: u64,
        /// Holds one piece.
        buffer: Vec<u8>,
    },
    /// Pieces as they come, until the sender is dropped.
    Stream(mpsc::Receiver<Bytes>),
}

impl Body {
    /// The first `length` bytes of a file from its current position.
    pub fn file(file: tokio::fs::File, length: u64) -> Self {
        Body::File { file: Box::new(file), left: length, buffer: Vec::new() }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Body::Bytes(bytes) if bytes.is_empty() => Poll::Ready(None),
            Body::Bytes(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Body::File { left: 0, .. } => Poll::Ready(None),
            Body::Stream(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(|p| Ok(Frame::data(p)))),
            Body::File { file, left, buffer } => {
                buffer.resize(FILE_CHUNK.min(usize::try_from(*left).unwrap_or(FILE_CHUNK)), 0);
                let mut piece = ReadBuf::new(buffer);
                match Pin::new(file.as_mut()).poll_read(cx, &mut piece) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Ready(Ok(())) => {}
                }
                let data = Bytes::copy_from_slice(piece.filled());
                if data.is_empty() {
                    let short =
                        format!("the file became shorter while it was sent: {left} bytes are missing");
                    return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::UnexpectedEof, short))));
                }
                *left -= data.len() as u64;
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.size_hint().exact() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::File { left, .. } => SizeHint::with_exact(*left),
            Body::Stream(_) => SizeHint::new(),
        }
    }
}

/// What the connection knows about a request.
#[derive(Clone)]
pub(super) struct Peer {
    /// The connection came in on a loopback address.
    pub(super) via_loopback: bool,
    /// The connection is encrypted.
    pub(super) is_tls: bool,
    /// The other end.
    pub(super) address: Option<IpAddr>,
    /// The connection's place among the allowed ones; a WebSocket keeps it.
    pub(super) _place: Arc<OwnedSemaphorePermit>,
}

/// One request on its way to a handler.
pub(super) struct Call {
    /// The server.
    pub(super) app: Arc<App>,
    /// Head and body.
    pub(super) request: hyper::Request<Incoming>,
    /// Path parameters, percent-decoded.
    pub(super) params: Vec<(String, String)>,
    /// The connection.
    pub(super) peer: Peer,
    /// The name of the API key that was shown, if keys are asked for.
    pub(super) key_name: Option<Arc<str>>,
}

/// Decodes `%xx`; bytes that are not UTF-8 become U+FFFD.
pub(super) fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// The first value of a key in a query string (`+` is a space).
pub(super) fn query_value(query: &str, key: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(&name.replace('+', " ")) == key).then(|| decode(&value.replace('+', " ")))
    })
}

impl Call {
    /// The request's headers.
    pub(super) fn headers(&self) -> &HeaderMap {
        self.request.headers()
    }

    /// Who counts as the sender of prompts: the API key's name, else the peer's address.
    pub(super) fn owner(&self) -> Option<String> {
        let address = || self.peer.address.map(|address| address.to_string());
        self.key_name.as_ref().map(|name| format!("key {name}")).or_else(address)
    }

    /// In what idempotency keys are told apart: the kind of request, and whose it is.
    pub(super) fn idempotency_scope(&self, what: &str) -> String {
        format!("{what} {}", self.key_name.as_deref().unwrap_or_default())
    }

    /// This server's address as the client sees it, such as `http://127.0.0.1:8188`.
    pub(super) fn base_url(&self) -> String {
        let scheme = if self.peer.is_tls { "https" } else { "http" };
        let host = self.headers().get(HOST).and_then(|v| v.to_str().ok()).unwrap_or("127.0.0.1");
        format!("{scheme}://{host}")
    }

    /// A path parameter, or an empty text.
    pub(super) fn param(&self, name: &str) -> &str {
        self.params.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
    }

    /// The first value of a query key.
    pub(super) fn query(&self, key: &str) -> Option<String> {
        query_value(self.request.uri().query()?, key)
    }

    /// The body, to be read piece by piece, with the server and the headers.
    pub(super) fn into_body(self) -> Result<(Arc<App>, HeaderMap, BodyReader), Failure> {
        let limits = &self.app.config.limits;
        let (head, incoming) = self.request.into_parts();
        let reader = BodyReader::new(incoming, &head.headers, limits.max_body_bytes, limits)?;
        Ok((self.app, head.headers, reader))
    }

    /// The body as JSON, whatever its content type; `None` if there is no body.
    pub(super) async fn into_json(self) -> Result<(Arc<App>, Option<Json>), Failure> {
        let limits = &self.app.config.limits;
        let limit = limits.max_json_bytes.min(limits.max_body_bytes);
        let (head, incoming) = self.request.into_parts();
        let reader = BodyReader::new(incoming, &head.headers, limit, limits)?;
        let mut body = reader.collect(&self.app.body_budget).await?;
        if body.bytes.is_empty() {
            return Ok((self.app, None));
        }
        let value = json::parse_off_thread(std::mem::take(&mut body.bytes)).await?;
        Ok((self.app, Some(value)))
    }

    /// The body as a JSON object; anything else is refused.
    pub(super) async fn into_object(self) -> Result<(Arc<App>, serde_json::Map<String, Json>), Failure> {
        match self.into_json().await? {
            (app, Some(Json::Object(object))) => Ok((app, object)),
            (_, Some(_)) => Err(Failure::bad_request("the request body must be a JSON object")),
            (_, None) => Err(Failure::bad_request("the request body is empty; a JSON object is needed")),
        }
    }
}

/// Why a request is not answered as asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// A status and no more.
    #[error("{0}")]
    Status(StatusCode),
    /// A status with a line of text.
    #[error("{0}: {1}")]
    Text(StatusCode, String),
    /// 400 in ComfyUI's shape: `{"error": {type, message, details, extra_info}, "node_errors": {}}`.
    #[error("{kind}: {message}")]
    Refused {
        /// `error.type`.
        kind: &'static str,
        /// `error.message` and `error.details`.
        message: String,
    },
    /// A status with a code that programs read, and more about it.
    #[error("{status}: {code}: {message}")]
    Coded {
        /// The status.
        status: StatusCode,
        /// What happened, for programs.
        code: &'static str,
        /// What happened, for people.
        message: String,
        /// More about it; null if there is no more.
        details: Json,
    },
    /// No byte of what is asked for is in the file.
    #[error("the range lies beyond the file's {size} bytes")]
    OutOfRange {
        /// Bytes of the file.
        size: u64,
    },
    /// The body could not be read.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The body is not acceptable JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
}

impl Failure {
    /// 404 and no more to say.
    pub(super) const NOT_FOUND: Failure = Failure::Status(StatusCode::NOT_FOUND);
    /// 400 and no more to say.
    pub(super) const BAD_REQUEST: Failure = Failure::Status(StatusCode::BAD_REQUEST);
    /// 403 and no more to say.
    pub(super) const FORBIDDEN: Failure = Failure::Status(StatusCode::FORBIDDEN);

    /// 400 in ComfyUI's shape.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Failure::Refused { kind: "invalid_request", message: message.into() }
    }

    /// 500 with the reason.
    pub(super) fn internal(error: impl std::fmt::Display) -> Self {
        Failure::Text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }

    /// A failure with a code that programs read.
    pub(super) fn coded(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Failure::Coded { status, code, message: message.into(), details: Json::Null }
    }

    /// The status of the answer.
    fn status(&self) -> StatusCode {
        match self {
            Failure::Status(status) | Failure::Text(status, _) | Failure::Coded { status, .. } => *status,
            Failure::Refused { .. } | Failure::Json(_) => StatusCode::BAD_REQUEST,
            Failure::OutOfRange { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
            Failure::Body(error) => match error {
                BodyError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                BodyError::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
                BodyError::Busy => StatusCode::SERVICE_UNAVAILABLE,
                BodyError::Transport(_) => StatusCode::BAD_REQUEST,
            },
        }
    }

    /// The answer, in the form that the client expects.
    pub(super) fn into_response(self, style: ErrorStyle) -> Response {
        let (is_busy, is_body) =
            (matches!(self, Failure::Body(BodyError::Busy)), matches!(self, Failure::Body(_)));
        let size = match self {
            Failure::OutOfRange { size } => HeaderValue::from_str(&format!("bytes */{size}")).ok(),
            _ => None,
        };
        let mut response = style.answer(self);
        if let Some(size) = size {
            response.headers_mut().insert(CONTENT_RANGE, size);
        }
        if is_body {
            // the rest of the body is not read, so the connection can't be used again
            response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
        if response.status() == StatusCode::UNAUTHORIZED {
            set(&mut response, WWW_AUTHENTICATE, "Bearer");
        }
        match response.status() {
            _ if is_busy => set(&mut response, RETRY_AFTER, "1"),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                set(&mut response, RETRY_AFTER, "5");
            }
            _ => {}
        }
        response
    }
}

/// How errors look: always JSON. ComfyUI answers many without a body, or with a line of text; what
/// it says stands in `error.message` here, and its clients look at the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ErrorStyle {
    /// ComfyUI's object, as it refuses prompts: `{"error": {type, message, …}, "node_errors": {}}`.
    Comfy,
    /// No body: a browser wants a style sheet or a script, and would complain of JSON's type.
    Bare,
    /// `{"error": {code, message, details}}`: Comfy API v2 and assets.
    Coded,
    /// `{"error": {message, type, param, code}}`: the OpenAI-like routes.
    OpenAi,
}

/// Routes whose errors carry codes.
const CODED_PATHS: &[&str] = &["/v2/jobs", "/v2/assets", "/v2/health", "/assets", "/tags"];

impl ErrorStyle {
    /// The style for a request.
    pub(super) fn of(path: &str, headers: &HeaderMap) -> Self {
        let bare = path.strip_prefix("/api").filter(|rest| rest.starts_with('/'));
        let is_below = |prefix: &&str| {
            let path = if prefix.starts_with("/v2") { bare.unwrap_or(path) } else { bare.unwrap_or("") };
            path.strip_prefix(*prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if CODED_PATHS.iter().any(is_below) {
            return Self::Coded;
        }
        if bare.unwrap_or(path).starts_with("/v1/") {
            return Self::OpenAi;
        }
        let wanted = headers.get("sec-fetch-dest").map(HeaderValue::as_bytes);
        if matches!(wanted, Some(b"style" | b"script")) { Self::Bare } else { Self::Comfy }
    }

    /// The answer to a page of another site. ComfyUI's is empty, and that is tested for, so this is JSON for who
    /// asks for it only.
    pub(super) fn foreign_origin(self, headers: &HeaderMap) -> Response {
        let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok());
        if accepted.any(|v| v.contains("application/json")) {
            let message = "a page of another site asks: its Origin is not this server's".to_owned();
            return Failure::Text(StatusCode::FORBIDDEN, message).into_response(self);
        }
        empty(StatusCode::FORBIDDEN)
    }

    fn answer(self, failure: Failure) -> Response {
        let status = failure.status();
        let (code, message, details) = match failure {
            _ if self == Self::Bare => return empty(status),
            Failure::Refused { kind, message } => (kind, message, Json::Null),
            Failure::Json(error) => ("invalid_json", error.to_string(), Json::Null),
            Failure::Coded { code, message, details, .. } => (code, message, details),
            Failure::Text(status, message) => (code_of(status), message, Json::Null),
            Failure::Status(status) => (code_of(status), reason(status), Json::Null),
            Failure::Body(error) => (code_of(status), error.to_string(), Json::Null),
            failure @ Failure::OutOfRange { .. } => (code_of(status), failure.to_string(), Json::Null),
        };
        let body = match self {
            Self::Comfy | Self::Bare => json!({
                "error": {"type": code, "message": message, "details": message, "extra_info": {}},
                "node_errors": {},
            }),
            Self::Coded => json!({"error": {"code": code, "message": message, "details": details}}),
            Self::OpenAi => {
                let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
                json!({"error": {"message": message, "type": kind, "param": null, "code": code}})
            }
        };
        json_response(status, &body)
    }
}

/// A status in words.
fn reason(status: StatusCode) -> String {
    status.canonical_reason().unwrap_or("error").to_owned()
}

/// A status as a code that programs read.
fn code_of(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "unauthorized",
        StatusCode::FORBIDDEN => "forbidden",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        StatusCode::REQUEST_TIMEOUT => "request_timeout",
        StatusCode::CONFLICT => "conflict",
        StatusCode::GONE => "gone",
        StatusCode::PRECONDITION_FAILED => "precondition_failed",
        StatusCode::RANGE_NOT_SATISFIABLE => "range_not_satisfiable",
        StatusCode::PAYLOAD_TOO_LARGE => "payload_too_large",
        StatusCode::URI_TOO_LONG => "uri_too_long",
        StatusCode::TOO_MANY_REQUESTS => "too_many_requests",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        status if status.is_server_error() => "internal_error",
        _ => "invalid_request",
    }
}

fn with_type(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Body::Bytes(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A status without a body.
pub(super) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::Bytes(Bytes::new()));
    *response.status_mut() = status;
    response
}

/// A JSON answer.
pub(super) fn json_response(status: StatusCode, value: &Json) -> Response {
    json_text(status, value.to_string())
}

/// A JSON answer that is already text.
pub(super) fn json_text(status: StatusCode, text: String) -> Response {
    with_type(status, JSON_TYPE, text)
}

/// A header of our own.
pub(super) fn set(response: &mut Response, name: HeaderName, value: &'static str) {
    response.headers_mut().insert(name, HeaderValue::from_static(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_decoded() {
        let query = "filename=a%20b+c%2Bd.png&type=&preview=webp;90&x&caf%C3%A9=1";
        assert_eq!(query_value(query, "filename").as_deref(), Some("a b c+d.png"));
        assert_eq!(query_value(query, "type").as_deref(), Some(""));
        assert_eq!(query_value(query, "preview").as_deref(), Some("webp;90"));
        assert_eq!(query_value(query, "x").as_deref(), Some(""));
        assert_eq!(query_value(query, "café").as_deref(), Some("1"));
        assert_eq!(query_value(query, "file"), None);
        assert_eq!(decode("%2e%2e%2f%ff"), "../\u{fffd}");
    }
}
