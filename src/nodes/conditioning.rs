//! Conditioning: combining, limiting to places and times, zeroing.

use std::sync::Arc;

use super::pure::PureNode;
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::diffusion::conditioning::{Area, Rect, average, concat, zero_out};
use crate::diffusion::{CondEntry, Conditioning};
use crate::graph::Input;
use crate::tensor::HostTensor;

/// Pixels to a latent cell, in each direction.
const CELL: usize = 8;
/// Largest side of a picture.
const MAX_SIDE: u64 = 16384;

/// The conditioning nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(combine_schema, combine),
        PureNode::boxed(average_schema, average_two),
        PureNode::boxed(concat_schema, concat_two),
        PureNode::boxed(set_area_schema, set_area),
        PureNode::boxed(set_area_percentage_schema, set_area_percentage),
        PureNode::boxed(set_area_strength_schema, set_area_strength),
        PureNode::boxed(set_mask_schema, set_mask),
        PureNode::boxed(zero_out_schema, zero),
        PureNode::boxed(set_timestep_range_schema, set_timestep_range),
    ]
}

fn link(name: &'static str) -> Input {
    Input::link(name, "CONDITIONING").bare()
}

fn strength() -> Input {
    Input::float("strength", 1.0, 0.0, 10.0).opt("step", 0.01)
}

fn output(conds: Conditioning) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::object("CONDITIONING", conds)])
}

/// Changes every entry of the input `conditioning`.
fn change(inputs: &Inputs, f: impl Fn(&mut CondEntry)) -> Result<Vec<Value>, NodeError> {
    let mut conds = (*inputs.object::<Conditioning>("conditioning")?).clone();
    conds.iter_mut().for_each(f);
    output(conds)
}

fn combine_schema() -> Schema {
    Schema::new("ConditioningCombine", "conditioning")
        .display("Conditioning (Combine)")
        .describe("Both conditionings act side by side; their predictions are averaged.")
        .input(link("conditioning_1"))
        .input(link("conditioning_2"))
        .output("CONDITIONING")
}

fn combine(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let first = inputs.object::<Conditioning>("conditioning_1")?;
    let second = inputs.object::<Conditioning>("conditioning_2")?;
    output(first.iter().chain(second.iter()).cloned().collect())
}

fn average_schema() -> Schema {
    Schema::new("ConditioningAverage", "conditioning")
        .describe("Mixes the embeddings: all of the first at strength 1, all of the second at 0.")
        .input(link("conditioning_to"))
        .input(link("conditioning_from"))
        .input(Input::float("conditioning_to_strength", 1.0, 0.0, 1.0).opt("step", 0.01))
        .output("CONDITIONING")
}

fn average_two(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let to = inputs.object::<Conditioning>("conditioning_to")?;
    let from = inputs.object::<Conditioning>("conditioning_from")?;
    output(average(&to, &from, inputs.float("conditioning_to_strength")? as f32)?)
}

fn concat_schema() -> Schema {
    Schema::new("ConditioningConcat", "conditioning")
        .describe("Appends the tokens of the second conditioning to those of the first.")
        .input(link("conditioning_to"))
        .input(link("conditioning_from"))
        .output("CONDITIONING")
}

fn concat_two(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let to = inputs.object::<Conditioning>("conditioning_to")?;
    output(concat(&to, &*inputs.object::<Conditioning>("conditioning_from")?)?)
}

fn set_area_schema() -> Schema {
    let place = |name| Input::int(name, 0, 0, MAX_SIDE).opt("step", 8);
    let side = |name| Input::int(name, 64, 64, MAX_SIDE).opt("step", 8);
    Schema::new("ConditioningSetArea", "conditioning")
        .display("Conditioning (Set Area)")
        .describe("Limits a conditioning to a rectangle, in pixels.")
        .input(link("conditioning"))
        .input(side("width"))
        .input(side("height"))
        .input(place("x"))
        .input(place("y"))
        .input(strength())
        .output("CONDITIONING")
}

