//! Peers that are slow, huge, or speak broken HTTP; and stopping under load.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::{Answer, PATIENCE, Server};

/// Reads until the connection ends.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // a reset ends the connection as well
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the connection stays open");
    bytes
}

#[tokio::test]
async fn slow_heads_are_cut_off_while_others_are_served() {
    let server = Server::with(|config| config.limits.header_timeout = Duration::from_millis(500)).await;
    let mut slow = Vec::new();
    for _ in 0..100 {
        let mut stream = server.connect().await;
        stream.write_all(b"GET /queue HT").await.unwrap();
        slow.push(stream);
    }
    let began = Instant::now();
    assert_eq!(server.get("/queue").await.status, 200);
    assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
    for stream in &mut slow {
        let _ = stream.write_all(b"T").await;
        rest(stream).await;
    }
    assert!(began.elapsed() < Duration::from_secs(5), "all are closed: {:?}", began.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn stalled_and_trickled_bodies_are_cut_off() {
    let server = Server::with(|config| {
        config.limits.body_idle = Duration::from_millis(300);
        config.limits.body_bytes_per_idle_span = 1000;
    })
    .await;
    let head = b"POST /prompt HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n\r\n";
    let mut stalled = server.connect().await;
    stalled.write_all(head).await.unwrap();
    let began = Instant::now();
    assert_eq!(Answer::parse(&rest(&mut stalled).await).status, 408);
    assert!(began.elapsed() < Duration::from_secs(5));
    let (mut read, mut write) = server.connect().await.into_split();
    write.write_all(head).await.unwrap();
    let trickle = tokio::spawn(async move {
        while write.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    });
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, read.read_to_end(&mut bytes)).await.expect("a trickle is cut off");
    assert_eq!(Answer::parse(&bytes).status, 408);
    drop(read);
    timeout(PATIENCE, trickle).await.unwrap().unwrap();
    server.stop().await;
}

#[tokio::test]
async fn huge_bodies_are_refused() {
    let server = Server::with(|config| config.limits.max_body_bytes = 1024 * 1024).await;
    // declared: refused with no body byte read, and no invitation to send it
    let mut declared = server.connect().await;
    let head = "POST /upload/image HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n\
                Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 106000000\r\n\r\n";
    declared.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0_u8; 12];
    timeout(PATIENCE, declared.read_exact(&mut first)).await.unwrap().unwrap();
    assert_eq!(&first, b"HTTP/1.1 413");
    // a client that sends it all the same still reads the answer
    let mut sending = server.connect().await;
    sending
        .write_all(head.replace("Expect: 100-continue\r\n", "").replace("106000000", "2000000").as_bytes())
        .await
        .unwrap();
    sending.write_all(&vec![b'x'; 2_000_000]).await.unwrap();
    assert_eq!(Answer::parse(&rest(&mut sending).await).status, 413);
    // undeclared
    for path in ["/prompt", "/upload/image"] {
        let mut chunked = server.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\
             Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        );
        chunked.write_all(head.as_bytes()).await.unwrap();
        let part = b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\n\r\n";
        let mut body = format!("{:x}\r\n", part.len()).into_bytes();
        body.extend_from_slice(part);
        body.extend_from_slice(b"\r\n");
        for _ in 0..40 {
            body.extend_from_slice(b"8000\r\n");
            body.resize(body.len() + 0x8000, b'x');
            body.extend_from_slice(b"\r\n");
        }
        let _ = chunked.write_all(&body).await;
        assert_eq!(Answer::parse(&rest(&mut chunked).await).status, 413, "{path}");
    }
    let left: Vec<_> = std::fs::read_dir(server.dir.path().join("temp")).unwrap().collect();
    assert_eq!(left.len(), 0, "temporary files are gone");
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_reads_nothing_is_given_up() {
    let server = Server::with(|config| config.limits.write_timeout = Duration::from_millis(500)).await;
    let big = server.dir.path().join("output/big.json");
    let file = std::fs::File::create(&big).unwrap();
    file.set_len(64 * 1024 * 1024).unwrap();
    let mut stream = server.connect().await;
    stream.write_all(b"GET /view?filename=big.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").await.unwrap();
    sleep(Duration::from_secs(3)).await;
    let got = rest(&mut stream).await;
    assert!(got.starts_with(b"HTTP/1.1 200"));
    assert!(got.len() < 32 * 1024 * 1024, "{} bytes came in spite of the pause", got.len());
    assert_eq!(server.get("/queue").await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn connections_beyond_the_cap_wait() {
    let server = Server::with(|config| {
        config.limits.connections = 4;
        config.limits.header_timeout = Duration::from_millis(700);
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(server.connect().await);
    }
    sleep(Duration::from_millis(50)).await;
    let began = Instant::now();
    assert_eq!(server.get("/queue").await.status, 200);
    assert!(began.elapsed() > Duration::from_millis(300), "it waited for a place: {:?}", began.elapsed());
    drop(held);
    server.stop().await;
}

/// Requests whose framing two servers in a row could read differently, and other junk:
/// each is refused (or, for a length beside chunked coding, answered once and the
/// connection closed, as RFC 9112, 6.3 asks), and never smuggles a second request.
#[tokio::test]
async fn ambiguous_framing_is_never_answered_twice() {
    let server = Server::start().await;
    let evil = "GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    let post = "POST /free HTTP/1.1\r\nHost: 127.0.0.1\r\n";
    let corpus: Vec<String> = [
        "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
        "Content-Length: 5\r\nContent-Length: 0\r\n\r\n",
        "Content-Length: 0\r\nContent-Length: 49\r\n\r\n",
        "Content-Length: 0, 49\r\n\r\n",
        "Content-Length: +0\r\n\r\n",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 0x0\r\n\r\n",
        "Content-Length: 99999999999999999999\r\n\r\n",
        "Content-Length : 0\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nz\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0x1\r\n",
        "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        "Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
        "X: a\0b\r\n\r\n",
        "X\0: a\r\n\r\n",
        "X a: b\r\n\r\n",
        ": empty\r\n\r\n",
        "X: a\rb\r\n\r\n",
    ]
    .iter()
    .map(|tail| format!("{post}{tail}{evil}"))
    .chain([
        format!("GET /free HTTP/9.9\r\n\r\n{evil}"),
        format!("GET\r\n\r\n{evil}"),
        format!("GET  /free  HTTP/1.1\r\n\r\n{evil}"),
        format!("\u{1}\u{2}\u{3}\r\n\r\n{evil}"),
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ".to_owned() + &"a".repeat(200_000) + "\r\n\r\n",
        "GET / HTTP/1.1\r\n".to_owned() + &"X: a\r\n".repeat(500) + "\r\n",
    ])
    .collect();
    for request in &corpus {
        let mut stream = server.connect().await;
        let _ = stream.write_all(request.as_bytes()).await;
        stream.shutdown().await.ok();
        let answer = String::from_utf8_lossy(&rest(&mut stream).await).into_owned();
        let statuses: Vec<&str> = answer.matches("HTTP/1.1 ").collect();
        let what: String = request.chars().take(120).collect();
        let is_refused =
            answer.is_empty() || ["400", "431", "413"].iter().any(|s| answer[9..].starts_with(s));
        let is_both = request.contains("Content-Length: 6\r\n") && answer.contains("connection: close");
        assert!(is_refused || is_both, "{what:?}: {answer}");
        assert!(statuses.len() <= 1, "{what:?}: {answer}");
    }
    assert_eq!(server.get("/queue").await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn stopping_lets_the_running_prompt_end_and_truncates_nothing() {
    let server = Server::start().await;
    std::fs::write(server.dir.path().join("output/answer.json"), vec![b' '; 4 * 1024 * 1024]).unwrap();
    let running =
        server.queue(json!({"1": {"class_type": "Slow", "inputs": {"steps": 100, "salt": 1}}}), None).await;
    server.eventually("/queue", |q| q["queue_running"][0].get(1).cloned()).await;
    let addr = server.addr;
    let mut downloads = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let mut stream = server.connect().await;
        stream
            .write_all(b"GET /view?filename=answer.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            .await
            .unwrap();
        downloads.spawn(async move { rest(&mut stream).await });
    }
    let stopping = tokio::spawn(server.stop());
    sleep(Duration::from_millis(100)).await;
    // while the prompt runs the server answers, but takes no more prompts
    let body = json!({"prompt": {}}).to_string();
    let request = format!(
        "POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut late = TcpStream::connect(addr).await.unwrap();
    late.write_all(request.replace("Host: x", "Host: 127.0.0.1").as_bytes()).await.unwrap();
    let refused = Answer::parse(&rest(&mut late).await);
    assert_eq!((refused.status, refused.json()["error"]["type"].as_str()), (503, Some("server_stopping")));
    let mut watch = TcpStream::connect(addr).await.unwrap();
    let history = format!("GET /history/{running} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
    watch.write_all(history.as_bytes()).await.unwrap();
    assert_eq!(Answer::parse(&rest(&mut watch).await).status, 200);
    while let Some(download) = downloads.join_next().await {
        assert_eq!(Answer::parse(&download.unwrap()).body.len(), 4 * 1024 * 1024);
    }
    timeout(PATIENCE, stopping).await.unwrap().unwrap();
    assert!(TcpStream::connect(addr).await.is_err(), "nobody listens any more");
}
