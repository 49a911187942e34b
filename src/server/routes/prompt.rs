//! `/prompt`: queueing.

use hyper::StatusCode;
use hyper::header::RETRY_AFTER;
use serde_json::{Map, Value as Json, json};

use super::{blocking, is_truthy, waiting};
use crate::engine::{QueueLimits, Refused, Submission};
use crate::graph;
use crate::server::App;
use crate::server::http::{self, Call, Failure, Response, json_response};
use crate::server::webhook::Webhook;

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

/// Refuses graphs larger than any workflow is.
pub(super) fn check_size(app: &App, prompt: &Json) -> Result<(), String> {
    let (nodes, most) = (prompt.as_object().map_or(0, Map::len), app.config.limits.prompt_nodes);
    if nodes > most {
        return Err(format!("the prompt has {nodes} nodes; at most {most} are taken"));
    }
    Ok(())
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
        ..Submission::default()
    })
}

/// A refusal in ComfyUI's shape.
pub(super) fn refusal(refused: &Refused) -> Response {
    let status = if refused.is_queue_full { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::BAD_REQUEST };
    let body = json!({"error": refused.error, "node_errors": refused.node_errors});
    let mut response = json_response(status, &body);
    if refused.is_queue_full {
        http::set(&mut response, RETRY_AFTER, "5");
    }
    response
}

/// Refuses prompts because the server stops.
pub(super) fn check_running(app: &App) -> Result<(), Failure> {
    if app.is_stopping() {
        let message = "the server stops and takes no more prompts";
        return Err(Failure::coded(StatusCode::SERVICE_UNAVAILABLE, "server_stopping", message));
    }
    Ok(())
}

/// How many prompts may wait.
pub(super) fn queue_limits(app: &App) -> QueueLimits {
    let limits = &app.config.limits;
    QueueLimits { total: limits.queued_prompts, per_owner: limits.prompts_per_client }
}

/// What a request may say beside a workflow that is its whole body.
const REQUEST_KEYS: &[&str] =
    &["client_id", "prompt_id", "number", "front", "extra_data", "wait", "partial_execution_targets"];

/// A workflow as the web page saves it, as `prompt` or as the whole body, becomes a prompt;
/// the workflow itself goes into the pictures, as it would from the page.
fn convert(app: &App, mut body: Map<String, Json>) -> Result<Map<String, Json>, Failure> {
    let is_bare = !body.contains_key("prompt") && graph::is_ui_workflow(&Json::Object(body.clone()));
    if is_bare {
        let mut workflow = std::mem::take(&mut body);
        for key in REQUEST_KEYS {
            body.extend(workflow.remove_entry(*key));
        }
        body.insert("prompt".to_owned(), Json::Object(workflow));
    }
    let Some(workflow) = body.get("prompt").filter(|prompt| graph::is_ui_workflow(prompt)).cloned() else {
        return Ok(body);
    };
    body.insert("prompt".to_owned(), app.engine.convert_workflow(&workflow).map_err(bad_workflow)?);
    let extra = body.entry("extra_data").or_insert_with(|| json!({}));
    if extra.is_null() {
        *extra = json!({});
    }
    if let Some(extra) = extra.as_object_mut() {
        let info = extra.entry("extra_pnginfo").or_insert_with(|| json!({}));
        if let Some(info) = info.as_object_mut() {
            info.entry("workflow").or_insert(workflow);
        }
    }
    Ok(body)
}

fn bad_workflow(error: graph::WorkflowError) -> Failure {
    Failure::Refused { kind: "invalid_workflow", message: error.to_string() }
}

/// `POST /workflow/convert`: the web page's format to the API's, without running it.
pub(in crate::server) async fn convert_only(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let prompt = blocking(move || {
        let workflow = match body.get("workflow") {
            Some(workflow) if !graph::is_ui_workflow(&Json::Object(body.clone())) => workflow.clone(),
            _ => Json::Object(body),
        };
        app.engine.convert_workflow(&workflow).map_err(bad_workflow)
    })
    .await??;
    Ok(json_response(StatusCode::OK, &json!({"prompt": prompt})))
}

/// `POST /prompt`: checks a prompt and queues it (`?validate_only=1`: only checks it).
pub(in crate::server) async fn submit(call: Call) -> Result<Response, Failure> {
    let only_validate = call.query("validate_only").is_some_and(|value| value != "0" && value != "false");
    let (base, owner, headers) = (call.base_url(), call.owner(), call.headers().clone());
    let (app, body) = call.into_object().await?;
    let too_large = |message: String| Failure::Refused { kind: "prompt_too_large", message };
    check_size(&app, body.get("prompt").unwrap_or(&Json::Null)).map_err(too_large)?;
    let converter = app.clone();
    let body = blocking(move || convert(&converter, body)).await??;
    let wish = waiting::wish(&headers, &body)?;
    let mut submission = submission(body)?;
    if only_validate {
        return validate(app, submission).await;
    }
    check_running(&app)?;
    let allow_private = app.config.allow_private_webhooks;
    let webhook = Webhook::take(&mut submission.extra_data, &base, allow_private)
        .map_err(|message| Failure::Refused { kind: "invalid_webhook", message })?;
    (submission.owner, submission.limits) = (owner, queue_limits(&app));
    let queued = match waiting::queue(&app, submission, webhook).await? {
        Ok(queued) => queued,
        Err(refused) => return Ok(refusal(&refused)),
    };
    if let Some(patience) = wish {
        return waiting::answer(app, queued, patience, &headers, &base).await;
    }
    let accepted = queued.accepted;
    let body = json!({
        "prompt_id": accepted.prompt_id,
        "number": accepted.number,
        "node_errors": accepted.node_errors,
    });
    Ok(json_response(StatusCode::OK, &body))
}

/// Checks a prompt; the queue and the numbering see nothing of it.
async fn validate(app: std::sync::Arc<App>, submission: Submission) -> Result<Response, Failure> {
    let outcome = blocking(move || app.engine.validate(submission)).await?;
    Ok(match outcome {
        Ok(checked) => {
            let body = json!({"valid": true, "outputs": checked.outputs, "node_errors": checked.node_errors});
            json_response(StatusCode::OK, &body)
        }
        Err(refused) => refusal(&refused),
    })
}
