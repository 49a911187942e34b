//! Errors, panics, interrupts: the prompt ends, nothing else does.

use std::sync::{OnceLock, Weak};

use serde_json::json;

use super::bench::*;
use crate::engine::*;
use crate::graph::Schema;
use crate::nodes::{Inputs, NodeCtx, NodeError, NodeOutput};

fn broken(class: &str, inputs: Json) -> Json {
    json!({
        "1": node("Num", json!({"value": 5})),
        "2": node(class, inputs),
        "3": node("Show", json!({"x": ["2", 0]})),
    })
}

#[test]
fn a_failed_node_ends_its_prompt_alone() {
    let mut bench = Bench::new();
    let (events, entry) = bench.run(broken("Fail", json!({"x": ["1", 0]})));
    assert_eq!(
        brief(&events),
        [
            "execution_start",
            "execution_cached:",
            "executing:1",
            "executing:2",
            "execution_error",
            "executing:None"
        ]
    );
    let error = data(&events, "execution_error");
    for (key, expected) in [
        ("node_id", json!("2")),
        ("node_type", json!("Fail")),
        ("executed", json!(["1"])),
        ("exception_message", json!("no such tensor\n")),
        ("exception_type", json!("WeightsError")),
        ("current_inputs", json!({"x": [5]})),
        ("current_outputs", json!(["1", "2", "3"])),
    ] {
        assert_eq!(error[key], expected, "{key}");
    }
    let traceback = error["traceback"].as_array().expect("a list");
    assert!(!traceback.is_empty() && traceback.iter().all(Json::is_string));
    let keys: Vec<_> = error.as_object().expect("an object").keys().cloned().collect();
    assert_eq!(
        keys,
        [
            "prompt_id",
            "node_id",
            "node_type",
            "executed",
            "exception_message",
            "exception_type",
            "traceback",
            "current_inputs",
            "current_outputs",
            "timestamp"
        ]
    );
    assert_eq!((&entry["outputs"], &entry["meta"]), (&json!({}), &json!({})));
    assert_eq!(
        (&entry["status"]["status_str"], &entry["status"]["completed"]),
        (&json!("error"), &json!(false))
    );
    assert_eq!(entry["status"]["messages"][2], json!(["execution_error", error]));
    let (_, entry) = bench.run(small(5));
    assert_eq!(entry["status"]["status_str"], "success");
}

#[test]
fn what_ran_before_the_error_stays_cached() {
    let mut bench = Bench::new();
    bench.run(broken("Fail", json!({"x": ["1", 0]})));
    let (events, _) = bench.run(broken("Fail", json!({"x": ["1", 0]})));
    assert_eq!(data(&events, "execution_cached")["nodes"], json!(["1"]));
    assert_eq!(data(&events, "execution_error")["executed"], json!([]));
    assert_eq!(bench.take_calls(), ["1", "2", "2"]);
}

#[test]
fn a_panic_is_an_error_of_its_node() {
    let mut bench = Bench::new();
    let (events, _) = bench.run(broken("Panic", json!({})));
    let error = data(&events, "execution_error");
    assert_eq!((&error["node_id"], &error["exception_type"]), (&json!("2"), &json!("Panic")));
    assert_eq!(error["exception_message"], "index 7 out of range\n");
    let (_, entry) = bench.run(small(5));
    assert_eq!(entry["status"]["status_str"], "success");
}

#[test]
fn too_few_outputs_are_an_error() {
    let (events, _) = Bench::new().run(broken("Short", json!({})));
    let message = data(&events, "execution_error")["exception_message"].clone();
    assert_eq!(message, "class Short gave 0 values for 1 output slots\n");
}

