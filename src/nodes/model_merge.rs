//! Merging models: sums of two models' weights, as patches of the first.

use std::collections::HashMap;
use std::sync::Arc;

use super::loaders::ClipHandle;
use super::pure::PureNode;
use super::sd_model::SdModel;
use super::shapes::newer_unnamed;
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::diffusion::ModelHandle;
use crate::graph::Input;
use crate::models::patch::{Change, DIFFUSION, Patch, Values};

const MODULE: &str = "comfy_extras.nodes_model_merging";
const CATEGORY: &str = "advanced/model_merging";
const BY_BLOCK: &str = "comfy_extras.nodes_model_merging_model_specific";

/// The merging nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(|| of_two("ModelMergeSimple", "MODEL").input(ratio("ratio")).output("MODEL"), simple),
        PureNode::boxed(blocks_schema, blocks),
        PureNode::boxed(|| of_two("ModelMergeSubtract", "MODEL").input(factor()).output("MODEL"), subtract),
        PureNode::boxed(
            || of_two("ModelMergeAdd", "MODEL").output("MODEL"),
            |i| merge_models(i, |_| (1.0, 1.0)),
        ),
        PureNode::boxed(|| by_block_schema("ModelMergeSD1", false), by_block),
        PureNode::boxed(|| by_block_schema("ModelMergeSD2", false), by_block),
        PureNode::boxed(|| by_block_schema("ModelMergeSDXL", true), by_block),
        PureNode::boxed(
            || of_two("CLIPMergeSimple", "CLIP").input(ratio("ratio")).output("CLIP"),
            clip_simple,
        ),
        PureNode::boxed(|| of_two("CLIPMergeSubtract", "CLIP").input(factor()).output("CLIP"), clip_subtract),
        PureNode::boxed(|| of_two("CLIPMergeAdd", "CLIP").output("CLIP"), |i| merge_clips(i, 1.0, 1.0)),
        PureNode::boxed(
            || multiply_schema("UNetSelfAttentionMultiply", "model", "MODEL"),
            |i| multiply_model(i, "attn1"),
        ),
        PureNode::boxed(
            || multiply_schema("UNetCrossAttentionMultiply", "model", "MODEL"),
            |i| multiply_model(i, "attn2"),
        ),
        PureNode::boxed(|| multiply_schema("CLIPAttentionMultiply", "clip", "CLIP"), multiply_clip),
    ]
}

/// The schema of a node that makes one model of two.
fn of_two(class: &'static str, type_name: &'static str) -> Schema {
    let [first, second] = if type_name == "MODEL" { ["model1", "model2"] } else { ["clip1", "clip2"] };
    Schema::new(class, CATEGORY)
        .module(MODULE)
        .describe("Makes one of two, weight by weight.")
        .input(Input::link(first, type_name).bare())
        .input(Input::link(second, type_name).bare())
}

/// Share of the first model.
fn ratio(name: &'static str) -> Input {
    Input::float(name, 1.0, 0.0, 1.0).opt("step", 0.01)
}

fn factor() -> Input {
    Input::float("multiplier", 1.0, -10.0, 10.0).opt("step", 0.01)
}

/// Factors on the second model's weight and on the first one's.
type Factors = (f64, f64);

/// `second·values + first·weight` for every weight.
fn sums(values: Vec<(String, Values)>, factors: impl Fn(&str) -> Factors) -> HashMap<String, Patch> {
    let patch = |(name, values): (String, Values)| {
        let (strength, strength_model) = factors(&name);
        let change = Arc::new(Change::Add(values));
        (name, Patch { strength, change, strength_model })
    };
    values.into_iter().map(patch).collect()
}

/// Fails unless both lists have the same tensors.
fn expect_same_family(first: &[(String, Values)], second: &[(String, Values)]) -> Result<(), NodeError> {
    let shapes: HashMap<&str, Vec<usize>> =
        second.iter().map(|(name, v)| (name.as_str(), v.shape())).collect();
    let differs = first.iter().find(|(name, v)| shapes.get(name.as_str()) != Some(&v.shape()));
    let Some((name, values)) = differs else { return Ok(()) };
    let other = shapes.get(name.as_str());
    let message = format!(
        "models of different families can't be merged: '{name}' is {:?} in the first and {other:?} in the second",
        values.shape()
    );
    Err(NodeError::failed("ValueError", message))
}

