//! Who a request's data belongs to.
//!
//! Alone, everybody is `default`. With `--multi-user` a client names itself
//! with the `comfy-user` header, an id from `users.json` in the user folder.
//! That separates the data of people who trust each other; it is no
//! authentication, and ComfyUI's isn't either.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::{HeaderMap, StatusCode};
use serde_json::{Map, Value as Json};

use super::http::Failure;
use crate::files::{Folders, PathError, Sandbox, write_atomic};

/// The user of a server that knows no others.
const ALONE: &str = "default";
const FILE: &str = "users.json";
/// Longest name, in bytes: the id made from it must do as a folder name.
const MAX_NAME_BYTES: usize = 200;
/// Most users.
const MAX_USERS: usize = 10_000;

/// The users of a server.
#[derive(Debug)]
pub(super) struct Users {
    folders: Arc<Folders>,
    is_multi: bool,
    /// Id → name, as in the file.
    known: Mutex<Map<String, Json>>,
    /// Held while settings are read, changed and written.
    settings: Mutex<()>,
}

/// `users.json` that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the list of users {path} can't be used: {reason}; mend it, or remove it to start anew")]
pub struct UsersError {
    path: String,
    reason: String,
}

/// Why nobody was added.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AddError {
    /// The name is taken.
    Duplicate,
    /// The name can't be one.
    Unusable(&'static str),
    /// The list could not be written.
    NotStored(String),
}

/// ComfyUI's id for a name: runs of other characters than letters, digits, `-`
/// and `_` become `-`, and a UUID follows.
fn new_id(name: &str) -> String {
    let mut id = String::new();
    let mut is_run = false;
    for c in name.chars() {
        let is_plain = c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if is_plain {
            id.push(c);
        } else if !is_run {
            id.push('-');
        }
        is_run = !is_plain;
    }
    format!("{id}_{}", uuid::Uuid::new_v4())
}

fn read(folders: &Folders) -> Result<Map<String, Json>, UsersError> {
    let path = folders.user().join(FILE);
    let wrong = |reason: String| UsersError { path: path.display().to_string(), reason };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(wrong(error.to_string())),
    };
    let known: Map<String, Json> = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    match known.iter().find(|(_, name)| !name.is_string()) {
        None => Ok(known),
        Some((id, name)) => Err(wrong(format!("the name of {id:?} is {name}, not a text"))),
    }
}

impl Users {
    /// Reads the list of users.
    pub(super) fn open(folders: Arc<Folders>, is_multi: bool) -> Result<Self, UsersError> {
        let known = if is_multi { read(&folders)? } else { Map::new() };
        Ok(Self { folders, is_multi, known: Mutex::new(known), settings: Mutex::new(()) })
    }

    fn known(&self) -> MutexGuard<'_, Map<String, Json>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every user's name by id; `None` on a server that knows only one.
    pub(super) fn list(&self) -> Option<Json> {
        self.is_multi.then(|| Json::Object(self.known().clone()))
    }

    /// Whether the only user has data already.
    pub(super) fn is_migrated(&self) -> bool {
        self.folders.has_user_data(ALONE)
    }

    /// Adds a user; writes the list. File work.
    pub(super) fn add(&self, name: &str) -> Result<String, AddError> {
        let name = name.trim();
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(AddError::Unusable("a user name has 1 to 200 bytes"));
        }
        let mut known = self.known();
        if (!self.is_multi && name == ALONE) || known.values().any(|taken| taken == name) {
            return Err(AddError::Duplicate);
        }
        if !self.is_multi || known.len() >= MAX_USERS {
            return Err(AddError::Unusable("this server takes no more users"));
        }
        let id = new_id(name);
        let mut longer = known.clone();
        longer.insert(id.clone(), name.into());
        let text = Json::Object(longer.clone()).to_string();
        write_atomic(&self.folders.user().join(FILE), text.as_bytes())
            .map_err(|error| AddError::NotStored(error.to_string()))?;
        *known = longer;
        Ok(id)
    }

    /// The user whose data a request is about; 401 for one who is not on the list.
    pub(super) fn of(&self, headers: &HeaderMap) -> Result<String, Failure> {
        if !self.is_multi {
            return Ok(ALONE.to_owned());
        }
        let id = headers.get("comfy-user").map_or(ALONE.into(), |id| String::from_utf8_lossy(id.as_bytes()));
        if self.known().contains_key(&*id) {
            return Ok(id.into_owned());
        }
        Err(Failure::Text(StatusCode::UNAUTHORIZED, "401: Unauthorized".to_owned()))
    }

    /// The folder of a user's data. File work.
    pub(super) fn data(&self, user: &str) -> Result<Sandbox, PathError> {
        self.folders.user_data(user)
    }

    /// Keeps others from changing settings meanwhile.
    pub(super) fn lock_settings(&self) -> MutexGuard<'_, ()> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::FolderOptions;

    fn folders(base: &std::path::Path) -> Arc<Folders> {
        Arc::new(Folders::open(&FolderOptions { base: base.to_owned(), ..Default::default() }).unwrap())
    }

    fn as_user(id: &str) -> HeaderMap {
        HeaderMap::from_iter([("comfy-user".parse().unwrap(), id.parse().unwrap())])
    }

    #[test]
    fn ids_are_folder_names() {
        for (name, begin) in
            [("A b/c", "A-b-c_"), ("../..", "-_"), ("ü  x", "-x_"), ("a-_9", "a-_9_"), ("\\\0\n", "-_")]
        {
            let id = new_id(name);
            assert!(id.starts_with(begin) && id.len() == begin.len() + 36, "{name:?}: {id}");
        }
    }

    #[test]
    fn users_are_kept_and_told_apart() {
        let base = tempfile::tempdir().unwrap();
        let users = Users::open(folders(base.path()), true).unwrap();
        assert_eq!(users.list(), Some(Json::Object(Map::new())));
        let ann = users.add(" Ann ").unwrap();
        assert_eq!(users.add("Ann"), Err(AddError::Duplicate));
        for name in ["", "  ", &"x".repeat(201)] {
            assert!(matches!(users.add(name), Err(AddError::Unusable(_))), "{name:?}");
        }
        assert_eq!(users.of(&as_user(&ann)).unwrap(), ann);
        for stranger in ["nobody", "", "..", "default"] {
            assert!(users.of(&as_user(stranger)).is_err(), "{stranger:?}");
        }
        assert!(users.of(&HeaderMap::new()).is_err());
        let again = Users::open(folders(base.path()), true).unwrap();
        assert_eq!(again.list(), users.list());
        assert_eq!(again.list().unwrap()[&ann], "Ann");
        for bad in ["{", "[]", r#"{"a": 1}"#] {
            std::fs::write(base.path().join("user/users.json"), bad).unwrap();
            let error = Users::open(folders(base.path()), true).unwrap_err().to_string();
            assert!(error.contains("users.json"), "{error}");
        }
        assert!(Users::open(folders(base.path()), false).is_ok(), "not read alone");
    }

    #[test]
    fn alone_everybody_is_default() {
        let base = tempfile::tempdir().unwrap();
        let users = Users::open(folders(base.path()), false).unwrap();
        assert_eq!((users.list(), users.is_migrated()), (None, false));
        assert_eq!(users.of(&as_user("nobody")).unwrap(), "default");
        users.data("default").unwrap();
        assert!(users.is_migrated());
        assert!(users.add("Ann").is_err() && !base.path().join("user/users.json").exists());
    }
}
