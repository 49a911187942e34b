//! Status, headers and body of every route that needs no file.

use serde_json::json;

use super::Server;

const JSON: &str = "application/json; charset=utf-8";

fn graph(value: u64) -> serde_json::Value {
    json!({"1": {"class_type": "Number", "inputs": {"value": value}},
           "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}}})
}

#[tokio::test]
async fn page_and_facts() {
    let server = Server::start().await;
    let page = server.get("/").await;
    assert_eq!((page.status, page.header("cache-control")), (200, Some("no-cache")));
    assert!(page.header("content-type").is_some_and(|t| t.starts_with("text/html")));
    assert!(String::from_utf8_lossy(&page.body).contains("<html"));
    let features = server.get("/features").await;
    assert_eq!(features.header("content-type"), Some(JSON));
    assert_eq!(features.json(), json!({"supports_preview_metadata": true, "max_upload_size": 104_857_600}));
    assert_eq!(server.get("/api/features").await.json(), features.json());
    let stats = server.get("/system_stats").await.json();
    assert_eq!(stats["system"]["comfyui_version"], "0.3.64");
    assert_eq!(stats["system"]["argv"], json!(["kiln"]));
    assert_eq!(stats["devices"][0]["type"], "cpu");
    assert_eq!(stats["devices"][0]["index"], json!(null));
    let (total, free) =
        (stats["system"]["ram_total"].as_u64().unwrap(), stats["system"]["ram_free"].as_u64().unwrap());
    assert!(free <= total);
    assert_eq!(server.get("/extensions").await.json(), json!([]));
    server.stop().await;
}

#[tokio::test]
async fn methods_and_paths() {
    let server = Server::start().await;
    for (method, path, status) in [
        ("GET", "/no_such_route", 404),
        ("GET", "/api/no_such_route", 404),
        ("GET", "/api", 404),
        ("GET", "/interrupt", 404),
        ("GET", "/free", 404),
        ("HEAD", "/interrupt", 404),
        ("HEAD", "/prompt", 200),
        ("DELETE", "/prompt", 405),
        ("PUT", "/interrupt", 405),
        ("OPTIONS", "/prompt", 200),
        ("OPTIONS", "/anything", 200),
        ("GET", "/prompt/", 404),
    ] {
        let answer = server.send(method, path, &[], b"").await;
        assert_eq!(answer.status, status, "{method} {path}");
        if status == 404 && method != "HEAD" {
            assert_eq!(answer.json()["error"]["type"], "not_found", "{method} {path}");
        }
    }
    assert_eq!(server.send("DELETE", "/prompt", &[], b"").await.header("allow"), Some("GET,HEAD,POST"));
    assert_eq!(server.send("PUT", "/interrupt", &[], b"").await.header("allow"), Some("GET,HEAD,POST"));
    assert_eq!(server.send("DELETE", "/features", &[], b"").await.header("allow"), Some("GET,HEAD"));
    server.stop().await;
}

#[tokio::test]
async fn prompt_queue_history() {
    let server = Server::start().await;
    assert_eq!(server.get("/prompt").await.json(), json!({"exec_info": {"queue_remaining": 0}}));
    assert_eq!(server.get("/queue").await.json(), json!({"queue_running": [], "queue_pending": []}));
    let answer =
        server.post("/prompt", &json!({"prompt": graph(7), "client_id": "me", "prompt_id": "mine"})).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some(JSON)));
    assert_eq!(answer.json(), json!({"prompt_id": "mine", "number": 0, "node_errors": {}}));
    let entry = server.finished("mine").await;
    assert_eq!(entry["prompt"], json!([0, "mine", graph(7), {"client_id": "me"}, ["2"]]));
    let second = server.queue(graph(8), None).await;
    server.finished(&second).await;
    let newest = server.get("/history?max_items=1").await.json();
    assert_eq!(newest.as_object().unwrap().keys().collect::<Vec<_>>(), [&second]);
    let first = server.get("/history?max_items=1&offset=0").await.json();
    assert_eq!(first.as_object().unwrap().keys().collect::<Vec<_>>(), ["mine"]);
    assert_eq!(server.get("/history?max_items=x").await.status, 400);
    let deleted = server.post("/history", &json!({"delete": ["mine"]})).await;
    assert_eq!((deleted.status, deleted.body.len(), deleted.header("content-length")), (200, 0, Some("0")));
    assert_eq!(server.get("/history/mine").await.json(), json!({}));
    assert_eq!(server.post("/history", &json!({"clear": true})).await.status, 200);
    assert_eq!(server.get("/history").await.json(), json!({}));
    server.stop().await;
}

