//! ControlNets: loading, and attaching to conditioning with a picture.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::control::{Control, ControlHandle, SHARES_CONTROL, attached};
use super::loaders::{VaeHandle, model_file};
use super::pure::PureNode;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::{CondEntry, Conditioning, ModelHandle};
use crate::graph::Input;
use crate::models::controlnet::KINDS;
use crate::models::patch::{Change, Patch, Patches};
use crate::tensor::HostTensor;

const CATEGORY: &str = "conditioning/controlnet";

/// The ControlNet nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(ControlNetLoader),
        Box::new(DiffControlNetLoader),
        PureNode::boxed(apply_schema, apply),
        PureNode::boxed(apply_advanced_schema, apply_advanced),
        PureNode::boxed(apply_with_vae_schema, apply_advanced),
        PureNode::boxed(union_schema, set_union_type),
    ]
}

/// Nets for shuffled pictures average their outputs; only the file's name tells.
fn is_averaged(name: &str) -> bool {
    let stem = Path::new(name).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    stem.ends_with("_shuffle") || stem.ends_with("_shuffle_fp16")
}

fn load(ctx: &NodeCtx<'_>, inputs: &Inputs) -> Result<ControlHandle, NodeError> {
    let name = inputs.string("control_net_name")?;
    let file = model_file(ctx.services, "controlnet", name)?;
    let (patches, kinds) = (Patches::default(), Vec::new());
    let handle = ControlHandle { file, patches, kinds, is_averaged: is_averaged(name) };
    let is_averaged = handle.is_averaged && !handle.is_control_lora()?;
    Ok(ControlHandle { is_averaged, ..handle })
}

/// `ControlNetLoader`.
pub struct ControlNetLoader;

impl Node for ControlNetLoader {
    fn schema(&self) -> Schema {
        Schema::new("ControlNetLoader", "loaders")
            .display("Load ControlNet Model")
            .describe("Loads a ControlNet, which steers a diffusion model by a picture.")
            .input(Input::model_file("control_net_name", "controlnet").bare())
            .output("CONTROL_NET")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let handle = load(ctx, inputs)?;
        handle.check()?;
        Ok(NodeOutput::one(Value::object("CONTROL_NET", handle)))
    }
}

/// `DiffControlNetLoader`.
pub struct DiffControlNetLoader;

impl Node for DiffControlNetLoader {
    fn schema(&self) -> Schema {
        Schema::new("DiffControlNetLoader", "loaders")
            .display("Load ControlNet Model (diff)")
            .describe("Loads a ControlNet that is stored as a difference to a diffusion model.")
            .input(Input::link("model", "MODEL").bare())
            .input(Input::model_file("control_net_name", "controlnet").bare())
            .output("CONTROL_NET")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let mut handle = load(ctx, inputs)?;
        if handle.file.has_tensor("difference")? {
            let model = inputs.object::<ModelHandle>("model")?;
            let network = super::lora::network(&model)?;
            let values = network.file().unet_values(network.patches())?;
            let add = |(name, values)| {
                let change = Arc::new(Change::Add(values));
                (name, Patch { strength: 1.0, change, strength_model: 1.0 })
            };
            let patches: HashMap<String, Patch> = values.into_iter().map(add).collect();
            handle.patches = Patches::default().with(patches);
        }
        handle.check()?;
        Ok(NodeOutput::one(Value::object("CONTROL_NET", handle)))
    }
}

fn strength() -> Input {
    Input::float("strength", 1.0, 0.0, 10.0).opt("step", 0.01)
}

fn share(name: &'static str, default: f64) -> Input {
    Input::float(name, default, 0.0, 1.0).opt("step", 0.001)
}

/// The picture as the net takes it: `[B, 3, H, W]`.
fn hint(inputs: &Inputs) -> Result<Arc<HostTensor>, NodeError> {
    let image = inputs.object::<HostTensor>("image")?;
    let &[b, h, w, c] = image.shape() else {
        return Err(NodeError::input(
            "image",
            &format!("has shape {:?}; it must be a picture", image.shape()),
        ));
    };
    if image.is_empty() {
        return Err(NodeError::input("image", &format!("is empty: its shape is {:?}", image.shape())));
    }
    Ok(Arc::new(HostTensor::from_fn(&[b, c, h, w], |i| {
        let (n, ch, at) = (i / (c * h * w), i / (h * w) % c, i % (h * w));
        image.data()[(n * h * w + at) * c + ch]
    })))
}

fn apply_schema() -> Schema {
    Schema::new("ControlNetApply", CATEGORY)
        .display("Apply ControlNet (OLD)")
        .describe("Attaches a ControlNet and its picture to a conditioning.")
        .input(Input::link("conditioning", "CONDITIONING").bare())
        .input(Input::link("control_net", "CONTROL_NET").bare())
        .input(Input::link("image", "IMAGE").bare())
        .input(strength())
        .output("CONDITIONING")
        .flag("deprecated", true)
}

