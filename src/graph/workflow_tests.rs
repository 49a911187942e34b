//! The web page's format: widgets, modes, page-only nodes, subgraphs, hostile files.

use super::*;
use crate::graph::Input;

fn schemas() -> HashMap<&'static str, Schema> {
    let list = [
        Schema::new("Loader", "t").input(Input::combo("name", &["a", "b"])).output("MODEL").output("CLIP"),
        Schema::new("Sampler", "t")
            .input(Input::link("model", "MODEL"))
            .input(Input::int("seed", 0, 0, u64::MAX).opt("control_after_generate", true))
            .input(Input::int("steps", 20, 1, 100))
            .input(Input::float("cfg", 7.0, 0.0, 30.0))
            .output("LATENT"),
        Schema::new("Patch", "t")
            .input(Input::link("model", "MODEL"))
            .input(Input::float("strength", 1.0, 0.0, 2.0))
            .output("MODEL"),
        Schema::new("Text", "t")
            .display("A Text")
            .input(Input::string("text"))
            .input(Input::link("clip", "CLIP"))
            .output("CONDITIONING"),
        Schema::new("Save", "t").input(Input::link("latent", "LATENT")).input(Input::string("prefix")).sink(),
    ];
    list.into_iter().map(|schema| (schema.class, schema)).collect()
}

fn convert(workflow: &Json) -> Result<Json, WorkflowError> {
    let schemas = schemas();
    let find = |class: &str| schemas.get(class);
    // the closure borrows the map for as long as the workflow
    convert_workflow(workflow, &find)
}

fn input(name: &str, kind: &str, link: Json) -> Json {
    json!({"name": name, "type": kind, "link": link})
}

fn node(id: i64, class: &str, inputs: Json, outputs: &[&str], values: Json) -> Json {
    let outputs: Vec<Json> = outputs.iter().map(|kind| json!({"name": kind, "type": kind})).collect();
    json!({"id": id, "type": class, "mode": 0, "inputs": inputs, "outputs": outputs, "widgets_values": values})
}

/// Loader → Patch → Sampler → Reroute → Save, with a note and a primitive.
fn plain() -> Json {
    json!({
        "nodes": [
            node(1, "Loader", json!([]), &["MODEL", "CLIP"], json!(["b"])),
            node(2, "Patch", json!([input("model", "MODEL", json!(10))]), &["MODEL"], json!([0.5])),
            node(3, "Sampler", json!([input("model", "MODEL", json!(11)), input("steps", "INT", json!(14))]), &["LATENT"],
                 json!([42, "randomize", 20, 6.5])),
            node(4, "Reroute", json!([input("", "*", json!(12))]), &["LATENT"], json!(null)),
            node(5, "Save", json!([input("latent", "LATENT", json!(13))]), &[], json!({"prefix": "x", "other": 1})),
            node(6, "PrimitiveNode", json!([]), &["INT"], json!([30, "fixed"])),
            node(7, "Note", json!([]), &[], json!(["hello"])),
        ],
        "links": [[10, 1, 0, 2, 0, "MODEL"], [11, 2, 0, 3, 0, "MODEL"], [12, 3, 0, 4, 0, "LATENT"],
                  [13, 4, 0, 5, 0, "LATENT"], [14, 6, 0, 3, 1, "INT"]],
        "groups": [{"title": "a group"}], "version": 0.4,
    })
}

#[test]
fn widgets_reroutes_primitives_and_notes() {
    let prompt = convert(&plain()).unwrap();
    let wanted = json!({
        "1": {"inputs": {"name": "b"}, "class_type": "Loader", "_meta": {"title": "Loader"}},
        "2": {"inputs": {"strength": 0.5, "model": ["1", 0]}, "class_type": "Patch", "_meta": {"title": "Patch"}},
        "3": {"inputs": {"seed": 42, "steps": 30, "cfg": 6.5, "model": ["2", 0]}, "class_type": "Sampler",
              "_meta": {"title": "Sampler"}},
        "5": {"inputs": {"prefix": "x", "latent": ["3", 0]}, "class_type": "Save", "_meta": {"title": "Save"}},
    });
    assert_eq!(prompt, wanted);
}

#[test]
fn muted_and_bypassed_nodes() {
    let mut workflow = plain();
    workflow["nodes"][1]["mode"] = 4.into();
    let prompt = convert(&workflow).unwrap();
    assert_eq!(prompt["3"]["inputs"]["model"], json!(["1", 0]), "the bypassed patch passes its model on");
    assert!(prompt.get("2").is_none());
    workflow["nodes"][1]["mode"] = 2.into();
    let prompt = convert(&workflow).unwrap();
    assert!(prompt["3"]["inputs"].get("model").is_none(), "nothing comes from a muted node");
    // a bypassed sampler has no latent to pass on
    workflow["nodes"][2]["mode"] = 4.into();
    assert!(convert(&workflow).unwrap()["5"]["inputs"].get("latent").is_none());
}

