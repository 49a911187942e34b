//! `/v2/jobs`: submit, poll, cancel.

use std::collections::HashMap;

use hyper::StatusCode;
use hyper::header::HeaderMap;
use serde_json::{Map, Value as Json, json};

use super::super::blocking;
use super::time::{DAY_MS, utc};
use crate::engine::{JobProgress, JobQuery, JobStatus, JobView, Refused, Submission};
use crate::files::assets::{self, Asset, AssetStore};
use crate::graph;
use crate::server::App;
use crate::server::http::{Call, Failure, Response, json_response};
use crate::server::outputs::{self, OutputFile};

/// How long links and records are promised for: the history keeps its newest prompts, whatever their age.
const RETENTION_MS: u64 = 7 * DAY_MS;
/// Jobs on a page, unless asked otherwise, and at most.
const PAGE: usize = 50;
const MAX_PAGE: usize = 1000;
/// Labels of a job: how many, and how long.
const MAX_LABELS: usize = 64;

pub(super) fn status_name(job: &JobView) -> &'static str {
    match job.status {
        JobStatus::Pending => "queued",
        JobStatus::InProgress if job.is_cancelling => "canceling",
        JobStatus::InProgress => "running",
        JobStatus::Completed => "succeeded",
        JobStatus::Failed => "failed",
        JobStatus::Cancelled => "canceled",
    }
}

/// A progress snapshot.
pub(super) fn progress_json(progress: &JobProgress) -> Json {
    let (node, class) = progress.current.clone().unzip();
    let (step, steps) = progress.step.unzip();
    let message = class.as_ref().map(|class| match progress.step {
        Some((step, steps)) => format!("{class} {step}/{steps}"),
        None => class.clone(),
    });
    json!({
        "value": progress.fraction(),
        "nodes_done": progress.nodes_done,
        "nodes_total": progress.nodes_total,
        "current_node": node,
        "current_node_class": class,
        "step": step,
        "steps": steps,
        "message": message,
    })
}

/// The asset behind a job's output, if its file is there.
pub(in crate::server::routes) fn asset_of(
    store: &AssetStore,
    job_id: &str,
    file: &OutputFile,
) -> Option<Asset> {
    store.output(assets::OutputFile {
        job_id,
        kind: file.kind,
        subfolder: &file.subfolder,
        filename: &file.filename,
        content_type: file.content_type(),
    })
}

/// One output as clients see it.
pub(super) fn output_json(app: &App, base: &str, job_id: &str, file: &OutputFile) -> Option<Json> {
    let asset = asset_of(&app.assets, job_id, file)?;
    Some(json!({
        "node_id": file.node_id,
        "name": file.filename,
        "type": file.sort(),
        "content_type": asset.content_type,
        "size_bytes": asset.size,
        "id": asset.id,
        "hash": asset.hash,
        "url": super::assets::content_url(base, &asset.id),
        "url_expires_at": utc(asset.created_ms + RETENTION_MS),
        "job_id": job_id,
    }))
}

/// Why a job failed.
fn error_json(job: &JobView) -> Json {
    let Some(error) = job.error() else {
        return match job.status {
            JobStatus::Failed => json!({"code": "execution_error", "message": "the job failed"}),
            _ => Json::Null,
        };
    };
    let lines = error["traceback"].as_array().cloned().unwrap_or_default();
    let traceback: String = lines.iter().filter_map(Json::as_str).collect();
    json!({
        "code": "node_execution_error",
        "message": error["exception_message"].as_str().unwrap_or_default().trim_end(),
        "node_id": error["node_id"],
        "class_type": error["node_type"],
        "traceback": traceback,
    })
}

/// A job as clients see it. Looks at the files of its outputs.
pub(super) fn job_json(app: &App, base: &str, job: &JobView) -> Json {
    let files = outputs::files(&job.outputs);
    let outputs: Vec<Json> = files.iter().filter_map(|file| output_json(app, base, &job.id, file)).collect();
    let waited = job.started_ms.map(|started| started.saturating_sub(job.created_ms));
    let ran = job.started_ms.zip(job.ended_ms).map(|(start, end)| end.saturating_sub(start));
    let id = percent_encoding::utf8_percent_encode(&job.id, percent_encoding::NON_ALPHANUMERIC).to_string();
    let path = format!("/api/v2/jobs/{}", id.replace("%2D", "-"));
    json!({
        "id": job.id,
        "status": status_name(job),
        "created_at": utc(job.created_ms),
        "started_at": job.started_ms.map(utc),
        "completed_at": job.ended_ms.map(utc),
        "expires_at": utc(job.created_ms + RETENTION_MS),
        "queue_position": job.queue_position,
        "progress": job.progress.as_ref().map(progress_json),
        "outputs": outputs,
        "error": error_json(job),
        "metrics": {"queue_ms": waited, "execution_ms": ran},
        "metadata": job.extra_data.get("metadata"),
        "urls": {"self": path, "events": format!("{path}/events"), "cancel": format!("{path}/cancel")},
    })
}

