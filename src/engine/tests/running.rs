//! Order and content of events, lists, history entries.

use serde_json::json;

use super::bench::*;
use crate::engine::*;

#[test]
fn a_cold_run_sends_what_the_reference_sends() {
    let mut bench = Bench::new();
    let (events, _) = bench.run(small(5));
    assert_eq!(
        names(&events),
        [
            "status:1",
            "status:1",
            "execution_start",
            "execution_cached:",
            "progress_state:1=running",
            "executing:1",
            "progress_state:1=finished",
            "progress_state:1=finished,2=running",
            "executing:2",
            "progress_state:1=finished,2=finished",
            "progress_state:1=finished,2=finished,3=running",
            "executing:3",
            "executed:3",
            "progress_state:1=finished,2=finished,3=finished",
            "execution_success",
            "status:0",
            "executing:None",
        ]
    );
    assert_eq!(bench.take_calls(), ["1", "2", "3"]);
}

#[test]
fn payloads_are_those_of_the_reference() {
    let mut bench = Bench::new();
    let id = bench.submit(small(5));
    let (events, entry) = bench.finish(&id);
    let of = |n: &str| events.iter().find(|e| name(e) == n).map(|e| e.to_json()).expect("there");
    assert_eq!(
        of("status:1"),
        Some(json!({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}}}))
    );
    let text = of("progress_state:1=running").expect("JSON").to_string();
    assert_eq!(
        text.replace(&id, "ID"),
        concat!(
            r#"{"type":"progress_state","data":{"prompt_id":"ID","nodes":{"1":{"value":0.0,"max":1.0,"#,
            r#""state":"running","node_id":"1","prompt_id":"ID","display_node_id":"1","#,
            r#""parent_node_id":null,"real_node_id":"1"}}}}"#
        )
    );
    assert_eq!(
        of("executing:1"),
        Some(json!({"type": "executing", "data": {"node": "1", "display_node": "1", "prompt_id": id}}))
    );
    assert_eq!(
        of("executing:None"),
        Some(json!({"type": "executing", "data": {"node": null, "prompt_id": id}}))
    );
    assert_eq!(
        data(&events, "executed"),
        json!({"node": "3", "display_node": "3", "output": {"text": ["10"]}, "prompt_id": id})
    );
    let start = data(&events, "execution_start");
    assert_eq!(start["prompt_id"], json!(id));
    assert!(start["timestamp"].as_u64().is_some_and(|ms| ms > 1_600_000_000_000));
    assert_eq!(
        entry,
        json!({
            "prompt": [0, id, small(5), {"client_id": "me"}, ["3"]],
            "outputs": {"3": {"text": ["10"]}},
            "status": {"status_str": "success", "completed": true, "messages": [
                ["execution_start", start],
                ["execution_cached", data(&events, "execution_cached")],
                ["execution_success", data(&events, "execution_success")],
            ]},
            "meta": {"3": {"node_id": "3", "display_node": "3", "parent_node": null, "real_node_id": "3"}},
        })
    );
}

#[test]
fn progress_changes_the_state_and_comes_after_it() {
    let mut bench = Bench::new();
    let prompt = json!({"s": node("Slow", json!({"steps": 2})), "9": node("Show", json!({"x": ["s", 0]}))});
    let (events, _) = bench.run(prompt);
    let texts = names(&events);
    let at = texts.iter().position(|n| n == "executing:s").expect("there");
    assert_eq!(
        texts[at..at + 6],
        [
            "executing:s",
            "progress_state:s=running",
            "progress:s:1/10000",
            "progress_state:s=running",
            "progress:s:2/10000",
            "progress_state:s=finished",
        ]
    );
    let state = |i: usize| events[at + i].kind.data()["nodes"]["s"].clone();
    assert_eq!((&state(1)["value"], &state(1)["max"]), (&json!(1), &json!(10_000)));
    assert_eq!((&state(5)["value"], &state(5)["max"]), (&json!(10_000), &json!(10_000)));
    let progress = events[at + 2].kind.data();
    assert_eq!(
        (&progress["value"], &progress["max"], &progress["node"]),
        (&json!(1), &json!(10_000), &json!("s"))
    );
}

#[test]
fn events_go_to_the_owner_or_to_everybody() {
    let mut bench = Bench::new();
    let (events, _) = bench.run(small(1));
    for event in &events {
        let is_status = matches!(event.kind, EventKind::Status { .. });
        assert_eq!(event.client_id.as_deref(), (!is_status).then_some("me"));
    }
    let accepted =
        bench.engine.submit(Submission { prompt: small(2), ..Default::default() }).expect("accepted");
    let (events, entry) = bench.finish(&accepted.prompt_id);
    assert!(events.iter().all(|e| e.client_id.is_none()) && events.len() == 17);
    assert_eq!(entry["prompt"][3], json!({}));
}

fn shown(inputs: Json, middle: &str, sources: Json) -> Vec<String> {
    let mut prompt = sources;
    prompt["m"] = node(middle, inputs);
    prompt["9"] = node("Show", json!({"x": ["m", 0]}));
    let (_, entry) = Bench::new().run(prompt);
    assert_eq!(entry["status"]["status_str"], "success", "{entry}");
    serde_json::from_value(entry["outputs"]["9"]["text"].clone()).expect("texts")
}

