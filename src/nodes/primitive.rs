//! Single values as nodes, so that several inputs can share one.

use serde_json::Value as Json;

use super::pure::PureNode;
use super::shapes::newer;
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::graph::Input;

const LARGEST: i64 = i64::MAX;

/// The value nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(|| text("PrimitiveString", "String", false), give),
        PureNode::boxed(|| text("PrimitiveStringMultiline", "String (Multiline)", true), give),
        PureNode::boxed(int_schema, give),
        PureNode::boxed(float_schema, give),
        PureNode::boxed(boolean_schema, give),
    ]
}

fn schema(class: &'static str, name: &'static str, input: Input, about: &'static str) -> Schema {
    let type_name = input.kind.type_name();
    let schema = Schema::new(class, "utils/primitive")
        .display(name)
        .module("comfy_extras.nodes_primitive")
        .describe(about)
        .input(input)
        .output(type_name);
    newer(schema, false)
}

fn text(class: &'static str, name: &'static str, is_multiline: bool) -> Schema {
    schema(class, name, Input::string("value").opt("multiline", is_multiline), "A text.")
}

fn int_schema() -> Schema {
    let input = Input::open_int("value").opt("min", -LARGEST).opt("max", LARGEST);
    schema("PrimitiveInt", "Int", input.opt("control_after_generate", true), "A whole number.")
}

fn float_schema() -> Schema {
    let input = Input::open_float("value").opt("min", -LARGEST).opt("max", LARGEST);
    schema("PrimitiveFloat", "Float", input, "A number.")
}

fn boolean_schema() -> Schema {
    schema("PrimitiveBoolean", "Boolean", Input::boolean("value"), "True or false.")
}

fn give(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    Ok(vec![inputs.get("value").cloned().unwrap_or(Value::Json(Json::Null))])
}
