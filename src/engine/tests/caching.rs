//! What runs again and what is answered from the cache.

use std::sync::Weak;

use proptest::prelude::*;
use serde_json::json;

use super::bench::*;
use crate::engine::*;
use crate::graph::{Graph, Input, Schema};
use crate::nodes::{Inputs, NodeCtx, NodeError, NodeOutput};

#[test]
fn a_cached_rerun_sends_the_outputs_again() {
    let mut bench = Bench::new();
    let (_, first) = bench.run(small(5));
    bench.take_calls();
    let (events, second) = bench.run(small(5));
    assert_eq!(
        names(&events),
        [
            "status:1",
            "status:1",
            "execution_start",
            "execution_cached:1,2,3",
            "executed:3",
            "progress_state:3=finished",
            "execution_success",
            "status:0",
            "executing:None",
        ]
    );
    let state = events[5].kind.data().to_string();
    assert!(state.contains(r#""3":{"value":1,"max":1,"#), "{state}");
    assert_eq!(second["outputs"], first["outputs"]);
    assert_eq!(second["meta"], first["meta"]);
    assert_eq!(bench.take_calls(), [""; 0]);
}

#[test]
fn a_changed_node_runs_again_with_what_follows() {
    let mut bench = Bench::new();
    let mut prompt = small(5);
    prompt["1b"] = node("Num", json!({"value": 1}));
    prompt["2"]["inputs"]["b"] = json!(["1b", 0]);
    bench.run(prompt.clone());
    bench.take_calls();
    prompt["1b"]["inputs"]["value"] = json!(2);
    let (events, _) = bench.run(prompt);
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["1"]));
    assert_eq!(bench.take_calls(), ["1b", "2", "3"]);
}

#[test]
fn node_ids_do_not_matter() {
    let mut bench = Bench::new();
    bench.run(small(5));
    bench.take_calls();
    let renamed =
        small(5).to_string().replace("\"1\"", "\"x\"").replace("\"2\"", "\"y\"").replace("\"3\"", "\"z\"");
    let (events, entry) = bench.run(serde_json::from_str(&renamed).expect("JSON"));
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["x", "y", "z"]));
    assert_eq!(entry["outputs"], json!({"z": {"text": ["10"]}}));
    assert_eq!(bench.take_calls(), [""; 0]);
}

#[test]
fn classes_that_get_their_own_id_are_cached_by_it() {
    let mut bench = Bench::new();
    let prompt = |id: &str| json!({id: node("OwnId", json!({})), "9": node("Show", json!({"x": [id, 0]}))});
    bench.run(prompt("a"));
    bench.run(prompt("a"));
    let (_, entry) = bench.run(prompt("b"));
    assert_eq!(bench.take_calls(), ["a", "9", "b", "9"]);
    assert_eq!(entry["outputs"]["9"]["text"], json!(["b"]));
}

#[test]
fn another_prompt_in_between_drops_the_results() {
    let mut bench = Bench::new();
    bench.run(small(5));
    bench.run(json!({"a": node("Num", json!({"value": 50})), "b": node("Show", json!({"x": ["a", 0]}))}));
    let (events, _) = bench.run(small(5));
    assert_eq!(data(&events, "execution_cached")["nodes"], json!([]));
    let mut keeper = Bench::with(|config| config.cache = CachePolicy::Lru(10));
    keeper.run(small(5));
    keeper.run(small(6));
    let (events, _) = keeper.run(small(5));
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["1", "2", "3"]));
}

#[test]
fn without_a_cache_everything_runs_and_is_freed() {
    let mut bench = Bench::with(|config| config.cache = CachePolicy::Off);
    let prompt = json!({"1": node("Big", json!({"seed": 0})), "2": node("Show", json!({"x": ["1", 0]}))});
    bench.run(prompt.clone());
    let (events, _) = bench.run(prompt);
    assert_eq!(data(&events, "execution_cached")["nodes"], json!([]));
    assert_eq!(bench.take_calls(), ["1", "2", "1", "2"]);
    assert!(lock(&bench.big).iter().all(|b| b.upgrade().is_none()));
}

