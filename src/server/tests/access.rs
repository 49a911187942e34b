//! API keys on every route, TLS, limits of one client.

use std::path::Path;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Error;

use super::{Answer, Server};
use crate::server::{Auth, routes, tls};

const KEY: &str = "0123456789abcdef-key";

#[tokio::test]
async fn every_route_asks_for_the_key() {
    let server = Server::with(|config| config.auth = Auth::with_keys([KEY])).await;
    let routes = routes::all().patterns();
    assert!(routes.len() > 50, "{routes:?}");
    let mut refused = 0;
    for (method, pattern) in &routes {
        let path = pattern.replace("{*", "{").replace(['{', '}'], "");
        let is_open = matches!(path.as_str(), "/health" | "/v2/health");
        for path in [path.clone(), format!("/api{path}")] {
            let answer = server.send(method.as_str(), &path, &[], b"").await;
            if is_open {
                assert_eq!(answer.status, 200, "{path}");
                continue;
            }
            assert_eq!(answer.status, 401, "{method} {path}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert!(answer.json()["error"].is_object(), "{method} {path}: {answer:?}");
            refused += 1;
        }
    }
    assert!(refused > 100, "{refused}");
    let bearer = format!("Bearer {KEY}");
    let allowed = server.send("GET", "/queue", &[("Authorization", &bearer)], b"").await;
    assert_eq!(allowed.status, 200);
    let wrong = server.send("GET", "/queue", &[("Authorization", "Bearer 0123456789abcdef-kez")], b"").await;
    assert_eq!(wrong.status, 401);
    assert_eq!(server.get(&format!("/queue?token={KEY}")).await.status, 401, "not in every address");
    assert_eq!(
        server.get(&format!("/view?filename=none.png&token={KEY}")).await.status,
        404,
        "let in, not found"
    );
    let page = server.get(&format!("/?token={KEY}")).await;
    let cookie = page.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    assert_eq!(server.send("GET", "/queue", &[("Cookie", &cookie)], b"").await.status, 200);
    let refused = client_async(format!("ws://{}/ws", server.addr), server.connect().await).await;
    assert!(matches!(&refused, Err(Error::Http(answer)) if answer.status() == 401));
    let socket = client_async(format!("ws://{}/ws?token={KEY}", server.addr), server.connect().await).await;
    assert!(socket.is_ok());
    drop(socket);
    server.stop().await;
}

#[tokio::test]
async fn one_client_has_so_many_places() {
    let server = Server::with(|config| {
        config.limits.prompts_per_client = 2;
        config.auth = Auth::with_keys(["first", "second"]);
    })
    .await;
    let post = async |key: &str, salt: u64| {
        let body =
            json!({"prompt": {"1": {"class_type": "Slow", "inputs": {"steps": 1_000_000, "salt": salt}}}});
        let bearer = format!("Bearer {key}");
        let answer =
            server.send("POST", "/prompt", &[("Authorization", &bearer)], body.to_string().as_bytes()).await;
        (
            answer.status,
            answer.header("retry-after").map(str::to_owned),
            answer.json()["error"]["type"].clone(),
        )
    };
    assert_eq!((post("first", 1).await.0, post("first", 2).await.0), (200, 200));
    assert_eq!(post("first", 3).await, (429, Some("5".to_owned()), json!("client_queue_full")));
    assert_eq!(post("second", 4).await.0, 200, "others are not affected");
    let bearer = ("Authorization", "Bearer first");
    server.send("POST", "/queue", &[bearer], b"{\"clear\": true}").await;
    server.send("POST", "/interrupt", &[bearer], b"").await;
    server.stop().await;
}

#[tokio::test]
async fn connections_can_be_encrypted() {
    // made once with openssl, for localhost, good for a hundred years
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tls");
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let config = tls::load(&cert, &key).unwrap();
    assert!(tls::load(&key, &key).is_err() && tls::load(&cert, &cert).is_err());
    let server = Server::with(|server| server.tls = Some(config)).await;

    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&cert).unwrap()).unwrap();
    let provider = Arc::new(crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = TlsConnector::from(Arc::new(client.with_root_certificates(roots).with_no_client_auth()));
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = client.connect(name, server.connect().await).await.unwrap();
    let body =
        json!({"prompt": {"9": {"class_type": "Keep", "inputs": {"name": "tls"}}}, "wait": true}).to_string();
    let head = format!(
        "POST /prompt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = Answer::parse(&answer);
    assert_eq!(
        (answer.status, answer.json()["files"][0]["url"].as_str().unwrap().split("://").next()),
        (200, Some("https"))
    );
    // plain HTTP and silence don't hold a place
    let mut plain = server.connect().await;
    plain.write_all(b"GET /queue HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest).await;
    assert!(!rest.starts_with(b"HTTP/"), "{rest:?}");
    server.stop().await;
}
