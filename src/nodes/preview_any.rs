//! PreviewAny: shows whatever comes over a link as text.

use super::shapes::extremes;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::{Conditioning, Latent};
use crate::graph::{self, Input};
use crate::image::python_json;
use crate::tensor::HostTensor;

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(PreviewAny)]
}

/// `PreviewAny`.
pub struct PreviewAny;

impl Node for PreviewAny {
    fn schema(&self) -> Schema {
        Schema::new("PreviewAny", "utils")
            .display("Preview Any")
            .module("comfy_extras.nodes_preview_any")
            .describe("Shows any value as text.")
            .input(Input::link("source", "*"))
            .sink()
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let text = inputs.get("source").map_or_else(|| "None".to_owned(), shown);
        let mut ui = serde_json::Map::new();
        ui.insert("text".to_owned(), vec![text].into());
        Ok(NodeOutput::ui(ui))
    }
}

/// Literals as ComfyUI shows them (lists and objects as JSON); of everything
/// else what a reader wants to know: shape and range.
fn shown(value: &Value) -> String {
    match value {
        Value::Json(json) if json.is_array() || json.is_object() => python_json(json),
        Value::Json(json) => graph::text(json),
        Value::List(items) => items.iter().map(shown).collect::<Vec<_>>().join("\n"),
        Value::Object(_) => described(value),
    }
}

fn described(value: &Value) -> String {
    let name = value.describe();
    let name = name.trim_matches(['<', '>']);
    let tensor = |x: &HostTensor| match extremes(x) {
        Some((low, high)) => format!("{:?}, values {low} to {high}", x.shape()),
        None => format!("{:?}", x.shape()),
    };
    if let Some(x) = value.downcast::<HostTensor>() {
        format!("{name} {}", tensor(&x))
    } else if let Some(x) = value.downcast::<Latent>() {
        format!("{name} {}", tensor(&x.samples))
    } else if let Some(conds) = value.downcast::<Conditioning>() {
        let shapes: Vec<_> = conds.iter().map(|c| format!("{:?}", c.cond.shape())).collect();
        format!("{name} {}", shapes.join(", "))
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shows_literals_as_python_prints_them() {
        let cases = [
            (json!("a\nb"), "a\nb"),
            (json!(1.0), "1.0"),
            (json!(7), "7"),
            (json!(true), "True"),
            (json!(null), "None"),
            (json!(["ü", 1.5]), "[\"\\u00fc\", 1.5]"),
        ];
        for (value, want) in cases {
            assert_eq!(shown(&Value::Json(value)), want);
        }
        let image = HostTensor::from_fn(&[1, 1, 2, 1], |i| i as f32 / 2.0);
        assert_eq!(shown(&Value::object("IMAGE", image)), "IMAGE [1, 1, 2, 1], values 0 to 0.5");
    }
}
