//! `/api/assets`: the asset library of ComfyUI's newest web page, over the same store as API v2.
//!
//! Only below `/api`: the bare `/assets` are that page's own files.

use std::collections::BTreeMap;

use hyper::StatusCode;
use serde_json::{Value as Json, json};

use super::{blocking, v2};
use crate::files::Kind;
use crate::files::assets::Asset;
use crate::server::App;
use crate::server::http::{Call, Failure, Response, json_response};
use crate::server::outputs;

/// Assets on a page, unless asked otherwise, and at most.
const PAGE: usize = 20;
const MAX_PAGE: usize = 500;

/// An asset as that page wants it.
fn row(asset: &Asset) -> Json {
    let escape = |text: &str| {
        percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
    };
    let preview = asset.content_type.starts_with("image/").then(|| {
        let (file, folder) = (escape(&asset.filename), escape(&asset.subfolder));
        format!("/api/view?type={}&filename={file}&subfolder={folder}", asset.kind.name())
    });
    let created = v2::utc(asset.created_ms);
    json!({
        "id": asset.id,
        "name": asset.name,
        "hash": asset.hash,
        "asset_hash": asset.hash,
        "size": asset.size,
        "mime_type": asset.content_type,
        "tags": tags(asset),
        "preview_url": preview,
        "user_metadata": {"filename": asset.filename},
        "job_id": asset.job_id,
        "prompt_id": asset.job_id,
        "created_at": created,
        "updated_at": created,
        "last_access_time": created,
    })
}

/// Its labels; the folder is always one.
fn tags(asset: &Asset) -> Vec<String> {
    let folder = asset.kind.name().to_owned();
    let own = asset.tags.iter().filter(|tag| !tag.is_empty() && **tag != folder);
    std::iter::once(folder.clone()).chain(own.cloned()).collect()
}

fn refuse(code: &'static str, message: impl Into<String>) -> Failure {
    Failure::coded(StatusCode::BAD_REQUEST, code, message)
}

fn not_found() -> Failure {
    Failure::coded(StatusCode::NOT_FOUND, "ASSET_NOT_FOUND", "there is no asset of this id")
}

fn number(call: &Call, key: &str, default: usize) -> Result<usize, Failure> {
    let Some(text) = call.query(key) else { return Ok(default) };
    text.parse().map_err(|_| refuse("INVALID_QUERY", format!("'{key}' must be a whole number, not '{text}'")))
}

/// A page of a list.
fn page(mut assets: Vec<Asset>, limit: usize, offset: usize) -> Json {
    let total = assets.len();
    let rest = assets.split_off(offset.min(total));
    let rows: Vec<Json> = rest.iter().take(limit).map(row).collect();
    let has_more = offset.saturating_add(rows.len()) < total;
    json!({"assets": rows, "total": total, "has_more": has_more})
}

/// `GET /api/assets?include_tags=&exclude_tags=&name_contains=&limit=&offset=&sort=&order=`
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let limit = number(&call, "limit", PAGE)?;
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(refuse("INVALID_QUERY", format!("'limit' must be 1 to {MAX_PAGE}, not {limit}")));
    }
    let offset = number(&call, "offset", 0)?;
    let words = |key: &str| -> Vec<String> {
        let text = call.query(key).unwrap_or_default();
        text.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
    };
    let (wanted, unwanted) = (words("include_tags"), words("exclude_tags"));
    let part = call.query("name_contains").unwrap_or_default().to_lowercase();
    let (sort, order) = (call.query("sort").unwrap_or_default(), call.query("order").unwrap_or_default());
    let body = blocking(move || {
        let mut assets = call.app.assets.all();
        assets.retain(|asset| {
            let tags = tags(asset);
            wanted.iter().all(|tag| tags.contains(tag))
                && !unwanted.iter().any(|tag| tags.contains(tag))
                && asset.name.to_lowercase().contains(&part)
        });
        // they come newest first
        match sort.as_str() {
            "name" => assets.sort_by(|a, b| b.name.cmp(&a.name)),
            "size" => assets.sort_by_key(|asset| std::cmp::Reverse(asset.size)),
            _ => {}
        }
        if order == "asc" {
            assets.reverse();
        }
        page(assets, limit, offset)
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}

/// `GET /api/assets/{id}`
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let asset = call.app.assets.get(call.param("id")).ok_or_else(not_found)?;
    Ok(json_response(StatusCode::OK, &row(&asset)))
}

/// `POST /api/assets`: a form with `file`, `name`, `tags`, `mime_type`, `hash`.
pub(in crate::server) async fn upload(call: Call) -> Result<Response, Failure> {
    let (app, headers, body) = call.into_body()?;
    let form = v2::assets::receive(&app, &headers, body).await?;
    let (asset, is_new) = blocking(move || v2::assets::keep(&app, form)).await??;
    let mut body = row(&asset);
    body["created_new"] = is_new.into();
    Ok(json_response(if is_new { StatusCode::CREATED } else { StatusCode::OK }, &body))
}

/// Every asset of a job's outputs.
fn of_job(app: &App, id: &str) -> Option<Vec<Asset>> {
    let job = app.engine.job(id)?;
    let files = outputs::files(&job.outputs);
    Some(files.iter().filter_map(|file| v2::jobs::asset_of(&app.assets, id, file)).collect())
}

/// `GET /jobs/{id}/assets`
pub(in crate::server) async fn list_of_job(call: Call) -> Result<Response, Failure> {
    let assets = blocking(move || of_job(&call.app, call.param("id"))).await?;
    match assets {
        Some(assets) => Ok(json_response(StatusCode::OK, &page(assets, usize::MAX, 0))),
        None => Ok(json_response(StatusCode::NOT_FOUND, &json!({"error": "Job not found"}))),
    }
}

/// `GET /api/tags`: every label and how many assets have it.
pub(in crate::server) async fn list_tags(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for tag in call.app.assets.all().iter().flat_map(tags) {
            *counts.entry(tag).or_default() += 1;
        }
        for folder in [Kind::Input, Kind::Output] {
            counts.entry(folder.name().to_owned()).or_default();
        }
        let total = counts.len();
        let tags: Vec<Json> =
            counts.into_iter().map(|(name, count)| json!({"name": name, "count": count})).collect();
        json!({"tags": tags, "total": total, "has_more": false})
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
}
