//! `/`, `/kiln/*`, `/templates`: the page inside the binary, or the operator's own at `/`.
//!
//! The files of `assets/page/` as they are: nothing is built, and nothing is
//! loaded from elsewhere, which the content security policy says to the browser.

use std::sync::LazyLock;

use bytes::Bytes;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH, REFERRER_POLICY,
};
use hyper::{HeaderMap, StatusCode};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::server::frontend;
use crate::server::http::{self, Body, Call, Failure, Response};

struct Asset {
    name: &'static str,
    kind: &'static str,
    content: &'static str,
    tag: HeaderValue,
}

impl Asset {
    fn new(name: &'static str, kind: &'static str, content: &'static str) -> Self {
        let hash = u64::from_be_bytes(Sha256::digest(content).first_chunk().copied().unwrap_or_default());
        // quoted hexadecimal digits are always a header value
        let tag = HeaderValue::from_str(&format!("\"{hash:016x}\""));
        Self { name, kind, content, tag: tag.unwrap_or_else(|_| HeaderValue::from_static("\"0\"")) }
    }
}

macro_rules! asset {
    ($name:literal, $kind:literal) => {
        Asset::new($name, $kind, include_str!(concat!("../../../assets/page/", $name)))
    };
}

static ASSETS: LazyLock<[Asset; 6]> = LazyLock::new(|| {
    [
        asset!("index.html", "text/html; charset=utf-8"),
        asset!("page.css", "text/css; charset=utf-8"),
        asset!("page.js", "text/javascript; charset=utf-8"),
        asset!("server.js", "text/javascript; charset=utf-8"),
        asset!("workflow.js", "text/javascript; charset=utf-8"),
        asset!("icon.svg", "image/svg+xml"),
    ]
});

/// Own scripts and styles, own pictures and previews, own server; nothing else, and no frames around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn answer(name: &str, headers: &HeaderMap) -> Result<Response, Failure> {
    let asset = ASSETS.iter().find(|a| a.name == name).ok_or(Failure::NOT_FOUND)?;
    let mut response = if headers.get(IF_NONE_MATCH) == Some(&asset.tag) {
        http::empty(StatusCode::NOT_MODIFIED)
    } else {
        Response::new(Body::Bytes(Bytes::from_static(asset.content.as_bytes())))
    };
    http::set(&mut response, CONTENT_TYPE, asset.kind);
    http::set(&mut response, CACHE_CONTROL, "no-cache");
    http::set(&mut response, CONTENT_SECURITY_POLICY, POLICY);
    // an API key may stand in the address
    http::set(&mut response, REFERRER_POLICY, "no-referrer");
    response.headers_mut().insert(ETAG, asset.tag.clone());
    Ok(response)
}

/// `GET /`: the built-in page, or that of `--front-end-root`.
pub(in crate::server) async fn index(call: Call) -> Result<Response, Failure> {
    match &call.app.config.front_end_root {
        Some(root) => frontend::serve(root, "/", call.headers()).await,
        None => answer("index.html", call.headers()),
    }
}

/// `GET /kiln/{file}`: what the built-in page consists of.
pub(in crate::server) async fn asset(call: Call) -> Result<Response, Failure> {
    answer(call.param("file"), call.headers())
}

/// `GET /templates/index.json`: ComfyUI's example workflows, which are a package of their own. kiln brings none, and
/// says so: the official pages take a missing list for an error.
pub(in crate::server) async fn templates(call: Call) -> Result<Response, Failure> {
    match call.param("file") {
        "index.json" => Ok(http::json_response(StatusCode::OK, &json!([]))),
        _ => Err(Failure::NOT_FOUND),
    }
}
