//! A node of your own in a server of your own: `cargo run --release --example custom_node`, then ask
//! `curl 127.0.0.1:8188/object_info/Stripes` and queue it from any ComfyUI client.

use kiln::graph::{Input, Schema};
use kiln::nodes::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Value};
use kiln::tensor::HostTensor;

/// Draws stripes.
pub struct Stripes;

impl Node for Stripes {
    fn schema(&self) -> Schema {
        Schema::new("Stripes", "image/examples")
            .display("Draw Stripes")
            .describe("Black and white stripes, a node from examples/custom_node.rs.")
            .input(Input::int("size", 64, 8, 1024))
            .input(Input::int("width", 8, 1, 512))
            .input(Input::combo("direction", &["horizontal", "vertical"]))
            .output("IMAGE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (size, width) = (inputs.size("size")?, inputs.size("width")?);
        let is_horizontal = inputs.string("direction")? == "horizontal";
        let mut pixels = Vec::with_capacity(size * size * 3);
        for y in 0..size {
            ctx.check_interrupt()?;
            for x in 0..size {
                let stripe = if is_horizontal { y } else { x } / width;
                pixels.extend([if stripe % 2 == 0 { 0.0 } else { 1.0 }; 3]);
            }
        }
        let image = HostTensor::new(&[1, size, size, 3], pixels)
            .ok_or_else(|| NodeError::failed("StripesError", "pixels and size don't fit"))?;
        Ok(NodeOutput::one(Value::object("IMAGE", image)))
    }
}

fn main() -> Result<(), kiln::ServerError> {
    kiln::Server::builder().node(Stripes).run()
}