#[test]
fn lists_run_a_node_per_item_and_short_ones_repeat_their_last() {
    let list = |n: i64| node("List", json!({"count": n}));
    let num = node("Num", json!({"value": 100}));
    let add = json!({"a": ["a", 0], "b": ["b", 0]});
    assert_eq!(shown(add.clone(), "Add", json!({"a": list(3), "b": num})), ["100", "101", "102"]);
    assert_eq!(shown(add.clone(), "Add", json!({"a": list(4), "b": list(2)})), ["0", "2", "3", "4"]);
    let total = json!({"x": ["a", 0], "plus": 7});
    assert_eq!(shown(total, "Total", json!({"a": list(5)})), ["17"]);
}

#[test]
fn an_empty_list_is_an_error_of_its_consumer() {
    let prompt = json!({
        "a": node("List", json!({"count": 0})), "b": node("Num", json!({"value": 1})),
        "m": node("Add", json!({"a": ["a", 0], "b": ["b", 0]})), "9": node("Show", json!({"x": ["m", 0]})),
    });
    let (events, _) = Bench::new().run(prompt);
    let error = data(&events, "execution_error");
    assert_eq!((&error["node_id"], &error["exception_type"]), (&json!("m"), &json!("IndexError")));
}

#[test]
fn a_mapped_sink_sends_one_executed_with_all_items() {
    let mut bench = Bench::new();
    let prompt = json!({"1": node("List", json!({"count": 3})), "9": node("Show", json!({"x": ["1", 0]}))});
    let (events, _) = bench.run(prompt);
    assert_eq!(data(&events, "executed")["output"], json!({"text": ["0", "1", "2"]}));
    assert_eq!(bench.take_calls(), ["1", "9", "9", "9"]);
}

#[test]
fn sinks_without_data_send_no_executed() {
    let prompt = json!({"1": node("Num", json!({"value": 3})), "2": node("Quiet", json!({"x": ["1", 0]}))});
    let (events, entry) = Bench::new().run(prompt);
    let expected = [
        "execution_start",
        "execution_cached:",
        "executing:1",
        "executing:2",
        "execution_success",
        "executing:None",
    ];
    assert_eq!(brief(&events), expected);
    assert_eq!((&entry["outputs"], &entry["meta"]), (&json!({}), &json!({})));
}

#[test]
fn only_the_targets_run() {
    let mut bench = Bench::new();
    let mut prompt = small(1);
    prompt["4"] = node("Show", json!({"x": ["1", 0]}));
    let partial_execution_targets = Some(vec!["4".to_owned()]);
    let submission = Submission { prompt, partial_execution_targets, ..Default::default() };
    let id = bench.engine.submit(submission).expect("accepted").prompt_id;
    let (_, entry) = bench.finish(&id);
    assert_eq!(bench.take_calls(), ["1", "4"]);
    assert_eq!(entry["prompt"][4], json!(["4"]));
    assert_eq!(entry["outputs"], json!({"4": {"text": ["1"]}}));
}

#[test]
fn a_chain_of_20000_nodes_runs() {
    let mut bench = Bench::with(|config| config.event_capacity = 100_000);
    let mut prompt = Map::new();
    prompt.insert("0".to_owned(), node("Num", json!({"value": 1})));
    prompt.insert("one".to_owned(), node("Num", json!({"value": 2})));
    for i in 1..20_000 {
        prompt.insert(i.to_string(), node("Add", json!({"a": [(i - 1).to_string(), 0], "b": ["one", 0]})));
    }
    prompt.insert("end".to_owned(), node("Show", json!({"x": ["19999", 0]})));
    let (events, entry) = bench.run(Json::Object(prompt));
    assert_eq!(entry["outputs"]["end"]["text"], json!([(1 + 2 * 19_999).to_string()]));
    let states = events.iter().filter(|e| matches!(e.kind, EventKind::ProgressState { .. })).count();
    assert!(states < 2_000, "{states} messages that list all nodes");
    let last = events.iter().rev().find_map(|e| match &e.kind {
        EventKind::ProgressState { nodes, .. } => Some(nodes.clone()),
        _ => None,
    });
    assert!(last.is_some_and(|nodes| nodes.len() == 20_002 && nodes.iter().all(|n| n.is_finished)));
}

#[test]
fn texts_and_pictures_are_binary_events_of_their_node() {
    let (events, _) = Bench::new().run(json!({"22": node("Say", json!({}))}));
    let binary: Vec<_> = events.iter().filter(|e| e.to_json().is_none()).map(|e| &e.kind).collect();
    let [EventKind::Text { node, text, .. }, EventKind::Picture { node: of, image, .. }] = binary[..] else {
        panic!("a text and a picture, not {binary:?}");
    };
    assert_eq!((&**node, text.as_str(), &**of, image.shape()), ("22", "width: 24", "22", &[1, 2, 3, 3][..]));
}
