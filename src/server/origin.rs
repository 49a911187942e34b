//! Which web pages may talk to this server.
//!
//! A server on the user's own machine is reachable by every page that the
//! user's browser shows. Browsers say where a request comes from, programs
//! don't; so what carries no such sign passes, and the signs are checked:
//!
//! | sign | rule |
//! | --- | --- |
//! | `Origin` | on a loopback `Host`: host and port must equal `Host` (as ComfyUI does); `null` is no origin of ours |
//! | `Sec-Fetch-Site: cross-site` | on a loopback `Host`: only plain navigation (a link to the page) |
//! | `Host` | on a loopback connection: an address, `localhost`, or a name the operator allowed. Anything else is a foreign name that was pointed at this machine (DNS rebinding) |
//!
//! With `--enable-cors-header` the operator has opened the server to other
//! sites: the checks are off and CORS headers are sent instead, as in ComfyUI.

use std::net::IpAddr;

use hyper::header::{HOST, HeaderValue, ORIGIN};
use hyper::{HeaderMap, Method};

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A page of another site asks.
    ForeignOrigin,
    /// The `Host` name is not ours.
    ForeignHost,
}

/// What the check needs to know about the server.
#[derive(Clone, Debug, Default)]
pub struct OriginPolicy {
    /// `--enable-cors-header`: the origin to allow (`*` for all).
    pub cors: Option<String>,
    /// `--allowed-hosts`: further names under which this server is reached.
    pub allowed_hosts: Vec<String>,
}

/// Splits `host[:port]` (an IPv6 address stands in brackets).
fn split_host(authority: &str) -> (&str, Option<&str>) {
    let name_end = authority.rfind(']').map_or(0, |i| i + 1);
    match authority[name_end..].find(':') {
        Some(colon) => (&authority[..name_end + colon], Some(&authority[name_end + colon + 1..])),
        None => (authority, None),
    }
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

fn is_local_name(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

fn is_loopback(host: &str) -> bool {
    match address(host) {
        Some(IpAddr::V6(v6)) => v6.to_canonical().is_loopback(),
        Some(v4) => v4.is_loopback(),
        None => is_local_name(host),
    }
}

/// Whether `Origin: scheme://host[:port]` names the same host and port as `Host`.
pub(super) fn same_place(origin: &str, host: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let default_port = match scheme {
        "http" => "80",
        "https" => "443",
        _ => return false,
    };
    let (origin_name, origin_port) = split_host(authority);
    let (name, port) = split_host(host);
    origin_name.eq_ignore_ascii_case(name)
        && origin_port.unwrap_or(default_port) == port.unwrap_or(default_port)
}

impl OriginPolicy {
    /// Checks one request. `via_loopback`: the connection came in on a loopback address.
    pub fn check(&self, method: &Method, headers: &HeaderMap, via_loopback: bool) -> Result<(), Refusal> {
        if self.cors.is_some() {
            return Ok(());
        }
        let text = |value: Option<&HeaderValue>| value.map(|v| v.to_str().unwrap_or("\u{fffd}").to_owned());
        let host = text(headers.get(HOST)).unwrap_or_default();
        let (name, _) = split_host(&host);
        let is_allowed = self.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
        if via_loopback && !name.is_empty() && !is_allowed && address(name).is_none() && !is_local_name(name)
        {
            return Err(Refusal::ForeignHost);
        }
        if !is_loopback(name) {
            return Ok(());
        }
        if text(headers.get(ORIGIN)).is_some_and(|origin| !same_place(&origin, &host)) {
            return Err(Refusal::ForeignOrigin);
        }
        let fetch = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
        let is_navigation = method == Method::GET && fetch("sec-fetch-mode") == Some(b"navigate");
        if fetch("sec-fetch-site") == Some(b"cross-site") && !is_navigation {
            return Err(Refusal::ForeignOrigin);
        }
        Ok(())
    }

    /// Adds the CORS headers that `--enable-cors-header` asks for.
    pub fn add_cors(&self, headers: &mut HeaderMap) {
        let Some(origin) = self.cors.as_ref().and_then(|o| HeaderValue::from_str(o).ok()) else { return };
        for (name, value) in [
            ("access-control-allow-origin", origin),
            ("access-control-allow-methods", HeaderValue::from_static("POST, GET, DELETE, PUT, OPTIONS")),
            ("access-control-allow-headers", HeaderValue::from_static("Content-Type, Authorization")),
            ("access-control-allow-credentials", HeaderValue::from_static("true")),
        ] {
            headers.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: Result<(), Refusal> = Ok(());
    const ORIGIN_403: Result<(), Refusal> = Err(Refusal::ForeignOrigin);

    /// Host, Origin, Sec-Fetch-Site, Sec-Fetch-Mode, connection, outcome; `tests/faults/origins.rs` sends the same.
    const TABLE: &str = include_str!("../../tests/data/origins.tsv");

    #[test]
    fn table() {
        let policy = OriginPolicy { cors: None, allowed_hosts: vec!["kiln.lan".to_owned()] };
        let rows: Vec<Vec<&str>> =
            TABLE.lines().filter(|l| !l.starts_with('#')).map(|l| l.split('\t').collect()).collect();
        assert_eq!(rows.len(), 38);
        for row in rows {
            let mut headers = HeaderMap::new();
            for (name, value) in ["host", "origin", "sec-fetch-site", "sec-fetch-mode"].into_iter().zip(&row)
            {
                if *value != "-" {
                    let value = if *value == "\"\"" { "" } else { value };
                    headers.insert(name, HeaderValue::from_static(value));
                }
            }
            let wanted = match row[5] {
                "ok" => OK,
                "foreign-origin" => ORIGIN_403,
                "foreign-host" => Err(Refusal::ForeignHost),
                other => panic!("{other}"),
            };
            assert_eq!(policy.check(&Method::GET, &headers, row[4] == "loopback"), wanted, "{row:?}");
        }
    }

    #[test]
    fn navigation_is_get_only() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("host", "localhost"), ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let policy = OriginPolicy::default();
        assert_eq!(policy.check(&Method::GET, &headers, true), OK);
        assert_eq!(policy.check(&Method::POST, &headers, true), ORIGIN_403);
    }

    #[test]
    fn cors_replaces_the_check() {
        let policy = OriginPolicy { cors: Some("*".to_owned()), allowed_hosts: Vec::new() };
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("127.0.0.1:8188"));
        headers.insert("origin", HeaderValue::from_static("http://other.example"));
        assert_eq!(policy.check(&Method::POST, &headers, true), OK);
        let mut answer = HeaderMap::new();
        policy.add_cors(&mut answer);
        assert_eq!(answer["access-control-allow-origin"], "*");
        assert_eq!(answer["access-control-allow-methods"], "POST, GET, DELETE, PUT, OPTIONS");
        assert_eq!(answer.len(), 4);
    }
}