fn apply(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let conds = inputs.object::<Conditioning>("conditioning")?;
    let strength = inputs.float("strength")?;
    if strength == 0.0 {
        return Ok(vec![Value::shared("CONDITIONING", conds)]);
    }
    let (net, hint) = (inputs.object::<ControlHandle>("control_net")?, hint(inputs)?);
    let attach = |entry: &CondEntry| {
        let control = Control {
            net: net.as_ref().clone(),
            hint: hint.clone(),
            strength: strength as f32,
            range: (0.0, 1.0),
            previous: attached(entry),
        };
        let mut entry = entry.clone();
        control.attach(&mut entry);
        entry.attachments.insert(SHARES_CONTROL, true);
        entry
    };
    let conds: Conditioning = conds.iter().map(attach).collect();
    Ok(vec![Value::object("CONDITIONING", conds)])
}

fn apply_advanced_schema() -> Schema {
    Schema::new("ControlNetApplyAdvanced", CATEGORY)
        .display("Apply ControlNet")
        .describe("Attaches a ControlNet and its picture to both sides, for a part of the sampling.")
        .input(Input::link("positive", "CONDITIONING").bare())
        .input(Input::link("negative", "CONDITIONING").bare())
        .input(Input::link("control_net", "CONTROL_NET").bare())
        .input(Input::link("image", "IMAGE").bare())
        .input(strength())
        .input(share("start_percent", 0.0))
        .input(share("end_percent", 1.0))
        .input(Input::link("vae", "VAE").bare().optional())
        .named_output("CONDITIONING", "positive")
        .named_output("CONDITIONING", "negative")
}

/// The older form of the same for nets that look through a VAE.
fn apply_with_vae_schema() -> Schema {
    let schema = Schema::new("ControlNetApplySD3", CATEGORY)
        .display("Apply Controlnet with VAE")
        .module("comfy_extras.nodes_sd3")
        .describe(
            "Attaches a ControlNet and its picture to both sides; nets of the families here need no VAE.",
        )
        .input(Input::link("positive", "CONDITIONING"))
        .input(Input::link("negative", "CONDITIONING"))
        .input(Input::link("control_net", "CONTROL_NET"))
        .input(Input::link("vae", "VAE"))
        .input(Input::link("image", "IMAGE"))
        .input(strength())
        .input(share("start_percent", 0.0))
        .input(share("end_percent", 1.0))
        .named_output("CONDITIONING", "positive")
        .named_output("CONDITIONING", "negative");
    schema.flag("deprecated", true).flag("experimental", false).flag("api_node", false)
}

fn apply_advanced(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let sides = ["positive", "negative"];
    let strength = inputs.float("strength")?;
    // Only nets of other families look at the picture through a VAE.
    inputs.object_opt::<VaeHandle>("vae")?;
    if strength == 0.0 {
        let side = |name| Ok(Value::shared("CONDITIONING", inputs.object::<Conditioning>(name)?));
        return sides.into_iter().map(side).collect();
    }
    let (net, hint) = (inputs.object::<ControlHandle>("control_net")?, hint(inputs)?);
    let range = (inputs.float("start_percent")?, inputs.float("end_percent")?);
    // Conditionings that had the same nets so far share the new one, and run as one batch.
    let mut shared: Vec<Arc<Control>> = Vec::new();
    let mut outputs = Vec::new();
    for name in sides {
        let conds = inputs.object::<Conditioning>(name)?;
        let mut side: Conditioning = conds.as_ref().clone();
        for entry in &mut side {
            let previous = attached(entry);
            let is_same = |control: &&Arc<Control>| match (&control.previous, &previous) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            let control = shared.iter().find(is_same).cloned().unwrap_or_else(|| {
                let (net, hint) = (net.as_ref().clone(), hint.clone());
                let control = Control { net, hint, strength: strength as f32, range, previous };
                shared.push(Arc::new(control));
                shared[shared.len() - 1].clone()
            });
            Control::attach_shared(control, entry);
            entry.attachments.remove(SHARES_CONTROL);
        }
        outputs.push(Value::object("CONDITIONING", side));
    }
    Ok(outputs)
}

fn union_schema() -> Schema {
    let kinds: Vec<&str> = ["auto"].into_iter().chain(KINDS).collect();
    Schema::new("SetUnionControlNetType", CATEGORY)
        .module("comfy_extras.nodes_controlnet")
        .describe("Tells a union ControlNet what kind of picture it is given.")
        .input(Input::link("control_net", "CONTROL_NET").bare())
        .input(Input::combo("type", &kinds).bare())
        .output("CONTROL_NET")
}

fn set_union_type(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let net = inputs.object::<ControlHandle>("control_net")?;
    let kind = inputs.string("type")?;
    let kinds = KINDS.iter().position(|name| *name == kind).into_iter().collect();
    Ok(vec![Value::object("CONTROL_NET", ControlHandle { kinds, ..net.as_ref().clone() })])
}
