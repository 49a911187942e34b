//! Row 10, web pages of others: a loopback server refuses foreign names (DNS rebinding) and foreign
//! origins by default. The table of 38 rows, `tests/data/origins.tsv`, stands for the rule in
//! `server::origin` too; here each row goes over the wire as a page's request and as a WebSocket.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use super::process::Server;

const TABLE: &str = include_str!("../data/origins.tsv");
const HANDSHAKE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// An address of this machine besides loopback. Connecting a UDP socket sends nothing.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

/// The status of an answer; the body is not waited for, a WebSocket would stay open.
fn status(address: SocketAddr, method: &str, path: &str, headers: &str) -> u16 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nContent-Length: 0\r\n{headers}\r\n").unwrap();
    let mut head = [0_u8; 12];
    stream.read_exact(&mut head).unwrap();
    String::from_utf8_lossy(&head[9..]).parse().unwrap()
}

/// A row with the server's own port as header lines.
fn headers(row: &[&str], port: u16) -> String {
    let names = ["Host", "Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode"];
    let line = |(name, value): (&str, &&str)| match *value {
        "-" => String::new(),
        "\"\"" => format!("{name}: \r\n"),
        value => format!("{name}: {}\r\n", value.replace(":8188", &format!(":{port}"))),
    };
    names.into_iter().zip(row).map(line).collect()
}

#[test]
fn rebinding_and_foreign_origins_are_refused_by_default() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &["--listen", "0.0.0.0", "--allowed-hosts", "kiln.lan"]);
    let port: u16 = server.address().rsplit(':').next().unwrap().parse().unwrap();
    let network = own_address();
    let (mut asked, mut left_out) = (0, 0);
    for row in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let row: Vec<&str> = row.split('\t').collect();
        let address = if row[4] == "loopback" { Some(Ipv4Addr::LOCALHOST.into()) } else { network };
        let Some(address) = address.map(|ip| SocketAddr::new(ip, port)) else {
            left_out += 1;
            continue;
        };
        let headers = headers(&row, port);
        let (page, socket, post) = if row[5] == "ok" { (200, 101, 200) } else { (403, 403, 403) };
        assert_eq!(status(address, "GET", "/prompt", &headers), page, "{row:?}");
        assert_eq!(
            status(address, "GET", "/ws", &format!("{headers}{HANDSHAKE}")),
            socket,
            "WebSocket: {row:?}"
        );
        // a link to the page may be followed from elsewhere; nothing else that navigates may
        let post = if row[2] == "cross-site" && row[3] == "navigate" { 403 } else { post };
        assert_eq!(status(address, "POST", "/free", &headers), post, "POST: {row:?}");
        asked += 1;
    }
    if left_out > 0 {
        eprintln!("skipped: {left_out} rows, as this machine has no address but loopback");
    }
    eprintln!("{asked} of 38 rows over the wire");
    assert_eq!(asked + left_out, 38);
}
