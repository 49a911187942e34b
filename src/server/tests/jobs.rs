//! `/jobs`: states, lists, cancelling; and what late clients and newer pages see.

use serde_json::{Value as Json, json};

use super::Server;

fn show(value: u64) -> Json {
    json!({"1": {"class_type": "Number", "inputs": {"value": value}},
           "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}}})
}

fn slow(salt: u64) -> Json {
    json!({"1": {"class_type": "Slow", "inputs": {"steps": 1_000_000, "salt": salt}}})
}

fn ids(list: &Json) -> Vec<&str> {
    list["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn every_state_is_listed() {
    let server = Server::start().await;
    let done = server.queue(json!({"1": {"class_type": "Keep", "inputs": {"name": "a"}}}), None).await;
    server.finished(&done).await;
    let body = json!({"prompt": slow(1), "extra_data": {"extra_pnginfo": {"workflow": {"id": "w1"}}}});
    let running = server.post("/prompt", &body).await.json()["prompt_id"].as_str().unwrap().to_owned();
    server.eventually("/api/jobs?status=in_progress", |l| l["jobs"][0]["progress"]["step"].as_u64()).await;
    let first = server.queue(show(1), None).await;
    let second = server.queue(show(2), None).await;

    let all = server.get("/api/jobs").await.json();
    assert_eq!(all["pagination"], json!({"offset": 0, "limit": 4, "total": 4, "has_more": false}));
    assert_eq!(ids(&all), [&second, &first, &running, &done].map(String::as_str), "newest first");
    let states: Vec<_> =
        all["jobs"].as_array().unwrap().iter().map(|j| j["status"].as_str().unwrap()).collect();
    assert_eq!(states, ["pending", "pending", "in_progress", "completed"]);
    let (newest, oldest) = (&all["jobs"][0], &all["jobs"][3]);
    assert_eq!((newest["queue_position"].as_u64(), newest["priority"].as_u64()), (Some(1), Some(3)));
    assert_eq!(
        oldest["preview_output"],
        json!({"filename": "a.png", "subfolder": "", "type": "output", "nodeId": "1", "mediaType": "images"})
    );
    assert_eq!(
        (oldest["outputs_count"].as_u64(), oldest["previewable_outputs_count"].as_u64()),
        (Some(1), Some(1))
    );
    let (start, end) = (oldest["execution_start_time"].as_u64(), oldest["execution_end_time"].as_u64());
    assert!(oldest["create_time"].as_u64() <= start && start <= end && start.is_some(), "{oldest}");
    let progress = &all["jobs"][2]["progress"];
    assert_eq!(
        (&progress["nodes_total"], &progress["node"], &progress["steps"]),
        (&json!(1), &json!("1"), &json!(1_000_000))
    );

    let page = server.get("/jobs?status=pending,completed&limit=1&offset=1&sort_order=asc").await.json();
    assert_eq!(ids(&page), [first.as_str()]);
    assert_eq!(page["pagination"], json!({"offset": 1, "limit": 1, "total": 3, "has_more": true}));
    assert_eq!(ids(&server.get("/jobs?workflow_id=w1").await.json()), [running.as_str()]);
    assert_eq!(ids(&server.get("/jobs?sort_by=execution_duration&limit=9").await.json()).len(), 4);
    for bad in ["status=done", "limit=0", "limit=x", "offset=-1", "sort_by=name", "sort_order=up"] {
        let answer = server.get(&format!("/api/jobs?{bad}")).await;
        assert!(answer.status == 400 && answer.json()["error"].is_string(), "{bad}: {answer:?}");
    }
    server.post("/interrupt", &json!({})).await;
    server.stop().await;
}

#[tokio::test]
async fn jobs_are_cancelled_wherever_they_are() {
    let server = Server::start().await;
    let running = server.queue(slow(1), None).await;
    server.eventually("/queue", |q| q["queue_running"][0].get(1).cloned()).await;
    let waiting = server.queue(show(1), None).await;
    let third = server.queue(show(2), None).await;
    let answer = server.post(&format!("/api/jobs/{waiting}/cancel"), &json!({})).await;
    assert_eq!(answer.json(), json!({"id": waiting, "status": "cancelled", "cancelled": true}));
    let detail = server.get(&format!("/api/jobs/{waiting}")).await.json();
    assert_eq!((&detail["status"], &detail["workflow"]["prompt"]), (&json!("cancelled"), &show(1)));
    assert_eq!(
        server.get(&format!("/history/{waiting}")).await.json(),
        json!({}),
        "the history is ComfyUI's"
    );
    let body = json!({"job_ids": [running, third, waiting, "nobody"]});
    let answer = server.post("/api/jobs/cancel", &body).await;
    assert_eq!(
        answer.json(),
        json!({"cancelled": [running, third], "already_finished": [waiting], "not_found": ["nobody"]})
    );
    server.finished(&running).await;
    let detail = server.get(&format!("/api/jobs/{running}")).await.json();
    assert_eq!((detail["status"].as_str(), &detail["execution_error"]), (Some("cancelled"), &json!(null)));
    let answer = server.post(&format!("/jobs/{running}/cancel"), &json!({})).await;
    assert_eq!((answer.status, answer.json()["cancelled"].as_bool()), (200, Some(false)));
    assert_eq!(server.get("/api/jobs/nobody").await.json(), json!({"error": "Job not found"}));
    assert_eq!(server.post("/api/jobs/nobody/cancel", &json!({})).await.status, 404);
    assert_eq!(server.post("/api/jobs/cancel", &json!({"ids": []})).await.status, 400);
    assert_eq!(server.get("/api/jobs?status=cancelled").await.json()["pagination"]["total"], 3);
    server.post("/history", &json!({"clear": true})).await;
    assert_eq!(server.get("/api/jobs").await.json()["pagination"]["total"], 0);
    server.stop().await;
}

#[tokio::test]
async fn failed_jobs_say_why() {
    let server = Server::start().await;
    let id = server.queue(json!({"1": {"class_type": "Keep", "inputs": {"name": "../x"}}}), None).await;
    server.finished(&id).await;
    let job = server.get(&format!("/api/jobs/{id}")).await.json();
    assert_eq!(job["status"], "failed");
    let error = &job["execution_error"];
    assert_eq!((error["node_id"].as_str(), error["node_type"].as_str()), (Some("1"), Some("Keep")));
    assert!(error["traceback"].is_array() && error["exception_type"] == "Keep", "{error}");
    server.stop().await;
}

#[tokio::test]
async fn the_library_of_the_newest_page() {
    let server = Server::start().await;
    let job = server.queue(json!({"1": {"class_type": "Keep", "inputs": {"name": "b"}}}), None).await;
    server.finished(&job).await;
    let of_job = server.get(&format!("/api/jobs/{job}/assets")).await.json();
    assert_eq!((of_job["total"].as_u64(), &of_job["assets"][0]["name"]), (Some(1), &json!("b.png")));
    let list = server.get("/api/assets?include_tags=output&name_contains=B.").await.json();
    assert_eq!(list["assets"][0]["id"], of_job["assets"][0]["id"]);
    assert_eq!(server.get("/api/assets?include_tags=input").await.json()["total"], 0);
    assert_eq!(server.get("/api/assets?limit=501").await.json()["error"]["code"], "INVALID_QUERY");
    assert_eq!(server.get("/assets").await.status, 404, "the bare path is a page's own");
    let tags = server.get("/api/tags").await.json();
    assert_eq!(tags["tags"], json!([{"name": "input", "count": 0}, {"name": "output", "count": 1}]));
    server.stop().await;
}
