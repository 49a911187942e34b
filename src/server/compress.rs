//! gzip for text answers (`--enable-compress-response-body`).
//!
//! Only what is in memory and made of text is compressed: pictures are already
//! small, and files are sent with their length and ranges.

use async_compression::tokio::write::GzipEncoder;
use bytes::Bytes;
use hyper::HeaderMap;
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, VARY};
use tokio::io::AsyncWriteExt;

use super::http::{self, Body, Response};

/// Larger answers are compressed on a blocking thread.
const INLINE_BYTES: usize = 16 * 1024;

/// Whether `Accept-Encoding` names gzip (or `*`) with a weight above zero.
pub(super) fn accepts_gzip(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).any(
        |item| {
            let mut parts = item.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let weight =
                parts.find_map(|p| p.strip_prefix("q=")).and_then(|q| q.parse::<f32>().ok()).unwrap_or(1.0);
            (name.eq_ignore_ascii_case("gzip") || name == "*") && weight > 0.0
        },
    )
}

fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.starts_with("application/json") || kind.starts_with("text/")
}

async fn encode(plain: Bytes) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzipEncoder::new(Vec::with_capacity(plain.len() / 4));
    encoder.write_all(&plain).await?;
    encoder.shutdown().await?;
    Ok(encoder.into_inner())
}

/// Large texts keep a thread busy for milliseconds: not one that answers others.
async fn encode_anywhere(plain: Bytes) -> std::io::Result<Vec<u8>> {
    if plain.len() <= INLINE_BYTES {
        return encode(plain).await;
    }
    let work = move || tokio::runtime::Handle::current().block_on(encode(plain));
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}

/// Compresses an answer made of text, however short, as ComfyUI does.
pub(super) async fn gzip(response: Response) -> Response {
    let (mut head, body) = response.into_parts();
    let plain = match body {
        Body::Bytes(bytes)
            if !bytes.is_empty()
                && is_text(&head.headers)
                && !head.headers.contains_key(CONTENT_ENCODING) =>
        {
            bytes
        }
        other => return Response::from_parts(head, other),
    };
    match encode_anywhere(plain.clone()).await {
        Ok(small) => {
            head.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            let mut response = Response::from_parts(head, Body::Bytes(small.into()));
            http::set(&mut response, VARY, "Accept-Encoding");
            response
        }
        Err(_) => Response::from_parts(head, Body::Bytes(plain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_encoding() {
        for (value, wanted) in [
            ("gzip", true),
            ("deflate, GZIP;q=0.5", true),
            ("*", true),
            ("gzip;q=0", false),
            ("identity", false),
            ("br, deflate", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(value));
            assert_eq!(accepts_gzip(&headers), wanted, "{value}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
