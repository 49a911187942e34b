//! `/internal/*`: what only the web page asks for. No `/api` alias, as in ComfyUI.

use hyper::StatusCode;
use serde_json::{Map, Value as Json, json};

use super::{blocking, is_truthy};
use crate::files::Kind;
use crate::server::http::{self, Call, Failure, Response, json_response};
use crate::server::log;

/// `GET /internal/logs`: the last lines of the log, one text.
pub(in crate::server) async fn logs(call: Call) -> Result<Response, Failure> {
    let text = blocking(move || call.app.config.log.text()).await?;
    Ok(json_response(StatusCode::OK, &text.into()))
}

/// `GET /internal/logs/raw`: the same as a list.
pub(in crate::server) async fn logs_raw(call: Call) -> Result<Response, Failure> {
    let entries = blocking(move || call.app.config.log.entries()).await?;
    Ok(json_response(StatusCode::OK, &json!({"entries": entries, "size": log::size()})))
}

/// `PATCH /internal/logs/subscribe`: `{"clientId", "enabled"}`; new lines go to that client's WebSocket.
pub(in crate::server) async fn subscribe(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let client = body.get("clientId").and_then(Json::as_str);
    let client = client.ok_or_else(|| Failure::bad_request("'clientId' must be a text"))?;
    app.sockets.set_wants_log(client, is_truthy(body.get("enabled")));
    Ok(http::empty(StatusCode::OK))
}

/// `GET /internal/folder_paths`: the model folders with their places.
pub(in crate::server) async fn folder_paths(call: Call) -> Result<Response, Failure> {
    let folders: Map<String, Json> =
        call.app.folders.model_folders().map(|(name, roots)| (name.to_owned(), json!(roots))).collect();
    Ok(json_response(StatusCode::OK, &folders.into()))
}

/// `GET /internal/files/{type}`: what lies directly in a folder, newest first.
pub(in crate::server) async fn files(call: Call) -> Result<Response, Failure> {
    let Some(kind) = Kind::from_name(call.param("type")) else {
        return Ok(json_response(StatusCode::BAD_REQUEST, &json!({"error": "Invalid directory type"})));
    };
    let names = blocking(move || call.app.folders.newest_files(kind)).await?;
    Ok(json_response(StatusCode::OK, &json!(names)))
}
