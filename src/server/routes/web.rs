//! What ComfyUI's custom nodes bring for its web page. kiln runs none of them,
//! so the lists are empty; the page needs the answers all the same.

use hyper::StatusCode;
use serde_json::{Value as Json, json};

use crate::server::http::{Call, Failure, Response, json_response};

/// `GET /workflow_templates`: names of example workflows by custom node.
pub(in crate::server) async fn workflow_templates(_call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &json!({})))
}

/// `GET /i18n`: translations of custom nodes by language.
pub(in crate::server) async fn translations(_call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &json!({})))
}

/// `GET /global_subgraphs`: subgraphs that custom nodes bring, by id.
pub(in crate::server) async fn subgraphs(_call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &json!({})))
}

/// `GET /global_subgraphs/{id}`: one of them; null if there is none of that id.
pub(in crate::server) async fn subgraph(_call: Call) -> Result<Response, Failure> {
    Ok(json_response(StatusCode::OK, &Json::Null))
}
