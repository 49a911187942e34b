//! `/v2/assets`: files known by the hash of their content.

use hyper::StatusCode;
use hyper::header::HeaderMap;
use multer::{Constraints, Multipart, SizeLimit};
use serde_json::{Map, Value as Json, json};
use tempfile::NamedTempFile;

use super::super::blocking;
use super::super::upload::{MAX_FIELD_BYTES, boundary, client_name, next_chunk, store, unreadable};
use super::time::{DAY_MS, utc};
use crate::files::assets::{self, Asset, NewAsset};
use crate::server::http::{self, Call, Failure, Response, json_response};
use crate::server::limits::BodyReader;
use crate::server::{App, download};

/// How long a link is promised for.
const LINK_MS: u64 = 7 * DAY_MS;
/// Bounds of `expires_in`, in seconds.
const LIFETIME: std::ops::RangeInclusive<u64> = 60..=604_800;
/// Longest name and label.
const MAX_NAME: usize = 1024;

/// Where an asset's content is.
pub(super) fn content_url(base: &str, id: &str) -> String {
    format!("{base}/api/v2/assets/{id}/content")
}

fn asset_json(base: &str, asset: &Asset, created_new: Option<bool>) -> Json {
    let mut body = json!({
        "id": asset.id,
        "hash": asset.hash,
        "size_bytes": asset.size,
        "content_type": asset.content_type,
        "file_path": asset.name,
        "created_at": utc(asset.created_ms),
        "url": content_url(base, &asset.id),
        "url_expires_at": utc(asset.created_ms + LINK_MS),
        "expires_at": asset.expires_ms.map(utc),
        "job_id": asset.job_id,
        "tags": asset.tags,
    });
    if let Some(created_new) = created_new {
        body["created_new"] = created_new.into();
    }
    body
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::coded(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request", message)
}

fn not_found() -> Failure {
    Failure::coded(StatusCode::NOT_FOUND, "not_found", "there is no asset of this id")
}

fn no_blob() -> Failure {
    Failure::coded(StatusCode::NOT_FOUND, "blob_not_found", "there is no content of this hash")
}

/// A hash in its one spelling.
fn checked_hash(text: &str) -> Option<String> {
    Some(text.trim().to_ascii_lowercase()).filter(|hash| assets::is_hash(hash))
}

fn checked_lifetime(seconds: Option<u64>) -> Result<Option<u64>, Failure> {
    match seconds {
        Some(seconds) if !LIFETIME.contains(&seconds) => {
            Err(invalid(format!("'expires_in' must be 60 to 604800 seconds, not {seconds}")))
        }
        other => Ok(other),
    }
}

/// The labels of a form's field: a list in JSON, as the web page sends it, or texts with commas between.
fn labels(text: &str) -> Vec<String> {
    let list: Vec<String> =
        serde_json::from_str(text).unwrap_or_else(|_| text.split(',').map(str::to_owned).collect());
    list.iter().map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty()).collect()
}

/// What an upload form holds.
#[derive(Default)]
pub(in crate::server::routes) struct Form {
    /// The file.
    pub(in crate::server::routes) file: Option<NamedTempFile>,
    /// What is said about it.
    pub(in crate::server::routes) new: NewAsset,
    /// The hash that the client computed.
    pub(in crate::server::routes) expected_hash: Option<String>,
}

/// Reads an upload form; the file goes to a temporary file as it comes.
pub(in crate::server::routes) async fn receive(
    app: &App,
    headers: &HeaderMap,
    body: BodyReader,
) -> Result<Form, Failure> {
    let fields = [
        "content_type",
        "mime_type",
        "file_path",
        "name",
        "expected_hash",
        "hash",
        "tags",
        "user_metadata",
        "expires_in",
    ];
    let limits =
        fields.iter().fold(SizeLimit::new(), |limit, field| limit.for_field(*field, MAX_FIELD_BYTES));
    let constraints = Constraints::new().size_limit(limits);
    let mut multipart = Multipart::with_constraints(body.into_stream(), boundary(headers)?, constraints);
    let (mut form, mut file_name, mut file_type) = (Form::default(), None, None);
    while let Some(mut field) = multipart.next_field().await.map_err(unreadable)? {
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "file" if form.file.is_none() => {
                file_name = client_name(&field);
                file_type = field.content_type().map(|kind| kind.essence_str().to_owned());
                form.file = Some(store(&mut field, app.folders.clone()).await?);
            }
            name if fields.contains(&name) => {
                let text = field.text().await.map_err(unreadable)?;
                match name {
                    "content_type" | "mime_type" => form.new.content_type = text,
                    "file_path" | "name" => form.new.name = text,
                    "tags" => form.new.tags.extend(labels(&text)),
                    "user_metadata" => {
                        let bad = |e| invalid(format!("'user_metadata' is no JSON object: {e}"));
                        form.new.notes = serde_json::from_str(&text).map_err(bad)?;
                    }
                    "expires_in" => {
                        let seconds = text.trim().parse();
                        let bad = |_| invalid(format!("'expires_in' is no number of seconds: {text}"));
                        form.new.expires_in = checked_lifetime(Some(seconds.map_err(bad)?))?;
                    }
                    _ => form.expected_hash = Some(text),
                }
            }
            _ => while next_chunk(&mut field).await?.is_some() {},
        }
    }
    if form.new.name.is_empty() {
        form.new.name = file_name.unwrap_or_default();
    }
    if form.new.content_type.is_empty() {
        form.new.content_type = file_type.unwrap_or_else(|| "application/octet-stream".to_owned());
    }
    let texts = [&form.new.name, &form.new.content_type].into_iter().chain(&form.new.tags);
    if texts.into_iter().any(|text| text.len() > MAX_NAME || text.chars().any(char::is_control)) {
        return Err(invalid("names, types and tags must be at most 1024 bytes without control characters"));
    }
    Ok(form)
}