#[test]
fn hidden_inputs_are_shown_too() {
    let prompt = json!({"1": node("List", json!({"count": 0})), "3": node("Show", json!({"x": ["1", 0]}))});
    let mut bench = Bench::new();
    let (_, entry) = bench.run(prompt);
    // An empty list as the only input: the node runs no time at all.
    assert_eq!((&entry["status"]["status_str"], &entry["outputs"]), (&json!("success"), &json!({})));
    let show_fails = json!({
        "1": node("List", json!({"count": 0})), "2": node("Num", json!({"value": 1})),
        "3": node("Add", json!({"a": ["1", 0], "b": ["2", 0]})), "4": node("Show", json!({"x": ["3", 0]})),
    });
    let (events, _) = bench.run(show_fails);
    assert_eq!(data(&events, "execution_error")["current_inputs"], json!({"a": [], "b": [1]}));
}

#[test]
fn interrupting_ends_the_running_prompt() {
    let mut bench = Bench::new();
    let slow = bench.start_slow();
    let next = bench.submit(small(5));
    bench.engine.interrupt(Some("someone-else"));
    bench.until(|e| matches!(e.kind, EventKind::Progress { value: 1.., .. }));
    assert_eq!(bench.engine.queue().running[0][1], json!(slow));
    assert_eq!(bench.engine.executing("me"), Some((slow.clone(), "s".to_owned())));
    bench.engine.interrupt(None);
    let (events, entry) = bench.finish(&slow);
    assert_eq!(names(&events)[events.len() - 3..], ["execution_interrupted", "status:1", "executing:None"]);
    let data = data(&events, "execution_interrupted");
    assert_eq!(
        data,
        json!({"prompt_id": slow, "node_id": "s", "node_type": "Slow", "executed": [], "timestamp": data["timestamp"]})
    );
    assert_eq!((&entry["status"]["status_str"], &entry["outputs"]), (&json!("error"), &json!({})));
    let kinds: Vec<_> = (0..3).map(|i| entry["status"]["messages"][i][0].clone()).collect();
    assert_eq!(kinds, ["execution_start", "execution_cached", "execution_interrupted"]);
    let (_, entry) = bench.finish(&next);
    assert_eq!(entry["status"]["status_str"], "success");
    assert_eq!(bench.engine.executing("me"), None);
}

#[test]
fn interrupting_by_id_and_while_idle() {
    let mut bench = Bench::new();
    bench.engine.interrupt(None);
    let (_, entry) = bench.run(small(5));
    assert_eq!(entry["status"]["status_str"], "success");
    let slow = bench.start_slow();
    bench.engine.interrupt(Some(&slow));
    let (events, _) = bench.finish(&slow);
    assert_eq!(data(&events, "execution_interrupted")["prompt_id"], json!(slow));
}

#[test]
fn shutting_down_stops_the_running_prompt() {
    let mut bench = Bench::new();
    let slow = bench.start_slow();
    let waiting = bench.submit(small(5));
    bench.engine.shutdown();
    assert_eq!(bench.engine.history_one(&slow)[&slow]["status"]["status_str"], "error");
    assert_eq!(bench.engine.queue().pending[0][1], json!(waiting));
}

/// Shuts its own engine down.
struct Stopper(Arc<OnceLock<Weak<Engine>>>);

impl Node for Stopper {
    fn schema(&self) -> Schema {
        Schema::new("Stopper", "test").sink()
    }

    fn execute(&self, _: &mut NodeCtx<'_>, _: &Inputs) -> Result<NodeOutput, NodeError> {
        self.0.get().and_then(Weak::upgrade).expect("the engine").shutdown();
        Ok(NodeOutput::ui(Map::new()))
    }
}

#[test]
fn a_node_may_shut_its_engine_down() {
    let place = Arc::new(OnceLock::new());
    let mut bench = Bench::with(|config| config.nodes.push(Box::new(Stopper(place.clone()))));
    place.set(Arc::downgrade(&bench.engine)).expect("empty");
    // Comes to an end: the prompt doesn't wait for the thread that waits for the prompt.
    let (_, entry) = bench.run(json!({"1": node("Stopper", json!({}))}));
    assert_eq!(entry["status"]["completed"], true);
}
