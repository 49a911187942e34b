//! API keys (`--api-key-file`): who may use the server.
//!
//! A key comes as `Authorization: Bearer KEY`. Where a browser can't send that
//! header (`/ws`, pictures from `/view`) it may be `?token=KEY`. A page that was
//! opened with `/?token=KEY` gets a cookie that its own later requests carry; the
//! cookie counts for nothing on a request from another origin.
//!
//! Only hashes of keys are kept, and all of them are compared in constant time:
//! how long a refusal takes says nothing. Keys are never logged. This is no user
//! management: every key may do everything.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::header::{AUTHORIZATION, COOKIE, HOST, HeaderValue, ORIGIN};
use hyper::{Request, StatusCode};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::http::{Failure, query_value};
use super::origin::same_place;

/// Shorter keys can be guessed.
const SHORT_KEY: usize = 16;
const COOKIE_NAME: &str = "kiln_key";

/// A key file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It can't be read.
    #[error("the key file {path} can't be read: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It holds no key.
    #[error("the key file {path} holds no key: write one key a line, with a name before it if you like")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line has more than a name and a key.
    #[error("line {line} of the key file {path} is not 'KEY' or 'NAME KEY'")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

#[derive(Clone)]
struct Key {
    name: Arc<str>,
    hash: [u8; 32],
}

/// The keys of a server; without any, everybody may use it.
#[derive(Clone, Default)]
pub struct Auth {
    keys: Arc<Vec<Key>>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Auth({} keys)", self.keys.len())
    }
}

fn hash(key: &str) -> [u8; 32] {
    *blake3::hash(key.as_bytes()).as_bytes()
}

/// Paths that answer without a key.
fn is_open(path: &str) -> bool {
    matches!(path, "/health" | "/api/health" | "/v2/health" | "/api/v2/health")
}

/// Paths whose key may stand in the query.
fn takes_token(path: &str) -> bool {
    matches!(path, "/" | "/ws" | "/api/ws" | "/view" | "/api/view")
}

impl Auth {
    /// Reads a key file: `KEY` or `NAME KEY` a line; empty lines and lines with `#` in front don't count.
    ///
    /// # Errors
    /// [`KeyFileError`] if it can't be read or holds no key.
    pub fn from_file(path: &Path) -> Result<Self, KeyFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| KeyFileError::Io { path: path.to_owned(), source })?;
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, key) = match words.as_slice() {
                [] => continue,
                [first, ..] if first.starts_with('#') => continue,
                [key] => (format!("{}", keys.len() + 1), *key),
                [name, key] => ((*name).to_owned(), *key),
                _ => return Err(KeyFileError::Line { path: path.to_owned(), line: i + 1 }),
            };
            if key.len() < SHORT_KEY {
                tracing::warn!(
                    name,
                    "an API key is shorter than {SHORT_KEY} characters: make it longer, it can be guessed"
                );
            }
            keys.push(Key { name: name.into(), hash: hash(key) });
        }
        if keys.is_empty() {
            return Err(KeyFileError::Empty { path: path.to_owned() });
        }
        Ok(Self { keys: Arc::new(keys) })
    }

    /// These keys, named by number: for programs that embed a server.
    pub fn with_keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        let named = keys.into_iter().enumerate();
        let keys = named.map(|(i, key)| Key { name: format!("{}", i + 1).into(), hash: hash(key) });
        Self { keys: Arc::new(keys.collect()) }
    }

    /// Whether a key is asked for.
    pub fn is_on(&self) -> bool {
        !self.keys.is_empty()
    }

    /// The name of a key; every key is compared, whichever it is.
    fn name_of(&self, key: &str) -> Option<Arc<str>> {
        let given = hash(key);
        let (mut is_known, mut at) = (Choice::from(0), 0_u32);
        for (i, known) in (0_u32..).zip(self.keys.iter()) {
            let is_same = known.hash.ct_eq(&given);
            at.conditional_assign(&i, is_same);
            is_known |= is_same;
        }
        bool::from(is_known).then(|| self.keys[at as usize].name.clone())
    }

    /// Lets a request pass, with the name of its key, or refuses it with 401.
    pub(super) fn check<B>(&self, request: &Request<B>) -> Result<Option<Arc<str>>, Failure> {
        if !self.is_on() || is_open(request.uri().path()) {
            return Ok(None);
        }
        match [bearer(request), query(request), cookie(request)]
            .into_iter()
            .flatten()
            .find_map(|k| self.name_of(&k))
        {
            Some(name) => Ok(Some(name)),
            None => Err(Failure::coded(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "an API key is needed: send 'Authorization: Bearer KEY' (or ?token=KEY to /, /ws and /view)",
            )),
        }
    }

    /// The cookie for a page that was opened with a good `?token=`.
    pub(super) fn cookie_for<B>(&self, request: &Request<B>) -> Option<HeaderValue> {
        if !self.is_on() || request.uri().path() != "/" {
            return None;
        }
        let key = query(request).filter(|key| self.name_of(key).is_some())?;
        let is_plain = key.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b';' | b',' | b'"' | b'\\'));
        let text = format!("{COOKIE_NAME}={key}; Path=/; HttpOnly; SameSite=Strict");
        HeaderValue::from_str(&text).ok().filter(|_| is_plain)
    }
}

