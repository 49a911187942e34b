//! `--front-end-root`: the files of a web page that the operator has installed, such as ComfyUI's own.
//!
//! Routes come first; what is no route is looked up here. Names follow the
//! rules of [`files`](crate::files). Unlike users' files these may be scripts:
//! they get their real type. File names that contain a hash of their content
//! (`assets/index-B3xZ01ab.js`) never change and are kept by browsers for good;
//! everything else is checked at each load.

use std::fs::File;
use std::path::Path;

use hyper::HeaderMap;
use hyper::header::{CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};

use super::download;
use super::http::{self, Failure, Response};
use crate::files;

/// Characters of the hash that bundlers put at the end of a file's stem.
const HASH_CHARS: usize = 8;

/// Whether the name of a file below `assets/` carries a hash of its content.
fn is_hashed(name: &str) -> bool {
    let Some((_, file)) = name.split_once("assets/").filter(|(before, _)| before.is_empty()) else {
        return false;
    };
    let stem = file.rsplit('/').next().and_then(|f| f.split_once('.')).map_or("", |(stem, _)| stem);
    let is_hash = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'-';
    stem.len() > HASH_CHARS && {
        let (before, hash) = stem.as_bytes().split_at(stem.len() - HASH_CHARS);
        before.ends_with(b"-") && hash.iter().copied().all(is_hash)
    }
}

fn media_type(name: &str) -> HeaderValue {
    // The registered type of modules is that of scripts (RFC 9239); the table still has the old one.
    let name = if name.ends_with(".mjs") { "a.js" } else { name };
    let kind = mime_guess::from_path(name).first_or_octet_stream();
    let text = if kind.type_() == "text" { format!("{kind}; charset=utf-8") } else { kind.to_string() };
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("application/octet-stream"))
}

/// The file of a request path below `root`; `/` is `index.html`.
pub(super) async fn serve(root: &Path, path: &str, headers: &HeaderMap) -> Result<Response, Failure> {
    let name = http::decode(path.trim_start_matches('/'));
    let name = if name.is_empty() { "index.html".to_owned() } else { name };
    let (root, wanted) = (root.to_owned(), name.clone());
    let open = move || File::open(files::resolve_below(&root, &wanted).ok()?).ok();
    let file = tokio::task::spawn_blocking(open).await.map_err(Failure::internal)?;
    // what is no file here is no route either
    let mut response = download::serve(file.ok_or(Failure::NOT_FOUND)?, &name, headers).await?;
    // these files are the operator's, and work as a page
    response.headers_mut().remove(CONTENT_SECURITY_POLICY);
    response.headers_mut().remove(CONTENT_DISPOSITION);
    response.headers_mut().insert(CONTENT_TYPE, media_type(&name));
    if is_hashed(&name) {
        http::set(&mut response, CACHE_CONTROL, "public, max-age=31536000, immutable");
    } else if name.ends_with(".html") {
        http::set(&mut response, CACHE_CONTROL, "no-cache");
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashed_names() {
        for (name, wanted) in [
            ("assets/index-B3xZ01ab.js", true),
            ("assets/fonts/a-b-_-x0Yz12.woff2", true),
            ("assets/index-B3xZ01ab.js.map", true),
            ("assets/index.js", false),
            ("assets/some-long-name.js", false),
            ("assets/-B3xZ01a.js", false),
            ("scripts/index-B3xZ01ab.js", false),
            ("x/assets/index-B3xZ01ab.js", false),
        ] {
            assert_eq!(is_hashed(name), wanted, "{name}");
        }
    }

    #[test]
    fn types() {
        for (name, wanted) in [
            ("a.js", "text/javascript; charset=utf-8"),
            ("a.mjs", "text/javascript; charset=utf-8"),
            ("a.css", "text/css; charset=utf-8"),
            ("a.html", "text/html; charset=utf-8"),
            ("a.json", "application/json"),
            ("a.svg", "image/svg+xml"),
            ("a.webp", "image/webp"),
            ("a.woff2", "font/woff2"),
            ("a.wasm", "application/wasm"),
            ("a", "application/octet-stream"),
        ] {
            assert_eq!(media_type(name), wanted, "{name}");
        }
    }
}
