//! Corners of the API that clients run into: odd methods, paths, bodies and queries. What ComfyUI answers
//! is from its public source (0.3.64) and aiohttp's behaviour; where kiln differs, a row says why.

use serde_json::{Value as Json, json};

use super::Server;

/// Method, path, body, status.
type Row = (&'static str, &'static str, &'static str, u16);

async fn check(server: &Server, rows: &[Row]) {
    for (method, path, body, status) in rows {
        let answer = server.send(method, path, &[], body.as_bytes()).await;
        assert_eq!(answer.status, *status, "{method} {path} {body}: {answer:?}");
        let is_error = answer.status >= 400;
        if is_error && *method != "HEAD" {
            assert!(answer.json()["error"].is_object(), "{method} {path}: {answer:?}");
        }
        assert!(!is_error || answer.header("content-length").is_some(), "{method} {path}: {answer:?}");
    }
}

#[tokio::test]
async fn paths_and_methods() {
    let server = Server::start().await;
    check(
        &server,
        &[
            ("GET", "/queue/", "", 404),
            ("GET", "//queue", "", 404),
            ("GET", "/Queue", "", 404),
            ("GET", "/%71ueue", "", 200),
            ("GET", "/queue?x=1&y", "", 200),
            ("GET", "/queue?%ff=%ff", "", 200),
            ("GET", "/api", "", 404),
            ("GET", "/api/", "", 404),
            ("GET", "/api/queue", "", 200),
            ("GET", "/api/queue/", "", 404),
            ("GET", "/api/api/queue", "", 404),
            ("GET", "/internal/nope", "", 404),
            ("GET", "/api/internal/logs", "", 404),
            ("GET", "/object_info/", "", 404),
            ("GET", "/object_info/%20", "", 200),
            ("GET", "/history/", "", 404),
            ("GET", "/history/%2e%2e", "", 200),
            ("GET", "/history/a%2Fb", "", 200),
            ("GET", "/models/", "", 404),
            ("GET", "/models/checkpoints/", "", 404),
            ("GET", "/models/..%2f", "", 404),
            ("GET", "/settings/", "", 404),
            ("GET", "/userdata/", "", 404),
            ("GET", "/free", "", 404),
            ("GET", "/interrupt", "", 404),
            ("GET", "/upload/image", "", 404),
            ("HEAD", "/queue", "", 200),
            ("HEAD", "/free", "", 404),
            ("HEAD", "/nothing", "", 404),
            ("PUT", "/queue", "", 405),
            ("DELETE", "/queue", "", 405),
            ("PATCH", "/history", "{}", 405),
            ("POST", "/system_stats", "", 405),
            ("POST", "/view", "", 405),
            ("POST", "/ws", "", 405),
            ("TRACE", "/queue", "", 405),
            ("POST", "/nothing", "", 404),
            ("DELETE", "/nothing", "", 404),
        ],
    )
    .await;
    for path in ["/queue", "/nothing", "/ws", "/api/free"] {
        let answer = server.send("OPTIONS", path, &[], b"").await;
        assert_eq!((answer.status, answer.body.len()), (200, 0), "{path}");
    }
    for (method, path, allow) in [("PUT", "/queue", "GET,HEAD,POST"), ("POST", "/view", "GET,HEAD")] {
        assert_eq!(server.send(method, path, &[], b"").await.header("allow"), Some(allow), "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn bodies_of_the_wrong_form() {
    let server = Server::start().await;
    check(
        &server,
        &[
            // ComfyUI: no JSON names no prompt, so whatever runs is stopped
            ("POST", "/interrupt", "", 200),
            ("POST", "/interrupt", "{}", 200),
            ("POST", "/interrupt", "{bad", 200),
            ("POST", "/interrupt", r#"{"prompt_id": ""}"#, 200),
            ("POST", "/interrupt", r#"{"prompt_id": null}"#, 200),
            ("POST", "/interrupt", r#"{"prompt_id": "nobody"}"#, 200),
            ("POST", "/interrupt", r#"{"prompt_id": 5}"#, 400),
            // ComfyUI fails with 500 at what follows
            ("POST", "/queue", "", 400),
            ("POST", "/queue", "[]", 400),
            ("POST", "/queue", "{bad", 400),
            ("POST", "/queue", r#"{"delete": [{}]}"#, 400),
            ("POST", "/history", "null", 400),
            ("POST", "/free", "{bad", 400),
            ("POST", "/settings", "[1]", 400),
            ("POST", "/settings/x", "", 400),
            ("POST", "/users", "{}", 400),
            ("POST", "/prompt", "", 400),
            ("POST", "/prompt", "[]", 400),
            ("POST", "/prompt", r#"{"prompt": []}"#, 400),
            ("POST", "/prompt", r#"{"prompt": null}"#, 400),
            ("POST", "/prompt", r#"{"prompt": {"1": null}}"#, 400),
            ("POST", "/prompt", r#"{"prompt": {"1": {"class_type": 5, "inputs": {}}}}"#, 400),
            ("POST", "/upload/image", "no form", 400),
            ("POST", "/upload/mask", "", 400),
            ("PATCH", "/internal/logs/subscribe", "{}", 400),
            // as in ComfyUI
            ("POST", "/queue", "{}", 200),
            ("POST", "/queue", r#"{"delete": ["nobody"]}"#, 200),
            ("POST", "/queue", r#"{"delete": []}"#, 200),
            ("POST", "/queue", r#"{"clear": 1, "delete": ["x"]}"#, 200),
            ("POST", "/queue", r#"{"unknown": 1}"#, 200),
            ("POST", "/history", r#"{"delete": ["nobody"]}"#, 200),
            ("POST", "/history", r#"{"clear": false}"#, 200),
            ("POST", "/free", "{}", 200),
            ("POST", "/free", r#"{"unload_models": "yes", "free_memory": 1}"#, 200),
            ("POST", "/settings/x", "null", 200),
        ],
    )
    .await;
    server.stop().await;
}

#[tokio::test]
async fn queries_of_the_wrong_form() {
    let server = Server::start().await;
    check(
        &server,
        &[
            ("GET", "/history?max_items=x", "", 400),
            ("GET", "/history?max_items=", "", 400),
            ("GET", "/history?max_items=1.5", "", 400),
            ("GET", "/history?offset=x", "", 400),
            ("GET", "/history?offset=99999999999999999999", "", 400),
            ("GET", "/history?max_items=%202&offset=-7", "", 200),
            ("GET", "/view", "", 404),
            ("GET", "/view?filename=", "", 400),
            ("GET", "/view?filename=.", "", 400),
            ("GET", "/view?filename=..", "", 400),
            ("GET", "/view?filename=a%00b.png", "", 400),
            ("GET", "/view?filename=a.png&type=", "", 400),
            ("GET", "/view?filename=a.png&type=INPUT", "", 400),
            ("GET", "/view?filename=a.png&subfolder=/", "", 403),
            ("GET", "/view?filename=a.png&subfolder=..", "", 403),
            ("GET", "/view?filename=a.png&subfolder=a/..", "", 404),
            ("GET", "/view?filename=a..b.png", "", 404),
            ("GET", "/view_metadata/checkpoints", "", 404),
            ("GET", "/view_metadata/nothing?filename=a.safetensors", "", 404),
            ("GET", "/view_metadata/checkpoints?filename=a.txt", "", 404),
            ("GET", "/view_metadata/checkpoints?filename=..%2F..%2Fa.safetensors", "", 404),
            ("GET", "/userdata", "", 400),
            ("GET", "/userdata?dir=", "", 400),
            ("GET", "/userdata?dir=..", "", 403),
            ("GET", "/userdata?dir=none", "", 404),
            ("GET", "/v2/userdata?path=..", "", 400),
            ("GET", "/v2/userdata?path=none", "", 404),
            ("GET", "/userdata/..%2F..%2Fx", "", 403),
            ("GET", "/userdata/..%252Fx", "", 403),
            ("DELETE", "/userdata/none", "", 404),
            ("POST", "/userdata/none/move/other", "", 404),
        ],
    )
    .await;
    // these have objects of their own in ComfyUI
    for (path, status) in [("/internal/files/models", 400), ("/jobs?limit=x", 400), ("/jobs/nobody", 404)] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.json()["error"].is_string(), "{path}: {answer:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn encoded_slashes_in_user_files() {
    let server = Server::start().await;
    for (path, wanted) in
        [("w%2Fa.json", "w/a.json"), ("w%252Fb.json", "w/b.json"), ("w%2F.%2Fc.json", "w/c.json")]
    {
        let answer = server.send("POST", &format!("/userdata/{path}"), &[], b"{}").await;
        assert_eq!((answer.status, answer.json()), (200, Json::from(wanted)), "{path}");
    }
    let mut names = server.get("/userdata?dir=w").await.json();
    names.as_array_mut().unwrap().sort_by_key(Json::to_string);
    assert_eq!(names, json!(["a.json", "b.json", "c.json"]));
    let moved = server.send("POST", "/userdata/w%2Fa.json/move/x%2Fz.json?full_info=TRUE", &[], b"").await;
    assert_eq!(moved.json()["path"], "x/z.json");
    assert_eq!(server.get("/userdata/w%2Fa.json").await.status, 404);
    let kept = server.send("POST", "/userdata/w%2Fb.json?overwrite=false", &[], b"new").await;
    assert_eq!((kept.status, kept.json()["error"]["message"].as_str()), (409, Some("File already exists")));
    server.stop().await;
}
