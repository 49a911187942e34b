//! Every answer that the reference was recorded to give, and what no recording covers.

use super::super::FileLists;
use super::*;
use crate::graph::FileList;

/// Recorded requests with their answers, and the classes that they use.
const RECORDED: &str = include_str!("../../tests/data/prompt/recorded.json");

/// Classes by schema; `LoadImage` refuses every file, as no file exists.
struct TestClasses(Vec<Schema>);

impl FileLists for TestClasses {
    fn list(&self, list: &FileList) -> Vec<String> {
        match list {
            FileList::Models { .. } => {
                ["conf-tiny-unet.safetensors", "synth-sd15.safetensors"].map(Into::into).into()
            }
            _ => Vec::new(),
        }
    }
}

impl Classes for TestClasses {
    fn schema(&self, class: &str) -> Option<&Schema> {
        self.0.iter().find(|s| s.class == class)
    }

    fn checked_inputs(&self, class: &str) -> &[&str] {
        if class == "LoadImage" { &["image"] } else { &[] }
    }

    fn check(&self, class: &str, inputs: &Map<String, Json>) -> Result<(), String> {
        match class {
            "LoadImage" => Err(format!("Invalid image file: {}", text(&inputs["image"]))),
            _ => Ok(()),
        }
    }
}

fn leak(value: &Json) -> &'static str {
    Box::leak(value.as_str().expect("a text").to_owned().into_boxed_str())
}

/// A schema from a recorded `/object_info` entry.
fn schema_of(info: &Json) -> Schema {
    let mut schema = Schema::new(leak(&info["name"]), "");
    schema.is_output_node = info["output_node"] == true;
    for output in info["output"].as_array().expect("outputs") {
        schema = schema.output(leak(output));
    }
    for (group, presence) in [("required", Presence::Required), ("optional", Presence::Optional)] {
        for (name, spec) in info["input"][group].as_object().into_iter().flatten() {
            let kind = match &spec[0] {
                Json::String(t) if t == "INT" => InputKind::Int,
                Json::String(t) if t == "FLOAT" => InputKind::Float,
                Json::String(t) if t == "STRING" => InputKind::String,
                Json::String(_) => InputKind::Link(leak(&spec[0])),
                Json::Array(options) => InputKind::Combo(ComboSource::Static(options.clone())),
                _ => InputKind::Combo(ComboSource::Files(FileList::Models {
                    folder: "checkpoints",
                    extra: vec![],
                })),
            };
            let name = leak(&Json::from(name.as_str()));
            let options = spec.get(1).and_then(Json::as_object).cloned();
            schema = schema.input(Input { name, kind, presence, options });
        }
    }
    schema
}

fn recorded() -> (TestClasses, Map<String, Json>) {
    let mut data: Json = serde_json::from_str(RECORDED).expect("valid JSON");
    let classes = data["classes"].as_object().expect("classes").values().map(schema_of).collect();
    let cases = data["cases"].take();
    (TestClasses(classes), cases.as_object().expect("cases").clone())
}

/// Tracebacks become the text that stands for them in the recordings; errors
/// of a node, whose order the reference leaves to chance, are sorted.
fn normalise(value: &mut Json) {
    match value {
        Json::Object(map) => {
            for (key, item) in map {
                match item {
                    Json::Array(lines) if key == "traceback" => {
                        assert!(!lines.is_empty() && lines.iter().all(Json::is_string), "{lines:?}");
                        *item = Json::from("<list of text lines>");
                    }
                    Json::Array(errors) if key == "errors" => {
                        errors.iter_mut().for_each(normalise);
                        errors.sort_by_key(Json::to_string);
                    }
                    item => normalise(item),
                }
            }
        }
        Json::Array(items) => items.iter_mut().for_each(normalise),
        _ => {}
    }
}