#[test]
fn twins_run_once() {
    let mut bench = Bench::new();
    let prompt = json!({
        "1": node("Num", json!({"value": 4})),
        "2": node("Add", json!({"a": ["1", 0], "b": ["1", 0]})), "3": node("Add", json!({"a": ["1", 0], "b": ["1", 0]})),
        "4": node("Add", json!({"a": ["2", 0], "b": ["3", 0]})), "9": node("Show", json!({"x": ["4", 0]})),
    });
    let (events, entry) = bench.run(prompt);
    assert_eq!(
        brief(&events),
        [
            "execution_start",
            "execution_cached:",
            "executing:1",
            "executing:3",
            "executed:2",
            "executing:4",
            "executing:9",
            "executed:9",
            "execution_success",
            "executing:None"
        ]
    );
    let twin = events.iter().find(|e| name(e) == "executed:2").map(|e| e.kind.data()).expect("there");
    assert_eq!((&twin["node"], &twin["output"]), (&json!("2"), &Json::Null));
    assert_eq!(entry["outputs"]["9"]["text"], json!(["16"]));
    assert_eq!(bench.take_calls(), ["1", "3", "4", "9"]);
}

#[test]
fn classes_that_are_never_cached_run_every_time_with_what_follows() {
    let mut bench = Bench::new();
    let prompt = json!({
        "1": node("Fresh", json!({})), "0": node("Num", json!({"value": 4})),
        "2": node("Add", json!({"a": ["1", 0], "b": ["0", 0]})), "3": node("Show", json!({"x": ["2", 0]})),
    });
    bench.run(prompt.clone());
    bench.take_calls();
    let (events, _) = bench.run(prompt);
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["0"]));
    assert_eq!(bench.take_calls(), ["1", "2", "3"]);
}

#[test]
fn a_change_of_the_outside_world_counts() {
    let mut bench = Bench::new();
    let prompt = json!({"1": node("World", json!({})), "3": node("Show", json!({"x": ["1", 0]}))});
    bench.run(prompt.clone());
    bench.run(prompt.clone());
    assert_eq!(bench.take_calls(), ["1", "3"]);
    bench.world.fetch_add(1, Ordering::SeqCst);
    bench.run(prompt);
    assert_eq!(bench.take_calls(), ["1", "3"]);
}

fn alive(bench: &Bench) -> usize {
    lock(&bench.big).iter().filter_map(Weak::upgrade).count()
}

#[test]
fn free_memory_while_idle_drops_results_at_once() {
    let mut bench = Bench::new();
    let prompt = json!({"1": node("Big", json!({"seed": 0})), "2": node("Show", json!({"x": ["1", 0]}))});
    bench.run(prompt.clone());
    bench.engine.free(FreeRequest { unload_models: true, free_memory: false });
    bench.run(prompt.clone());
    assert_eq!((bench.take_calls().len(), alive(&bench)), (2, 1));
    bench.engine.free(FreeRequest { unload_models: false, free_memory: true });
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while alive(&bench) > 0 && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(alive(&bench), 0);
    bench.run(prompt);
    assert_eq!(bench.take_calls().len(), 2);
}

