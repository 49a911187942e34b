//! Row 10, web pages of others: a loopback server refuses foreign names (DNS rebinding) and foreign
//! origins by default. The whole table of 38 rows stands beside the rule, in `server::origin`; these
//! go over the wire, the WebSocket included.

use super::process::Server;
use super::wire::send;

#[test]
fn rebinding_and_foreign_origins_are_refused_by_default() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &["--allowed-hosts", "kiln.lan"]);
    let port = server.address().rsplit(':').next().unwrap().to_owned();
    let own = format!("127.0.0.1:{port}");
    let upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    // a handshake that is let in would stay open: only refusals are asked for
    let wanted_socket = |plain: u16, headers: &[(&str, &str)]| match plain {
        403 => send(&server, "GET", "/ws", headers, b"").status,
        other => other,
    };
    let row = |host: &str, origin: &str, site: &str| {
        let mut headers = vec![("Host", host)];
        headers.extend([("Origin", origin), ("Sec-Fetch-Site", site)].iter().filter(|(_, v)| !v.is_empty()));
        let plain = send(&server, "POST", "/free", &headers, b"").status;
        headers.extend(upgrade);
        (plain, wanted_socket(plain, &headers))
    };
    let (evil, evil_page) = (format!("evil.example:{port}"), format!("http://evil.example:{port}"));
    let own = own.as_str();
    for (host, origin, site, wanted) in [
        ("evil.example", "", "", 403),
        (evil.as_str(), evil_page.as_str(), "same-origin", 403),
        ("localhost.evil.example", "", "", 403),
        (own, "http://evil.example", "cross-site", 403),
        (own, "null", "", 403),
        (own, "", "cross-site", 403),
        (own, "http://127.0.0.1:1", "same-site", 403),
        (own, "", "", 200),
    ] {
        let (plain, socket) = row(host, origin, site);
        assert_eq!(plain, wanted, "{host} {origin} {site}");
        assert_eq!(socket, wanted, "WebSocket: {host} {origin} {site}");
    }
    for host in ["kiln.lan".to_owned(), format!("kiln.lan:{port}"), format!("localhost:{port}")] {
        assert_eq!(send(&server, "POST", "/free", &[("Host", &host)], b"").status, 200, "{host}");
    }
}
