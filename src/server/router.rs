//! From a path to a handler, and what every answer gets on its way out.
//!
//! Every route answers under its own path and under `/api` + path, except
//! `/internal/*` and what is written with `/api` here (a web page's own files lie
//! under `/assets`, for one). A wrong method is 405 with `Allow`; `GET` on a route that only
//! takes `POST` is 404, as in ComfyUI, where a file could have that name.

use std::borrow::Cow;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, HeaderName, HeaderValue, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{HeaderMap, Method, Request, StatusCode};

use super::App;
use super::compress;
use super::frontend;
use super::http::{self, Call, ErrorStyle, Failure, Peer, Response};
use super::origin::Refusal;

type Outcome = Pin<Box<dyn Future<Output = Result<Response, Failure>> + Send>>;
type Handler = Arc<dyn Fn(Call) -> Outcome + Send + Sync>;

#[derive(Default, Clone)]
struct Entry {
    handlers: Vec<(Method, Handler)>,
}

impl Entry {
    fn find(&self, method: &Method) -> Option<&Handler> {
        let wanted = if method == Method::HEAD { &Method::GET } else { method };
        self.handlers.iter().find(|(m, _)| m == wanted).map(|(_, h)| h)
    }

    /// `GET` and `HEAD` are always listed: they are answered, if only with 404.
    fn allowed(&self) -> String {
        let mut names = vec!["GET", "HEAD"];
        names.extend(self.handlers.iter().map(|(m, _)| m.as_str()).filter(|m| *m != "GET"));
        names.join(",")
    }
}

/// The routes of a server.
#[derive(Default)]
pub(super) struct Router {
    routes: Vec<(String, Entry)>,
    table: matchit::Router<Entry>,
}

impl Router {
    /// Adds a handler for a path pattern such as `/history/{id}`.
    pub(super) fn on<F, Fut>(mut self, method: Method, path: &str, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Response, Failure>> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |call| Box::pin(handler(call)));
        let at = match self.routes.iter().position(|(p, _)| p == path) {
            Some(at) => at,
            None => {
                self.routes.push((path.to_owned(), Entry::default()));
                self.routes.len() - 1
            }
        };
        self.routes[at].1.handlers.push((method, handler));
        self
    }

    /// Adds a `GET` handler.
    pub(super) fn get<F, Fut>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Response, Failure>> + Send + 'static,
    {
        self.on(Method::GET, path, handler)
    }

    /// Adds a `POST` handler.
    pub(super) fn post<F, Fut>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Response, Failure>> + Send + 'static,
    {
        self.on(Method::POST, path, handler)
    }

    /// Every method and path pattern, without the `/api` aliases.
    pub(super) fn patterns(&self) -> Vec<(Method, String)> {
        let of = |(path, entry): &(String, Entry)| {
            entry.handlers.iter().map(|(method, _)| (method.clone(), path.clone())).collect::<Vec<_>>()
        };
        self.routes.iter().flat_map(of).collect()
    }

    /// Builds the lookup table.
    pub(super) fn build(mut self) -> Result<Self, matchit::InsertError> {
        for (path, entry) in &self.routes {
            self.table.insert(path.clone(), entry.clone())?;
            if !path.starts_with("/internal") && !path.starts_with("/api/") && path != "/" {
                self.table.insert(format!("/api{path}"), entry.clone())?;
            }
        }
        Ok(self)
    }
}

/// Answers one request.
pub(super) async fn answer(app: Arc<App>, peer: Peer, request: Request<Incoming>) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let cookie = app.config.auth.cookie_for(&request);
    let accepts_gzip = compress::accepts_gzip(request.headers());
    let wanted_type = wanted_type(request.headers());
    let mut response = match app.config.origin.check(&method, request.headers(), peer.via_loopback) {
        Ok(()) if method == Method::OPTIONS => http::empty(StatusCode::OK),
        Ok(()) => route(app.clone(), peer, request).await,
        Err(refusal) => refuse(refusal, uri.path(), request.headers()),
    };
    // what has a type already is an error in JSON
    let is_bare =
        response.status() == StatusCode::NOT_FOUND && !response.headers().contains_key(CONTENT_TYPE);
    if let Some(kind) = wanted_type.filter(|_| is_bare) {
        http::set(&mut response, CONTENT_TYPE, kind);
    }
    finish(&mut response, uri.path());
    if let Some(cookie) = cookie {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    app.config.origin.add_cors(response.headers_mut());
    if app.config.compress && accepts_gzip {
        response = compress::gzip(response).await;
    }
    tracing::debug!(target: "kiln::http", %method, path = uri.path(), status = response.status().as_u16());
    response
}

/// The type of a style sheet or script that a page asks for. It goes on the answer that there is none, too, or
/// browsers, told by `nosniff` to insist on types, report a wrong type besides.
fn wanted_type(headers: &HeaderMap) -> Option<&'static str> {
    match headers.get("sec-fetch-dest")?.as_bytes() {
        b"style" => Some("text/css; charset=utf-8"),
        b"script" => Some("text/javascript; charset=utf-8"),
        _ => None,
    }
}

fn refuse(refusal: Refusal, path: &str, headers: &HeaderMap) -> Response {
    let style = ErrorStyle::of(path, headers);
    match refusal {
        Refusal::ForeignOrigin => style.foreign_origin(headers),
        Refusal::ForeignHost => {
            let host = headers
                .get(HOST)
                .map_or_else(String::new, |h| String::from_utf8_lossy(h.as_bytes()).into_owned());
            let hint =
                format!("the Host '{host}' is not a name of this server; allow it with --allowed-hosts");
            Failure::Text(StatusCode::FORBIDDEN, hint).into_response(style)
        }
    }
}

