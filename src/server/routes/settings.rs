//! `/settings` and `/users`: what the web page remembers, and for whom.
//!
//! Settings are one JSON object in `comfy.settings.json` among the user's data.
//! A file that can't be read counts as no settings, as in ComfyUI, so that a
//! broken one doesn't lock the page.

use std::io::{Read, Write};

use hyper::StatusCode;
use serde_json::{Map, Value as Json, json};

use super::{blocking, refuse_path};
use crate::files::{PathError, Sandbox};
use crate::server::App;
use crate::server::http::{self, Call, Failure, Response, json_response};
use crate::server::users::AddError;

const FILE: &str = "comfy.settings.json";
/// Largest settings file.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

fn read(data: &Sandbox) -> Result<Map<String, Json>, PathError> {
    let file = match data.open(FILE) {
        Err(PathError::NotFound { .. }) => return Ok(Map::new()),
        other => other?,
    };
    let mut text = Vec::new();
    let settings = file
        .take(MAX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_slice(&text).map_err(|e| e.to_string()));
    Ok(settings.unwrap_or_else(|error| {
        tracing::error!(error, file = FILE, "the settings can't be read and count as empty");
        Map::new()
    }))
}

fn write(data: &Sandbox, settings: &Map<String, Json>) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(settings).map_err(Failure::internal)?;
    if text.len() as u64 > MAX_BYTES {
        let message = format!("the settings would take {} bytes; at most {MAX_BYTES} are kept", text.len());
        return Err(Failure::Text(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    let mut staged = data.stage().map_err(Failure::internal)?;
    staged.file().write_all(text.as_bytes()).map_err(Failure::internal)?;
    staged.keep(FILE, true).map_err(Failure::internal)?;
    Ok(())
}

/// The settings of the user that asks.
async fn of(call: &Call) -> Result<Map<String, Json>, Failure> {
    let (app, user) = (call.app.clone(), call.app.users.of(call.headers())?);
    blocking(move || read(&app.users.data(&user)?)).await?.map_err(refuse_path)
}

/// Adds to the settings, or replaces some of them.
async fn merge(app: std::sync::Arc<App>, user: String, new: Map<String, Json>) -> Result<Response, Failure> {
    blocking(move || {
        let _held = app.users.lock_settings();
        let data = app.users.data(&user).map_err(refuse_path)?;
        let mut settings = read(&data).map_err(refuse_path)?;
        settings.extend(new);
        write(&data, &settings)
    })
    .await??;
    Ok(http::empty(StatusCode::OK))
}

/// `GET /settings`
pub(in crate::server) async fn all(call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &Json::Object(of(&call).await?)))
}

/// `GET /settings/{id}`: one value, null if there is none.
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let value = of(&call).await?.remove(call.param("id")).unwrap_or_default();
    Ok(json_response(StatusCode::OK, &value))
}

/// `POST /settings`: an object of values to store.
pub(in crate::server) async fn store(call: Call) -> Result<Response, Failure> {
    let user = call.app.users.of(call.headers())?;
    let (app, new) = call.into_object().await?;
    merge(app, user, new).await
}

/// `POST /settings/{id}`: one value to store.
pub(in crate::server) async fn store_one(call: Call) -> Result<Response, Failure> {
    let user = call.app.users.of(call.headers())?;
    let id = call.param("id").to_owned();
    let (app, value) = call.into_json().await?;
    let value =
        value.ok_or_else(|| Failure::bad_request("the request body is empty; a JSON value is needed"))?;
    merge(app, user, Map::from_iter([(id, value)])).await
}

/// `GET /users`
pub(in crate::server) async fn users(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || match call.app.users.list() {
        Some(users) => json!({"storage": "server", "users": users}),
        None => json!({"storage": "server", "migrated": call.app.users.is_migrated()}),
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}

/// `POST /users`: `{"username": …}`; the answer is the new user's id.
pub(in crate::server) async fn add_user(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let name = body.get("username").and_then(Json::as_str);
    let name = name.ok_or_else(|| Failure::bad_request("'username' must be a text"))?.to_owned();
    match blocking(move || app.users.add(&name)).await? {
        Ok(id) => Ok(json_response(StatusCode::OK, &id.into())),
        Err(AddError::Duplicate) => {
            Ok(json_response(StatusCode::BAD_REQUEST, &json!({"error": "Duplicate username."})))
        }
        Err(AddError::Unusable(reason)) => {
            Ok(json_response(StatusCode::BAD_REQUEST, &json!({"error": reason})))
        }
        Err(AddError::NotStored(error)) => Err(Failure::internal(error)),
    }
}
