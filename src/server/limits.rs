//! Limits on what a peer may cost: connections, time, body bytes, memory.
//!
//! hyper bounds the request head (its size, and with a timer its duration) but
//! leaves bodies to the application: no size cap, no timeout. [`BodyReader`] is
//! the only way in which a handler gets at body bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::CONTENT_LENGTH;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

/// What a peer may cost at most.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections; further ones wait in the listen backlog.
    pub connections: usize,
    /// Open WebSockets; further ones are refused with 503.
    pub web_sockets: usize,
    /// Time for a request head; also how long an idle keep-alive connection lives.
    pub header_timeout: Duration,
    /// Longest pause inside a request body.
    pub body_idle: Duration,
    /// Slowest body, in bytes per [`body_idle`](Self::body_idle) span.
    pub body_bytes_per_idle_span: u64,
    /// Longest time in which a peer reads nothing of an answer.
    pub write_timeout: Duration,
    /// Largest request body (`--max-upload-size`).
    pub max_body_bytes: u64,
    /// Largest JSON body.
    pub max_json_bytes: u64,
    /// Bytes of JSON bodies held in memory for all requests together.
    pub buffered_bytes: usize,
    /// Running and waiting prompts; further ones are refused with 429.
    pub queued_prompts: usize,
    /// Running and waiting prompts of one client (an API key, else an address).
    pub prompts_per_client: usize,
    /// Longest path with query.
    pub uri_bytes: usize,
    /// Nodes in one prompt.
    pub prompt_nodes: usize,
    /// Open event streams; further ones are refused with 429.
    pub event_streams: usize,
    /// How long open requests may take to end after the engine has stopped.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            web_sockets: 1000,
            header_timeout: Duration::from_secs(12),
            body_idle: Duration::from_secs(30),
            body_bytes_per_idle_span: 30 * 1024,
            write_timeout: Duration::from_secs(25),
            max_body_bytes: 100 * 1024 * 1024,
            max_json_bytes: 32 * 1024 * 1024,
            buffered_bytes: 256 * 1024 * 1024,
            queued_prompts: 10_000,
            prompts_per_client: usize::MAX,
            uri_bytes: 16 * 1024,
            prompt_nodes: 50_000,
            event_streams: 256,
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// Why a request body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Declared or received more than allowed.
    #[error("the request body exceeds the limit of {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// A pause that is too long, or a trickle.
    #[error(
        "the request body is too slow: {received} bytes so far, less than {wanted} in the last {seconds} s"
    )]
    TooSlow {
        /// Bytes received in all.
        received: u64,
        /// Bytes demanded in the span.
        wanted: u64,
        /// Length of the span.
        seconds: u64,
    },
    /// Other requests hold the memory set aside for bodies.
    #[error("the server holds as many request bodies as it can; try again")]
    Busy,
    /// The connection broke, or the framing is wrong.
    #[error("the request body could not be read: {0}")]
    Transport(#[from] hyper::Error),
}

/// The memory for buffered bodies, shared by all requests, counted in KiB.
#[derive(Clone, Debug)]
pub(super) struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new((bytes / 1024).clamp(1, Semaphore::MAX_PERMITS))))
    }

    fn take(&self, kib: usize) -> Result<OwnedSemaphorePermit, BodyError> {
        let kib = u32::try_from(kib).map_err(|_| BodyError::Busy)?;
        self.0.clone().try_acquire_many_owned(kib).map_err(|_| BodyError::Busy)
    }
}

/// A whole body in memory; its share of the budget returns when it is dropped.
#[derive(Debug)]
pub(super) struct Buffered {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    _share: OwnedSemaphorePermit,
}

/// Reads a request body under limits of size, pause and rate.
pub(super) struct BodyReader {
    incoming: Incoming,
    limit: u64,
    received: u64,
    idle: Duration,
    bytes_per_span: u64,
    span_began: Instant,
    span_bytes: u64,
}

impl BodyReader {
    /// Refuses at once, with no body byte read, if the declared length exceeds `limit`.
    pub(super) fn new(
        incoming: Incoming,
        headers: &HeaderMap,
        limit: u64,
        limits: &Limits,
    ) -> Result<Self, BodyError> {
        let declared =
            headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
        if declared.is_some_and(|length| length > limit) {
            return Err(BodyError::TooLarge { limit });
        }
        Ok(Self {
            incoming,
            limit,
            received: 0,
            idle: limits.body_idle,
            bytes_per_span: limits.body_bytes_per_idle_span,
            span_began: Instant::now(),
            span_bytes: 0,
        })
    }

    fn too_slow(&self) -> BodyError {
        BodyError::TooSlow {
            received: self.received,
            wanted: self.bytes_per_span,
            seconds: self.idle.as_secs(),
        }
    }

    /// The next piece; `None` at the end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            let frame = match timeout(self.idle, self.incoming.frame()).await {
                Err(_) => return Err(self.too_slow()),
                Ok(None) => return Ok(None),
                Ok(Some(frame)) => frame?,
            };
            let Ok(data) = frame.into_data() else { continue };
            self.received += data.len() as u64;
            self.span_bytes += data.len() as u64;
            if self.received > self.limit {
                return Err(BodyError::TooLarge { limit: self.limit });
            }
            if self.span_began.elapsed() >= self.idle {
                if self.span_bytes < self.bytes_per_span {
                    return Err(self.too_slow());
                }
                self.span_began = Instant::now();
                self.span_bytes = 0;
            }
            return Ok(Some(data));
        }
    }

    /// The whole body in memory.
    pub(super) async fn collect(mut self, budget: &BodyBudget) -> Result<Buffered, BodyError> {
        let mut bytes = Vec::new();
        let mut share = budget.take(1)?;
        while let Some(chunk) = self.chunk().await? {
            let held = share.num_permits() * 1024;
            if bytes.len() + chunk.len() > held {
                share.merge(budget.take((bytes.len() + chunk.len() - held).div_ceil(1024).max(64))?);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Buffered { bytes, _share: share })
    }

    /// The pieces as a stream, for the multipart parser.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Bytes, BodyError>> + Send {
        stream::unfold(Some(self), |reader| async move {
            let mut reader = reader?;
            match reader.chunk().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}
