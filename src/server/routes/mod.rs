//! The routes, one file a group.

mod assets;
mod generations;
mod history;
mod internal;
mod jobs;
mod models;
mod page;
mod prompt;
mod queue;
mod settings;
mod system;
mod upload;
mod userdata;
mod v2;
mod view;
mod waiting;
mod web;

use hyper::Method;
use serde_json::Value as Json;

use super::http::Failure;
use super::router::Router;
use super::ws;
use crate::files::{PathError, names};
pub(super) use jobs::detail as job_detail;
pub(super) use v2::Idempotency;
pub(super) use waiting::links;

/// Every route of this server.
pub(super) fn all() -> Router {
    Router::default()
        .get("/", page::index)
        .get("/kiln/{file}", page::asset)
        .get("/templates/{file}", page::templates)
        .get("/ws", ws::upgrade)
        .get("/system_stats", system::stats)
        .get("/features", system::features)
        .get("/extensions", system::extensions)
        .get("/object_info", system::object_info)
        .get("/object_info/{class}", system::object_info)
        .post("/free", system::free)
        .get("/prompt", prompt::info)
        .post("/prompt", prompt::submit)
        .get("/queue", queue::list)
        .post("/queue", queue::edit)
        .post("/interrupt", queue::interrupt)
        .get("/history", history::list)
        .get("/history/{id}", history::one)
        .post("/history", history::edit)
        .get("/models", models::folders)
        .get("/models/{folder}", models::files)
        .get("/experiment/models", models::places)
        .get("/experiment/models/{folder}", models::entries)
        .get("/experiment/models/preview/{folder}/{index}/{*file}", models::preview)
        .get("/view_metadata/{folder}", models::metadata)
        .get("/embeddings", models::embeddings)
        .get("/view", view::view)
        .post("/upload/image", upload::image)
        .post("/upload/mask", upload::mask)
        .get("/userdata", userdata::list)
        .get("/v2/userdata", userdata::list_all)
        .get("/userdata/{file}", userdata::get)
        .post("/userdata/{file}", userdata::put)
        .on(Method::DELETE, "/userdata/{file}", userdata::delete)
        .post("/userdata/{file}/move/{dest}", userdata::rename)
        .get("/settings", settings::all)
        .post("/settings", settings::store)
        .get("/settings/{id}", settings::one)
        .post("/settings/{id}", settings::store_one)
        .get("/users", settings::users)
        .post("/users", settings::add_user)
        .get("/workflow_templates", web::workflow_templates)
        .get("/i18n", web::translations)
        .get("/global_subgraphs", web::subgraphs)
        .get("/global_subgraphs/{id}", web::subgraph)
        .get("/internal/logs", internal::logs)
        .get("/internal/logs/raw", internal::logs_raw)
        .on(Method::PATCH, "/internal/logs/subscribe", internal::subscribe)
        .get("/internal/folder_paths", internal::folder_paths)
        .get("/internal/files/{type}", internal::files)
        .get("/health", system::health)
        .get("/openapi.json", system::openapi)
        .post("/workflow/convert", prompt::convert_only)
        .post("/models/load", generations::load)
        .post("/v1/images/generations", generations::create)
        .get("/v1/models", generations::models)
        .get("/jobs", jobs::list)
        .post("/jobs/cancel", jobs::cancel_many)
        .get("/jobs/{id}", jobs::one)
        .post("/jobs/{id}/cancel", jobs::cancel)
        .get("/jobs/{id}/assets", assets::list_of_job)
        .get("/api/assets", assets::list)
        .post("/api/assets", assets::upload)
        .post("/api/assets/from-hash", v2::assets::from_hash)
        .get("/api/assets/hash/{hash}", v2::assets::by_hash)
        .get("/api/assets/{id}", assets::one)
        .on(Method::PUT, "/api/assets/{id}", assets::update)
        .on(Method::DELETE, "/api/assets/{id}", v2::assets::delete)
        .post("/api/assets/{id}/tags", assets::add_tags)
        .on(Method::DELETE, "/api/assets/{id}/tags", assets::remove_tags)
        .get("/api/assets/tags/refine", assets::refine_tags)
        .get("/api/assets/{id}/content", v2::assets::content)
        .get("/api/tags", assets::list_tags)
        .get("/v2/health", v2::health)
        .get("/v2/jobs", v2::jobs::list)
        .post("/v2/jobs", v2::jobs::create)
        .get("/v2/jobs/{id}", v2::jobs::one)
        .get("/v2/jobs/{id}/workflow", v2::jobs::workflow)
        .get("/v2/jobs/{id}/events", v2::events::stream)
        .post("/v2/jobs/{id}/cancel", v2::jobs::cancel)
        .post("/v2/assets", v2::assets::upload)
        .post("/v2/assets/from-hash", v2::assets::from_hash)
        .get("/v2/assets/by-hash/{hash}", v2::assets::by_hash)
        .get("/v2/assets/{id}", v2::assets::one)
        .on(Method::DELETE, "/v2/assets/{id}", v2::assets::delete)
        .get("/v2/assets/{id}/content", v2::assets::content)
}

/// Runs file or CPU work on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(Failure::internal)
}

/// A list of ids: texts, and numbers as texts.
fn ids(value: &Json) -> Result<Vec<String>, Failure> {
    let list = value.as_array().ok_or_else(|| Failure::bad_request("'delete' must be a list of ids"))?;
    list.iter()
        .map(|id| match id {
            Json::String(id) => Ok(id.clone()),
            Json::Number(id) => Ok(id.to_string()),
            other => Err(Failure::bad_request(format!("'delete' holds {other}, which is no id"))),
        })
        .collect()
}

/// What a Python server takes for true: not null, false, zero, or empty.
fn is_truthy(value: Option<&Json>) -> bool {
    match value {
        None | Some(Json::Null) => false,
        Some(Json::Bool(b)) => *b,
        Some(Json::Number(n)) => n.as_f64() != Some(0.0),
        Some(Json::String(s)) => !s.is_empty(),
        Some(Json::Array(a)) => !a.is_empty(),
        Some(Json::Object(o)) => !o.is_empty(),
    }
}

/// What a path that may not be, or is not there, means to a client.
fn refuse_path(error: PathError) -> Failure {
    match error {
        PathError::Invalid { .. } => Failure::BAD_REQUEST,
        PathError::OutsideRoot { .. } => Failure::FORBIDDEN,
        PathError::NotFound { .. } | PathError::UnknownFolder(_) => Failure::NOT_FOUND,
        PathError::Io { .. } => Failure::internal(error),
    }
}
