//! What a handler takes and gives: [`Call`] in, [`Response`] or [`Failure`] out.
//!
//! The one table from errors to HTTP is [`Failure::into_response`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, StatusCode, http};
use percent_encoding::percent_decode_str;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::json::{self, JsonError};
use super::limits::{BodyError, BodyReader};

/// An answer.
pub type Response = hyper::Response<Body>;

/// The content type of every JSON answer.
pub(super) const JSON_TYPE: &str = "application/json; charset=utf-8";
const TEXT_TYPE: &str = "text/plain; charset=utf-8";
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
        SizeHint::with_exact(match self {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File { left, .. } => *left,
        })
    }
}

/// What the connection knows about a request.
#[derive(Clone)]
pub(super) struct Peer {
    /// The connection came in on a loopback address.
    pub(super) via_loopback: bool,
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
    /// A status without a body.
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
    /// The body could not be read.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The body is not acceptable JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
}

impl Failure {
    /// 404 without a body.
    pub(super) const NOT_FOUND: Failure = Failure::Status(StatusCode::NOT_FOUND);
    /// 400 without a body.
    pub(super) const BAD_REQUEST: Failure = Failure::Status(StatusCode::BAD_REQUEST);
    /// 403 without a body.
    pub(super) const FORBIDDEN: Failure = Failure::Status(StatusCode::FORBIDDEN);

    /// 400 in ComfyUI's shape.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Failure::Refused { kind: "invalid_request", message: message.into() }
    }

    /// 500 with the reason.
    pub(super) fn internal(error: impl std::fmt::Display) -> Self {
        Failure::Text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }

    /// The answer.
    pub(super) fn into_response(self) -> Response {
        match self {
            Failure::Status(status) => empty(status),
            Failure::Text(status, message) => text(status, message),
            Failure::Refused { kind, message } => refused(kind, &message),
            Failure::Json(error) => refused("invalid_json", &error.to_string()),
            Failure::Body(error) => {
                let status = match error {
                    BodyError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                    BodyError::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
                    BodyError::Busy => StatusCode::SERVICE_UNAVAILABLE,
                    BodyError::Transport(_) => StatusCode::BAD_REQUEST,
                };
                let is_busy = matches!(error, BodyError::Busy);
                let mut response = text(status, error.to_string());
                // the rest of the body is not read, so the connection can't be used again
                response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
                if is_busy {
                    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
                }
                response
            }
        }
    }
}

fn refused(kind: &str, message: &str) -> Response {
    let body = json!({
        "error": {"type": kind, "message": message, "details": message, "extra_info": {}},
        "node_errors": {},
    });
    json_response(StatusCode::BAD_REQUEST, &body)
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

/// A status with a line of text.
pub(super) fn text(status: StatusCode, message: impl Into<String>) -> Response {
    with_type(status, TEXT_TYPE, message.into())
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
