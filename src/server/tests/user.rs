//! `/userdata`, `/settings`, `/users`, `/internal`: what the web page stores and asks.

use serde_json::{Value as Json, json};

use super::{Answer, Server};

async fn put(server: &Server, path: &str, body: &str) -> Answer {
    server.send("POST", &format!("/userdata/{path}"), &[], body.as_bytes()).await
}

#[tokio::test]
async fn files_are_stored_listed_moved_and_deleted() {
    let server = Server::start().await;
    assert_eq!(server.get("/users").await.json(), json!({"storage": "server", "migrated": false}));
    let answer = put(&server, "w%2Fa.json", r#"{"x": 1}"#).await;
    assert_eq!((answer.status, answer.json()), (200, json!("w/a.json")));
    assert_eq!(server.get("/users").await.json(), json!({"storage": "server", "migrated": true}));
    let file = server.get("/api/userdata/w%2Fa.json").await;
    assert_eq!((file.status, file.json()), (200, json!({"x": 1})));
    assert_eq!(file.header("content-type"), Some("application/json"));
    assert!(file.header("etag").is_some() && file.header("last-modified").is_some());
    assert_eq!(put(&server, "w%2Fa.json?overwrite=false", "2").await.status, 409);
    assert_eq!(server.get("/userdata/w%2Fa.json").await.json(), json!({"x": 1}));
    let twice = put(&server, "w%252Fb.txt?full_info=TRUE&overwrite=no", "12345").await.json();
    assert_eq!((&twice["path"], &twice["size"]), (&json!("w/b.txt"), &json!(5)), "decoded twice");
    assert!(twice["modified"].as_f64().is_some_and(|t| t > 1.7e9) && twice["created"].is_number());
    put(&server, "w%2Fs%2Fc.txt", "c").await;
    put(&server, "w%2F.hidden", "h").await;
    for (query, wanted) in [
        ("dir=w", json!(["a.json", "b.txt"])),
        ("dir=w%2F&recurse=true", json!(["a.json", "b.txt", "s/c.txt"])),
        ("dir=w&split=true&recurse=false", json!([["a.json", "a.json"], ["b.txt", "b.txt"]])),
        ("dir=w%2Fs&split=true", json!([["c.txt", "c.txt"]])),
        (
            "dir=.&split=true&recurse=true",
            json!([["w/a.json", "w", "a.json"], ["w/b.txt", "w", "b.txt"], ["w/s/c.txt", "w", "s", "c.txt"]]),
        ),
    ] {
        assert_eq!(server.get(&format!("/userdata?{query}")).await.json(), wanted, "{query}");
    }
    let full = server.get("/userdata?dir=w&full_info=true&split=true").await.json();
    assert_eq!((&full[1]["path"], &full[1]["size"]), (&json!("b.txt"), &json!(5)));
    for (query, status, text) in [
        ("", 400, "Directory not provided"),
        ("dir=", 400, "Directory not provided"),
        ("dir=none", 404, "Directory not found"),
        ("dir=../", 403, "Invalid directory"),
        ("dir=/etc", 403, "Invalid directory"),
    ] {
        let answer = server.get(&format!("/userdata?{query}")).await;
        assert_eq!((answer.status, &answer.json()["error"]["message"]), (status, &json!(text)), "{query}");
    }
    let moved = server.post("/userdata/w%2Fb.txt/move/new%2Fd.txt", &Json::Null).await;
    assert_eq!((moved.status, moved.json()), (200, json!("new/d.txt")));
    let refused = server.post("/userdata/w%2Fa.json/move/new%2Fd.txt?overwrite=false", &Json::Null).await;
    assert_eq!((refused.status, &refused.json()["error"]["message"]), (409, &json!("File already exists")));
    for (method, path, status) in [
        ("POST", "none/move/x", 404),
        ("POST", "new%2Fd.txt/move/..%2Fx", 403),
        ("POST", "..%2Fx/move/y", 403),
        ("POST", "w", 400),
        ("POST", "w%2Fa.json%2Fx", 400),
        ("POST", "nul%00", 400),
        ("GET", "none", 404),
        ("GET", "w", 404),
        ("GET", "..%2F..%2Fmain.py", 403),
        ("GET", "%2Fetc%2Fpasswd", 403),
        ("GET", "%252e%252e%252fx", 403),
        ("GET", "w/a.json", 404),
        ("DELETE", "none", 404),
        ("DELETE", "..%2Fx", 403),
        ("DELETE", "new%2Fd.txt", 204),
        ("PUT", "new%2Fd.txt", 405),
    ] {
        let answer = server.send(method, &format!("/userdata/{path}"), &[], b"").await;
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        assert!(status != 204 || answer.body.is_empty());
    }
    server.stop().await;
}

#[tokio::test]
async fn the_new_list_shows_folders_first() {
    let server = Server::start().await;
    assert_eq!(server.get("/v2/userdata").await.json(), json!([]));
    for (path, body) in [("w%2FB.txt", "123"), ("w%2Fa.txt", "1"), ("w%2Fz%2Fc.txt", "12"), (".dot", "")] {
        put(&server, path, body).await;
    }
    let brief = |answer: Answer| -> Vec<(String, Json)> {
        let entries = answer.json();
        let entries = entries.as_array().unwrap().iter();
        entries
            .map(|e| (format!("{} {}", e["type"], e["path"]).replace('"', ""), e["size"].clone()))
            .collect()
    };
    let inside = brief(server.get("/api/v2/userdata?path=w%2F").await);
    let wanted = [
        ("directory w/z", Json::Null),
        ("file w/a.txt", 1.into()),
        ("file w/B.txt", 3.into()),
        ("file w/z/c.txt", 2.into()),
    ];
    assert_eq!(inside, wanted.map(|(text, size)| (text.to_owned(), size)));
    let all: Vec<String> =
        brief(server.get("/v2/userdata").await).into_iter().map(|(text, _)| text).collect();
    let paths =
        ["directory w", "directory w/z", "file .dot", "file w/a.txt", "file w/B.txt", "file w/z/c.txt"];
    assert_eq!(all, paths);
    for (path, status) in [("none", 404), ("../x", 400), ("/etc", 400), ("w/a.txt", 400), ("%2e%2e", 400)] {
        assert_eq!(server.get(&format!("/v2/userdata?path={path}")).await.status, status, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn stored_files_can_not_run_in_the_servers_origin() {
    let server = Server::start().await;
    let script = "<script>alert(1)</script>";
    for name in [
        "x.html",
        "x.htm",
        "x.xhtml",
        "x.svg",
        "x.js",
        "x.mjs",
        "x.xml",
        "x.css",
        "x.txt",
        "x.pdf",
        "x.HTML",
        "x",
        "x.json.html",
        "x.shtml",
        "x.xsl",
        "x.swf",
        "x.md",
        "x.hta",
        "x.php",
        "x.wasm",
        "x.vbs",
        "x.png.svg",
        "x.mht",
        "x.xht",
        "x.webmanifest",
    ] {
        put(&server, &format!("web%2F{name}"), script).await;
        let answer = server.get(&format!("/userdata/web%2F{name}")).await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, script.as_bytes()), "{name}");
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"), "{name}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{name}");
        assert!(answer.header("content-disposition").is_some_and(|d| d.starts_with("attachment;")), "{name}");
        assert_eq!(answer.header("content-security-policy"), Some("default-src 'none'; sandbox"), "{name}");
    }
    server.stop().await;
}

#[tokio::test]
async fn large_files_are_bounded_and_unfinished_ones_vanish() {
    let server = Server::with(|config| config.limits.max_body_bytes = 100_000).await;
    put(&server, "a", "old").await;
    let refused = put(&server, "a", &"x".repeat(100_001)).await;
    assert_eq!(refused.status, 413);
    let cut = b"POST /userdata/a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 90000\r\n\r\npart";
    let mut stream = server.connect().await;
    tokio::io::AsyncWriteExt::write_all(&mut stream, cut).await.unwrap();
    tokio::io::AsyncWriteExt::shutdown(&mut stream).await.unwrap();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut Vec::new()).await.unwrap();
    assert_eq!(server.get("/userdata/a").await.body, b"old");
    let folder = server.dir.path().join("user/default");
    let end = tokio::time::Instant::now() + super::PATIENCE;
    while std::fs::read_dir(&folder).unwrap().count() != 1 {
        assert!(tokio::time::Instant::now() < end, "an unfinished file stays");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn settings_are_merged_and_survive() {
    let server = Server::start().await;
    assert_eq!(server.get("/settings").await.json(), json!({}));
    let stored = server.post("/settings", &json!({"a": 1, "b": {"deep": [true]}})).await;
    assert_eq!((stored.status, stored.body.len(), stored.header("content-length")), (200, 0, Some("0")));
    server.post("/api/settings", &json!({"a": 2})).await;
    let plain = [("Content-Type", "text/plain;charset=UTF-8")];
    assert_eq!(server.send("POST", "/settings/Comfy.One%20x", &plain, b"\"text\"").await.status, 200);
    let wanted = json!({"a": 2, "b": {"deep": [true]}, "Comfy.One x": "text"});
    assert_eq!(server.get("/settings").await.json(), wanted);
    assert_eq!(server.get("/api/settings/Comfy.One%20x").await.json(), json!("text"));
    assert_eq!(server.get("/settings/none").await.json(), Json::Null);
    for body in ["", "[1]", "{", "5"] {
        assert_eq!(server.send("POST", "/settings", &[], body.as_bytes()).await.status, 400, "{body}");
    }
    for body in ["", "{", "NaN"] {
        assert_eq!(server.send("POST", "/settings/a", &[], body.as_bytes()).await.status, 400, "{body}");
    }
    assert_eq!(server.get("/settings").await.json(), wanted, "refusals change nothing");
    let posts = (0..20).map(|i| {
        let server = &server;
        async move { server.post("/settings", &json!({format!("n{i}"): i})).await.status }
    });
    assert!(futures_util::future::join_all(posts).await.iter().all(|status| *status == 200));
    let all = server.get("/settings").await.json();
    assert_eq!(all.as_object().unwrap().len(), 23, "none is lost: {all}");
    let file = server.dir.path().join("user/default/comfy.settings.json");
    std::fs::write(&file, b"{broken").unwrap();
    assert_eq!(server.get("/settings").await.json(), json!({}));
    server.stop().await;
}

fn as_user(id: &str) -> [(&str, &str); 1] {
    [("comfy-user", id)]
}

#[tokio::test]
async fn users_are_kept_apart() {
    let alone = Server::start().await;
    assert_eq!(alone.send("GET", "/settings", &[("comfy-user", "nobody")], b"").await.status, 200);
    assert_eq!(alone.post("/users", &json!({"username": "Ann"})).await.status, 400);
    alone.stop().await;
    let server = Server::with(|config| config.multi_user = true).await;
    assert_eq!(server.get("/users").await.json(), json!({"storage": "server", "users": {}}));
    let added = server.post("/users", &json!({"username": "A b/c"})).await;
    let ann = added.json().as_str().unwrap().to_owned();
    assert!(added.status == 200 && ann.starts_with("A-b-c_") && ann.len() == 6 + 36, "{added:?}");
    let bob = server.post("/users", &json!({"username": "Bob"})).await.json().as_str().unwrap().to_owned();
    let twin = server.post("/users", &json!({"username": "A b/c"})).await;
    assert_eq!((twin.status, twin.json()), (400, json!({"error": "Duplicate username."})));
    for body in [json!({}), json!({"username": 5}), json!({"username": "  "}), json!(["x"])] {
        assert_eq!(server.post("/users", &body).await.status, 400, "{body}");
    }
    let users = server.get("/users").await.json();
    assert_eq!(users["users"], json!({&ann: "A b/c", &bob: "Bob"}));
    let stored = server.send("POST", "/settings", &as_user(&ann), br#"{"x": 1}"#).await;
    assert_eq!(stored.status, 200);
    assert_eq!(server.send("POST", "/userdata/f", &as_user(&ann), b"hers").await.status, 200);
    assert_eq!(server.send("GET", "/settings", &as_user(&ann), b"").await.json(), json!({"x": 1}));
    assert_eq!(server.send("GET", "/settings", &as_user(&bob), b"").await.json(), json!({}));
    assert_eq!(server.send("GET", "/userdata/f", &as_user(&bob), b"").await.status, 404);
    let other = format!("..%2F{ann}%2Ff");
    assert_eq!(server.send("GET", &format!("/userdata/{other}"), &as_user(&bob), b"").await.status, 403);
    for stranger in ["nobody", "..", "default", ""] {
        for (method, path) in [
            ("GET", "/settings"),
            ("GET", "/settings/x"),
            ("POST", "/settings"),
            ("POST", "/settings/x"),
            ("GET", "/userdata?dir=."),
            ("GET", "/v2/userdata"),
            ("GET", "/userdata/f"),
            ("POST", "/userdata/f"),
            ("DELETE", "/userdata/f"),
            ("POST", "/userdata/f/move/g"),
        ] {
            let answer = server.send(method, path, &as_user(stranger), b"").await;
            let status = if path == "/v2/userdata" { 403 } else { 401 };
            assert_eq!(answer.status, status, "{method} {path}");
            assert!(answer.json()["error"]["message"].is_string(), "{answer:?}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn what_only_the_web_page_asks() {
    let server = Server::start().await;
    for path in ["/workflow_templates", "/i18n", "/global_subgraphs"] {
        assert_eq!(server.get(path).await.json(), json!({}), "{path}");
        assert_eq!(server.get(&format!("/api{path}")).await.json(), json!({}), "{path}");
    }
    assert_eq!(server.get("/global_subgraphs/x").await.json(), Json::Null);
    let folders = server.get("/internal/folder_paths").await.json();
    assert!(folders["checkpoints"][0].as_str().is_some_and(|p| p.ends_with("models/checkpoints")));
    let names: Vec<&String> = folders.as_object().unwrap().keys().collect();
    assert_eq!(json!(names), server.get("/models").await.json());
    let input = server.dir.path().join("input");
    for (age, name) in ["new.png", "old.txt"].into_iter().enumerate() {
        std::fs::write(input.join(name), b"x").unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(60 * age as u64);
        std::fs::File::open(input.join(name)).unwrap().set_modified(time).unwrap();
    }
    assert_eq!(server.get("/internal/files/input").await.json(), json!(["new.png", "old.txt"]));
    let wrong = server.get("/internal/files/models").await;
    assert_eq!((wrong.status, wrong.json()), (400, json!({"error": "Invalid directory type"})));
    for path in ["/api/internal/logs", "/api/internal/files/input", "/internal"] {
        assert_eq!(server.get(path).await.status, 404, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn the_log_is_shown() {
    let log = super::super::LogTail::default();
    let tail = log.clone();
    let server = Server::with(|config| config.log = tail).await;
    assert_eq!(server.get("/internal/logs").await.json(), json!(""));
    use std::io::Write as _;
    use tracing_subscriber::fmt::MakeWriter as _;
    writeln!(log.make_writer(), "one").unwrap();
    writeln!(log.make_writer(), "two").unwrap();
    let text = server.get("/internal/logs").await.json();
    assert!(text.as_str().is_some_and(|t| t.ends_with(" - two\n") && t.lines().count() == 2), "{text}");
    let raw = server.get("/internal/logs/raw").await.json();
    assert_eq!((&raw["entries"][0]["m"], &raw["size"]), (&json!("one\n"), &json!({"cols": 80, "rows": 24})));
    for (body, status) in [
        (r#"{"clientId": "x", "enabled": true}"#, 200),
        (r#"{"clientId": "x", "enabled": false}"#, 200),
        (r#"{"enabled": true}"#, 400),
        ("", 400),
    ] {
        let answer = server.send("PATCH", "/internal/logs/subscribe", &[], body.as_bytes()).await;
        assert_eq!(answer.status, status, "{body}");
    }
    server.stop().await;
}