/// The two models with factors by the name of a weight in the UNet.
fn merge_models(inputs: &Inputs, factors: impl Fn(&str) -> Factors) -> Result<Vec<Value>, NodeError> {
    let (handle, other) = (inputs.object::<ModelHandle>("model1")?, inputs.object::<ModelHandle>("model2")?);
    let (first, second) = (SdModel::of(&handle)?, SdModel::of(&other)?);
    let values = second.file().unet_values(second.patches())?;
    expect_same_family(&first.file().unet_values(first.patches())?, &values)?;
    let patches = sums(values, |name| factors(name.strip_prefix(DIFFUSION).unwrap_or(name)));
    Ok(vec![Value::object("MODEL", handle.with_network(Arc::new(first.patched(patches))))])
}

fn simple(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let ratio = inputs.float("ratio")?;
    merge_models(inputs, |_| (1.0 - ratio, ratio))
}

fn subtract(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let factor = inputs.float("multiplier")?;
    merge_models(inputs, |_| (-factor, factor))
}

fn blocks_schema() -> Schema {
    of_two("ModelMergeBlocks", "MODEL")
        .input(ratio("input"))
        .input(ratio("middle"))
        .input(ratio("out"))
        .output("MODEL")
}

fn blocks(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    merge_by(inputs, &["input", "middle", "out"])
}

/// Merges with a ratio by block: that of the longest of `names` that a weight's
/// name begins with, else that of the first.
fn merge_by(inputs: &Inputs, names: &[&str]) -> Result<Vec<Value>, NodeError> {
    let ratios = names.iter().map(|name| Ok((*name, inputs.float(name)?)));
    let ratios: Vec<(&str, f64)> = ratios.collect::<Result<_, NodeError>>()?;
    let fallback = ratios.first().map_or(1.0, |r| r.1);
    merge_models(inputs, |weight| {
        let fitting = ratios.iter().filter(|(name, _)| weight.starts_with(name));
        let ratio = fitting.max_by_key(|(name, _)| name.len()).map_or(fallback, |r| r.1);
        (1.0 - ratio, ratio)
    })
}

/// Input names of the nodes with a ratio a block; SDXL's end without a dot, as in the reference.
const SD_BLOCKS: [&str; 30] = [
    "time_embed.",
    "label_emb.",
    "input_blocks.0.",
    "input_blocks.1.",
    "input_blocks.2.",
    "input_blocks.3.",
    "input_blocks.4.",
    "input_blocks.5.",
    "input_blocks.6.",
    "input_blocks.7.",
    "input_blocks.8.",
    "input_blocks.9.",
    "input_blocks.10.",
    "input_blocks.11.",
    "middle_block.0.",
    "middle_block.1.",
    "middle_block.2.",
    "output_blocks.0.",
    "output_blocks.1.",
    "output_blocks.2.",
    "output_blocks.3.",
    "output_blocks.4.",
    "output_blocks.5.",
    "output_blocks.6.",
    "output_blocks.7.",
    "output_blocks.8.",
    "output_blocks.9.",
    "output_blocks.10.",
    "output_blocks.11.",
    "out.",
];
const SDXL_BLOCKS: [&str; 24] = [
    "time_embed.",
    "label_emb.",
    "input_blocks.0",
    "input_blocks.1",
    "input_blocks.2",
    "input_blocks.3",
    "input_blocks.4",
    "input_blocks.5",
    "input_blocks.6",
    "input_blocks.7",
    "input_blocks.8",
    "middle_block.0",
    "middle_block.1",
    "middle_block.2",
    "output_blocks.0",
    "output_blocks.1",
    "output_blocks.2",
    "output_blocks.3",
    "output_blocks.4",
    "output_blocks.5",
    "output_blocks.6",
    "output_blocks.7",
    "output_blocks.8",
    "out.",
];

