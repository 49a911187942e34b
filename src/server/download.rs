//! A file on disk as an answer: type, disposition, ranges, validators.
//!
//! What a user uploaded must not run in the server's origin. So only types that
//! can't carry script are shown inline; everything else is a download without
//! a telling type. `sandbox` and `nosniff` say it again to the browser.

use std::fs::Metadata;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_RANGE, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE,
    LAST_MODIFIED, RANGE, VARY,
};
use hyper::{HeaderMap, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::io::AsyncSeekExt;

use super::http::{self, Body, Failure, Response};

/// Types that are shown inline, by file name ending.
const INLINE: &[(&str, &str)] = &[
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("webp", "image/webp"),
    ("gif", "image/gif"),
    ("mp4", "video/mp4"),
    ("webm", "video/webm"),
    ("wav", "audio/x-wav"),
    ("mp3", "audio/mpeg"),
    ("flac", "audio/flac"),
    ("ogg", "audio/ogg"),
    ("opus", "audio/opus"),
    ("json", "application/json"),
];
const OPAQUE: &str = "application/octet-stream";
/// RFC 5987 `attr-char`s stay as they are.
const EXTENDED_VALUE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'.')
    .remove(b'-')
    .remove(b'_')
    .remove(b'~')
    .remove(b'!')
    .remove(b'#')
    .remove(b'&');

/// The content type, and whether the file may be shown inline.
pub(super) fn content_type(name: &str, headers: &HeaderMap) -> (&'static str, bool) {
    let ending = name.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase()).unwrap_or_default();
    if ending == "svg" {
        // a picture inside a page can't run scripts; a document can
        let is_picture = headers.get("sec-fetch-dest").map(HeaderValue::as_bytes) == Some(b"image");
        return if is_picture { ("image/svg+xml", true) } else { (OPAQUE, false) };
    }
    INLINE.iter().find(|(e, _)| *e == ending).map_or((OPAQUE, false), |(_, kind)| (kind, true))
}

/// `Content-Disposition` of a file: quoted, with an extended form for names beyond ASCII.
pub(super) fn disposition(name: &str, is_inline: bool) -> HeaderValue {
    let plain: String = name
        .chars()
        .map(|c| if c == '"' || c == '\\' || !(' '..='~').contains(&c) { '_' } else { c })
        .collect();
    let mut value = if is_inline { String::new() } else { "attachment; ".to_owned() };
    value.push_str(&format!("filename=\"{plain}\""));
    if plain != name {
        value.push_str(&format!("; filename*=UTF-8''{}", utf8_percent_encode(name, EXTENDED_VALUE)));
    }
    HeaderValue::from_str(&value).unwrap_or_else(|_| HeaderValue::from_static("attachment"))
}

/// Headers that every answer with a user's file carries.
pub(super) fn mark_user_file(response: &mut Response, name: &str, kind: &'static str, is_inline: bool) {
    http::set(response, CONTENT_TYPE, kind);
    response.headers_mut().insert(CONTENT_DISPOSITION, disposition(name, is_inline));
    http::set(response, CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox");
    if name.to_ascii_lowercase().ends_with(".svg") {
        http::set(response, VARY, "Sec-Fetch-Dest");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Span {
    Whole,
    /// First byte and number of bytes.
    Part(u64, u64),
    Unsatisfiable,
}

/// A single byte range; several ranges, and what is malformed, mean the whole file (RFC 9110, 14.2).
fn span(range: Option<&str>, size: u64) -> Span {
    let Some((first, last)) = range.and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.split_once('-'))
    else {
        return Span::Whole;
    };
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return Span::Whole;
    }
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), _) if first >= size => Span::Unsatisfiable,
        (Ok(first), Ok(last)) if last < first => Span::Whole,
        (Ok(first), Ok(last)) => Span::Part(first, last.min(size - 1) - first + 1),
        (Ok(first), Err(_)) if last.is_empty() => Span::Part(first, size - first),
        (Err(_), Ok(0)) => Span::Unsatisfiable,
        (Err(_), Ok(_)) if size == 0 => Span::Unsatisfiable,
        (Err(_), Ok(count)) if first.is_empty() => Span::Part(size - count.min(size), count.min(size)),
        _ => Span::Whole,
    }
}