fn set_area(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let cells = |name| inputs.size(name).map(|pixels| pixels / CELL);
    let area = Area::Cells(Rect {
        height: cells("height")?,
        width: cells("width")?,
        y: cells("y")?,
        x: cells("x")?,
    });
    set_rectangle(inputs, area)
}

fn set_rectangle(inputs: &Inputs, area: Area) -> Result<Vec<Value>, NodeError> {
    let strength = inputs.float("strength")?;
    change(inputs, |entry| {
        (entry.area, entry.strength, entry.set_area_to_bounds) = (Some(area), strength, false);
    })
}

fn set_area_percentage_schema() -> Schema {
    let share = |name| Input::float(name, 1.0, 0.0, 1.0).opt("min", 0).opt("step", 0.01);
    let place = |name| share(name).opt("default", 0);
    Schema::new("ConditioningSetAreaPercentage", "conditioning")
        .display("Conditioning (Set Area with Percentage)")
        .describe("Limits a conditioning to a rectangle, in fractions of the picture.")
        .input(link("conditioning"))
        .input(share("width"))
        .input(share("height"))
        .input(place("x"))
        .input(place("y"))
        .input(strength())
        .output("CONDITIONING")
}

fn set_area_percentage(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let area = Area::Fraction {
        height: inputs.float("height")?,
        width: inputs.float("width")?,
        y: inputs.float("y")?,
        x: inputs.float("x")?,
    };
    set_rectangle(inputs, area)
}

fn set_area_strength_schema() -> Schema {
    Schema::new("ConditioningSetAreaStrength", "conditioning")
        .describe("Sets a conditioning's weight in the mean with others.")
        .input(link("conditioning"))
        .input(strength())
        .output("CONDITIONING")
}

fn set_area_strength(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let strength = inputs.float("strength")?;
    change(inputs, |entry| entry.strength = strength)
}

fn set_mask_schema() -> Schema {
    Schema::new("ConditioningSetMask", "conditioning")
        .display("Conditioning (Set Mask)")
        .describe("Weights a conditioning by place; optionally only the mask's bounding box is computed.")
        .input(link("conditioning"))
        .input(Input::link("mask", "MASK").bare())
        .input(strength())
        .input(Input::combo("set_cond_area", &["default", "mask bounds"]).bare())
        .output("CONDITIONING")
}

fn set_mask(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let mask = inputs.object::<HostTensor>("mask")?;
    let &[.., h, w] = mask.shape() else {
        let what = format!("has shape {:?}, not [batch, height, width]", mask.shape());
        return Err(NodeError::input("mask", &what));
    };
    if mask.is_empty() {
        return Err(NodeError::input("mask", &format!("is empty: its shape is {:?}", mask.shape())));
    }
    let shape = [mask.len() / (h * w), h, w];
    let mask = HostTensor::new(&shape, mask.data().to_vec()).map(Arc::new);
    let strength = inputs.float("strength")?;
    let to_bounds = inputs.string("set_cond_area")? != "default";
    change(inputs, |entry| {
        entry.mask = mask.clone();
        (entry.mask_strength, entry.set_area_to_bounds) = (strength, to_bounds);
    })
}

fn zero_out_schema() -> Schema {
    Schema::new("ConditioningZeroOut", "advanced/conditioning")
        .describe("Replaces the embeddings by zeros.")
        .input(link("conditioning"))
        .output("CONDITIONING")
}

fn zero(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    output(zero_out(&*inputs.object::<Conditioning>("conditioning")?))
}

fn set_timestep_range_schema() -> Schema {
    let share = |name, default| Input::float(name, default, 0.0, 1.0).opt("step", 0.001);
    Schema::new("ConditioningSetTimestepRange", "advanced/conditioning")
        .describe("Limits a conditioning to a part of the sampling, from 0 (start) to 1 (end).")
        .input(link("conditioning"))
        .input(share("start", 0.0))
        .input(share("end", 1.0))
        .output("CONDITIONING")
}

fn set_timestep_range(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (start, end) = (inputs.float("start")?, inputs.float("end")?);
    change(inputs, |entry| (entry.start_percent, entry.end_percent) = (Some(start), Some(end)))
}
