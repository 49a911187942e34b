//! `/models`, `/experiment/models`, `/view_metadata`, `/embeddings`: what the model folders hold.

use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use hyper::header::CONTENT_TYPE;
use serde_json::{Value as Json, json};

use super::blocking;
use super::view::{Form, convert};
use crate::files::{Folders, ModelEntry, ModelPath};
use crate::image::{Preview, PreviewFormat};
use crate::server::http::{self, Body, Call, Failure, Response, json_response};
use crate::weights::WeightsFile;

/// `GET /models`: the folder types.
pub(in crate::server) async fn folders(call: Call) -> Result<Response, Failure> {
    let names: Json = call.app.folders.model_folders().map(|(name, _)| name).collect();
    Ok(json_response(StatusCode::OK, &names))
}

/// `GET /models/{folder}`: the files of a type, by its current name.
pub(in crate::server) async fn files(call: Call) -> Result<Response, Failure> {
    let names = blocking(move || {
        let folder = call.param("folder");
        call.app.folders.model_roots(folder).map(|_| call.app.folders.list_models(folder))
    })
    .await?;
    let names = names.ok_or(Failure::NOT_FOUND)?;
    Ok(json_response(StatusCode::OK, &json!(names)))
}

/// Folder types that hold no models.
const NO_MODELS: &[&str] = &["configs", "custom_nodes"];

/// `GET /experiment/models`: the folder types that hold models, with their places.
pub(in crate::server) async fn places(call: Call) -> Result<Response, Failure> {
    let types = call.app.folders.model_folders().filter(|(name, _)| !NO_MODELS.contains(name));
    let types: Json = types.map(|(name, roots)| json!({"name": name, "folders": roots})).collect();
    Ok(json_response(StatusCode::OK, &types))
}

fn seconds(time: std::io::Result<SystemTime>) -> Option<f64> {
    Some(time.ok()?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}

/// A file with its size and times; `None` if it is gone meanwhile.
fn describe(entry: &ModelEntry) -> Option<Json> {
    let facts = entry.path.metadata().ok()?;
    let modified = seconds(facts.modified())?;
    Some(json!({
        "name": entry.name,
        "pathIndex": entry.root,
        "modified": modified,
        // some file systems don't know it
        "created": seconds(facts.created()).unwrap_or(modified),
        "size": facts.len(),
    }))
}

/// `GET /experiment/models/{folder}`: the files of a type with size and times.
pub(in crate::server) async fn entries(call: Call) -> Result<Response, Failure> {
    let list = |folders: &Folders, folder: &str| {
        folders.model_roots(folder)?;
        Some(folders.model_entries(folder).iter().filter_map(describe).collect::<Json>())
    };
    let files = blocking(move || list(&call.app.folders, call.param("folder"))).await?;
    Ok(json_response(StatusCode::OK, &files.ok_or(Failure::NOT_FOUND)?))
}

/// `GET /experiment/models/preview/{folder}/{index}/{file}`: the picture beside a model file, as WebP.
pub(in crate::server) async fn preview(call: Call) -> Result<Response, Failure> {
    let app = call.app.clone();
    let root: usize = call.param("index").parse().map_err(|_| Failure::NOT_FOUND)?;
    let picture = blocking(move || {
        let path = call.app.folders.model_preview(call.param("folder"), root, call.param("file"));
        File::open(path.ok_or(Failure::NOT_FOUND)?).map_err(|_| Failure::NOT_FOUND)
    })
    .await?;
    let form = Form::Preview(Preview { format: PreviewFormat::Webp, quality: 90, rgb: false });
    let (bytes, media_type) = convert(&app, picture?, form).await?;
    let mut response = Response::new(Body::Bytes(bytes.into()));
    http::set(&mut response, CONTENT_TYPE, media_type);
    Ok(response)
}

/// `GET /view_metadata/{folder}?filename=`: the texts in a model file's header.
/// Whatever is not a readable file with texts is 404.
pub(in crate::server) async fn metadata(call: Call) -> Result<Response, Failure> {
    let name =
        call.query("filename").filter(|name| name.ends_with(".safetensors")).ok_or(Failure::NOT_FOUND)?;
    let texts = blocking(move || {
        let file = match call.app.folders.model_path(call.param("folder"), &name).ok()? {
            ModelPath::File(path) => WeightsFile::open(&path),
            ModelPath::Embedded { name, bytes } => WeightsFile::from_static(bytes, name),
        };
        let file = file.inspect_err(|error| tracing::debug!(%error, "view_metadata")).ok()?;
        Some(json!(file.metadata())).filter(|_| !file.metadata().is_empty())
    })
    .await?;
    Ok(json_response(StatusCode::OK, &texts.ok_or(Failure::NOT_FOUND)?))
}

/// `GET /embeddings`: names without extension.
pub(in crate::server) async fn embeddings(call: Call) -> Result<Response, Failure> {
    let names = blocking(move || call.app.folders.embedding_names()).await?;
    Ok(json_response(StatusCode::OK, &json!(names)))
}
