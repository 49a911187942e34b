//! Prompts whose sender waits for the end: `"wait": true`, `Prefer: wait=30`, and the
//! routes that answer with results.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION};
use hyper::{HeaderMap, StatusCode};
use serde_json::{Map, Value as Json, json};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::view::{self, Form};
use super::{blocking, jobs};
use crate::engine::{Accepted, JobStatus, JobView, Refused, Submission};
use crate::server::App;
use crate::server::http::{Body, Failure, Response, json_response};
use crate::server::outputs::{self, OutputFile};
use crate::server::webhook::{self, Webhook};

/// Longest wait, whatever was asked for.
const LONGEST: Duration = Duration::from_secs(3600);
const IMAGE_COUNT: HeaderName = HeaderName::from_static("x-kiln-images");

/// A queued prompt and news of its end.
pub(super) struct Queued {
    pub(super) accepted: Accepted,
    pub(super) ended: oneshot::Receiver<()>,
}

/// Queues a prompt; its webhook is told of the end.
pub(super) async fn queue(
    app: &Arc<App>,
    mut submission: Submission,
    webhook: Option<Webhook>,
) -> Result<Result<Queued, Box<Refused>>, Failure> {
    let id = submission.prompt_id.get_or_insert_with(|| uuid::Uuid::new_v4().to_string()).clone();
    // before it is queued: it could be over before anybody looks
    let ended = app.endings.watch(&id);
    let for_webhook = webhook.map(|webhook| (webhook, app.endings.watch(&id)));
    let engine = app.engine.clone();
    let outcome = blocking(move || engine.submit(submission)).await?;
    Ok(match outcome {
        Ok(accepted) => {
            if let Some((webhook, ended)) = for_webhook {
                tokio::spawn(webhook::tell_when_over(app.clone(), webhook, id, ended));
            }
            Ok(Queued { accepted, ended })
        }
        Err(refused) => {
            drop((ended, for_webhook));
            app.endings.tidy(&id);
            Err(refused)
        }
    })
}

/// How long the sender waits; `None`: not at all.
pub(super) fn wish(headers: &HeaderMap, body: &Map<String, Json>) -> Result<Option<Duration>, Failure> {
    let bad = || Failure::bad_request("'wait' must be true, false, or a number of seconds from 0 to 3600");
    let seconds = |s: f64| Duration::try_from_secs_f64(s).map(|d| d.min(LONGEST)).map_err(|_| bad());
    match body.get("wait") {
        Some(Json::Bool(true)) => return Ok(Some(LONGEST)),
        Some(Json::Number(number)) => return seconds(number.as_f64().unwrap_or(-1.0)).map(Some),
        None | Some(Json::Null | Json::Bool(false)) => {}
        Some(_) => return Err(bad()),
    }
    let preferences = headers.get_all("prefer").iter().filter_map(|v| v.to_str().ok());
    let wait = preferences.flat_map(|v| v.split([',', ';'])).find_map(|p| {
        let (name, value) = p.trim().split_once('=')?;
        name.trim()
            .eq_ignore_ascii_case("wait")
            .then(|| value.trim().trim_matches('"').parse::<f64>().ok())?
    });
    // RFC 7240: a preference that can't be met is passed over
    Ok(wait.and_then(|s| seconds(s).ok()))
}

/// Waits for the end; the job as it is then.
pub(super) async fn for_end(app: &Arc<App>, queued: Queued, patience: Duration) -> Result<JobView, Failure> {
    // an error means that time is up, or that the server stops: the job tells where it stands
    let _ = timeout(patience, queued.ended).await;
    let (app, id) = (app.clone(), queued.accepted.prompt_id);
    let job = blocking(move || app.engine.job(&id)).await?;
    job.ok_or_else(|| {
        Failure::Text(StatusCode::GONE, "the job was deleted while it was waited for".to_owned())
    })
}

/// The files of a job with their addresses.
pub(in crate::server) fn links(base: &str, job: &JobView) -> Vec<Json> {
    outputs::files(&job.outputs)
        .iter()
        .map(|file| {
            json!({
                "node_id": file.node_id,
                "filename": file.filename,
                "subfolder": file.subfolder,
                "type": file.kind.name(),
                "media_type": file.content_type(),
                "url": format!("{base}{}", file.view_path()),
            })
        })
        .collect()
}

