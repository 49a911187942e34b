//! `/history`: finished prompts.

use hyper::StatusCode;

use super::{blocking, ids, is_truthy};
use crate::server::http::{self, Call, Failure, Response, json_text};

/// A whole number in the query.
fn count(call: &Call, key: &str) -> Result<Option<i64>, Failure> {
    let Some(text) = call.query(key) else { return Ok(None) };
    let number = text.trim().parse();
    number.map(Some).map_err(|_| Failure::bad_request(format!("'{key}' is no whole number: {text}")))
}

/// `GET /history?max_items=&offset=`
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let (max_items, offset) = (count(&call, "max_items")?, count(&call, "offset")?);
    let text = blocking(move || call.app.engine.history_text(max_items, offset)).await?;
    Ok(json_text(StatusCode::OK, text))
}

/// `GET /history/{id}`: one prompt, or an empty object.
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let text = blocking(move || call.app.engine.history_one_text(call.param("id"))).await?;
    Ok(json_text(StatusCode::OK, text))
}

/// `POST /history`: `{"clear": true}` or `{"delete": [prompt ids]}`.
pub(in crate::server) async fn edit(call: Call) -> Result<Response, Failure> {
    let (app, body) = call.into_object().await?;
    let delete = body.get("delete").map(ids).transpose()?;
    if is_truthy(body.get("clear")) {
        app.engine.clear_history();
    }
    if let Some(delete) = delete {
        app.engine.delete_history(&delete);
    }
    Ok(http::empty(StatusCode::OK))
}