fn by_block_schema(class: &'static str, is_sdxl: bool) -> Schema {
    let names: &[&'static str] = if is_sdxl { &SDXL_BLOCKS } else { &SD_BLOCKS };
    let mut schema = of_two(class, "MODEL").module(BY_BLOCK);
    schema.category = "advanced/model_merging/model_specific";
    names.iter().fold(schema, |schema, name| schema.input(ratio(name))).output("MODEL")
}

fn by_block(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let is_sdxl = inputs.get(SDXL_BLOCKS[2]).is_some();
    merge_by(inputs, if is_sdxl { &SDXL_BLOCKS } else { &SD_BLOCKS })
}

/// `second·clip2 + first·clip1`, encoder by encoder.
fn merge_clips(inputs: &Inputs, second: f64, first: f64) -> Result<Vec<Value>, NodeError> {
    let (clip, other) = (inputs.object::<ClipHandle>("clip1")?, inputs.object::<ClipHandle>("clip2")?);
    let variants = |clip: &ClipHandle| clip.parts.iter().map(|part| part.variant).collect::<Vec<_>>();
    if variants(&clip) != variants(&other) {
        return Err(NodeError::input(
            "clip2",
            "has other text encoders than clip1; both must be of one family",
        ));
    }
    let mut merged = clip.as_ref().clone();
    for (part, other) in merged.parts.iter_mut().zip(&other.parts) {
        let values = other.file.clip_values(other.variant, &other.patches)?;
        expect_same_family(&part.file.clip_values(part.variant, &part.patches)?, &values)?;
        part.patches = part.patches.with(sums(values, |_| (second, first)));
    }
    Ok(vec![Value::object("CLIP", merged)])
}

fn clip_simple(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let ratio = inputs.float("ratio")?;
    merge_clips(inputs, 1.0 - ratio, ratio)
}

fn clip_subtract(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let factor = inputs.float("multiplier")?;
    merge_clips(inputs, -factor, factor)
}

fn multiply_schema(class: &'static str, name: &'static str, type_name: &'static str) -> Schema {
    let factor = |name| Input::float(name, 1.0, 0.0, 10.0).opt("step", 0.01);
    let schema = Schema::new(class, "_for_testing/attention_experiments")
        .module("comfy_extras.nodes_attention_multiply")
        .describe("Multiplies the weights of attention's queries, keys, values and output.")
        .input(Input::link(name, type_name))
        .input(factor("q"))
        .input(factor("k"))
        .input(factor("v"))
        .input(factor("out"))
        .output(type_name);
    newer_unnamed(schema, true)
}

/// Factors on the weights and biases of layers whose name ends so.
fn multiplied(values: Vec<(String, Values)>, factors: &[(String, f64)]) -> HashMap<String, Patch> {
    let of = |name: &str| {
        let layer = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"))?;
        factors.iter().find(|(end, _)| layer.ends_with(end.as_str())).map(|f| f.1)
    };
    let patch = |(name, values): (String, Values)| {
        let strength_model = of(&name)?;
        Some((name, Patch { strength: 0.0, change: Arc::new(Change::Add(values)), strength_model }))
    };
    values.into_iter().filter_map(patch).collect()
}

fn factors(inputs: &Inputs, ends: [String; 4]) -> Result<Vec<(String, f64)>, NodeError> {
    ends.into_iter().zip(["q", "k", "v", "out"]).map(|(end, name)| Ok((end, inputs.float(name)?))).collect()
}

fn multiply_model(inputs: &Inputs, attention: &str) -> Result<Vec<Value>, NodeError> {
    let handle = inputs.object::<ModelHandle>("model")?;
    let model = SdModel::of(&handle)?;
    let factors =
        factors(inputs, ["to_q", "to_k", "to_v", "to_out.0"].map(|layer| format!("{attention}.{layer}")))?;
    let patches = multiplied(model.file().unet_values(model.patches())?, &factors);
    Ok(vec![Value::object("MODEL", handle.with_network(Arc::new(model.patched(patches))))])
}

fn multiply_clip(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let layers = ["q_proj", "k_proj", "v_proj", "out_proj"].map(|layer| format!("self_attn.{layer}"));
    let factors = factors(inputs, layers)?;
    let mut clip = inputs.object::<ClipHandle>("clip")?.as_ref().clone();
    for part in &mut clip.parts {
        let values = part.file.clip_values(part.variant, &part.patches)?;
        part.patches = part.patches.with(multiplied(values, &factors));
    }
    Ok(vec![Value::object("CLIP", clip)])
}