#[tokio::test]
async fn waiting_prompts_are_deleted_and_running_ones_interrupted() {
    let server = Server::start().await;
    let slow = server
        .queue(json!({"1": {"class_type": "Slow", "inputs": {"steps": 1_000_000, "salt": 1}}}), None)
        .await;
    server.eventually("/queue", |q| q["queue_running"][0].get(1).cloned()).await;
    let one = server.queue(graph(1), None).await;
    let two = server.queue(graph(2), None).await;
    assert_eq!(server.get("/prompt").await.json()["exec_info"]["queue_remaining"], 3);
    let deleted = server.post("/queue", &json!({"delete": [one, "unknown"]})).await;
    assert_eq!((deleted.status, deleted.body.len()), (200, 0));
    let queue = server.get("/queue").await.json();
    assert_eq!(
        (queue["queue_running"][0][1].as_str(), queue["queue_running"].as_array().unwrap().len()),
        (Some(&*slow), 1)
    );
    assert_eq!(queue["queue_pending"].as_array().unwrap().len(), 1);
    assert_eq!(queue["queue_pending"][0][1], json!(two));
    assert_eq!(server.post("/interrupt", &json!({"prompt_id": "someone-else"})).await.status, 200);
    assert_eq!(server.get("/prompt").await.json()["exec_info"]["queue_remaining"], 2, "still running");
    assert_eq!(server.send("POST", "/interrupt", &[], b"").await.status, 200);
    let entry = server.finished(&slow).await;
    assert_eq!(entry["status"]["status_str"], "error");
    server.finished(&two).await;
    assert_eq!(server.get(&format!("/history/{one}")).await.json(), json!({}));
    for body in
        [json!({}), json!({"unload_models": true, "free_memory": true}), json!({"free_memory": false})]
    {
        let freed = server.post("/free", &body).await;
        assert_eq!((freed.status, freed.body.len()), (200, 0), "{body}");
    }
    assert_eq!(server.send("POST", "/free", &[], b"").await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn refusals_have_comfyuis_shape() {
    let server = Server::start().await;
    let no_prompt = server.post("/prompt", &json!({"client_id": "x"})).await;
    assert_eq!(no_prompt.status, 400);
    assert_eq!(
        no_prompt.json(),
        json!({"error": {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided",
                         "extra_info": {}}, "node_errors": {}})
    );
    let deep = format!("{{\"prompt\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let keys: Vec<String> = (0..1_000_000).map(|i| format!("\"{i}\":0")).collect();
    let many = format!("{{\"prompt\": {{{}}}}}", keys.join(","));
    for (body, kind) in [
        ("{bad", "invalid_json"),
        (r#"{"prompt": NaN}"#, "invalid_json"),
        (r#"{"prompt": {"1": {"class_type": "Number", "inputs": {"value": 1e400}}}}"#, "invalid_json"),
        (r#"{"prompt": "\ud800"}"#, "invalid_json"),
        (&deep, "invalid_json"),
        (&many, "invalid_json"),
        ("[1]", "invalid_request"),
        ("", "invalid_request"),
        (r#"{"prompt": {}, "extra_data": 5}"#, "invalid_request"),
        (r#"{"prompt": {}, "number": "x"}"#, "invalid_request"),
        (r#"{"prompt": {}, "client_id": [1]}"#, "invalid_request"),
        (r#"{"prompt": {}, "partial_execution_targets": "1"}"#, "invalid_request"),
    ] {
        let answer = server.send("POST", "/prompt", &[], body.as_bytes()).await;
        let what = &body[..body.len().min(60)];
        assert_eq!((answer.status, answer.header("content-type")), (400, Some(JSON)), "{what}");
        let value = answer.json();
        assert_eq!(
            (value["error"]["type"].as_str(), &value["node_errors"]),
            (Some(kind), &json!({})),
            "{what}"
        );
        assert_eq!(value["error"]["extra_info"], json!({}));
        assert!(value["error"]["message"].is_string() && value["error"]["details"].is_string());
    }
    assert_eq!(server.get("/prompt").await.json()["exec_info"]["queue_remaining"], 0);
    server.stop().await;
}

#[tokio::test]
async fn object_info_of_all_and_of_one() {
    let server = Server::start().await;
    let all = server.get("/object_info").await.json();
    assert_eq!(
        all.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["Number", "Show", "Slow", "Picture", "Keep"]
    );
    assert_eq!(server.get("/object_info/Show").await.json(), json!({"Show": all["Show"]}));
    assert_eq!(server.get("/object_info/No%20such").await.json(), json!({}));
    server.stop().await;
}

#[tokio::test]
async fn origin_is_checked_on_every_route() {
    let server = Server::start().await;
    let host = server.addr.to_string();
    let body = json!({"prompt": graph(1)}).to_string();
    for (method, path) in
        [("GET", "/prompt"), ("POST", "/prompt"), ("GET", "/ws"), ("GET", "/"), ("OPTIONS", "/prompt")]
    {
        let headers = [("Host", host.as_str()), ("Origin", "http://evil.example")];
        let answer =
            server.send(method, path, &headers, if method == "POST" { body.as_bytes() } else { b"" }).await;
        assert_eq!((answer.status, answer.body.len()), (403, 0), "{method} {path}");
    }
    let own = format!("http://{host}");
    assert_eq!(server.send("GET", "/prompt", &[("Origin", &own)], b"").await.status, 200);
    let rebound = server.send("GET", "/prompt", &[("Host", "evil.example")], b"").await;
    assert_eq!(rebound.status, 403);
    assert!(String::from_utf8_lossy(&rebound.body).contains("--allowed-hosts"));
    assert_eq!(server.get("/prompt").await.json()["exec_info"]["queue_remaining"], 0, "nothing was queued");
    server.stop().await;
}

#[tokio::test]
async fn cors_and_gzip_on_request() {
    let server = Server::with(|config| {
        config.origin.cors = Some("*".to_owned());
        config.compress = true;
    })
    .await;
    let answer = server.send("GET", "/prompt", &[("Origin", "http://other.example")], b"").await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some("*")));
    assert_eq!(answer.header("content-encoding"), None, "not asked for");
    for accepted in ["gzip", "br, gzip;q=0.5", "*"] {
        let small = server.send("GET", "/prompt", &[("Accept-Encoding", accepted)], b"").await;
        assert_eq!(small.header("content-encoding"), Some("gzip"), "{accepted}");
        assert_eq!(small.header("vary"), Some("Accept-Encoding"));
    }
    let missing = server.send("GET", "/none", &[("Accept-Encoding", "gzip")], b"").await;
    assert_eq!((missing.status, missing.header("content-encoding")), (404, Some("gzip")));
    let options = server.send("OPTIONS", "/prompt", &[("Origin", "http://other.example")], b"").await;
    assert_eq!(options.header("access-control-allow-headers"), Some("Content-Type, Authorization"));
    let packed = server.send("GET", "/object_info", &[("Accept-Encoding", "gzip")], b"").await;
    assert_eq!(packed.header("content-encoding"), Some("gzip"));
    assert_eq!(&packed.body[..2], b"\x1f\x8b");
    let plain = server.get("/object_info").await;
    assert!(packed.body.len() < plain.body.len() && plain.header("content-encoding").is_none());
    server.stop().await;
}

#[tokio::test]
async fn a_full_queue_and_a_stopping_server_refuse() {
    let server = Server::with(|config| config.limits.queued_prompts = 2).await;
    let slow = json!({"1": {"class_type": "Slow", "inputs": {"steps": 1_000_000, "salt": 3}}});
    server.queue(slow, None).await;
    server.queue(graph(1), None).await;
    let full = server.post("/prompt", &json!({"prompt": graph(2)})).await;
    assert_eq!((full.status, full.header("retry-after")), (429, Some("5")));
    assert_eq!(full.json()["error"]["type"], "queue_full");
    server.post("/queue", &json!({"clear": true})).await;
    server.post("/interrupt", &json!({})).await;
    server.stop().await;
}

#[tokio::test]
async fn the_page_is_whole() {
    let server = Server::start().await;
    let page = server.get("/").await;
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'") && !policy.contains("unsafe"),
        "{policy}"
    );
    let text = String::from_utf8(page.body).unwrap();
    assert!(!text.contains("http://") && !text.contains("https://"), "nothing from elsewhere");
    let mut found = 0;
    for name in text.split('"').filter(|t| t.starts_with("kiln/")) {
        let file = server.get(&format!("/{name}")).await;
        let kind = match name.rsplit('.').next() {
            Some("css") => "text/css; charset=utf-8",
            Some("js") => "text/javascript; charset=utf-8",
            _ => "image/svg+xml",
        };
        assert_eq!((file.status, file.header("content-type")), (200, Some(kind)), "{name}");
        let tag = file.header("etag").unwrap();
        let again = server.send("GET", &format!("/{name}"), &[("If-None-Match", tag)], b"").await;
        assert_eq!((again.status, again.body.len()), (304, 0), "{name}");
        for import in String::from_utf8(file.body.clone()).unwrap().split("from \"./").skip(1) {
            let module = format!("/kiln/{}", import.split('"').next().unwrap());
            assert_eq!(server.get(&module).await.status, 200, "{module}");
        }
        found += 1;
    }
    assert!(found >= 3, "{found} files in {text}");
    assert_eq!(server.get("/kiln/Cargo.toml").await.status, 404);
    server.stop().await;
}

#[tokio::test]
async fn an_installed_page_is_served_where_there_is_no_route() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("web");
    std::fs::create_dir_all(root.join("assets")).unwrap();
    std::fs::create_dir_all(root.join("queue")).unwrap();
    for (name, text) in [
        ("web/index.html", "<html>theirs"),
        ("web/assets/index-B3xZ01ab.js", "export {}"),
        ("web/user.css", "a {}"),
        ("web/free", "a file under a POST route's name"),
        ("web/queue/index.html", "not this"),
        ("secret", "canary"),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let server = Server::with(|config| config.front_end_root = Some(root)).await;
    for (path, status, kind, caching) in [
        ("/", 200, Some("text/html; charset=utf-8"), Some("no-cache")),
        ("/index.html", 200, Some("text/html; charset=utf-8"), Some("no-cache")),
        (
            "/assets/index-B3xZ01ab.js",
            200,
            Some("text/javascript; charset=utf-8"),
            Some("public, max-age=31536000, immutable"),
        ),
        ("/user.css?x=1", 200, Some("text/css; charset=utf-8"), Some("no-cache")),
        ("/free", 200, Some("application/octet-stream"), None),
        ("/queue", 200, Some("application/json; charset=utf-8"), None),
        ("/assets", 404, Some(JSON), None),
        ("/nothing.js", 404, Some(JSON), Some("no-cache")),
        ("/nothing.css", 404, Some(JSON), Some("no-cache")),
        ("/../secret", 404, Some(JSON), None),
        ("/%2e%2e/secret", 404, Some(JSON), None),
        ("/assets/..%2f..%2fsecret", 404, Some(JSON), None),
        ("/assets/%5c..%5c..%5csecret", 404, Some(JSON), None),
    ] {
        let answer = server.get(path).await;
        let got = (answer.status, answer.header("content-type"), answer.header("cache-control"));
        assert_eq!(got, (status, kind, caching), "{path}");
        assert!(!answer.body.ends_with(b"canary"), "{path}");
    }
    let page = server.get("/").await;
    assert_eq!(page.body, b"<html>theirs");
    let tag = page.header("etag").unwrap();
    assert_eq!(server.send("GET", "/", &[("If-None-Match", tag)], b"").await.status, 304);
    for (kind, wanted) in [("style", "text/css"), ("script", "text/javascript")] {
        let missing = server.send("GET", "/nothing", &[("Sec-Fetch-Dest", kind)], b"").await;
        assert_eq!(missing.status, 404);
        assert!(missing.header("content-type").is_some_and(|t| t.starts_with(wanted)), "{missing:?}");
    }
    let head = server.send("HEAD", "/user.css", &[], b"").await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, Some("4"), 0));
    server.stop().await;
}