#[test]
fn answers_are_those_of_the_reference() {
    let (classes, cases) = recorded();
    assert_eq!(cases.len(), 25);
    for (name, mut case) in cases {
        let sent = &mut case["sent"];
        let mut prompt = sent.get_mut("prompt").map(Json::take).unwrap_or_default();
        let targets: Option<Vec<String>> = sent.get("partial_execution_targets").map(|t| {
            t.as_array().expect("a list").iter().map(|id| id.as_str().expect("an id").to_owned()).collect()
        });
        let (status, mut answer) = match validate(&mut prompt, &classes, targets.as_deref()) {
            Ok(good) => {
                if let Some(outputs) = case.get("outputs") {
                    assert_eq!(json!(good.outputs), *outputs, "{name}: outputs");
                    assert_eq!(prompt, case["stored"], "{name}: stored prompt");
                }
                (200, json!({"node_errors": good.node_errors}))
            }
            Err(r) => (400, json!({"error": r.error, "node_errors": r.node_errors})),
        };
        let mut expected = case["body"].take();
        normalise(&mut answer);
        normalise(&mut expected);
        assert_eq!(
            (status, answer.to_string()),
            (case["status"].as_i64().expect("a status") as i32, expected.to_string()),
            "{name}"
        );
    }
}

/// A source, a filter with typed inputs, and sinks.
fn small_classes() -> TestClasses {
    TestClasses(vec![
        Schema::new("Source", "").output("IMAGE").output("MASK"),
        Schema::new("Any", "").output("*"),
        Schema::new("Filter", "").input(Input::link("x", "IMAGE")).output("IMAGE"),
        Schema::new("Union", "").input(Input::link("x", "INT, MASK,FLOAT")).output("INT,FLOAT"),
        Schema::new("Wild", "").input(Input::link("x", "*")).output("IMAGE"),
        Schema::new("Widget", "")
            .input(Input::int("n", 1, 0, 10).optional())
            .input(Input::string("s").optional())
            .output("INT"),
        Schema::new("Sink", "").input(Input::link("x", "IMAGE")).sink(),
        Schema::new("SinkAll", "").input(Input::link("x", "*")).sink(),
    ])
}

fn node(class: &str, inputs: Json) -> Json {
    json!({"class_type": class, "inputs": inputs})
}

fn check(mut prompt: Json) -> Result<(Json, Validated), Box<Refusal>> {
    validate(&mut prompt, &small_classes(), None).map(|good| (prompt, good))
}

fn first_error(prompt: Json, id: &str) -> Json {
    let refusal = check(prompt).expect_err("refused");
    refusal.node_errors[id]["errors"][0].clone()
}

#[test]
fn links_to_slots_that_do_not_exist() {
    for (link, exception, text) in [
        (json!(["1", 2]), "IndexError", "tuple index out of range"),
        (json!(["1", -1]), "IndexError", "tuple index out of range"),
        (json!(["1", "0"]), "TypeError", "tuple indices must be integers or slices, not str"),
        (json!(["1", 0.0]), "TypeError", "tuple indices must be integers or slices, not float"),
        (json!([1, 0]), "KeyError", "1"),
        (json!([null, 0]), "KeyError", "None"),
        (json!([["1"], 0]), "TypeError", "unhashable type: 'list'"),
    ] {
        let found =
            first_error(json!({"1": node("Source", json!({})), "2": node("Sink", json!({"x": link}))}), "2");
        assert_eq!(found["details"], text);
        assert_eq!(found["extra_info"]["exception_type"], exception);
    }
}

#[test]
fn types_with_stars_and_commas() {
    let fits = |from: &str, slot: u64, to: &str| {
        let middle = node(to, json!({"x": ["1", slot]}));
        let prompt = json!({"1": node(from, json!({"x": ["0", 1]})), "0": node("Source", json!({})), "2": middle,
            "3": node("SinkAll", json!({"x": ["2", 0]}))});
        check(prompt).is_ok()
    };
    assert!(fits("Source", 0, "Filter") && fits("Any", 0, "Filter") && fits("Source", 1, "Wild"));
    assert!(!fits("Source", 1, "Filter") && !fits("Source", 0, "Union"));
    assert!(fits("Source", 1, "Union") && fits("Union", 0, "Union"));
}

