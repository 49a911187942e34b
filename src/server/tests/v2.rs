//! Comfy API v2: submission, polling, events, assets.

use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{Answer, PATIENCE, Server};

fn keep(name: &str) -> Json {
    json!({"9": {"class_type": "Keep", "inputs": {"name": name}}})
}

fn slow(salt: u64) -> Json {
    json!({"1": {"class_type": "Slow", "inputs": {"steps": 1_000_000, "salt": salt}}})
}

async fn submit(server: &Server, workflow: Json) -> Json {
    let answer = server.post("/api/v2/jobs", &json!({"workflow": workflow})).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

async fn over(server: &Server, id: &str) -> Json {
    let is_over = |job: &Json| !matches!(job["status"].as_str(), Some("queued" | "running" | "canceling"));
    server.eventually(&format!("/api/v2/jobs/{id}"), |job| is_over(job).then(|| job.clone())).await
}

/// A form with one file and texts.
fn form(file: &[u8], name: &str, texts: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in texts {
        body.extend_from_slice(
            format!("--b\r\nContent-Disposition: form-data; name=\"{key}\"\r\n\r\n{value}\r\n").as_bytes(),
        );
    }
    let head = format!(
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\nContent-Type: image/png\r\n\r\n"
    );
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(file);
    body.extend_from_slice(b"\r\n--b--\r\n");
    body
}

async fn upload(server: &Server, file: &[u8], texts: &[(&str, &str)]) -> Answer {
    let headers = [("Content-Type", "multipart/form-data; boundary=b")];
    server.send("POST", "/api/v2/assets", &headers, &form(file, "photo.png", texts)).await
}

#[tokio::test]
async fn a_job_from_submission_to_bytes() {
    let server = Server::start().await;
    assert_eq!(server.get("/api/v2/health").await.json()["status"], "ok");
    let job = submit(&server, keep("v2")).await;
    for key in [
        "id",
        "status",
        "created_at",
        "started_at",
        "completed_at",
        "expires_at",
        "queue_position",
        "progress",
        "outputs",
        "error",
        "urls",
    ] {
        assert!(job.get(key).is_some(), "{key} is missing: {job}");
    }
    let id = job["id"].as_str().unwrap();
    assert_eq!(job["urls"]["self"], format!("/api/v2/jobs/{id}"));
    let job = over(&server, id).await;
    assert_eq!((job["status"].as_str(), &job["error"]), (Some("succeeded"), &json!(null)));
    let output = &job["outputs"][0];
    assert_eq!(
        (&output["node_id"], &output["name"], &output["type"]),
        (&json!("9"), &json!("v2.png"), &json!("image"))
    );
    assert_eq!((&output["content_type"], &output["job_id"]), (&json!("image/png"), &json!(id)));
    let path = output["url"].as_str().unwrap().split_once(&server.addr.to_string()).unwrap().1.to_owned();
    let whole = server.get(&path).await;
    assert_eq!(
        (whole.status, &whole.body[..4], whole.header("accept-ranges")),
        (200, &b"\x89PNG"[..], Some("bytes"))
    );
    let part = server.send("GET", &path, &[("Range", "bytes=1-3")], b"").await;
    assert_eq!((part.status, &part.body[..]), (206, &b"PNG"[..]));
    let asset = server.get(&format!("/api/v2/assets/{}", output["id"].as_str().unwrap())).await.json();
    assert!(asset["hash"].as_str().unwrap().starts_with("blake3:") && asset["job_id"] == id, "{asset}");
    let workflow = server.get(&format!("/api/v2/jobs/{id}/workflow")).await.json();
    assert_eq!(workflow, json!({"workflow": keep("v2"), "format": "api"}));
    let list = server.get("/api/v2/jobs?limit=1").await.json();
    assert_eq!((&list["jobs"][0]["id"], list.get("next_cursor")), (&json!(id), None));
    server.stop().await;
}

#[tokio::test]
async fn refusals_have_codes() {
    let server = Server::with(|config| config.limits.queued_prompts = 2).await;
    let refused =
        |answer: Answer| (answer.status, answer.json()["error"]["code"].as_str().unwrap().to_owned());
    let post = async |body: Json| refused(server.post("/api/v2/jobs", &body).await);
    for (body, status, code) in [
        (json!({}), 422, "invalid_workflow"),
        (json!({"workflow": {"nodes": [], "links": []}}), 422, "workflow_format_ui"),
        (json!({"workflow": {"1": {"class_type": "Nope", "inputs": {}}}}), 422, "invalid_workflow"),
        (json!({"workflow": keep("a"), "webhook_url": "x"}), 422, "invalid_request"),
        (json!({"workflow": keep("a"), "extra_data": {"x": 1}}), 422, "invalid_request"),
        (
            json!({"workflow": {"9": {"class_type": "Keep", "inputs": {
            "name": {"__type": "core/ASSET", "info": {"id": "none"}}}}}}),
            422,
            "missing_asset",
        ),
    ] {
        assert_eq!(post(body.clone()).await, (status, code.to_owned()), "{body}");
    }
    let missing =
        server.post("/api/v2/jobs", &json!({"workflow": {"9": {"class_type": "Keep", "inputs": {}}}})).await;
    let error = &missing.json()["error"];
    assert_eq!(error["details"]["node_errors"]["9"][0]["reason"], "required_input_missing", "{error}");
    assert_eq!(
        refused(server.send("POST", "/api/v2/jobs", &[], b"{bad").await),
        (400, "invalid_json".to_owned())
    );
    assert_eq!(refused(server.get("/api/v2/jobs/none").await), (404, "not_found".to_owned()));
    assert_eq!(refused(server.get("/api/v2/assets/none").await), (404, "not_found".to_owned()));
    assert_eq!(
        refused(server.send("DELETE", "/api/v2/jobs", &[], b"").await),
        (405, "method_not_allowed".to_owned())
    );

    let key = [("Idempotency-Key", "k1")];
    let again =
        async |body: Json| server.send("POST", "/api/v2/jobs", &key, body.to_string().as_bytes()).await;
    assert_eq!(again(json!({"workflow": {}})).await.status, 422, "made nothing, so the key is free again");
    assert_eq!(again(json!({"workflow": slow(1)})).await.status, 201);
    assert_eq!(refused(again(json!({"workflow": slow(1)})).await), (422, "idempotency_key_reuse".to_owned()));
    submit(&server, slow(2)).await;
    let full = server.post("/api/v2/jobs", &json!({"workflow": slow(3)})).await;
    assert_eq!(full.header("retry-after"), Some("5"));
    assert_eq!(refused(full), (429, "queue_full".to_owned()));
    server.post("/queue", &json!({"clear": true})).await;
    server.post("/interrupt", &json!({})).await;
    server.stop().await;
}

#[tokio::test]
async fn events_until_the_end_and_cancelling() {
    let server = Server::start().await;
    let job = submit(&server, slow(1)).await;
    let id = job["id"].as_str().unwrap();
    let waiting = submit(&server, keep("x")).await;
    let mut stream = server.connect().await;
    let head = format!(
        "GET /api/v2/jobs/{id}/events HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
        server.addr
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    while !text.contains("event: preview") {
        let mut piece = [0; 4096];
        let count = timeout(PATIENCE, stream.read(&mut piece)).await.unwrap().unwrap();
        assert!(count > 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
    assert!(
        text.contains("text/event-stream") && text.contains("event: progress") && text.contains("Slow "),
        "{text}"
    );
    assert!(text.contains("\"running\""), "{text}");
    let cancelled =
        server.post(&format!("/api/v2/jobs/{}/cancel", waiting["id"].as_str().unwrap()), &json!({})).await;
    assert_eq!(cancelled.json()["status"], "canceled");
    let cancelled = server.post(&format!("/api/v2/jobs/{id}/cancel"), &json!({})).await.json();
    assert!(matches!(cancelled["status"].as_str(), Some("canceling" | "canceled")), "{cancelled}");
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("\"canceled\""), "the last event is the end: {rest}");
    assert_eq!(over(&server, id).await["status"], "canceled");
    let after = server.get(&format!("/api/v2/jobs/{id}/events")).await;
    assert!(
        String::from_utf8_lossy(&after.body).contains("\"canceled\""),
        "a stream of a finished job ends at once"
    );
    server.stop().await;
}

#[tokio::test]
async fn assets_are_known_by_their_content() {
    let server = Server::start().await;
    let first =
        upload(&server, b"\x89PNG abc", &[("content_type", "image/png"), ("file_path", "in/photo.png")])
            .await;
    assert_eq!(first.status, 201, "{first:?}");
    let first = first.json();
    let hash = first["hash"].as_str().unwrap();
    assert_eq!(
        (&first["created_new"], &first["size_bytes"], &first["file_path"]),
        (&json!(true), &json!(8), &json!("in/photo.png"))
    );
    let second = upload(&server, b"\x89PNG abc", &[]).await;
    assert_eq!((second.status, second.json()["created_new"].as_bool()), (200, Some(false)));
    assert_ne!(second.json()["id"], first["id"]);
    let wrong = upload(&server, b"other", &[("expected_hash", hash)]).await;
    assert_eq!((wrong.status, wrong.json()["error"]["code"].as_str()), (409, Some("hash_mismatch")));
    assert_eq!(upload(&server, b"x", &[("expires_in", "5")]).await.status, 422);
    let unknown = format!("blake3:{}", "0".repeat(64));
    for (hash, status) in [(hash, 200), ("blake3:00", 404), (unknown.as_str(), 404)] {
        assert_eq!(
            server.send("HEAD", &format!("/api/v2/assets/by-hash/{hash}"), &[], b"").await.status,
            status
        );
    }
    let minted =
        server.post("/api/v2/assets/from-hash", &json!({"hash": hash, "file_path": "again.png"})).await;
    assert_eq!((minted.status, minted.json()["content_type"].as_str()), (201, Some("image/png")));
    let none = server.post("/api/v2/assets/from-hash", &json!({"hash": "blake3:00"})).await;
    assert_eq!((none.status, none.json()["error"]["code"].as_str()), (404, Some("blob_not_found")));

    let reference = json!({"__type": "core/ASSET", "info": {"id": first["id"]}});
    let graph = json!({"9": {"class_type": "Keep", "inputs": {"name": "k", "from": reference}}});
    let job = submit(&server, graph).await;
    let ran = server.get(&format!("/api/v2/jobs/{}/workflow", job["id"].as_str().unwrap())).await.json();
    let name = ran["workflow"]["9"]["inputs"]["from"].as_str().unwrap();
    assert_eq!(name, format!("assets/{}.png", &hash[7..]));
    assert!(server.dir.path().join("input").join(name).is_file());

    for (id, status) in [(&first["id"], 204), (&first["id"], 404)] {
        let path = format!("/api/v2/assets/{}", id.as_str().unwrap());
        assert_eq!(server.send("DELETE", &path, &[], b"").await.status, status);
    }
    server.stop().await;
}