fn not_found() -> Failure {
    Failure::coded(StatusCode::NOT_FOUND, "not_found", "there is no job of this id")
}

fn invalid(code: &'static str, message: impl Into<String>) -> Failure {
    Failure::coded(StatusCode::UNPROCESSABLE_ENTITY, code, message)
}

/// Puts file names in the place of `core/ASSET` objects.
fn place_assets(store: &AssetStore, value: &mut Json) -> Result<(), Failure> {
    if value.get("__type").is_some_and(|kind| kind == "core/ASSET") {
        let id = value["info"]["id"].as_str().unwrap_or_default();
        let asset = store.get(id).filter(|asset| store.path(asset).is_ok_and(|path| path.is_file()));
        let asset = asset.ok_or_else(|| invalid("missing_asset", format!("there is no asset '{id}'")))?;
        *value = AssetStore::node_name(&asset).into();
        return Ok(());
    }
    let children: Vec<&mut Json> = match value {
        Json::Array(list) => list.iter_mut().collect(),
        Json::Object(object) => object.values_mut().collect(),
        _ => return Ok(()),
    };
    // the parser bounds the depth
    children.into_iter().try_for_each(|child| place_assets(store, child))
}

/// What is wrong with a graph, by node, in the words of this API.
fn invalid_workflow(refused: &Refused) -> Failure {
    let mut errors = Map::new();
    for (node, entry) in refused.node_errors.as_object().into_iter().flatten() {
        let of_node = entry["errors"].as_array().cloned().unwrap_or_default();
        let of_node = of_node.iter().map(|e| {
            json!({"field": e["extra_info"]["input_name"], "reason": e["type"], "message": e["message"],
                   "details": e["details"]})
        });
        errors.insert(node.clone(), of_node.collect());
    }
    let first = errors.iter().find_map(|(node, list)| {
        let error = list.get(0)?;
        let class = refused.node_errors[node]["class_type"].as_str().unwrap_or("?");
        let (message, details) = (error["message"].as_str()?, error["details"].as_str().unwrap_or_default());
        Some(format!("Node {node} ({class}): {message}: {details}"))
    });
    let general = || {
        let text = |key: &str| refused.error[key].as_str().unwrap_or_default().to_owned();
        format!("{} {}", text("message"), text("details")).trim().to_owned()
    };
    Failure::Coded {
        status: StatusCode::UNPROCESSABLE_ENTITY,
        code: "invalid_workflow",
        message: first.unwrap_or_else(general),
        details: json!({"node_errors": errors, "error": refused.error}),
    }
}

fn extra_data(body: &mut Map<String, Json>) -> Result<Map<String, Json>, Failure> {
    for key in body.keys() {
        if !matches!(key.as_str(), "workflow" | "extra_data" | "metadata") {
            return Err(invalid("invalid_request", format!("the field '{key}' is not known here")));
        }
    }
    match body.remove("extra_data") {
        None | Some(Json::Null) => {}
        // The key is for partner nodes, of which there are none: it is not kept.
        Some(Json::Object(extra)) if extra.keys().all(|key| key == "api_key_comfy_org") => {}
        Some(_) => return Err(invalid("invalid_request", "'extra_data' may only hold 'api_key_comfy_org'")),
    }
    let mut extra = Map::new();
    match body.remove("metadata") {
        None | Some(Json::Null) => {}
        Some(Json::Object(labels)) if labels.len() <= MAX_LABELS && labels.values().all(Json::is_string) => {
            extra.insert("metadata".to_owned(), Json::Object(labels));
        }
        Some(_) => {
            return Err(invalid("invalid_request", "'metadata' must be an object of at most 64 texts"));
        }
    }
    Ok(extra)
}

/// The body as a submission.
fn submission(app: &App, mut body: Map<String, Json>) -> Result<Submission, Failure> {
    let extra_data = extra_data(&mut body)?;
    let Some(mut workflow @ Json::Object(_)) = body.remove("workflow") else {
        return Err(invalid("invalid_workflow", "'workflow' must be an object: a graph in API format"));
    };
    if graph::is_ui_workflow(&workflow) {
        let message = "this is the format of the web page ('nodes', 'links'); export the API format, or convert it \
                       with POST /workflow/convert";
        return Err(invalid("workflow_format_ui", message));
    }
    super::super::prompt::check_size(app, &workflow)
        .map_err(|message| invalid("invalid_workflow", message))?;
    place_assets(&app.assets, &mut workflow)?;
    let limits = super::super::prompt::queue_limits(app);
    Ok(Submission { prompt: workflow, extra_data, limits, ..Submission::default() })
}