#[test]
fn a_wrapped_list_is_a_literal() {
    let prompt = json!({"1": node("Widget", json!({"s": {"__value__": ["a", 1]}})), "2": node("SinkAll", json!({"x": ["1", 0]}))});
    let (stored, _) = check(prompt).expect("good");
    assert_eq!(stored["1"]["inputs"]["s"], "['a', 1]");
}

#[test]
fn odd_prompts_are_refused_not_fatal() {
    for prompt in [json!([]), json!("x"), json!(5), json!(true)] {
        assert_eq!(check(prompt).expect_err("refused").error["type"], "invalid_prompt");
    }
    for (node, details) in [(json!(7), "Node ID '#1'"), (json!({"class_type": {"a": 1}}), "Node ID '#1'")] {
        let refusal = check(json!({"1": node})).expect_err("refused");
        assert_eq!(
            (&refusal.error["type"], &refusal.error["details"]),
            (&json!("invalid_prompt"), &json!(details))
        );
    }
    let without_inputs = json!({"1": {"class_type": "Sink"}});
    assert_eq!(first_error(without_inputs, "1")["details"], "'inputs'");
    let inputs_a_list = json!({"1": {"class_type": "Sink", "inputs": []}});
    assert_eq!(first_error(inputs_a_list, "1")["extra_info"]["exception_type"], "TypeError");
}

#[test]
fn a_cycle_spares_the_other_outputs() {
    let prompt = json!({
        "1": node("Filter", json!({"x": ["2", 0]})), "2": node("Filter", json!({"x": ["1", 0]})),
        "3": node("Sink", json!({"x": ["1", 0]})), "4": node("Sink", json!({"x": ["2", 0]})),
        "5": node("Filter", json!({"x": ["5", 0]})), "6": node("Sink", json!({"x": ["5", 0]})),
        "7": node("Source", json!({})), "8": node("Sink", json!({"x": ["7", 0]})),
    });
    let (_, good) = check(prompt).expect("one output is good");
    assert_eq!((good.outputs, good.node_errors), (vec!["8".to_owned()], json!({})));
}

#[test]
fn dependent_outputs_are_those_downstream() {
    let prompt = json!({
        "1": node("Filter", json!({})), "2": node("Filter", json!({"x": ["1", 0]})),
        "3": node("Sink", json!({"x": ["1", 0]})), "4": node("Sink", json!({"x": ["2", 0]})),
        "5": node("Filter", json!({"x": ["1"]})), "6": node("Sink", json!({"x": ["5", 0]})),
    });
    let refusal = check(prompt).expect_err("refused");
    assert_eq!(refusal.node_errors["1"]["dependent_outputs"], json!(["3", "4"]));
    assert_eq!(refusal.node_errors["5"]["dependent_outputs"], json!(["6"]));
    assert_eq!(refusal.node_errors.as_object().map(Map::len), Some(2));
}

#[test]
fn a_chain_of_20000_nodes() {
    let mut prompt = Map::new();
    prompt.insert("0".to_owned(), node("Source", json!({})));
    for i in 1..20_000 {
        prompt.insert(i.to_string(), node("Filter", json!({"x": [(i - 1).to_string(), 0]})));
    }
    prompt.insert("end".to_owned(), node("Sink", json!({"x": ["19999", 0]})));
    assert!(check(Json::Object(prompt.clone())).is_ok());
    prompt["0"] = node("Filter", json!({"x": ["19999", 0]}));
    let refusal = check(Json::Object(prompt)).expect_err("a long cycle");
    assert_eq!((&refusal.error["details"], &refusal.node_errors), (&json!(""), &json!({})));
}
