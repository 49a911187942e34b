//! `/v2/jobs/{id}/events`: what happens to a job, as server-sent events.
//!
//! The stream begins with where the job stands and ends with its last `status`.
//! It is no log: whoever connects later, or reads slowly, gets the newest state.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::BASE64;
use hyper::StatusCode;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::{Value as Json, json};
use tokio::sync::{OwnedSemaphorePermit, broadcast, mpsc};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::super::blocking;
use super::jobs::{output_json, progress_json, status_name};
use crate::engine::{Event, EventKind, JobStatus};
use crate::nodes::PreviewFrame;
use crate::server::App;
use crate::server::http::{self, Body, Call, Failure, Response};
use crate::server::outputs;
use crate::server::ws::preview_jpeg;

/// How often progress and previews are sent at most.
const INTERVAL: Duration = Duration::from_millis(500);
/// Ticks between two signs of life.
const HEARTBEAT_TICKS: u32 = 30;
/// Longest time for one event; a client that reads nothing is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(25);
/// Events that may wait for the client.
const WAITING: usize = 16;

/// The client went away, or reads nothing.
struct Gone;

struct Stream {
    app: Arc<App>,
    base: String,
    id: String,
    sender: mpsc::Sender<Bytes>,
    /// What the last `status` said.
    status: Json,
    progress: Json,
    preview: Option<(String, PreviewFrame)>,
    _place: OwnedSemaphorePermit,
}

/// `GET /v2/jobs/{id}/events`
pub(in crate::server) async fn stream(call: Call) -> Result<Response, Failure> {
    let events = call.app.engine.subscribe();
    let id = call.param("id").to_owned();
    if call.app.engine.job_status(&id).is_none() {
        return Err(Failure::coded(StatusCode::NOT_FOUND, "not_found", "there is no job of this id"));
    }
    let place = call.app.event_streams.clone().try_acquire_owned().map_err(|_| {
        let message = "as many event streams as allowed are open; poll the job, or close one";
        Failure::coded(StatusCode::TOO_MANY_REQUESTS, "too_many_streams", message)
    })?;
    let (sender, pieces) = mpsc::channel(WAITING);
    let stream = Stream {
        base: call.base_url(),
        preview: call.app.engine.last_preview(&id).map(|(node, preview)| (node.to_string(), preview)),
        app: call.app,
        id,
        sender,
        status: Json::Null,
        progress: Json::Null,
        _place: place,
    };
    tokio::spawn(async move {
        if stream.run(events).await.is_err() {
            tracing::debug!("a client left its event stream");
        }
    });
    let mut response = Response::new(Body::Stream(pieces));
    http::set(&mut response, CONTENT_TYPE, "text/event-stream");
    http::set(&mut response, CACHE_CONTROL, "no-cache");
    Ok(response)
}

impl Stream {
    async fn run(mut self, mut events: broadcast::Receiver<Arc<Event>>) -> Result<(), Gone> {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut quiet = 0;
        if self.send_status().await? {
            return Ok(());
        }
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => {
                        if self.take(&event).await? {
                            return Ok(());
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                _ = ticks.tick() => {
                    quiet = if self.send_progress().await? { 0 } else { quiet + 1 };
                    if self.send_status().await? {
                        return Ok(());
                    }
                    if quiet >= HEARTBEAT_TICKS {
                        quiet = 0;
                        self.put(": still here\n\n".into()).await?;
                    }
                }
            }
        }
    }

    /// Deals with one engine event; whether the job is over.
    async fn take(&mut self, event: &Event) -> Result<bool, Gone> {
        if event.kind.prompt_id().is_none_or(|id| **id != *self.id) {
            return Ok(false);
        }
        match &event.kind {
            EventKind::ExecutionStart { .. } | EventKind::Cancelled { .. } => {
                return self.send_status().await;
            }
            EventKind::Progress { node, preview: Some(preview), .. } => {
                self.preview = Some((node.to_string(), preview.clone()));
            }
            EventKind::Executed { node, output: Some(ui), .. } => {
                for file in outputs::files_of(node, ui) {
                    let (app, base, id) = (self.app.clone(), self.base.clone(), self.id.clone());
                    let output = blocking(move || output_json(&app, &base, &id, &file)).await;
                    if let Ok(Some(output)) = output {
                        self.send("output", &output).await?;
                    }
                }
            }
            EventKind::Executing { node: None, .. } => return self.send_status().await,
            _ => {}
        }
        Ok(false)
    }

    async fn put(&self, text: String) -> Result<(), Gone> {
        match timeout(SEND_TIMEOUT, self.sender.send(text.into())).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }

    async fn send(&self, name: &str, data: &Json) -> Result<(), Gone> {
        self.put(format!("event: {name}\ndata: {data}\n\n")).await
    }

    /// Sends `status` if it changed; whether the job is over.
    async fn send_status(&mut self) -> Result<bool, Gone> {
        let (app, id) = (self.app.clone(), self.id.clone());
        let Ok(Some(job)) = blocking(move || app.engine.job(&id)).await else { return Ok(true) };
        let status = json!({"status": status_name(&job), "queue_position": job.queue_position});
        if status != self.status {
            self.send("status", &status).await?;
            self.status = status;
        }
        Ok(JobStatus::is_over(job.status))
    }

    /// Sends progress and the newest preview; whether there was anything to send.
    async fn send_progress(&mut self) -> Result<bool, Gone> {
        let progress = self.app.engine.job_progress(&self.id).map_or(Json::Null, |p| progress_json(&p));
        let has_news = !progress.is_null() && progress != self.progress;
        if has_news {
            self.send("progress", &progress).await?;
            self.progress = progress;
        }
        let Some((node, preview)) = self.preview.take() else { return Ok(has_news) };
        let size = self.app.config.preview_size;
        if let Ok(Ok(jpeg)) = blocking(move || preview_jpeg(&preview, size)).await {
            let data =
                json!({"node_id": node, "content_type": "image/jpeg", "data_base64": BASE64.encode(&jpeg)});
            self.send("preview", &data).await?;
        }
        Ok(true)
    }
}
