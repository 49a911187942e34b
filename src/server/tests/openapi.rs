//! The OpenAPI document against the server: every described `GET` without path parameters is asked,
//! and must answer with a described status and a described content type.

use serde_json::Value as Json;

use super::Server;

#[tokio::test]
async fn answers_are_as_described() {
    let server = Server::start().await;
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let mut asked = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(operation) = methods.get("get").filter(|_| path != "/ws") else { continue };
        let responses = operation["responses"].as_object().unwrap();
        if responses.contains_key("default") {
            continue;
        }
        // an id that nothing has
        let filled = path.split('{').map(|part| part.split_once('}').map_or(part, |(_, rest)| rest));
        let filled = filled.collect::<Vec<_>>().join("none");
        let answer = server.get(&filled).await;
        let described = responses.get(&answer.status.to_string());
        let described =
            described.unwrap_or_else(|| panic!("{path} answers {}, which is not described", answer.status));
        let kind = answer.header("content-type").unwrap_or_default().split(';').next().unwrap_or_default();
        if answer.status == 200
            && let Some(content) = described.get("content").and_then(Json::as_object)
        {
            assert!(content.contains_key(kind) || content.contains_key("*/*"), "{path} answers with {kind}");
            let required = &described["content"]["application/json"]["schema"]["required"];
            for key in required.as_array().into_iter().flatten() {
                assert!(answer.json().get(key.as_str().unwrap()).is_some(), "{path} lacks {key}");
            }
        }
        asked += 1;
    }
    assert!(asked > 30, "only {asked} were asked");
    server.stop().await;
}
