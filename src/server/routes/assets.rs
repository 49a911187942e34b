//! `/api/assets`: the asset library of ComfyUI's newest web page, over the same store as API v2.
//!
//! Only below `/api`: the bare `/assets` are that page's own files.

use std::collections::BTreeMap;

use hyper::StatusCode;
use serde_json::{Map, Value as Json, json};

use super::{blocking, v2};
use crate::files::Kind;
use crate::files::assets::Asset;
use crate::server::App;
use crate::server::http::{Call, Failure, Response, json_response};
use crate::server::outputs;

/// Assets on a page, unless asked otherwise, and at most.
const PAGE: usize = 20;
const MAX_PAGE: usize = 500;
/// Labels to refine a search with, unless asked otherwise.
const MAX_REFINED: usize = 100;
/// Longest label and name, in bytes, and largest notes.
const MAX_TAG: usize = 512;
const MAX_NAME: usize = 1024;
const MAX_NOTES: usize = 64 * 1024;

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
        "user_metadata": notes(asset),
        "job_id": asset.job_id,
        "prompt_id": asset.job_id,
        "created_at": created,
        "updated_at": created,
        "last_access_time": created,
    })
}

/// What its owner noted, and its file's name.
fn notes(asset: &Asset) -> Json {
    let mut notes = asset.notes.clone();
    notes.entry("filename").or_insert_with(|| asset.filename.clone().into());
    Json::Object(notes)
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

/// Which assets a query means.
struct Filter {
    wanted: Vec<String>,
    unwanted: Vec<String>,
    part: String,
}

impl Filter {
    fn of(call: &Call) -> Self {
        let words = |key: &str| -> Vec<String> {
            let text = call.query(key).unwrap_or_default();
            text.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
        };
        let part = call.query("name_contains").unwrap_or_default().to_lowercase();
        Self { wanted: words("include_tags"), unwanted: words("exclude_tags"), part }
    }

    /// Newest first.
    fn pick(&self, app: &App) -> Vec<Asset> {
        let mut assets = app.assets.all();
        assets.retain(|asset| {
            let tags = tags(asset);
            self.wanted.iter().all(|tag| tags.contains(tag))
                && !self.unwanted.iter().any(|tag| tags.contains(tag))
                && asset.name.to_lowercase().contains(&self.part)
        });
        assets
    }
}

/// A number of rows from the query.
fn limit(call: &Call, default: usize) -> Result<usize, Failure> {
    let limit = number(call, "limit", default)?;
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(refuse("INVALID_QUERY", format!("'limit' must be 1 to {MAX_PAGE}, not {limit}")));
    }
    Ok(limit)
}