/// What tells one content of a file from another: a tag, and the time of the last change in whole seconds.
struct Validators {
    tag: String,
    modified: SystemTime,
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(text(headers, name)?).ok()
}

impl Validators {
    fn of(facts: &Metadata) -> Self {
        let since = facts.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let tag = format!("\"{:x}-{:x}\"", since.as_nanos(), facts.len());
        Self { tag, modified: UNIX_EPOCH + Duration::from_secs(since.as_secs()) }
    }

    fn is_among(&self, list: &str) -> bool {
        list.split(',').map(str::trim).any(|t| t == "*" || t.strip_prefix("W/").unwrap_or(t) == self.tag)
    }

    /// The answer without content that the request's conditions call for, in the order of RFC 9110, 13.2.2.
    fn precondition(&self, headers: &HeaderMap) -> Option<StatusCode> {
        let has_changed = match text(headers, IF_MATCH) {
            Some(list) => !self.is_among(list),
            None => date(headers, IF_UNMODIFIED_SINCE).is_some_and(|date| self.modified > date),
        };
        if has_changed {
            return Some(StatusCode::PRECONDITION_FAILED);
        }
        let is_known = match text(headers, IF_NONE_MATCH) {
            Some(list) => self.is_among(list),
            None => date(headers, IF_MODIFIED_SINCE).is_some_and(|date| self.modified <= date),
        };
        is_known.then_some(StatusCode::NOT_MODIFIED)
    }

    /// Whether the ranges asked for are of this content.
    fn may_split(&self, headers: &HeaderMap) -> bool {
        match text(headers, IF_RANGE) {
            Some(value) if value.starts_with('"') => value == self.tag,
            Some(_) => date(headers, IF_RANGE).is_some_and(|date| self.modified <= date),
            None => !headers.contains_key(IF_RANGE),
        }
    }
}

/// Answers with a user's open file under its own name.
pub(super) async fn serve(file: std::fs::File, name: &str, headers: &HeaderMap) -> Result<Response, Failure> {
    let mut file = tokio::fs::File::from_std(file);
    let facts = file.metadata().await.map_err(Failure::internal)?;
    if !facts.is_file() {
        return Err(Failure::NOT_FOUND);
    }
    let size = facts.len();
    let validators = Validators::of(&facts);
    let (kind, is_inline) = content_type(name, headers);
    let range = text(headers, RANGE).filter(|_| validators.may_split(headers));
    let mut response = if let Some(status) = validators.precondition(headers) {
        if status.is_client_error() {
            return Err(Failure::Status(status));
        }
        http::empty(status)
    } else {
        match span(range, size) {
            Span::Whole => Response::new(Body::file(file, size)),
            Span::Part(first, count) => {
                file.seek(std::io::SeekFrom::Start(first)).await.map_err(Failure::internal)?;
                let mut response = Response::new(Body::file(file, count));
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                let place = format!("bytes {first}-{}/{size}", first + count - 1);
                insert(&mut response, CONTENT_RANGE, &place);
                response
            }
            Span::Unsatisfiable => {
                return Err(Failure::OutOfRange { size });
            }
        }
    };
    mark_user_file(&mut response, name, kind, is_inline);
    http::set(&mut response, ACCEPT_RANGES, "bytes");
    insert(&mut response, ETAG, &validators.tag);
    insert(&mut response, LAST_MODIFIED, &httpdate::fmt_http_date(validators.modified));
    Ok(response)
}