/// Whether the sender wants the picture itself.
fn wants_picture(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()).any(|v| v.contains("image/png"))
}

/// A file of a job as PNG.
pub(super) async fn png(app: &Arc<App>, file: &OutputFile) -> Result<Vec<u8>, Failure> {
    let folders = app.folders.clone();
    let (kind, subfolder, name) = (file.kind, file.subfolder.clone(), file.filename.clone());
    let opened =
        blocking(move || folders.open_file(kind, &subfolder, &name)).await?.map_err(super::refuse_path)?;
    let form = if file.content_type() == "image/png" { Form::File } else { Form::Rgb };
    Ok(view::convert(app, opened, form).await?.0)
}

/// The picture of a job, or why there is none.
async fn picture(app: &Arc<App>, job: &JobView) -> Result<Response, Failure> {
    if job.status != JobStatus::Completed {
        let message = match job.error() {
            Some(error) => error["exception_message"].as_str().unwrap_or_default().trim().to_owned(),
            None => "the job was cancelled".to_owned(),
        };
        return Err(Failure::coded(StatusCode::INTERNAL_SERVER_ERROR, "execution_error", message));
    }
    let files = outputs::files(&job.outputs);
    let pictures: Vec<_> = files.iter().filter(|file| file.content_type().starts_with("image/")).collect();
    let Some(first) = pictures.first() else {
        let message = "the job made no picture; ask without 'Accept: image/png' for what it made";
        return Err(Failure::coded(StatusCode::NOT_ACCEPTABLE, "no_image", message));
    };
    let mut response = Response::new(Body::Bytes(png(app, first).await?.into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
    response.headers_mut().insert(IMAGE_COUNT, HeaderValue::from(pictures.len()));
    Ok(response)
}

/// Answers a sender who waits: 200 with the job, or its picture; 202 if it is not over in time.
pub(super) async fn answer(
    app: Arc<App>,
    queued: Queued,
    patience: Duration,
    headers: &HeaderMap,
    base: &str,
) -> Result<Response, Failure> {
    let (number, node_errors) = (queued.accepted.number.clone(), queued.accepted.node_errors.clone());
    let job = for_end(&app, queued, patience).await?;
    if job.status.is_over() && wants_picture(headers) {
        return picture(&app, &job).await;
    }
    let (id, is_over, links) = (job.id.clone(), job.status.is_over(), links(base, &job));
    let mut row = jobs::row(&job);
    let keep = ["status", "execution_start_time", "execution_end_time", "execution_error"];
    row.retain(|key, _| keep.contains(&key.as_str()));
    let mut body = json!({"prompt_id": id, "number": number, "node_errors": node_errors});
    if let Json::Object(body) = &mut body {
        body.append(&mut row);
        body.insert("outputs".to_owned(), Json::Object(job.outputs));
        body.insert("files".to_owned(), links.into());
    }
    let status = if is_over { StatusCode::OK } else { StatusCode::ACCEPTED };
    let mut response = json_response(status, &body);
    if let Ok(place) = HeaderValue::from_str(&format!("/api/jobs/{id}"))
        && !is_over
    {
        response.headers_mut().insert(LOCATION, place);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        let of = |prefer: Option<&str>, body: Json| {
            let mut headers = HeaderMap::new();
            if let Some(prefer) = prefer {
                headers.insert("prefer", prefer.parse().unwrap());
            }
            wish(&headers, body.as_object().unwrap()).map(|w| w.map(|d| d.as_secs_f64())).ok()
        };
        assert_eq!(of(None, json!({})), Some(None));
        assert_eq!(of(None, json!({"wait": false})), Some(None));
        assert_eq!(of(None, json!({"wait": true})), Some(Some(3600.0)));
        assert_eq!(of(None, json!({"wait": 1.5})), Some(Some(1.5)));
        assert_eq!(of(None, json!({"wait": 1e9})), Some(Some(3600.0)));
        assert_eq!(of(None, json!({"wait": -1})), None);
        assert_eq!(of(None, json!({"wait": "yes"})), None);
        assert_eq!(of(Some("respond-async, wait=30"), json!({})), Some(Some(30.0)));
        assert_eq!(of(Some("wait=\"2\""), json!({})), Some(Some(2.0)));
        assert_eq!(of(Some("wait=soon"), json!({})), Some(None));
    }
}