fn bearer<B>(request: &Request<B>) -> Option<String> {
    let header = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim().to_owned())
}

fn query<B>(request: &Request<B>) -> Option<String> {
    let uri = request.uri();
    query_value(uri.query().filter(|_| takes_token(uri.path()))?, "token")
}

fn cookie<B>(request: &Request<B>) -> Option<String> {
    let text = |name| request.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    let is_own = text(ORIGIN).is_none_or(|origin| same_place(origin, text(HOST).unwrap_or_default()));
    let pairs = text(COOKIE).filter(|_| is_own)?.split(';');
    pairs
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, key)| key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri(path);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    #[test]
    fn who_passes() {
        let auth = Auth::with_keys(["first-key", "second-key"]);
        let own = ("Host", "kiln.lan:8188");
        for (path, headers, wanted) in [
            ("/queue", vec![], None),
            ("/queue", vec![("Authorization", "Bearer second-key")], Some("2")),
            ("/queue", vec![("Authorization", "bearer first-key")], Some("1")),
            ("/queue", vec![("Authorization", "Bearer first-ke")], None),
            ("/queue", vec![("Authorization", "Bearer ")], None),
            ("/queue", vec![("Authorization", "Basic first-key")], None),
            ("/queue?token=first-key", vec![], None),
            ("/ws?token=first-key", vec![], Some("1")),
            ("/api/view?filename=a.png&token=first-key", vec![], Some("1")),
            ("/view?token=", vec![], None),
            ("/queue", vec![("Cookie", "a=b; kiln_key=first-key")], Some("1")),
            ("/queue", vec![("Cookie", "kiln_key=wrong")], None),
            (
                "/queue",
                vec![own, ("Origin", "http://kiln.lan:8188"), ("Cookie", "kiln_key=first-key")],
                Some("1"),
            ),
            ("/queue", vec![own, ("Origin", "http://kiln.lan:9"), ("Cookie", "kiln_key=first-key")], None),
            ("/queue", vec![own, ("Origin", "null"), ("Cookie", "kiln_key=first-key")], None),
        ] {
            let got = auth.check(&request(path, &headers));
            assert_eq!(got.ok().flatten().as_deref(), wanted, "{path} {headers:?}");
        }
        assert!(auth.check(&request("/health", &[])).is_ok());
        assert!(auth.check(&request("/healthy", &[])).is_err());
        assert!(Auth::default().check(&request("/queue", &[])).is_ok());
        let cookie = auth.cookie_for(&request("/?token=first-key", &[])).unwrap();
        assert_eq!(cookie, "kiln_key=first-key; Path=/; HttpOnly; SameSite=Strict");
        assert!(auth.cookie_for(&request("/?token=other", &[])).is_none());
        assert_eq!(format!("{auth:?}"), "Auth(2 keys)", "no key is shown");
    }

    #[test]
    fn key_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# keys\n\nalice 0123456789abcdef\n0123456789abcdeg\n").unwrap();
        let auth = Auth::from_file(&file).unwrap();
        assert_eq!(auth.name_of("0123456789abcdef").as_deref(), Some("alice"));
        assert_eq!(auth.name_of("0123456789abcdeg").as_deref(), Some("2"));
        std::fs::write(&file, "# none\n").unwrap();
        assert!(matches!(Auth::from_file(&file), Err(KeyFileError::Empty { .. })));
        std::fs::write(&file, "a b c\n").unwrap();
        assert!(matches!(Auth::from_file(&file), Err(KeyFileError::Line { line: 1, .. })));
        assert!(matches!(Auth::from_file(&dir.path().join("none")), Err(KeyFileError::Io { .. })));
    }
}
