//! `/models`, `/view_metadata`, `/embeddings`: what the model folders hold.

use hyper::StatusCode;
use serde_json::{Value as Json, json};

use super::blocking;
use crate::files::ModelPath;
use crate::server::http::{Call, Failure, Response, json_response};
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
