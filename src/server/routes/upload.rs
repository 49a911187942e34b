//! `/upload/image` and `/upload/mask`: files from clients.
//!
//! The file streams to a temporary file next to its later place or, while that
//! is not known yet (fields may come in any order), in the temp folder; it gets
//! its name in one step, so no half file is ever visible. Memory does not grow
//! with the file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use hyper::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use hyper::{HeaderMap, StatusCode};
use multer::{Constraints, Field, Multipart, SizeLimit};
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt;

use super::view::{read_picture, refuse_picture};
use super::{blocking, names, refuse_path};
use crate::files::{Folders, Kind, PathError, below};
use crate::image;
use crate::server::App;
use crate::server::http::{Call, Failure, Response, decode, json_response};
use crate::server::limits::BodyError;

/// Largest text field.
pub(super) const MAX_FIELD_BYTES: u64 = 64 * 1024;
/// Names tried before a collision is given up.
const MAX_RENAMES: usize = 10_000;

/// What a form holds.
struct Form {
    staged: NamedTempFile,
    filename: String,
    kind: Kind,
    subfolder: String,
    overwrite: bool,
    original_ref: Option<String>,
}

/// `POST /upload/image`
pub(in crate::server) async fn image(call: Call) -> Result<Response, Failure> {
    let (app, form) = receive(call).await?;
    finish(app, form).await
}

/// `POST /upload/mask`: the upload's alpha on the picture that `original_ref` names.
pub(in crate::server) async fn mask(call: Call) -> Result<Response, Failure> {
    let (app, mut form) = receive(call).await?;
    let reference = form.original_ref.take().ok_or_else(|| bad("the field 'original_ref' is missing"))?;
    let _slot = app.image_slots.acquire().await.map_err(Failure::internal)?;
    let folders = app.folders.clone();
    form.staged = {
        let staged = form.staged;
        blocking(move || masked(&folders, &reference, staged)).await??
    };
    finish(app.clone(), form).await
}

pub(super) fn bad(message: impl Into<String>) -> Failure {
    Failure::Text(StatusCode::BAD_REQUEST, message.into())
}

/// A failure of the multipart parser: the body's own failure if that is behind it.
pub(super) fn unreadable(error: multer::Error) -> Failure {
    match error {
        multer::Error::StreamReadFailed(cause) => match cause.downcast::<BodyError>() {
            Ok(body) => Failure::Body(*body),
            Err(other) => bad(format!("the form could not be read: {other}")),
        },
        other => bad(format!("the form could not be read: {other}")),
    }
}

/// The client's name for a file; the extended form (`filename*`) counts first.
pub(super) fn client_name(field: &Field<'_>) -> Option<String> {
    let disposition =
        String::from_utf8_lossy(field.headers().get(CONTENT_DISPOSITION)?.as_bytes()).into_owned();
    let extended = disposition.split(';').find_map(|part| {
        let (charset, encoded) = part.trim().strip_prefix("filename*=")?.split_once("''")?;
        charset.eq_ignore_ascii_case("utf-8").then(|| decode(encoded))
    });
    extended.or_else(|| field.file_name().map(str::to_owned)).filter(|name| !name.is_empty())
}

fn staging(folders: &Folders) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kiln-").suffix(".part");
    // others may read uploads; the process's umask still applies
    #[cfg(unix)]
    builder.permissions(<std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    builder.tempfile_in(folders.root(Kind::Temp))
}

pub(super) async fn store(field: &mut Field<'_>, folders: Arc<Folders>) -> Result<NamedTempFile, Failure> {
    let (staged, handle) = blocking(move || {
        let staged = staging(&folders)?;
        let handle = staged.reopen()?;
        Ok::<_, io::Error>((staged, handle))
    })
    .await?
    .map_err(Failure::internal)?;
    let mut file = tokio::fs::File::from_std(handle);
    while let Some(chunk) = next_chunk(field).await? {
        file.write_all(&chunk).await.map_err(Failure::internal)?;
    }
    file.flush().await.map_err(Failure::internal)?;
    Ok(staged)
}

pub(super) async fn next_chunk(field: &mut Field<'_>) -> Result<Option<Bytes>, Failure> {
    field.chunk().await.map_err(unreadable)
}

/// Reads the form; the file ends up in a temporary file.
async fn receive(call: Call) -> Result<(Arc<App>, Form), Failure> {
    let boundary = boundary(call.headers())?;
    let (app, _, body) = call.into_body()?;
    let limits = ["overwrite", "type", "subfolder", "original_ref"]
        .iter()
        .fold(SizeLimit::new(), |limit, field| limit.for_field(*field, MAX_FIELD_BYTES));
    let constraints = Constraints::new().size_limit(limits);
    let mut form = Multipart::with_constraints(body.into_stream(), boundary, constraints);
    let (mut file, mut overwrite, mut kind) = (None, false, Kind::Input);
    let (mut subfolder, mut original_ref) = (String::new(), None);
    while let Some(mut field) = form.next_field().await.map_err(unreadable)? {
        match field.name().unwrap_or_default() {
            "image" if file.is_none() => {
                let Some(name) = client_name(&field) else { continue };
                file = Some((name, store(&mut field, app.folders.clone()).await?));
            }
            "overwrite" => {
                overwrite = matches!(field.text().await.map_err(unreadable)?.as_str(), "true" | "1")
            }
            "subfolder" => subfolder = field.text().await.map_err(unreadable)?,
            "original_ref" => original_ref = Some(field.text().await.map_err(unreadable)?),
            "type" => {
                let name = field.text().await.map_err(unreadable)?;
                kind = Kind::from_name(&name).ok_or(Failure::BAD_REQUEST)?;
            }
            _ => while next_chunk(&mut field).await?.is_some() {},
        }
    }
    let (filename, staged) = file.ok_or(Failure::BAD_REQUEST)?;
    Ok((app, Form { staged, filename, kind, subfolder, overwrite, original_ref }))
}