/// A path in its plain spelling: `%71` is `q`, since letters, digits and `-._~` need no escape (RFC 3986, 6.2.2.2).
/// All other escapes stay.
fn plain(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return path.into();
    }
    let mut spelled = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, escape)) = rest.split_once('%') {
        spelled.push_str(before);
        let byte = escape.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte.filter(|b| b.is_ascii_alphanumeric() || b"-._~".contains(b)) {
            Some(byte) => {
                spelled.push(char::from(byte));
                rest = &escape[2..];
            }
            None => {
                spelled.push('%');
                rest = escape;
            }
        }
    }
    spelled.push_str(rest);
    spelled.into()
}

async fn route(app: Arc<App>, peer: Peer, request: Request<Incoming>) -> Response {
    let style = ErrorStyle::of(request.uri().path(), request.headers());
    let uri_bytes = request.uri().path_and_query().map_or(0, |p| p.as_str().len());
    if uri_bytes > app.config.limits.uri_bytes {
        let message = format!("the address has {uri_bytes} bytes; {} are read", app.config.limits.uri_bytes);
        return Failure::Text(StatusCode::URI_TOO_LONG, message).into_response(style);
    }
    let key_name = match app.config.auth.check(&request) {
        Ok(name) => name,
        Err(failure) => return failure.into_response(style),
    };
    let path = plain(request.uri().path());
    let (entry, params) = match app.router.table.at(&path) {
        Err(_) => return no_route(&app, &request, style).await,
        Ok(found) => {
            let params = found.params.iter().map(|(k, v)| (k.to_owned(), http::decode(v))).collect();
            (found.value.clone(), params)
        }
    };
    let method = request.method();
    let Some(handler) = entry.find(method) else {
        if matches!(*method, Method::GET | Method::HEAD) {
            return no_route(&app, &request, style).await;
        }
        let refused = Failure::Text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed".to_owned());
        let mut response = refused.into_response(style);
        if let Ok(allow) = HeaderValue::from_str(&entry.allowed()) {
            response.headers_mut().insert(ALLOW, allow);
        }
        return response;
    };
    // a panic is a bug, but no reason to leave its client without an answer
    let outcome = AssertUnwindSafe(handler(Call { app, request, params, peer, key_name })).catch_unwind();
    match outcome.await.unwrap_or_else(|_| Err(Failure::internal("the server failed at this request"))) {
        Ok(response) => response,
        Err(failure) => {
            tracing::debug!(target: "kiln::http", %failure);
            failure.into_response(style)
        }
    }
}

/// A file of `--front-end-root`, or 404.
async fn no_route(app: &App, request: &Request<Incoming>, style: ErrorStyle) -> Response {
    let root = app.config.front_end_root.as_ref();
    match root.filter(|_| matches!(*request.method(), Method::GET | Method::HEAD)) {
        Some(root) => frontend::serve(root, request.uri().path(), request.headers())
            .await
            .unwrap_or_else(|failure| failure.into_response(style)),
        None => Failure::NOT_FOUND.into_response(style),
    }
}

const IMAGE_ENDINGS: &[&str] = &[".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"];
const CODE_ENDINGS: &[&str] = &[".js", ".css", "index.json"];

/// Adds the headers that depend on the path and the status.
fn finish(response: &mut Response, path: &str) {
    let path = path.to_ascii_lowercase();
    let ends = |endings: &[&str]| endings.iter().any(|e| path.ends_with(e));
    let caching = if ends(CODE_ENDINGS) {
        Some("no-cache")
    } else if ends(IMAGE_ENDINGS) && response.status().is_success() {
        Some("public, max-age=86400")
    } else if ends(IMAGE_ENDINGS) && response.status() == StatusCode::NOT_FOUND {
        Some("public, max-age=3600")
    } else {
        None
    };
    let mut add = |name: HeaderName, value| {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    };
    if let Some(value) = caching {
        add(CACHE_CONTROL, value);
    }
    add(X_CONTENT_TYPE_OPTIONS, "nosniff");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_that_nothing_needs_are_undone() {
        for (path, wanted) in [
            ("/queue", "/queue"),
            ("/%71u%65ue", "/queue"),
            ("/userdata/a%2Fb%2ejson", "/userdata/a%2Fb.json"),
            ("/userdata/%252F", "/userdata/%252F"),
            ("/%C3%A9%7e%", "/%C3%A9~%"),
            ("/%7", "/%7"),
            ("/%+1%zz%e", "/%+1%zz%e"),
        ] {
            assert_eq!(plain(path), wanted, "{path}");
        }
    }

    #[test]
    fn caching_depends_on_the_path() {
        for (path, status, wanted) in [
            ("/userdata/a.png", 200, Some("public, max-age=86400")),
            ("/userdata/a.WEBP", 200, Some("public, max-age=86400")),
            ("/userdata/a.png", 404, Some("public, max-age=3600")),
            ("/userdata/a.png", 403, None),
            ("/x/a.js", 404, Some("no-cache")),
            ("/x/a.css", 200, Some("no-cache")),
            ("/templates/index.json", 200, Some("no-cache")),
            ("/x/a.json", 200, None),
            ("/view", 200, None),
        ] {
            let mut response = http::empty(StatusCode::from_u16(status).unwrap());
            finish(&mut response, path);
            let got = response.headers().get(CACHE_CONTROL).map(|v| v.to_str().unwrap());
            assert_eq!(got, wanted, "{path} {status}");
            assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
        }
    }
}