/// An instance (node 8) of a subgraph with a text and a sampler in it.
fn with_subgraph() -> Json {
    let text = json!({"name": "text", "type": "STRING", "link": 22, "widget": {"name": "text"}});
    json!({
        "nodes": [
            node(1, "Loader", json!([]), &["MODEL", "CLIP"], json!(["a"])),
            node(8, "sub-id", json!([input("model", "MODEL", json!(1)),
                 {"name": "words", "type": "STRING", "link": null, "widget": {"name": "words"}}]), &["LATENT"],
                 json!(["from outside"])),
            node(9, "Save", json!([input("latent", "LATENT", json!(2))]), &[], json!(["p"])),
        ],
        "links": [[1, 1, 0, 8, 0, "MODEL"], [2, 8, 0, 9, 0, "LATENT"]],
        "definitions": {"subgraphs": [{
            "id": "sub-id",
            "nodes": [
                node(3, "Sampler", json!([input("model", "MODEL", json!(20))]), &["LATENT"], json!([1, "fixed", 5, 1.0])),
                node(4, "Text", json!([text]), &["CONDITIONING"], json!(["inside"])),
            ],
            "links": [
                {"id": 20, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "MODEL"},
                {"id": 22, "origin_id": -10, "origin_slot": 1, "target_id": 4, "target_slot": 0, "type": "STRING"},
                {"id": 21, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
            ],
        }]},
    })
}

#[test]
fn subgraphs_are_unfolded() {
    let prompt = convert(&with_subgraph()).unwrap();
    assert_eq!(prompt.as_object().unwrap().keys().collect::<Vec<_>>(), ["1", "9", "8:3", "8:4"]);
    assert_eq!(prompt["9"]["inputs"], json!({"prefix": "p", "latent": ["8:3", 0]}));
    assert_eq!(prompt["8:3"]["inputs"], json!({"seed": 1, "steps": 5, "cfg": 1.0, "model": ["1", 0]}));
    assert_eq!(prompt["8:4"]["inputs"], json!({"text": "from outside"}));
    assert_eq!(prompt["8:4"]["_meta"], json!({"title": "A Text"}));
    let mut muted = with_subgraph();
    muted["nodes"][1]["mode"] = 2.into();
    assert_eq!(convert(&muted).unwrap().as_object().unwrap().keys().collect::<Vec<_>>(), ["1", "9"]);
}

#[test]
fn hostile_workflows_end() {
    let mut endless = with_subgraph();
    endless["definitions"]["subgraphs"][0]["nodes"][0]["type"] = "sub-id".into();
    assert_eq!(convert(&endless), Err(WorkflowError::TooDeep("sub-id".to_owned())));
    let mut circle = plain();
    circle["links"][2] = json!([12, 4, 0, 4, 0, "LATENT"]);
    assert!(matches!(convert(&circle), Err(WorkflowError::Circle(_))));
    assert!(matches!(convert(&json!({"1": {}})), Err(WorkflowError::Shape(_))));
    let odd = json!({"nodes": [1, {"id": []}, {"id": 1}, {"id": 2, "type": "Gone", "inputs": "x", "widgets_values": 3}],
                     "links": [null, [1], {"id": 3}]});
    let prompt = convert(&odd).unwrap();
    assert_eq!(prompt["2"]["class_type"], "Gone");
    assert!(!is_ui_workflow(&json!({"nodes": {}, "links": []})) && !is_ui_workflow(&json!([])));
}

/// Files older than a widget don't have its value, and the oldest say with a switch what happens to a seed.
#[test]
fn missing_widgets_have_their_defaults() {
    let inputs_of = |index: usize, values: Json| {
        let mut workflow = plain();
        workflow["nodes"][index]["widgets_values"] = values;
        let id = workflow["nodes"][index]["id"].to_string();
        convert(&workflow).unwrap()[id.as_str()]["inputs"].clone()
    };
    let sampler = json!({"seed": 42, "steps": 30, "cfg": 7.0, "model": ["2", 0]});
    assert_eq!(inputs_of(2, json!([42])), sampler);
    assert_eq!(inputs_of(2, json!([42, true, 20])), sampler, "a switch after a seed");
    assert_eq!(inputs_of(2, json!([42, false, 20])), sampler);
    assert_eq!(inputs_of(2, json!({"seed": 42})), sampler);
    assert_eq!(inputs_of(0, json!(null)), json!({"name": "a"}), "the first of a list");
    assert_eq!(inputs_of(4, json!([])), json!({"prefix": "", "latent": ["3", 0]}));
}