/// Stores the file of a form; the asset, and whether its content is new.
pub(in crate::server::routes) fn keep(app: &App, form: Form) -> Result<(Asset, bool), Failure> {
    let file = form.file.ok_or_else(|| invalid("the form has no field 'file'"))?;
    let hash = assets::hash_file(file.path()).map_err(Failure::internal)?;
    if let Some(expected) = form.expected_hash
        && checked_hash(&expected).as_ref() != Some(&hash)
    {
        let message = format!("the content's hash is {hash}, not {expected}");
        return Err(Failure::coded(StatusCode::CONFLICT, "hash_mismatch", message));
    }
    app.assets.add(file, &hash, &form.new).map_err(Failure::internal)
}

/// `POST /v2/assets`: an upload.
pub(in crate::server) async fn upload(call: Call) -> Result<Response, Failure> {
    let (base, scope) = (call.base_url(), call.idempotency_scope("assets"));
    let (app, headers, body) = call.into_body()?;
    let key = app.idempotency.claim(&scope, &headers)?;
    let outcome = async {
        let form = receive(&app, &headers, body).await?;
        let keeper = app.clone();
        blocking(move || keep(&keeper, form)).await?
    };
    let (asset, is_new) = outcome.await.inspect_err(|_| app.idempotency.release(key))?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok(json_response(status, &asset_json(&base, &asset, Some(is_new))))
}

/// `POST /v2/assets/from-hash`: a new record over content that is there.
pub(in crate::server) async fn from_hash(call: Call) -> Result<Response, Failure> {
    let base = call.base_url();
    let (app, body) = call.into_object().await?;
    let text = |key: &str| body.get(key).and_then(Json::as_str);
    let hash = text("hash").ok_or_else(|| invalid("'hash' must be a text"))?;
    let hash = checked_hash(hash).ok_or_else(no_blob)?;
    let tags = body.get("tags").and_then(Json::as_array).into_iter().flatten();
    let new = NewAsset {
        name: text("file_path").unwrap_or_default().to_owned(),
        content_type: String::new(),
        tags: tags.filter_map(|tag| Some(tag.as_str()?.to_owned())).collect(),
        notes: Map::new(),
        expires_in: checked_lifetime(body.get("expires_in").and_then(Json::as_u64))?,
    };
    let minted = blocking(move || app.assets.mint(&hash, &new)).await?.map_err(Failure::internal)?;
    let asset = minted.ok_or_else(no_blob)?;
    Ok(json_response(StatusCode::CREATED, &asset_json(&base, &asset, Some(false))))
}

/// `HEAD /v2/assets/by-hash/{hash}`: whether content of that hash is there.
pub(in crate::server) async fn by_hash(call: Call) -> Result<Response, Failure> {
    let hash = checked_hash(call.param("hash")).ok_or_else(no_blob)?;
    match blocking(move || call.app.assets.has(&hash)).await? {
        true => Ok(http::empty(StatusCode::OK)),
        false => Err(no_blob()),
    }
}

/// `GET /v2/assets/{id}`
pub(in crate::server) async fn one(call: Call) -> Result<Response, Failure> {
    let body = blocking(move || {
        let asset = call.app.assets.get(call.param("id")).ok_or_else(not_found)?;
        let asset = call.app.assets.with_hash(asset).map_err(|_| not_found())?;
        Ok::<_, Failure>(asset_json(&call.base_url(), &asset, None))
    })
    .await??;
    Ok(json_response(StatusCode::OK, &body))
}

/// `GET /v2/assets/{id}/content`: the bytes, also in ranges.
pub(in crate::server) async fn content(call: Call) -> Result<Response, Failure> {
    let store = call.app.assets.clone();
    let asset = store.get(call.param("id")).ok_or_else(not_found)?;
    let file = {
        let asset = asset.clone();
        blocking(move || store.path(&asset).ok().and_then(|path| std::fs::File::open(path).ok()))
            .await?
            .ok_or_else(not_found)?
    };
    // the client's own name if it says what the file is, else the stored one
    let given = asset.name.rsplit(['/', '\\']).next().unwrap_or_default();
    let is_telling = download::content_type(given, call.headers()).1;
    let name = if is_telling { given } else { &asset.filename };
    download::serve(file, name, call.headers()).await
}

/// `DELETE /v2/assets/{id}`: the record; the content stays while another record needs it.
pub(in crate::server) async fn delete(call: Call) -> Result<Response, Failure> {
    match blocking(move || call.app.assets.delete(call.param("id"))).await?.map_err(Failure::internal)? {
        true => Ok(http::empty(StatusCode::NO_CONTENT)),
        false => Err(not_found()),
    }
}