fn insert(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (range, size, wanted) in [
            (None, 10, Span::Whole),
            (Some("bytes=0-3"), 10, Span::Part(0, 4)),
            (Some("bytes=4-"), 10, Span::Part(4, 6)),
            (Some("bytes=-3"), 10, Span::Part(7, 3)),
            (Some("bytes=-30"), 10, Span::Part(0, 10)),
            (Some("bytes=5-99999999999"), 10, Span::Part(5, 5)),
            (Some("bytes=10-"), 10, Span::Unsatisfiable),
            (Some("bytes=-0"), 10, Span::Unsatisfiable),
            (Some("bytes=-1"), 0, Span::Unsatisfiable),
            (Some("bytes=3-1"), 10, Span::Whole),
            (Some("bytes=0-1,4-5"), 10, Span::Whole),
            (Some("bytes=a-b"), 10, Span::Whole),
            (Some("bytes=-"), 10, Span::Whole),
            (Some("lines=0-1"), 10, Span::Whole),
            (Some("bytes=99999999999999999999999-"), 10, Span::Whole),
        ] {
            assert_eq!(span(range, size), wanted, "{range:?} of {size}");
        }
    }

    #[test]
    fn conditions() {
        let modified = httpdate::parse_http_date("Sat, 07 Mar 2026 04:05:59 GMT").unwrap();
        let file = Validators { tag: "\"1a-5\"".to_owned(), modified };
        let (before, same, after) = (
            "Sat, 07 Mar 2026 04:05:58 GMT",
            "Sat, 07 Mar 2026 04:05:59 GMT",
            "Sun, 08 Mar 2026 00:00:00 GMT",
        );
        for (headers, status) in [
            (vec![], None),
            (vec![("if-none-match", "\"1a-5\"")], Some(304)),
            (vec![("if-none-match", "\"x\", W/\"1a-5\"")], Some(304)),
            (vec![("if-none-match", "*")], Some(304)),
            (vec![("if-none-match", "\"1a-55\"")], None),
            (vec![("if-none-match", "\"other\""), ("if-modified-since", after)], None),
            (vec![("if-modified-since", before)], None),
            (vec![("if-modified-since", same)], Some(304)),
            (vec![("if-modified-since", after)], Some(304)),
            (vec![("if-modified-since", "yesterday")], None),
            (vec![("if-match", "\"1a-5\"")], None),
            (vec![("if-match", "\"other\"")], Some(412)),
            (vec![("if-unmodified-since", before)], Some(412)),
            (vec![("if-unmodified-since", same)], None),
            (vec![("if-match", "*"), ("if-unmodified-since", before)], None),
        ] {
            let map = headers.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect();
            assert_eq!(file.precondition(&map).map(|s| s.as_u16()), status, "{headers:?}");
        }
        for (value, wanted) in
            [("\"1a-5\"", true), ("\"x\"", false), (before, false), (same, true), ("?", false)]
        {
            let map = HeaderMap::from_iter([(IF_RANGE, value.parse().unwrap())]);
            assert_eq!(file.may_split(&map), wanted, "{value}");
        }
        assert!(file.may_split(&HeaderMap::new()));
    }

    #[test]
    fn only_harmless_types_are_inline() {
        let none = HeaderMap::new();
        for name in [
            "a.html",
            "a.htm",
            "a.xhtml",
            "a.js",
            "a.mjs",
            "a.css",
            "a.svg",
            "a.xml",
            "a.pdf",
            "a.txt",
            "a.md",
            "a.swf",
            "a.hta",
            "a.xsl",
            "a.shtml",
            "a.php",
            "a.safetensors",
            "a.latent",
            "a",
            ".html",
            "a.png.html",
        ] {
            assert_eq!(content_type(name, &none), (OPAQUE, false), "{name}");
        }
        assert_eq!(content_type("a.PNG", &none), ("image/png", true));
        assert_eq!(content_type("a.html.png", &none), ("image/png", true));
        let mut in_page = HeaderMap::new();
        in_page.insert("sec-fetch-dest", HeaderValue::from_static("image"));
        assert_eq!(content_type("a.svg", &in_page), ("image/svg+xml", true));
    }

    #[test]
    fn dispositions() {
        assert_eq!(disposition("a b (1).png", true), "filename=\"a b (1).png\"");
        assert_eq!(disposition("x.html", false), "attachment; filename=\"x.html\"");
        assert_eq!(disposition("ä\".png", true), "filename=\"__.png\"; filename*=UTF-8''%C3%A4%22.png");
        assert_eq!(disposition("a\r\nb.png", true), "filename=\"a__b.png\"; filename*=UTF-8''a%0D%0Ab.png");
    }
}
