//! `/view`: pictures and other results, as files or in another form.

use std::fs::File;
use std::io::Read;

use hyper::StatusCode;

use super::{blocking, names};
use crate::files::Kind;
use crate::image::{self, Preview, ViewError};
use crate::server::App;
use crate::server::download;
use crate::server::http::{Body, Call, Failure, Response};

/// Larger files are not decoded for a preview.
const MAX_PICTURE_BYTES: u64 = 512 * 1024 * 1024;

/// What the client wants to see.
pub(super) enum Form {
    /// The file as it is.
    File,
    /// A PNG without alpha.
    Rgb,
    /// A PNG of the alpha channel.
    Alpha,
    /// A smaller file.
    Preview(Preview),
}

impl Form {
    fn of(call: &Call) -> Self {
        let channel = call.query("channel").unwrap_or_default();
        match (call.query("preview"), channel.as_str()) {
            (Some(preview), channel) => Form::Preview(Preview::parse(&preview, channel)),
            (None, "rgb") => Form::Rgb,
            (None, "a") => Form::Alpha,
            (None, _) => Form::File,
        }
    }
}

/// `GET /view?filename=&type=&subfolder=&preview=&channel=`
pub(in crate::server) async fn view(call: Call) -> Result<Response, Failure> {
    let filename = call.query("filename").ok_or(Failure::NOT_FOUND)?;
    let (name, kind) = names::split_annotation(&filename);
    let name = names::last_part(name).map_err(|_| Failure::BAD_REQUEST)?.to_owned();
    let kind = match kind {
        Some(kind) => kind,
        None => {
            let given = call.query("type").unwrap_or_else(|| Kind::Output.name().to_owned());
            Kind::from_name(&given).ok_or(Failure::BAD_REQUEST)?
        }
    };
    let subfolder = names::collapse(&call.query("subfolder").unwrap_or_default());
    let file = {
        let (app, name) = (call.app.clone(), name.clone());
        blocking(move || app.folders.open_file(kind, &subfolder, &name)).await?.map_err(super::refuse_path)?
    };
    let form = Form::of(&call);
    if let Form::File = form {
        return download::serve(file, &name, call.headers()).await;
    }
    let (bytes, media_type) = convert(&call.app, file, form).await?;
    let mut response = Response::new(Body::Bytes(bytes.into()));
    download::mark_user_file(&mut response, &name, media_type, true);
    Ok(response)
}

/// Decodes and encodes on one of a few blocking threads.
pub(super) async fn convert(app: &App, file: File, form: Form) -> Result<(Vec<u8>, &'static str), Failure> {
    let _slot = app.image_slots.acquire().await.map_err(Failure::internal)?;
    blocking(move || {
        let bytes = read_picture(file)?;
        let (result, media_type) = match form {
            Form::Preview(preview) => (image::preview(&bytes, &preview), preview.format.media_type()),
            Form::Rgb => (image::channel_rgb(&bytes), "image/png"),
            Form::Alpha => (image::channel_alpha(&bytes), "image/png"),
            Form::File => return Ok((bytes, "application/octet-stream")),
        };
        Ok((result.map_err(refuse_picture)?, media_type))
    })
    .await?
}

/// A whole picture file in memory.
pub(super) fn read_picture(file: File) -> Result<Vec<u8>, Failure> {
    let facts = file.metadata().map_err(Failure::internal)?;
    if facts.len() > MAX_PICTURE_BYTES {
        let message =
            format!("the file has {} bytes; pictures up to {MAX_PICTURE_BYTES} are read", facts.len());
        return Err(Failure::Text(StatusCode::BAD_REQUEST, message));
    }
    let mut bytes = Vec::new();
    file.take(MAX_PICTURE_BYTES).read_to_end(&mut bytes).map_err(Failure::internal)?;
    Ok(bytes)
}

/// A file that can't be shown is the request's fault.
pub(super) fn refuse_picture(error: ViewError) -> Failure {
    Failure::Text(StatusCode::BAD_REQUEST, error.to_string())
}