/// Queues a job; its id.
fn queue(app: &App, body: Map<String, Json>, owner: Option<String>) -> Result<String, Failure> {
    super::super::prompt::check_running(app)?;
    let submission = Submission { owner, ..submission(app, body)? };
    app.engine.submit(submission).map(|accepted| accepted.prompt_id).map_err(|refused| {
        if refused.is_queue_full {
            let message = refused.error["message"].as_str().unwrap_or_default();
            return Failure::coded(StatusCode::TOO_MANY_REQUESTS, "queue_full", message);
        }
        invalid_workflow(&refused)
    })
}

/// `POST /v2/jobs`
pub(in crate::server) async fn create(call: Call) -> Result<Response, Failure> {
    let (base, owner) = (call.base_url(), call.owner());
    let (scope, headers): (String, HeaderMap) = (call.idempotency_scope("jobs"), call.headers().clone());
    let (app, body) = call.into_object().await?;
    let key = app.idempotency.claim(&scope, &headers)?;
    let body = blocking(move || {
        let id = queue(&app, body, owner).inspect_err(|_| app.idempotency.release(key))?;
        let job = app.engine.job(&id).ok_or_else(|| Failure::internal("the job vanished"))?;
        Ok::<_, Failure>(job_json(&app, &base, &job))
    })
    .await??;
    Ok(json_response(StatusCode::CREATED, &body))
}

/// `GET /v2/jobs/{id}`
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || {
        let job = call.app.engine.job(call.param("id"))?;
        Some(job_json(&call.app, &call.base_url(), &job))
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body.ok_or_else(not_found)?))
}

/// `GET /v2/jobs/{id}/workflow`: the graph as it ran.
pub(in crate::server) async fn workflow(call: Call) -> Result<Response, Failure> {
    let job = blocking(move || call.app.engine.job(call.param("id"))).await?.ok_or_else(not_found)?;
    Ok(json_response(StatusCode::OK, &json!({"workflow": job.prompt, "format": "api"})))
}

/// `POST /v2/jobs/{id}/cancel`
pub(in crate::server) async fn cancel(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || {
        let id = call.param("id");
        call.app.engine.cancel(id)?;
        let job = call.app.engine.job(id)?;
        Some(job_json(&call.app, &call.base_url(), &job))
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body.ok_or_else(not_found)?))
}

/// A job in a list.
fn summary(job: &JobView) -> Json {
    let updated = job.ended_ms.or(job.started_ms).unwrap_or(job.created_ms);
    json!({
        "id": job.id,
        "status": status_name(job),
        "create_time": utc(job.created_ms),
        "update_time": utc(updated),
        "metadata": job.extra_data.get("metadata"),
    })
}

/// The filters `metadata[key]=value` of a query.
fn label_filter(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let decode = |text: &str| crate::server::http::decode(&text.replace('+', " "));
    pairs
        .filter_map(|(key, value)| {
            let key = decode(key);
            let key = key.strip_prefix("metadata[")?.strip_suffix(']')?.to_owned();
            Some((key, decode(value)))
        })
        .collect()
}

/// `GET /v2/jobs?limit=&cursor=&metadata[key]=value`: newest first.
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let number = |key: &str| match call.query(key) {
        None => Ok(None),
        Some(text) => text
            .parse::<usize>()
            .map(Some)
            .map_err(|_| invalid("invalid_request", format!("'{key}' must be a whole number, not '{text}'"))),
    };
    let limit = number("limit")?.unwrap_or(PAGE).clamp(1, MAX_PAGE);
    let offset = number("cursor")?.unwrap_or(0);
    let labels = label_filter(call.request.uri().query().unwrap_or_default());
    let body = blocking(move || {
        let query = match labels.is_empty() {
            true => JobQuery { offset, limit: Some(limit), ..JobQuery::default() },
            false => JobQuery::default(),
        };
        let list = call.app.engine.jobs(&query);
        let has_labels = |job: &&JobView| {
            labels.iter().all(|(key, value)| job.extra_data["metadata"][key.as_str()] == value.as_str())
        };
        let (jobs, total): (Vec<Json>, usize) = if labels.is_empty() {
            (list.jobs.iter().map(summary).collect(), list.total)
        } else {
            let all: Vec<&JobView> = list.jobs.iter().filter(has_labels).collect();
            (all.iter().skip(offset).take(limit).map(|job| summary(job)).collect(), all.len())
        };
        let next = offset.saturating_add(jobs.len());
        let mut body = json!({"jobs": jobs});
        if next < total {
            body["next_cursor"] = next.to_string().into();
        }
        body
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}
