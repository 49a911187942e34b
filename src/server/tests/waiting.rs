//! What is opt-in at `POST /prompt`: waiting, pictures, webhooks, checks, the page's format; and
//! the OpenAI-like route's refusals.

use std::time::Duration;

use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use super::{PATIENCE, Server};

fn keep(name: &str) -> Json {
    json!({"9": {"class_type": "Keep", "inputs": {"name": name}}})
}

fn slow(steps: u64) -> Json {
    json!({"1": {"class_type": "Slow", "inputs": {"steps": steps, "salt": 1}}})
}

#[tokio::test]
async fn who_waits_gets_the_outputs_or_the_picture() {
    let server = Server::start().await;
    let body = json!({"prompt": keep("w1"), "wait": true});
    let answer = server.post("/prompt", &body).await;
    let job = answer.json();
    assert_eq!((answer.status, job["status"].as_str()), (200, Some("completed")), "{job}");
    assert_eq!(job["outputs"]["9"]["images"][0]["filename"], "w1.png");
    let url = job["files"][0]["url"].as_str().unwrap();
    assert_eq!(url, format!("http://{}/view?filename=w1%2Epng&subfolder=&type=output", server.addr));
    let path = url.split_once(&server.addr.to_string()).unwrap().1;
    assert_eq!(&server.get(path).await.body[..4], b"\x89PNG");
    let picture =
        server.send("POST", "/prompt", &[("Accept", "image/png")], body.to_string().as_bytes()).await;
    assert_eq!((picture.status, picture.header("content-type")), (200, Some("image/png")));
    assert_eq!((&picture.body[..4], picture.header("x-kiln-images")), (&b"\x89PNG"[..], Some("1")));

    let began = Instant::now();
    let body = json!({"prompt": slow(1_000_000)}).to_string();
    let late = server.send("POST", "/prompt", &[("Prefer", "wait=0.2")], body.as_bytes()).await;
    assert!(began.elapsed() < Duration::from_secs(10));
    let id = late.json()["prompt_id"].as_str().unwrap().to_owned();
    assert_eq!((late.status, late.json()["status"].as_str()), (202, Some("in_progress")));
    assert_eq!(late.header("location"), Some(&*format!("/api/jobs/{id}")));
    server.post("/interrupt", &json!({})).await;
    let failing = json!({"prompt": keep("../x"), "wait": 30}).to_string();
    let failed = server.send("POST", "/prompt", &[], failing.as_bytes()).await.json();
    assert_eq!(
        (failed["status"].as_str(), &failed["execution_error"]["node_id"]),
        (Some("failed"), &json!("9"))
    );
    let failed = server.send("POST", "/prompt", &[("Accept", "image/png")], failing.as_bytes()).await;
    assert_eq!((failed.status, failed.json()["error"]["type"].as_str()), (500, Some("execution_error")));
    assert_eq!(server.post("/prompt", &json!({"prompt": keep("a"), "wait": "x"})).await.status, 400);
    server.stop().await;
}

#[tokio::test]
async fn a_waiter_hears_of_a_cancelled_job() {
    let server = Server::start().await;
    server.queue(slow(1_000_000), None).await;
    server.eventually("/queue", |q| q["queue_running"][0].get(1).cloned()).await;
    let body = json!({"prompt": keep("never"), "prompt_id": "mine", "wait": true}).to_string();
    let (answer, ()) = tokio::join!(server.send("POST", "/prompt", &[], body.as_bytes()), async {
        server.eventually("/queue", |q| q["queue_pending"][0].get(1).cloned()).await;
        server.post("/queue", &json!({"delete": ["mine"]})).await;
    });
    assert_eq!(answer.json()["status"], "cancelled");
    server.post("/interrupt", &json!({})).await;
    server.stop().await;
}

#[tokio::test]
async fn checking_queues_nothing() {
    let server = Server::start().await;
    let good = server.post("/prompt?validate_only=1", &json!({"prompt": keep("a")})).await;
    assert_eq!(good.json(), json!({"valid": true, "outputs": ["9"], "node_errors": {}}));
    let bad = server
        .post("/prompt?validate_only=1", &json!({"prompt": {"9": {"class_type": "Keep", "inputs": {}}}}))
        .await;
    assert_eq!(
        (bad.status, bad.json()["error"]["type"].as_str()),
        (400, Some("prompt_outputs_failed_validation"))
    );
    assert_eq!(server.get("/history").await.json(), json!({}));
    let id = server.post("/prompt", &json!({"prompt": keep("b")})).await.json();
    assert_eq!(id["number"], 0, "checking takes no number");
    server.stop().await;
}

