//! `/object_info`: what a node class looks like to clients.

use serde_json::{Map, Value as Json, json};

use super::{ComboSource, FileLists, Input, InputKind, Presence, Schema};

/// The options of a combo input, files as they are now.
pub(super) fn combo_options(source: &ComboSource, files: &dyn FileLists) -> Vec<Json> {
    match source {
        ComboSource::Static(options) => options.clone(),
        ComboSource::Files(list) => files.list(list).into_iter().map(Json::String).collect(),
    }
}

/// Whether a combo is written `["COMBO", {"options": […]}]` instead of `[[…], {}]`:
/// the form of ComfyUI's newer nodes, chosen by having one of its option keys.
fn is_named_combo(input: &Input) -> bool {
    let has = |key| input.options.as_ref().is_some_and(|o| o.contains_key(key));
    has("options") || has("multiselect") || has("remote")
}

/// Type and options object as ComfyUI holds them: `(["a", "b"], {})`, `("INT", {"default": 1})`.
pub(super) fn type_and_options(input: &Input, files: &dyn FileLists) -> (Json, Map<String, Json>) {
    let mut options = input.options.clone().unwrap_or_default();
    let InputKind::Combo(source) = &input.kind else {
        return (Json::from(input.kind.type_name()), options);
    };
    let list = Json::Array(combo_options(source, files));
    if !is_named_combo(input) {
        return (list, options);
    }
    if !options.contains_key("remote") {
        options.insert("options".to_owned(), list);
    }
    (Json::from("COMBO"), options)
}

/// One input as clients see it.
fn input_json(input: &Input, files: &dyn FileLists) -> Json {
    let (kind, options) = type_and_options(input, files);
    match &input.options {
        None => json!([kind]),
        Some(_) => json!([kind, options]),
    }
}

/// The entry of one class in `/object_info`.
pub fn object_info(schema: &Schema, files: &dyn FileLists) -> Json {
    let mut input = Map::new();
    let mut order = Map::new();
    for (presence, name) in
        [(Presence::Required, "required"), (Presence::Optional, "optional"), (Presence::Hidden, "hidden")]
    {
        let group: Vec<&Input> = schema.inputs.iter().filter(|i| i.presence == presence).collect();
        if group.is_empty() && presence != Presence::Required {
            continue;
        }
        let specs: Map<String, Json> = group
            .iter()
            .map(|i| {
                let spec = match presence {
                    // A bare one is written as newer nodes do: `["PROMPT"]`.
                    Presence::Hidden if i.options.is_some() => Json::from(i.kind.type_name()),
                    _ => input_json(i, files),
                };
                (i.name.to_owned(), spec)
            })
            .collect();
        input.insert(name.to_owned(), Json::Object(specs));
        order.insert(name.to_owned(), group.iter().map(|i| i.name).collect());
    }
    let mut info = Map::new();
    let mut put = |key: &str, value: Json| info.insert(key.to_owned(), value);
    put("input", Json::Object(input));
    put("input_order", Json::Object(order));
    put("output", schema.outputs.iter().map(|o| o.type_name).collect());
    put("output_is_list", schema.outputs.iter().map(|o| o.is_list).collect());
    put("output_name", schema.outputs.iter().map(|o| o.name).collect());
    put("name", schema.class.into());
    put("display_name", schema.display_name.into());
    put("description", schema.description.into());
    put("python_module", schema.python_module.into());
    put("category", schema.category.into());
    put("output_node", schema.is_output_node.into());
    info.extend(schema.extra.clone());
    Json::Object(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::FileList;

    struct TwoFiles;

    impl FileLists for TwoFiles {
        fn list(&self, list: &FileList) -> Vec<String> {
            assert_eq!(*list, FileList::Models { folder: "checkpoints", extra: vec![] });
            vec!["a.safetensors".into(), "b.safetensors".into()]
        }
    }

    #[test]
    fn writes_the_form_and_key_order_of_the_reference() {
        let schema = Schema::new("Thing", "image/batch")
            .display("A Thing")
            .module("comfy_extras.nodes_thing")
            .input(Input::model_file("ckpt_name", "checkpoints"))
            .input(Input::int("seed", 0, 0, u64::MAX).opt("control_after_generate", true))
            .input(Input::float("cfg", 8.0, 0.0, 100.0).opt("step", 0.1))
            .input(Input::combo("mode", &["x", "y"]).bare())
            .input(Input::combo("newer", &["x", "y"]).opt("default", "y").opt("multiselect", false))
            .input(Input::link("vae", "VAE").bare().optional())
            .input(Input::hidden("prompt", "PROMPT"))
            .named_output("IMAGE", "pictures")
            .list()
            .output("MASK")
            .sink()
            .flag("deprecated", false);
        let expected = concat!(
            r#"{"input":{"required":{"ckpt_name":[["a.safetensors","b.safetensors"],{}],"#,
            r#""seed":["INT",{"default":0,"min":0,"max":18446744073709551615,"control_after_generate":true}],"#,
            r#""cfg":["FLOAT",{"default":8.0,"min":0.0,"max":100.0,"step":0.1}],"mode":[["x","y"]],"#,
            r#""newer":["COMBO",{"default":"y","multiselect":false,"options":["x","y"]}]},"#,
            r#""optional":{"vae":["VAE"]},"hidden":{"prompt":"PROMPT"}},"#,
            r#""input_order":{"required":["ckpt_name","seed","cfg","mode","newer"],"optional":["vae"],"hidden":["prompt"]},"#,
            r#""output":["IMAGE","MASK"],"output_is_list":[true,false],"output_name":["pictures","MASK"],"#,
            r#""name":"Thing","display_name":"A Thing","description":"","python_module":"comfy_extras.nodes_thing","#,
            r#""category":"image/batch","output_node":true,"deprecated":false}"#
        );
        assert_eq!(object_info(&schema, &TwoFiles).to_string(), expected);
    }

    #[test]
    fn required_is_there_even_without_inputs() {
        let info = object_info(&Schema::new("DisableNoise", "x").output("NOISE"), &TwoFiles);
        assert_eq!(info["input"], json!({"required": {}}));
        assert_eq!(info["input_order"], json!({"required": []}));
    }
}
