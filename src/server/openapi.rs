//! `/openapi.json`: the API as an OpenAPI 3.1 document.
//!
//! Paths and methods come from the router, so that a route can't be missing; what they take and give
//! is told by `openapi.json` beside this file, one line an operation. A route without a line there
//! is listed all the same. A test asks every described route and compares.

use hyper::Method;
use serde_json::{Map, Value as Json, json};

/// What is known about operations and schemas.
const DETAILS: &str = include_str!("openapi.json");

/// Path parameters of a pattern.
fn parameters(path: &str) -> Vec<Json> {
    let names = path.split('{').skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name);
    names
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect()
}

/// How any request may be refused.
const ERRORS: &[(&str, &str)] = &[
    ("401", "An API key is needed, or there is no such user."),
    (
        "403",
        "A page of another site asks (no body, unless JSON is accepted), or the Host is not this server's.",
    ),
    ("414", "The address is too long."),
    ("500", "The server failed."),
];
/// How a request with a body may be refused.
const BODY_ERRORS: &[(&str, &str)] = &[
    ("400", "The body is not what it should be."),
    ("408", "The body comes too slowly."),
    ("413", "The body is too large."),
    ("503", "The server stops, or holds as many bodies as it can."),
];

/// Adds to an operation how it may be refused, and the form in which all errors come.
fn add_errors(operation: &mut Map<String, Json>) {
    let own: &[_] = if operation.contains_key("requestBody") { BODY_ERRORS } else { &[] };
    let Some(Json::Object(responses)) = operation.get_mut("responses") else { return };
    for (status, description) in ERRORS.iter().chain(own) {
        responses.entry(*status).or_insert_with(|| json!({"description": description}));
    }
    for (status, response) in responses {
        if status.as_str() >= "400" && status != "403" && response.get("content").is_none() {
            response["content"] =
                json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
        }
    }
}

/// What the file says about an operation, with the pattern's own parameters.
fn operation(method: &Method, path: &str, details: &Json) -> Json {
    let mut operation = match details["operations"].get(format!("{method} {path}")) {
        Some(Json::Object(known)) => known.clone(),
        _ => {
            let known = json!({"summary": format!("{method} {path}"), "responses": {"default": {"description": "An answer."}}});
            known.as_object().cloned().unwrap_or_default()
        }
    };
    add_errors(&mut operation);
    let name: String = format!("{method} {path}")
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' })
        .collect();
    operation.insert("operationId".to_owned(), name.into());
    let mut all = parameters(path);
    if let Some(Json::Array(own)) = operation.remove("parameters") {
        all.extend(own);
    }
    if !all.is_empty() {
        operation.insert("parameters".to_owned(), all.into());
    }
    if path.ends_with("/health") {
        operation.insert("security".to_owned(), json!([]));
    }
    Json::Object(operation)
}

/// The document for these routes.
pub(super) fn document(routes: &[(Method, String)]) -> Json {
    let details: Json = serde_json::from_str(DETAILS).unwrap_or_default();
    let mut paths: Map<String, Json> = Map::new();
    for (method, pattern) in routes {
        let bare = pattern.replace("{*", "{");
        // newer surfaces are known by their paths below /api
        let is_new =
            ["/v2/jobs", "/v2/assets", "/v2/health", "/jobs"].iter().any(|new| bare.starts_with(new));
        let path = if is_new { format!("/api{bare}") } else { bare.clone() };
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method.as_str().to_ascii_lowercase()] = operation(method, &bare, &details);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "kiln",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "ComfyUI's API, Comfy API v2, and kiln's additions. Every path answers below /api too.",
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearerAuth": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearerAuth": {"type": "http", "scheme": "bearer"}},
            "schemas": details["schemas"],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::routes;

    #[test]
    fn every_described_operation_is_a_route() {
        let details: Json = serde_json::from_str(DETAILS).unwrap();
        let routes = routes::all().patterns();
        let known: Vec<String> =
            routes.iter().map(|(m, p)| format!("{m} {}", p.replace("{*", "{"))).collect();
        for name in details["operations"].as_object().unwrap().keys() {
            assert!(known.contains(name), "{name} is described but is no route");
        }
        let document = document(&routes);
        let count: usize =
            document["paths"].as_object().unwrap().values().map(|p| p.as_object().unwrap().len()).sum();
        assert_eq!(count, known.len(), "every route is in the document");
        let described = details["operations"].as_object().unwrap();
        let missing: Vec<&String> = known.iter().filter(|name| !described.contains_key(*name)).collect();
        assert_eq!(missing, Vec::<&String>::new(), "every route is described");
        for schema in document.to_string().split("#/components/schemas/").skip(1) {
            let name = schema.split('"').next().unwrap();
            assert!(document["components"]["schemas"].get(name).is_some(), "{name}");
        }
    }
}