#[tokio::test]
async fn the_pages_own_format_runs() {
    let server = Server::start().await;
    let workflow = json!({
        "nodes": [
            {"id": 1, "type": "Number", "mode": 0, "inputs": [], "outputs": [{"type": "INT"}], "widgets_values": [7]},
            {"id": 2, "type": "Show", "mode": 0, "inputs": [{"name": "value", "type": "INT", "link": 5}], "outputs": []},
        ],
        "links": [[5, 1, 0, 2, 0, "INT"]],
    });
    let wanted = json!({
        "1": {"inputs": {"value": 7}, "class_type": "Number", "_meta": {"title": "Number"}},
        "2": {"inputs": {"value": ["1", 0]}, "class_type": "Show", "_meta": {"title": "Show"}},
    });
    let converted = server.post("/workflow/convert", &workflow).await.json();
    assert_eq!(converted, json!({"prompt": wanted}));
    assert_eq!(server.post("/workflow/convert", &json!({"workflow": workflow})).await.json(), converted);
    for body in
        [workflow.clone(), json!({"prompt": workflow}), json!({"prompt": workflow, "extra_data": null})]
    {
        let mut body = body;
        body["wait"] = json!(true);
        let answer = server.post("/prompt", &body).await.json();
        assert_eq!(answer["outputs"]["2"], json!({"text": [7]}), "{answer}");
        let job = server.get(&format!("/api/jobs/{}", answer["prompt_id"].as_str().unwrap())).await.json();
        let kept = &job["workflow"]["extra_data"]["extra_pnginfo"]["workflow"];
        assert_eq!(kept["links"], workflow["links"], "the workflow goes into the pictures");
    }
    let bad = server.post("/workflow/convert", &json!({"a": 1})).await;
    assert_eq!((bad.status, bad.json()["error"]["type"].as_str()), (400, Some("invalid_workflow")));
    server.stop().await;
}

/// Takes one request; gives its text and answers with a status.
async fn receive(listener: &TcpListener, status: &str) -> String {
    let (mut stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let mut bytes = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).await.unwrap();
        bytes.extend_from_slice(&piece[..count]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if count == 0 || body.len() >= length.unwrap_or(0) {
            stream
                .write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes())
                .await
                .unwrap();
            return text;
        }
    }
}

#[tokio::test]
async fn webhooks_are_signed_and_told_again() {
    let server = Server::with(|config| {
        config.allow_private_webhooks = true;
        config.webhook_pause = Duration::from_millis(20);
    })
    .await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook?x=1", listener.local_addr().unwrap());
    let post = async |prompt: Json| {
        let hook = json!({"url": url, "secret": "s3cret"});
        server.post("/prompt", &json!({"prompt": prompt, "extra_data": {"webhook": hook}})).await.json()
    };
    let id = post(keep("hooked")).await["prompt_id"].as_str().unwrap().to_owned();
    let first = receive(&listener, "500 Oops").await;
    let second = receive(&listener, "204 No Content").await;
    let header = |text: &str, name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name).map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert!(second.starts_with("POST /hook?x=1 HTTP/1.1"), "{second}");
    assert_eq!(header(&second, "x-kiln-event: "), "job.completed");
    assert_eq!(
        header(&first, "x-kiln-delivery: "),
        header(&second, "x-kiln-delivery: "),
        "the same delivery"
    );
    let body = second.split_once("\r\n\r\n").unwrap().1;
    let (time, signature) = (header(&second, "x-kiln-timestamp: "), header(&second, "x-kiln-signature: "));
    assert_eq!(
        super::super::webhook::signature("s3cret", time.parse().unwrap(), body.as_bytes()),
        Some(signature)
    );
    let told: Json = serde_json::from_str(body).unwrap();
    assert_eq!((&told["prompt_id"], &told["job"]["status"]), (&json!(id), &json!("completed")));
    assert!(told["files"][0]["url"].as_str().unwrap().contains("hooked%2Epng"), "{told}");
    let stored = server.get(&format!("/history/{id}")).await.json();
    assert!(
        !stored.to_string().contains("s3cret") && !body.contains("s3cret"),
        "the secret is stored nowhere"
    );

    post(keep("../x")).await;
    let failed = receive(&listener, "200 OK").await;
    assert!(failed.contains("x-kiln-event: job.failed") && failed.contains("\"node_id\":\"9\""), "{failed}");
    server.stop().await;
}

