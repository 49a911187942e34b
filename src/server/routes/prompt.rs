//! `/prompt`: queueing.

use hyper::StatusCode;
use hyper::header::RETRY_AFTER;
use serde_json::{Map, Value as Json, json};

use super::{blocking, is_truthy};
use crate::engine::Submission;
use crate::server::App;
use crate::server::http::{self, Call, Failure, Response, json_response};

/// `GET /prompt`: how much there is to do.
pub(in crate::server) async fn info(call: Call) -> Result<Response, Failure> {
    let queue_remaining = call.app.engine.queue_remaining();
    Ok(json_response(StatusCode::OK, &json!({"exec_info": {"queue_remaining": queue_remaining}})))
}

/// A text, or a number as a text; null is absent.
fn text(body: &Map<String, Json>, key: &str) -> Result<Option<String>, Failure> {
    match body.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(Json::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => Err(Failure::bad_request(format!("'{key}' must be a text, not {other}"))),
    }
}

fn number(body: &Map<String, Json>) -> Result<Option<f64>, Failure> {
    let given = match body.get("number") {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::Number(number)) => number.as_f64(),
        Some(Json::String(text)) => text.trim().parse().ok().filter(|n: &f64| n.is_finite()),
        Some(_) => None,
    };
    given.map(Some).ok_or_else(|| Failure::bad_request(format!("'number' is no number: {}", body["number"])))
}

fn targets(body: &Map<String, Json>) -> Result<Option<Vec<String>>, Failure> {
    match body.get("partial_execution_targets") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Array(list)) => list
            .iter()
            .map(|id| id.as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .map(Some)
            .ok_or_else(|| Failure::bad_request("'partial_execution_targets' must hold node ids")),
        Some(_) => Err(Failure::bad_request("'partial_execution_targets' must be a list of node ids")),
    }
}

fn submission(mut body: Map<String, Json>) -> Result<Submission, Failure> {
    let extra_data = match body.remove("extra_data") {
        None | Some(Json::Null) => Map::new(),
        Some(Json::Object(extra)) => extra,
        Some(other) => {
            return Err(Failure::bad_request(format!("'extra_data' must be an object, not {other}")));
        }
    };
    Ok(Submission {
        prompt: body.remove("prompt").unwrap_or(Json::Null),
        prompt_id: text(&body, "prompt_id")?,
        number: number(&body)?,
        front: is_truthy(body.get("front")),
        extra_data,
        client_id: text(&body, "client_id")?,
        partial_execution_targets: targets(&body)?,
    })
}

/// Why no prompt can be taken right now.
fn unavailable(app: &App) -> Option<Response> {
    let (status, kind, message) = if app.is_stopping() {
        (StatusCode::SERVICE_UNAVAILABLE, "server_stopping", "the server stops and takes no more prompts")
    } else if app.engine.queue_remaining() >= app.config.limits.queued_prompts {
        (StatusCode::TOO_MANY_REQUESTS, "queue_full", "the queue is full; try again later")
    } else {
        return None;
    };
    let error = json!({"type": kind, "message": message, "details": message, "extra_info": {}});
    let mut response = json_response(status, &json!({"error": error, "node_errors": {}}));
    http::set(&mut response, RETRY_AFTER, "5");
    Some(response)
}

/// `POST /prompt`: checks a prompt and queues it.
pub(in crate::server) async fn submit(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    if let Some(response) = unavailable(&app) {
        return Ok(response);
    }
    let submission = submission(body)?;
    let (status, answer) = blocking(move || match app.engine.submit(submission) {
        Ok(accepted) => {
            let body = json!({
                "prompt_id": accepted.prompt_id,
                "number": accepted.number,
                "node_errors": accepted.node_errors,
            });
            (StatusCode::OK, body)
        }
        Err(refused) => {
            (StatusCode::BAD_REQUEST, json!({"error": refused.error, "node_errors": refused.node_errors}))
        }
    })
    .await?;
    Ok(json_response(status, &answer))
}
