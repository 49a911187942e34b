//! Nodes whose outputs follow from their inputs alone, as two functions each.

use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};

/// A node that needs no context: no files, no models beyond its inputs, no progress.
pub(super) struct PureNode {
    /// What it takes and gives.
    pub schema: fn() -> Schema,
    /// Its output slots.
    pub run: fn(&Inputs) -> Result<Vec<Value>, NodeError>,
}

impl PureNode {
    /// The node, ready for the registry.
    pub(super) fn boxed(
        schema: fn() -> Schema,
        run: fn(&Inputs) -> Result<Vec<Value>, NodeError>,
    ) -> Box<dyn Node> {
        Box::new(Self { schema, run })
    }
}

impl Node for PureNode {
    fn schema(&self) -> Schema {
        (self.schema)()
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        (self.run)(inputs).map(NodeOutput::many)
    }
}