#[tokio::test]
async fn webhooks_go_to_no_private_address_and_hold_up_nothing() {
    let server = Server::start().await;
    for url in [
        "http://127.0.0.1:1/",
        "http://localhost/",
        "https://10.0.0.1/",
        "http://[::ffff:127.0.0.1]/",
        "file:///etc/passwd",
        "x",
    ] {
        let body = json!({"prompt": keep("a"), "extra_data": {"webhook": {"url": url}}});
        let answer = server.post("/prompt", &body).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["type"].as_str()),
            (400, Some("invalid_webhook")),
            "{url}"
        );
    }
    let server_with = Server::with(|config| config.allow_private_webhooks = true).await;
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hook = json!({"url": format!("http://{}/", deaf.local_addr().unwrap())});
    let began = Instant::now();
    for i in 0..20 {
        let body = json!({"prompt": keep(&format!("n{i}")), "extra_data": {"webhook": hook}, "wait": true});
        assert_eq!(server_with.post("/prompt", &body).await.json()["status"], "completed");
    }
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "no run waits for the deaf receiver: {:?}",
        began.elapsed()
    );
    server.stop().await;
    server_with.stop().await;
}

#[tokio::test]
async fn openai_like_refusals() {
    let server = Server::start().await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(
        (models["object"].as_str(), models["data"][0]["id"].as_str()),
        (Some("list"), Some("demo-sd.safetensors"))
    );
    for (body, status, code) in [
        (json!({}), 400, "missing_prompt"),
        (json!({"prompt": 1}), 400, "invalid_type"),
        (json!({"prompt": "x", "model": "none"}), 404, "model_not_found"),
        (json!({"prompt": "x", "size": "big"}), 400, "invalid_size"),
        (json!({"prompt": "x", "size": "8x99999"}), 400, "invalid_size"),
        (json!({"prompt": "x", "n": 11}), 400, "invalid_value"),
        (json!({"prompt": "x", "response_format": "gif"}), 400, "invalid_value"),
        // these servers have none of the nodes
        (json!({"prompt": "x"}), 400, "invalid_prompt"),
    ] {
        let answer = server.post("/v1/images/generations", &body).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["code"].as_str()), (status, Some(code)), "{body}: {error}");
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{error}");
    }
    assert_eq!(server.post("/models/load", &json!({"model": "none"})).await.status, 404);
    assert_eq!(server.post("/models/load", &json!({})).await.status, 400);
    server.stop().await;
}

#[tokio::test]
async fn errors_are_json() {
    let server = Server::with(|config| config.limits.max_body_bytes = 1000).await;
    for (method, path, body, status, code) in [
        ("GET", "/no_such_route", "".to_owned(), 404, "not_found"),
        ("GET", "/view?filename=none.png", String::new(), 404, "not_found"),
        ("DELETE", "/prompt", String::new(), 405, "method_not_allowed"),
        ("POST", "/prompt", "x".repeat(2000), 413, "payload_too_large"),
        ("POST", "/upload/image", String::new(), 400, "invalid_request"),
        ("GET", "/userdata", String::new(), 400, "invalid_request"),
        ("GET", "/userdata/..%2F..%2Fx", String::new(), 403, "forbidden"),
        ("GET", "/ws", String::new(), 400, "invalid_request"),
    ] {
        let answer = server.send(method, path, &[], body.as_bytes()).await;
        assert_eq!(
            (answer.status, answer.json()["error"]["type"].as_str()),
            (status, Some(code)),
            "{method} {path}"
        );
        assert_eq!(answer.header("content-type"), Some("application/json; charset=utf-8"), "{method} {path}");
        assert!(!answer.json()["error"]["message"].as_str().unwrap().is_empty());
    }
    let evil = ("Origin", "http://evil.example");
    let foreign = server.send("GET", "/prompt", &[evil], b"").await;
    assert_eq!((foreign.status, foreign.body.len()), (403, 0), "ComfyUI's answer, which the recordings hold");
    let asked = server.send("GET", "/prompt", &[evil, ("Accept", "application/json")], b"").await;
    assert_eq!((asked.status, asked.json()["error"]["type"].as_str()), (403, Some("forbidden")));
    server.stop().await;
}
