//! `/api/assets`: the asset library of the newest web page.

use serde_json::{Value as Json, json};

use super::{Answer, Server};

async fn upload(server: &Server, name: &str, fields: &[(&str, &str)]) -> Answer {
    let mut body = String::new();
    for (key, value) in fields {
        body.push_str(&format!("--b\r\nContent-Disposition: form-data; name=\"{key}\"\r\n\r\n{value}\r\n"));
    }
    let head = format!("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
    body.push_str(&format!("{head}bytes of {name}\r\n--b--\r\n"));
    let headers = [("Content-Type", "multipart/form-data; boundary=b")];
    server.send("POST", "/api/assets", &headers, body.as_bytes()).await
}

/// A JSON request of any method.
async fn tell(server: &Server, method: &str, path: &str, body: &Json) -> Answer {
    server.send(method, path, &[], body.to_string().as_bytes()).await
}

fn texts(list: &Json) -> Vec<&str> {
    list.as_array().unwrap().iter().filter_map(Json::as_str).collect()
}

#[tokio::test]
async fn labels_and_notes_change() {
    let server = Server::start().await;
    let fields = [("tags", "[\"input\", \"red\"]"), ("user_metadata", "{\"stars\": 3}")];
    let made = upload(&server, "a.png", &fields).await;
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    assert_eq!((texts(&made["tags"]), &made["user_metadata"]["stars"]), (vec!["input", "red"], &json!(3)));
    let path = format!("/api/assets/{}", made["id"].as_str().unwrap());

    let added =
        tell(&server, "POST", &format!("{path}/tags"), &json!({"tags": ["red", " blue ", "blue"]})).await;
    assert_eq!(added.status, 200, "{added:?}");
    let wanted =
        json!({"added": ["blue"], "already_present": ["red"], "total_tags": ["input", "red", "blue"]});
    assert_eq!(added.json(), wanted);
    let taken =
        tell(&server, "DELETE", &format!("{path}/tags"), &json!({"tags": ["red", "none", "input"]})).await;
    let wanted = json!({"removed": ["red"], "not_present": ["none"], "total_tags": ["input", "blue"]});
    assert_eq!(taken.json(), wanted, "the folder's label stays");

    let change = json!({"name": "better.png", "user_metadata": {"stars": 5}});
    let changed = tell(&server, "PUT", &path, &change).await;
    assert_eq!((changed.status, changed.json()["name"].as_str()), (200, Some("better.png")));
    let now = server.get(&path).await.json();
    assert_eq!((texts(&now["tags"]), &now["user_metadata"]["stars"]), (vec!["input", "blue"], &json!(5)));
    assert_eq!(now["hash"], made["hash"]);

    upload(&server, "b.png", &[("tags", "blue,sky")]).await;
    let counts = server.get("/api/assets/tags/refine?include_tags=blue").await.json();
    assert_eq!(counts, json!({"tag_counts": {"blue": 2, "input": 2, "sky": 1}}));
    let counts = server.get("/api/assets/tags/refine?include_tags=sky&limit=1").await.json();
    assert_eq!(counts["tag_counts"].as_object().unwrap().len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn wrong_changes_are_refused() {
    let server = Server::start().await;
    let made = upload(&server, "a.png", &[]).await.json();
    let path = format!("/api/assets/{}", made["id"].as_str().unwrap());
    let before = server.get(&path).await.json();
    for (method, path, body, status) in [
        ("PUT", path.clone(), json!({"name": ""}), 400),
        ("PUT", path.clone(), json!({"name": 7}), 400),
        ("PUT", path.clone(), json!({"tags": "red"}), 400),
        ("PUT", path.clone(), json!({"user_metadata": []}), 400),
        ("PUT", path.clone(), json!([]), 400),
        ("POST", format!("{path}/tags"), json!({}), 400),
        ("POST", format!("{path}/tags"), json!({"tags": []}), 400),
        ("POST", format!("{path}/tags"), json!({"tags": [""]}), 400),
        ("POST", format!("{path}/tags"), json!({"tags": ["x".repeat(600)]}), 400),
        ("DELETE", format!("{path}/tags"), json!({"tags": [1]}), 400),
        ("PUT", "/api/assets/none".to_owned(), json!({"name": "x"}), 404),
        ("POST", "/api/assets/none/tags".to_owned(), json!({"tags": ["x"]}), 404),
        ("DELETE", "/api/assets/none/tags".to_owned(), json!({"tags": ["x"]}), 404),
    ] {
        let answer = tell(&server, method, &path, &body).await;
        assert_eq!(answer.status, status, "{method} {path} {body}: {answer:?}");
        assert!(answer.json()["error"]["code"].is_string(), "{answer:?}");
    }
    assert_eq!(server.get(&path).await.json(), before, "nothing has changed");
    server.stop().await;
}
