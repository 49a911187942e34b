//! `/queue` and `/interrupt`.

use hyper::StatusCode;
use serde_json::Value as Json;

use super::{blocking, ids, is_truthy};
use crate::server::http::{self, Call, Failure, Response, json_text};

/// So few prompts are written out faster than another thread is woken up.
const SHORT_QUEUE: usize = 16;

/// `GET /queue`: what runs and what waits.
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let engine = call.app.engine.clone();
    let text = if engine.queue_remaining() > SHORT_QUEUE {
        blocking(move || engine.queue_text()).await?
    } else {
        engine.queue_text()
    };
    Ok(json_text(StatusCode::OK, text))
}

/// `POST /queue`: `{"clear": true}` or `{"delete": [prompt ids]}`, for prompts that wait.
pub(in crate::server) async fn edit(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let delete = body.get("delete").map(ids).transpose()?;
    if is_truthy(body.get("clear")) {
        app.engine.clear_pending();
    }
    if let Some(delete) = delete {
        app.engine.delete_pending(&delete);
    }
    Ok(http::empty(StatusCode::OK))
}

/// `POST /interrupt`: stops what runs, or the prompt with the given `prompt_id`. As in ComfyUI, a body that is no JSON
/// names no prompt.
pub(in crate::server) async fn interrupt(call: Call) -> Result<Response, Failure> {
    let app = call.app.clone();
    let body = match call.into_json().await {
        Err(Failure::Json(_)) => None,
        other => other?.1,
    };
    let prompt_id = body.as_ref().and_then(|b| b.get("prompt_id")).filter(|id| is_truthy(Some(id)));
    match prompt_id {
        None => app.engine.interrupt(None),
        Some(Json::String(id)) => app.engine.interrupt(Some(id)),
        Some(other) => return Err(Failure::bad_request(format!("'prompt_id' must be a text, not {other}"))),
    }
    Ok(http::empty(StatusCode::OK))
}
