//! `/userdata` and `/v2/userdata`: the web page's files, workflows above all.
//!
//! Names are one path component of the URL, with `%2F` between folders. What is
//! stored is what a browser sent: it is served as [`download`] serves uploads,
//! never as something that runs.

use hyper::StatusCode;
use serde_json::{Value as Json, json};
use tokio::io::AsyncWriteExt;

use super::{blocking, refuse_path};
use crate::files::{FileFacts, ListOptions, Listed, PathError, Sandbox};
use crate::server::download;
use crate::server::http::{self, Call, Failure, Response, json_response};

/// A folder of the user's data.
struct Place {
    user: String,
    name: String,
}

impl Place {
    /// What the path parameter names. ComfyUI decodes it once more if a `%` is left.
    fn of(call: &Call, param: &str) -> Result<Self, Failure> {
        let user = call.app.users.of(call.headers())?;
        Ok(Self { user, name: decoded(call.param(param).to_owned()) })
    }
}

fn decoded(name: String) -> String {
    if name.contains('%') { http::decode(&name) } else { name }
}

fn is_true(call: &Call, key: &str) -> bool {
    call.query(key).is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

fn may_overwrite(call: &Call) -> bool {
    call.query("overwrite").is_none_or(|value| value != "false")
}

fn refuse(status: StatusCode, message: &str) -> Failure {
    Failure::Text(status, message.to_owned())
}

fn exists_already() -> Failure {
    refuse(StatusCode::CONFLICT, "File already exists")
}

/// A name that can't be stored is the request's fault, also if only the file system says so.
fn refuse_name(error: PathError) -> Failure {
    match error {
        PathError::Invalid { .. } | PathError::NotFound { .. } => {
            refuse(StatusCode::BAD_REQUEST, &error.to_string())
        }
        other => refuse_path(other),
    }
}

fn describe(path: &str, facts: FileFacts) -> Json {
    json!({"path": path, "size": facts.size, "modified": facts.modified, "created": facts.created})
}

/// The answer about a stored file: its path, or all about it.
fn stored(data: &Sandbox, name: &str, full_info: bool) -> Result<Json, Failure> {
    if !full_info {
        return Ok(name.into());
    }
    match data.facts(name).map_err(refuse_path)? {
        Some(facts) => Ok(describe(name, facts)),
        // A folder that was moved.
        None => Ok(json!({"path": name, "size": 0})),
    }
}

/// `GET /userdata/{file}`
pub(in crate::server) async fn get(call: Call) -> Result<Response, Failure> {
    let Place { user, name } = Place::of(&call, "file")?;
    let app = call.app.clone();
    let file = {
        let name = name.clone();
        blocking(move || app.users.data(&user)?.open(&name)).await?.map_err(refuse_path)?
    };
    download::serve(file, name.rsplit('/').next().unwrap_or_default(), call.headers()).await
}

/// `POST /userdata/{file}?overwrite=&full_info=`: the body becomes the file.
pub(in crate::server) async fn put(call: Call) -> Result<Response, Failure> {
    let Place { user, name } = Place::of(&call, "file")?;
    let (overwrite, full_info) = (may_overwrite(&call), is_true(&call, "full_info"));
    let (app, _, mut body) = call.into_body()?;
    let (data, name, mut staged) = blocking(move || {
        let data = app.users.data(&user).map_err(refuse_path)?;
        let name = data.normal_name(&name).map_err(refuse_name)?;
        if !overwrite && data.facts(&name).is_ok() {
            return Err(exists_already());
        }
        let staged = data.stage().map_err(Failure::internal)?;
        Ok((data, name, staged))
    })
    .await??;
    let handle = staged.file().try_clone().map_err(Failure::internal)?;
    let mut file = tokio::fs::File::from_std(handle);
    while let Some(chunk) = body.chunk().await? {
        file.write_all(&chunk).await.map_err(Failure::internal)?;
    }
    file.flush().await.map_err(Failure::internal)?;
    let answer = blocking(move || match staged.keep(&name, overwrite).map_err(refuse_name)? {
        true => stored(&data, &name, full_info),
        false => Err(exists_already()),
    })
    .await??;
    Ok(json_response(StatusCode::OK, &answer))
}

/// `DELETE /userdata/{file}`
pub(in crate::server) async fn delete(call: Call) -> Result<Response, Failure> {
    let Place { user, name } = Place::of(&call, "file")?;
    blocking(move || call.app.users.data(&user)?.remove(&name)).await?.map_err(refuse_path)?;
    Ok(http::empty(StatusCode::NO_CONTENT))
}

/// `POST /userdata/{file}/move/{dest}?overwrite=&full_info=`
pub(in crate::server) async fn rename(call: Call) -> Result<Response, Failure> {
    let Place { user, name: from } = Place::of(&call, "file")?;
    let Place { name: to, .. } = Place::of(&call, "dest")?;
    let (overwrite, full_info) = (may_overwrite(&call), is_true(&call, "full_info"));
    let answer = blocking(move || {
        let data = call.app.users.data(&user).map_err(refuse_path)?;
        data.facts(&from).map_err(refuse_path)?;
        let to = data.normal_name(&to).map_err(refuse_name)?;
        match data.rename(&from, &to, overwrite).map_err(refuse_name)? {
            true => stored(&data, &to, full_info),
            false => Err(exists_already()),
        }
    })
    .await??;
    Ok(json_response(StatusCode::OK, &answer))
}

/// One file of `GET /userdata`: name, name with its parts, or all about it.
fn item(listed: Listed, split: bool, full_info: bool) -> Option<Json> {
    let Listed { name, facts } = listed;
    let facts = facts?;
    Some(match (full_info, split) {
        (true, _) => describe(&name, facts),
        (false, true) => std::iter::once(name.as_str()).chain(name.split('/')).collect(),
        (false, false) => name.into(),
    })
}

/// `GET /userdata?dir=&recurse=&full_info=&split=`: the files of a folder, hidden ones left out.
pub(in crate::server) async fn list(call: Call) -> Result<Response, Failure> {
    let user = call.app.users.of(call.headers())?;
    let folder = call.query("dir").filter(|dir| !dir.is_empty());
    let folder = decoded(folder.ok_or_else(|| refuse(StatusCode::BAD_REQUEST, "Directory not provided"))?);
    let options = ListOptions { recurse: is_true(&call, "recurse"), hidden: false };
    let (split, full_info) = (is_true(&call, "split"), is_true(&call, "full_info"));
    let listed = blocking(move || call.app.users.data(&user)?.list(&folder, options)).await?;
    let listed = listed.map_err(|error| match error {
        PathError::OutsideRoot { .. } => refuse(StatusCode::FORBIDDEN, "Invalid directory"),
        PathError::NotFound { .. } => refuse(StatusCode::NOT_FOUND, "Directory not found"),
        other => refuse_path(other),
    })?;
    let items: Json = listed.into_iter().filter_map(|file| item(file, split, full_info)).collect();
    Ok(json_response(StatusCode::OK, &items))
}

/// `GET /v2/userdata?path=`: files and folders below a folder, folders first, then by name.
pub(in crate::server) async fn list_all(call: Call) -> Result<Response, Failure> {
    let unknown = |_| refuse(StatusCode::FORBIDDEN, "Invalid user specified in request");
    let user = call.app.users.of(call.headers()).map_err(unknown)?;
    let path = decoded(call.query("path").unwrap_or_default());
    let (folder, mut listed) = blocking(move || {
        let data = call.app.users.data(&user).map_err(refuse_path)?;
        let at = |error| match error {
            PathError::OutsideRoot { .. } => refuse(StatusCode::BAD_REQUEST, "Invalid path requested"),
            PathError::NotFound { .. } => refuse(StatusCode::NOT_FOUND, "Requested path not found"),
            other => refuse_path(other),
        };
        if data.facts(&path).map_err(at)?.is_some() {
            return Err(refuse(StatusCode::BAD_REQUEST, "Requested path is not a directory"));
        }
        let folder = data.normal_folder(&path).map_err(at)?;
        Ok((folder, data.list(&path, ListOptions { recurse: true, hidden: true }).map_err(at)?))
    })
    .await??;
    let base = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
    listed.sort_by_cached_key(|l| (l.facts.is_some(), base(&l.name).to_lowercase()));
    let entries: Json = listed.into_iter().map(|l| entry(&folder, &base(&l.name), &l)).collect();
    Ok(json_response(StatusCode::OK, &entries))
}

/// One file or folder of `GET /v2/userdata`; its path counts from the user's folder.
fn entry(folder: &str, base: &str, listed: &Listed) -> Json {
    let path = if folder.is_empty() { listed.name.clone() } else { format!("{folder}/{}", listed.name) };
    match listed.facts {
        None => json!({"name": base, "path": path, "type": "directory"}),
        Some(FileFacts { size, modified, .. }) => {
            json!({"name": base, "path": path, "type": "file", "size": size, "modified": modified})
        }
    }
}