/// `GET /api/assets?include_tags=&exclude_tags=&name_contains=&limit=&offset=&sort=&order=`
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let (limit, offset) = (limit(&call, PAGE)?, number(&call, "offset", 0)?);
    let filter = Filter::of(&call);
    let (sort, order) = (call.query("sort").unwrap_or_default(), call.query("order").unwrap_or_default());
    let body = blocking(move || {
        let mut assets = filter.pick(&call.app);
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

/// What is asked for, if it is a list of labels; at least one, none of them long or empty.
fn wanted_tags(body: &Map<String, Json>) -> Result<Vec<String>, Failure> {
    let list = body.get("tags").and_then(Json::as_array).filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| refuse("INVALID_BODY", "'tags' must be a list of texts"))?;
    let mut tags: Vec<String> = Vec::new();
    for tag in list {
        let tag = tag.as_str().map(str::trim).unwrap_or_default();
        if tag.is_empty() || tag.len() > MAX_TAG || tag.chars().any(char::is_control) {
            return Err(refuse("INVALID_BODY", format!("a tag must be a text of 1 to {MAX_TAG} bytes")));
        }
        if !tags.iter().any(|known| known == tag) {
            tags.push(tag.to_owned());
        }
    }
    Ok(tags)
}

/// `PUT /api/assets/{id}`: `{name, tags, user_metadata}`, each if it is to change.
pub(in crate::server) async fn update(call: Call) -> Result<Response, Failure> {
    let id = call.param("id").to_owned();
    let (app, body) = call.into_object().await?;
    let name = match body.get("name") {
        None | Some(Json::Null) => None,
        Some(Json::String(name)) if !name.is_empty() && name.len() <= MAX_NAME => Some(name.clone()),
        Some(_) => {
            return Err(refuse("INVALID_BODY", format!("'name' must be a text of 1 to {MAX_NAME} bytes")));
        }
    };
    let tags = body.get("tags").filter(|tags| !tags.is_null()).map(|_| wanted_tags(&body)).transpose()?;
    let notes = match body.get("user_metadata") {
        None | Some(Json::Null) => None,
        Some(Json::Object(notes)) if body["user_metadata"].to_string().len() <= MAX_NOTES => {
            Some(notes.clone())
        }
        Some(_) => return Err(refuse("INVALID_BODY", "'user_metadata' must be an object of at most 64 kB")),
    };
    let change = move |asset: &mut Asset| {
        asset.name = name.unwrap_or(std::mem::take(&mut asset.name));
        asset.tags = tags.unwrap_or(std::mem::take(&mut asset.tags));
        asset.notes = notes.unwrap_or(std::mem::take(&mut asset.notes));
    };
    let asset = blocking(move || app.assets.update(&id, change)).await?.map_err(Failure::internal)?;
    Ok(json_response(StatusCode::OK, &row(&asset.ok_or_else(not_found)?)))
}

/// Adds or removes labels; those that were there before, and those that were not.
async fn change_tags(call: Call, add: bool) -> Result<(Vec<String>, Vec<String>, Vec<String>), Failure> {
    let id = call.param("id").to_owned();
    let (app, body) = call.into_object().await?;
    let wanted = wanted_tags(&body)?;
    blocking(move || {
        let before = tags(&app.assets.get(&id).ok_or_else(not_found)?);
        let (known, unknown): (Vec<_>, Vec<_>) = wanted.iter().cloned().partition(|tag| before.contains(tag));
        let change = |asset: &mut Asset| match add {
            true => asset.tags.extend(unknown.iter().cloned()),
            false => asset.tags.retain(|tag| !wanted.contains(tag)),
        };
        let asset = app.assets.update(&id, change).map_err(Failure::internal)?.ok_or_else(not_found)?;
        Ok((known, unknown, tags(&asset)))
    })
    .await?
}

/// `POST /api/assets/{id}/tags` `{"tags": […]}`
pub(in crate::server) async fn add_tags(call: Call) -> Result<Response, Failure> {
    let (known, unknown, all) = change_tags(call, true).await?;
    let body = json!({"added": unknown, "already_present": known, "total_tags": all});
    Ok(json_response(StatusCode::OK, &body))
}

/// `DELETE /api/assets/{id}/tags` `{"tags": […]}`; the folder's label stays.
pub(in crate::server) async fn remove_tags(call: Call) -> Result<Response, Failure> {
    let (known, unknown, all) = change_tags(call, false).await?;
    let removed: Vec<String> = known.into_iter().filter(|tag| !all.contains(tag)).collect();
    let body = json!({"removed": removed, "not_present": unknown, "total_tags": all});
    Ok(json_response(StatusCode::OK, &body))
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

/// `GET /api/assets/tags/refine?include_tags=&exclude_tags=&name_contains=&limit=`: the labels of the assets that are
/// meant, the most frequent ones first.
pub(in crate::server) async fn refine_tags(call: Call) -> Result<Response, Failure> {
    let (limit, filter) = (limit(&call, MAX_REFINED)?, Filter::of(&call));
    let body = blocking(move || {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for tag in filter.pick(&call.app).iter().flat_map(tags) {
            *counts.entry(tag).or_default() += 1;
        }
        let mut counts: Vec<(String, u64)> = counts.into_iter().collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let counts: Map<String, Json> =
            counts.into_iter().take(limit).map(|(tag, n)| (tag, n.into())).collect();
        json!({"tag_counts": counts})
    })
    .await?;
    Ok(json_response(StatusCode::OK, &body))
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
