//! Every class of this build against the reference's `/object_info`.
//!
//! `tests/data/object_info.json` holds all classes of ComfyUI 0.3.64 in a short
//! form: what follows from the rest (order of inputs, name) or is the rule
//! (unnamed outputs, no list, no sink) is left out, the flags are the list
//! `[deprecated, experimental, api_node]`, and `{"$list": NAME}` stands for one of
//! `lists`, `{"$files": FOLDER}` for the files that exist. Texts for people
//! (descriptions, tooltips) are ours and not compared.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::registry;
use crate::graph::{FileList, FileLists, object_info};

struct NoFiles;

impl FileLists for NoFiles {
    fn list(&self, _: &FileList) -> Vec<String> {
        Vec::new()
    }
}

/// One form for both sides: numbers as f64 (0 and 0.0 are one number in JSON),
/// file lists empty, named lists written out, no texts for people.
fn normal(value: &Json, lists: &Json) -> Json {
    match value {
        Json::Number(n) => json!(n.as_f64()),
        Json::Array(items) => {
            let mut items: Vec<Json> = items.iter().map(|v| normal(v, lists)).collect();
            // An input whose only option was a tooltip is recorded without options.
            if items.len() == 2 && items[0].is_string() && items[1] == json!({}) {
                items.pop();
            }
            Json::Array(items)
        }
        Json::Object(map) if map.contains_key("$files") => json!([]),
        Json::Object(map) if map.contains_key("$list") => {
            lists[map["$list"].as_str().unwrap_or_default()].clone()
        }
        Json::Object(map) => {
            let kept = map.iter().filter(|(k, _)| *k != "tooltip" && *k != "description");
            Json::Object(kept.map(|(k, v)| (k.clone(), normal(v, lists))).collect())
        }
        other => other.clone(),
    }
}

/// The whole entry of a class from its short form.
fn written_out(class: &str, short: &Json) -> Map<String, Json> {
    let mut entry = short.as_object().unwrap().clone();
    entry.remove("tier");
    let inputs = entry["input"].as_object().unwrap();
    let keys = |group: &Json| group.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let order: Map<String, Json> = inputs.iter().map(|(name, g)| (name.clone(), keys(g).into())).collect();
    let outputs = entry["output"].as_array().unwrap().len();
    let names = entry["output"].clone();
    entry.insert("input_order".into(), order.into());
    entry.entry("output_is_list").or_insert_with(|| vec![false; outputs].into());
    entry.entry("output_name").or_insert(names);
    entry.entry("output_node").or_insert(false.into());
    entry.insert("name".into(), class.into());
    let flags = entry.remove("flags").unwrap_or_default();
    for (flag, value) in
        ["deprecated", "experimental", "api_node"].into_iter().zip(flags.as_array().into_iter().flatten())
    {
        if !value.is_null() {
            entry.insert(flag.to_owned(), value.clone());
        }
    }
    entry
}

/// What differs between our entry of a class and the reference's.
fn differences(class: &str, got: &Json, want: &Json) -> Vec<String> {
    let (got, want) = (got.as_object().unwrap(), want.as_object().unwrap());
    let mut keys: Vec<&String> = got.keys().chain(want.keys()).collect();
    keys.sort();
    keys.dedup();
    let differs = keys.into_iter().filter(|key| got.get(*key) != want.get(*key));
    let line = |key: &String| format!("{class}.{key}: {:?}, recorded {:?}", got.get(key), want.get(key));
    differs.map(line).collect()
}

#[test]
fn classes_equal_the_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/object_info.json");
    let recorded: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (lists, recorded) = (&recorded["lists"], recorded["nodes"].as_object().unwrap());
    let nodes = registry();
    let ours: BTreeMap<&str, _> = nodes.iter().map(|n| (n.schema().class, n.schema())).collect();
    assert_eq!(ours.len(), nodes.len(), "a class is registered twice");
    let mut wrong = Vec::new();
    let mut tiers: BTreeMap<&str, (usize, Vec<&str>)> = BTreeMap::new();
    for (class, short) in recorded {
        let tier = tiers.entry(short["tier"].as_str().unwrap()).or_default();
        let Some(schema) = ours.get(class.as_str()) else {
            tier.1.push(class);
            continue;
        };
        tier.0 += 1;
        if schema.description.is_empty() {
            wrong.push(format!("{class} has no description"));
        }
        let got = normal(&object_info(schema, &NoFiles), lists);
        let want = normal(&Json::Object(written_out(class, short)), lists);
        wrong.extend(differences(class, &got, &want));
    }
    for (tier, (present, missing)) in &tiers {
        println!("{tier}: {present} classes, {} missing: {}", missing.len(), missing.join(", "));
    }
    let unknown: Vec<_> = ours.keys().filter(|class| !recorded.contains_key(**class)).collect();
    println!("not in the reference: {unknown:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