#[test]
fn free_memory_while_a_prompt_runs_keeps_only_what_it_needs() {
    let mut bench = Bench::new();
    let prompt = json!({
        "1": node("Big", json!({"seed": 0})), "2": node("Show", json!({"x": ["1", 0]})),
        "3": node("Big", json!({"seed": 1})),
        "5": node("Slow", json!({"steps": 300})), "6": node("Add", json!({"a": ["5", 0], "b": ["7", 0]})),
        "7": node("Num", json!({"value": 3})), "8": node("Show", json!({"x": ["6", 0]})),
        "9": node("Show", json!({"x": ["3", 0]})),
    });
    let id = bench.submit(prompt.clone());
    bench.until(|e| matches!(e.kind, EventKind::Progress { .. }));
    bench.engine.free(FreeRequest { unload_models: true, free_memory: true });
    let (events, entry) = bench.finish(&id);
    assert_eq!(brief(&events).last().map(String::as_str), Some("executing:None"));
    assert_eq!(entry["status"]["status_str"], "success", "{entry}");
    assert_eq!(entry["outputs"].as_object().map(Map::len), Some(3));
    assert_eq!(alive(&bench), 0);
    let (events, _) = bench.run(prompt);
    // The request took effect after node 5: only 6 and 8 ran later.
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["6", "8"]));
}

/// A class with every kind of input, for its cache keys only.
struct Keyed;

impl Node for Keyed {
    fn schema(&self) -> Schema {
        Schema::new("Keyed", "")
            .input(Input::int("i", 0, i64::MIN, u64::MAX))
            .input(Input::float("f", 0.0, f64::MIN, f64::MAX))
            .input(Input::string("s"))
            .input(Input::boolean("b"))
            .input(Input::link("x", "*").optional())
            .input(Input::link("y", "*").optional())
            .output("NUM")
            .output("NUM")
    }

    fn execute(&self, _: &mut NodeCtx<'_>, _: &Inputs) -> Result<NodeOutput, NodeError> {
        Ok(NodeOutput::default())
    }
}

fn literal() -> impl Strategy<Value = Json> {
    prop_oneof![
        any::<i64>().prop_map(Json::from),
        (-1e9..1e9_f64).prop_map(Json::from),
        any::<bool>().prop_map(Json::from),
        ".{0,6}".prop_map(Json::from),
        Just(Json::Null),
        proptest::collection::vec(0_i64..9, 0..4).prop_map(|v| json!({"k": v})),
        (0_i64..2).prop_map(|slot| json!(["up", slot])),
    ]
}

proptest! {
    #[test]
    fn any_changed_input_changes_the_signature(
        inputs in proptest::collection::btree_map(prop_oneof!["i", "f", "s", "b", "x", "y"], literal(), 0..6),
        name in prop_oneof!["i", "f", "s", "b", "x", "y"],
        value in literal(),
        upstream in any::<i64>(),
        id in "[a-z]{1,3}",
    ) {
        let services = Bench::new().engine.shared.services.clone();
        let catalog = Catalog::new(vec![Box::new(Keyed)], services.clone());
        let key = |id: &str, inputs: &Json, upstream: i64| {
            let prompt = json!({"up": node("Keyed", json!({"i": upstream})), id: node("Keyed", inputs.clone()),
                "down": node("Keyed", json!({"x": [id, 1]}))});
            let graph = Graph::new(&prompt, &catalog);
            let keys = signature::signatures(&graph, &catalog, &services);
            let find = |id: &str| graph.find(id).and_then(|i| keys[i]);
            (find(id), find("down"))
        };
        let inputs: Json = inputs.into_iter().collect();
        let (here, below) = key("n", &inputs, upstream);
        prop_assert!(here.is_some() && below.is_some() && here != below);
        let (renamed, below_renamed) = key(&format!("{id}-n"), &inputs, upstream);
        prop_assert_eq!((here, below), (renamed, below_renamed));
        let mut changed = inputs.clone();
        changed[&name] = value.clone();
        let is_same = inputs.get(&name).is_some_and(|old| {
            *old == value || old.is_number() && value.is_number() && old.as_f64() == value.as_f64()
        });
        let (other, below_other) = key("n", &changed, upstream);
        prop_assert_eq!(is_same, here == other);
        prop_assert_eq!(is_same, below == below_other);
        let has_link = inputs.as_object().is_some_and(|m| m.values().any(Json::is_array));
        let (other, _) = key("n", &inputs, upstream.wrapping_add(1));
        prop_assert_eq!(has_link, here != other);
    }
}
