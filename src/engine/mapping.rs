//! Lists: how often a node runs and with which values.
//!
//! Every output slot holds a list, of one value unless the slot or a node
//! upstream made more. A node runs once for each item of its longest input;
//! shorter inputs repeat their last item. A class with `input_is_list` runs
//! once and gets the lists whole.

use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::cache::NodeResult;
use super::catalog::Class;
use crate::graph::{GraphNode, Source};
use crate::nodes::{Inputs, NodeCtx, NodeError, NodeOutput, Value};

/// The values of each given input of a node.
pub(super) type InputLists = Vec<(&'static str, Arc<[Value]>)>;

/// Collects the values of a node's inputs from the results upstream.
pub(super) fn gather(node: &GraphNode, results: &[Option<Arc<NodeResult>>]) -> Result<InputLists, NodeError> {
    let values = |name: &str, source: &Source| match source {
        Source::Literal(value) => Ok(Arc::from([Value::Json(value.clone())])),
        Source::Link { node, slot } => results
            .get(*node)
            .and_then(|result| result.as_ref()?.slots.get(*slot).cloned())
            .ok_or_else(|| NodeError::input(name, "has no value: the node upstream gave none")),
        Source::Dangling => Err(NodeError::input(name, "is linked to a node that does not exist")),
    };
    node.inputs.iter().map(|(name, source)| Ok((*name, values(name, source)?))).collect()
}

/// Runs a node for all items of its inputs.
pub(super) fn execute(
    class: &Class,
    ctx: &mut NodeCtx<'_>,
    inputs: &InputLists,
) -> Result<NodeResult, NodeError> {
    let mut collected = Collected::new(class);
    if class.schema.input_is_list {
        let mut whole = Inputs::default();
        for (name, values) in inputs {
            whole.insert(*name, Value::List(values.to_vec()));
        }
        collected.add(class.node.execute(ctx, &whole)?)?;
        return Ok(collected.into_result());
    }
    let runs = inputs.iter().map(|(_, values)| values.len()).max().unwrap_or(1);
    for run in 0..runs {
        let mut items = Inputs::default();
        for (name, values) in inputs {
            let value = values.get(run).or(values.last()).ok_or_else(|| NodeError::Failed {
                kind: "IndexError",
                message: format!("input '{name}' is an empty list: the node upstream gave no items"),
            })?;
            items.insert(*name, value.clone());
        }
        ctx.check_interrupt()?;
        collected.add(class.node.execute(ctx, &items)?)?;
    }
    Ok(collected.into_result())
}

/// The outputs of all runs of a node.
struct Collected<'a> {
    class: &'a Class,
    slots: Vec<Vec<Value>>,
    ui: Map<String, Json>,
}

impl<'a> Collected<'a> {
    fn new(class: &'a Class) -> Self {
        Self { class, slots: vec![Vec::new(); class.schema.outputs.len()], ui: Map::new() }
    }

    fn add(&mut self, output: NodeOutput) -> Result<(), NodeError> {
        let NodeOutput { values, ui } = output;
        let outputs = &self.class.schema.outputs;
        if values.len() < outputs.len() {
            let message = format!(
                "class {} gave {} values for {} output slots",
                self.class.schema.class,
                values.len(),
                outputs.len()
            );
            return Err(NodeError::Failed { kind: "IndexError", message });
        }
        for ((slot, declared), value) in self.slots.iter_mut().zip(outputs).zip(values) {
            match value {
                Value::List(items) if declared.is_list => slot.extend(items),
                value => slot.push(value),
            }
        }
        for (key, value) in ui.into_iter().flatten() {
            match (self.ui.get_mut(&key), value) {
                (Some(Json::Array(all)), Json::Array(more)) => all.extend(more),
                (_, value) => {
                    self.ui.insert(key, value);
                }
            }
        }
        Ok(())
    }

    fn into_result(self) -> NodeResult {
        let ui = (!self.ui.is_empty()).then(|| Arc::new(self.ui));
        NodeResult { slots: self.slots.into_iter().map(Arc::from).collect(), ui }
    }
}