pub(super) fn boundary(headers: &HeaderMap) -> Result<String, Failure> {
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    multer::parse_boundary(kind).map_err(|_| Failure::BAD_REQUEST)
}

/// Gives the file its name and answers with it.
async fn finish(app: Arc<App>, form: Form) -> Result<Response, Failure> {
    let (subfolder, kind) = (form.subfolder.clone(), form.kind.name());
    let name = blocking(move || keep(&app.folders, form)).await??;
    Ok(json_response(StatusCode::OK, &json!({"name": name, "subfolder": subfolder, "type": kind})))
}

/// Gives the temporary file its name; returns it.
fn keep(folders: &Folders, form: Form) -> Result<String, Failure> {
    let Form { staged, filename, kind, subfolder, overwrite, .. } = form;
    let refuse = |error: PathError| match error {
        PathError::Io { .. } => Failure::internal(error),
        _ => Failure::BAD_REQUEST,
    };
    if filename.contains('/') {
        return Err(Failure::BAD_REQUEST);
    }
    let subfolder = names::collapse(&subfolder);
    let target = folders.sandbox(kind).map_err(Failure::internal)?;
    if overwrite {
        target.take_in(&staged, &below(&subfolder, &filename), true).map_err(refuse)?;
        return Ok(filename);
    }
    for attempt in 0..MAX_RENAMES {
        let name = numbered(&filename, attempt);
        let place = below(&subfolder, &name);
        match target.open(&place) {
            Ok(mut other) => {
                let mut own = staged.reopen().map_err(Failure::internal)?;
                if has_same_content(&mut other, &mut own).map_err(Failure::internal)? {
                    return Ok(name);
                }
            }
            Err(PathError::NotFound { .. }) => {
                if target.take_in(&staged, &place, false).map_err(refuse)? {
                    return Ok(name);
                }
            }
            Err(error) => return Err(refuse(error)),
        }
    }
    Err(bad(format!("there are too many files called '{filename}'")))
}

/// `name.ext`, `name (1).ext`, `name (2).ext`, …
fn numbered(filename: &str, attempt: usize) -> String {
    let path = Path::new(filename);
    match (attempt, path.file_stem().and_then(|s| s.to_str()), path.extension().and_then(|e| e.to_str())) {
        (0, _, _) => filename.to_owned(),
        (n, Some(stem), Some(extension)) => format!("{stem} ({n}).{extension}"),
        (n, _, _) => format!("{filename} ({n})"),
    }
}

fn has_same_content(a: &mut File, b: &mut File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0_u8; 64 * 1024], vec![0_u8; 64 * 1024]);
    loop {
        let count = a.read(&mut left)?;
        if count == 0 {
            return Ok(true);
        }
        let Some(other) = right.get_mut(..count) else { return Ok(false) };
        b.read_exact(other)?;
        if left.get(..count) != Some(&*other) {
            return Ok(false);
        }
    }
}

/// The original picture with the upload's alpha, in a new temporary file.
fn masked(folders: &Folders, reference: &str, mask: NamedTempFile) -> Result<NamedTempFile, Failure> {
    let reference: serde_json::Value =
        serde_json::from_str(reference).map_err(|e| bad(format!("'original_ref' is no JSON: {e}")))?;
    let text = |key: &str| reference.get(key).and_then(|v| v.as_str()).filter(|v| !v.is_empty());
    let filename = text("filename").ok_or_else(|| bad("'original_ref' names no file"))?;
    let (name, kind) = names::split_annotation(filename);
    let name = names::last_part(name).map_err(|_| Failure::BAD_REQUEST)?;
    let kind = match kind {
        Some(kind) => kind,
        None => Kind::from_name(text("type").unwrap_or(Kind::Output.name())).ok_or(Failure::BAD_REQUEST)?,
    };
    let original =
        folders.open_file(kind, text("subfolder").unwrap_or_default(), name).map_err(refuse_path)?;
    let mask = mask.reopen().map_err(Failure::internal)?;
    let picture =
        image::replace_alpha(&read_picture(original)?, &read_picture(mask)?).map_err(refuse_picture)?;
    let mut staged = staging(folders).map_err(Failure::internal)?;
    io::Write::write_all(&mut staged, &picture).map_err(Failure::internal)?;
    Ok(staged)
}

#[cfg(test)]
mod tests {
    use super::numbered;

    #[test]
    fn numbers_go_before_the_extension() {
        for (name, attempt, wanted) in [
            ("a.png", 0, "a.png"),
            ("a.png", 1, "a (1).png"),
            ("a.tar.png", 2, "a.tar (2).png"),
            ("noext", 1, "noext (1)"),
            (".png", 1, ".png (1)"),
            ("a.", 3, "a (3)."),
        ] {
            assert_eq!(numbered(name, attempt), wanted);
        }
    }
}
