//! Comfy API v2 (`/api/v2/jobs`, `/api/v2/assets`), as its public OpenAPI document
//! describes it and its official SDKs use it. The bare paths answer too.

pub(in crate::server) mod assets;
pub(in crate::server) mod events;
mod idempotency;
pub(in crate::server) mod jobs;
mod time;

use hyper::StatusCode;
use serde_json::json;

pub(in crate::server) use idempotency::Idempotency;
pub(in crate::server) use time::utc;

use crate::server::http::{Call, Failure, Response, json_response};

/// `GET /v2/health`
pub(in crate::server) async fn health(call: Call) -> Result<Response, Failure> {
    let (status, word) = match call.app.is_stopping() {
        false => (StatusCode::OK, "ok"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
    };
    Ok(json_response(status, &json!({"status": word, "version": env!("CARGO_PKG_VERSION")})))
}
