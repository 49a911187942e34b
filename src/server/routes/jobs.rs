//! `/jobs`: one list of what waits, runs and is over, for ComfyUI's newer web pages.

use hyper::StatusCode;
use serde_json::{Map, Value as Json, json};

use super::blocking;
use crate::engine::{Cancelling, JobQuery, JobSort, JobStatus, JobView};
use crate::server::http::{Call, Failure, Response, json_response};
use crate::server::outputs;

/// Most jobs on one page.
const MAX_LIMIT: usize = 1000;

/// A refusal as the reference words it: `{"error": "…"}`.
fn refuse(status: StatusCode, message: impl Into<String>) -> Response {
    json_response(status, &json!({"error": message.into()}))
}

fn statuses(call: &Call) -> Result<Vec<JobStatus>, String> {
    let text = call.query("status").unwrap_or_default();
    let names = text.split(',').map(|name| name.trim().to_ascii_lowercase()).filter(|name| !name.is_empty());
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for name in names {
        match JobStatus::from_name(&name) {
            Some(status) => known.push(status),
            None => unknown.push(name),
        }
    }
    if unknown.is_empty() {
        return Ok(known);
    }
    let all = JobStatus::ALL.map(JobStatus::name).join(", ");
    Err(format!("Invalid status value(s): {}. Valid values: {all}", unknown.join(", ")))
}

fn query(call: &Call) -> Result<JobQuery, String> {
    let number = |key: &str, least: usize| match call.query(key).filter(|text| !text.trim().is_empty()) {
        None => Ok(None),
        Some(text) => match text.trim().parse::<usize>() {
            Ok(number) if number >= least => Ok(Some(number)),
            _ => Err(format!("'{key}' must be a whole number from {least} on, not '{text}'")),
        },
    };
    let choice = |key: &str| call.query(key).map(|text| text.trim().to_ascii_lowercase()).unwrap_or_default();
    let sort = match choice("sort_by").as_str() {
        "" | "created_at" | "create_time" => JobSort::CreatedAt,
        "execution_duration" | "execution_time" => JobSort::Duration,
        other => return Err(format!("'sort_by' must be created_at or execution_duration, not '{other}'")),
    };
    let is_ascending = match choice("sort_order").as_str() {
        "" | "desc" => false,
        "asc" => true,
        other => return Err(format!("'sort_order' must be asc or desc, not '{other}'")),
    };
    Ok(JobQuery {
        statuses: statuses(call)?,
        workflow_id: call.query("workflow_id").filter(|id| !id.is_empty()),
        sort,
        is_ascending,
        offset: number("offset", 0)?.unwrap_or(0),
        limit: number("limit", 1)?.map(|limit| limit.min(MAX_LIMIT)),
    })
}

/// How far a job is: the done part, and the step of the node that runs.
fn progress(job: &JobView) -> Json {
    let Some(progress) = &job.progress else { return Json::Null };
    let (step, steps) = progress.step.unzip();
    json!({
        "value": progress.fraction(),
        "nodes_done": progress.nodes_done,
        "nodes_total": progress.nodes_total,
        "node": progress.current.as_ref().map(|(node, _)| node),
        "step": step,
        "steps": steps,
    })
}

/// A job in a list.
pub(super) fn row(job: &JobView) -> Map<String, Json> {
    let (count, shown, preview) = outputs::summary(&job.outputs);
    let row = json!({
        "id": job.id,
        "status": job.status.name(),
        "priority": job.number,
        "create_time": job.created_ms,
        "execution_start_time": job.started_ms,
        "execution_end_time": job.ended_ms,
        "execution_error": job.error(),
        "outputs_count": count,
        "previewable_outputs_count": shown,
        "preview_output": preview,
        "workflow_id": job.workflow_id(),
        "queue_position": job.queue_position,
        "progress": progress(job),
    });
    match row {
        Json::Object(row) => row,
        _ => Map::new(),
    }
}

/// A job with everything.
pub(in crate::server) fn detail(job: JobView) -> Json {
    let mut row = row(&job);
    let JobView { outputs, end, prompt, extra_data, .. } = job;
    row.insert("outputs".to_owned(), Json::Object(outputs));
    row.insert("execution_status".to_owned(), end);
    row.insert("workflow".to_owned(), json!({"prompt": prompt, "extra_data": extra_data}));
    Json::Object(row)
}

/// `GET /jobs?status=&workflow_id=&sort_by=&sort_order=&limit=&offset=`
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let query = match query(&call) {
        Ok(query) => query,
        Err(message) => return Ok(refuse(StatusCode::BAD_REQUEST, message)),
    };
    let body = blocking(move || {
        let list = call.app.engine.jobs(&query);
        let end = query.offset.saturating_add(list.jobs.len());
        let rows: Vec<_> = list.jobs.iter().map(row).collect();
        json!({
            "jobs": rows,
            "pagination": {
                "offset": query.offset,
                "limit": query.limit.unwrap_or(list.total),
                "total": list.total,
                "has_more": end < list.total,
            },
        })
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}

/// `GET /jobs/{id}`
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || call.app.engine.job(call.param("id")).map(detail)).await?;
    Ok(match body {
        Some(body) => json_response(StatusCode::OK, &body),
        None => refuse(StatusCode::NOT_FOUND, "Job not found"),
    })
}

/// `POST /jobs/{id}/cancel`: out of the queue, or stopped at the next step. Not an error if it is over.
pub(in crate::server) async fn cancel(call: Call) -> Result<Response, Failure> {
    let answer = blocking(move || {
        let id = call.param("id");
        let outcome = call.app.engine.cancel(id)?;
        let status = call.app.engine.job_status(id).unwrap_or(JobStatus::Cancelled);
        Some(json!({"id": id, "status": status.name(), "cancelled": outcome != Cancelling::WasOver}))
    })
    .await?;
    Ok(match answer {
        Some(body) => json_response(StatusCode::OK, &body),
        None => refuse(StatusCode::NOT_FOUND, "Job not found"),
    })
}

/// `POST /jobs/cancel`: `{"job_ids": [ids]}`.
pub(in crate::server) async fn cancel_many(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let ids: Option<Vec<String>> = body
        .get("job_ids")
        .and_then(Json::as_array)
        .and_then(|ids| ids.iter().map(|id| id.as_str().map(str::to_owned)).collect());
    let Some(ids) = ids else {
        return Ok(refuse(StatusCode::BAD_REQUEST, "'job_ids' must be a list of job ids"));
    };
    let body = blocking(move || {
        let (mut cancelled, mut over, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        for id in ids {
            match app.engine.cancel(&id) {
                Some(Cancelling::WasOver) => over.push(id),
                Some(_) => cancelled.push(id),
                None => unknown.push(id),
            }
        }
        json!({"cancelled": cancelled, "already_finished": over, "not_found": unknown})
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}
