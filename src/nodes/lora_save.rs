//! LoRA files from differences of models, as the subtracting merge nodes make them.

use super::model_save::{Content, Tensors};
use super::sd_model::SdModel;
use super::shapes::newer;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema};
use crate::diffusion::ModelHandle;
use crate::graph::Input;
use crate::models::patch::{DIFFUSION, Values, low_rank_factors};
use crate::nodes::loaders::ClipHandle;

/// The reference cuts factors at this quantile of their elements.
const CLAMP_QUANTILE: f64 = 0.99;
const TYPES: [&str; 2] = ["standard", "full_diff"];

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(LoraSave)]
}

/// `LoraSave`.
pub struct LoraSave;

impl Node for LoraSave {
    fn schema(&self) -> Schema {
        let prefix = Input::string("filename_prefix").opt("default", "loras/ComfyUI_extracted_lora");
        let schema = Schema::new("LoraSave", "_for_testing")
            .display("Extract and Save Lora")
            .module("comfy_extras.nodes_lora_extract")
            .describe("Writes the difference of two models (ModelMergeSubtract) as a LoRA.")
            .input(prefix.opt("multiline", false))
            .input(Input::int("rank", 8, 1, 4096).opt("step", 1))
            .input(Input::combo("lora_type", &TYPES).opt("multiselect", false))
            .input(Input::boolean("bias_diff").opt("default", true))
            .input(Input::link("model_diff", "MODEL").optional())
            .input(Input::link("text_encoder_diff", "CLIP").optional())
            .input(Input::hidden("prompt", "PROMPT").bare())
            .input(Input::hidden("extra_pnginfo", "EXTRA_PNGINFO").bare())
            .sink();
        newer(schema, true)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let model = inputs.object_opt::<ModelHandle>("model_diff")?;
        let clip = inputs.object_opt::<ClipHandle>("text_encoder_diff")?;
        if model.is_none() && clip.is_none() {
            return Ok(NodeOutput::default());
        }
        let mut out = Extraction {
            rank: inputs.size("rank")?,
            is_full: inputs.string("lora_type")? == "full_diff",
            has_biases: inputs.boolean("bias_diff")?,
            tensors: Tensors::default(),
        };
        if let Some(model) = model {
            let model = SdModel::of(&model)?;
            out.add(ctx, model.file().unet_values(model.patches())?, DIFFUSION)?;
        }
        for part in clip.iter().flat_map(|clip| &clip.parts) {
            let values = part.file.clip_values(part.variant, &part.patches)?;
            let named = values.into_iter().map(|(name, values)| (format!("text_encoders.{name}"), values));
            out.add(ctx, named.collect(), "")?;
        }
        out.tensors.write(ctx, inputs.string("filename_prefix")?, &[])
    }
}

/// A LoRA in the making.
struct Extraction {
    rank: usize,
    /// Whole differences in place of products.
    is_full: bool,
    has_biases: bool,
    tensors: Tensors,
}

impl Extraction {
    /// Adds the differences of weights, whose names begin with `prefix` if they belong to the model.
    fn add(
        &mut self,
        ctx: &NodeCtx<'_>,
        values: Vec<(String, Values)>,
        prefix: &str,
    ) -> Result<(), NodeError> {
        let count = values.len() as u64;
        for (i, (name, values)) in values.into_iter().enumerate() {
            ctx.progress(i as u64, count, None)?;
            if !name.starts_with(prefix) {
                continue;
            }
            let shape = values.shape();
            if let Some(layer) = name.strip_suffix(".bias") {
                if self.has_biases {
                    self.tensors.push_f16(format!("{layer}.diff_b"), shape, Content::Whole(values));
                }
            } else if let Some(layer) = name.strip_suffix(".weight") {
                match shape.len() {
                    0 | 1 if !self.is_full && !self.has_biases => {}
                    2.. if !self.is_full => self.add_product(layer, &shape, &values),
                    _ => self.tensors.push_f16(format!("{layer}.diff"), shape, Content::Whole(values)),
                }
            }
        }
        Ok(())
    }

    fn add_product(&mut self, layer: &str, shape: &[usize], values: &Values) {
        let rows = shape.first().copied().unwrap_or(1);
        let columns = shape.iter().skip(1).product();
        // Of a convolution the rank is at most its channels, as in the reference.
        let rank = self.rank.min(rows).min(shape.get(1).copied().unwrap_or(1));
        let (mut up, mut down) = match low_rank_factors(values.read(), (rows, columns), rank) {
            Ok(factors) => factors,
            Err(why) => return tracing::warn!("{layer} is left out of the LoRA: {why}"),
        };
        let most = quantile(up.iter().chain(&down).copied().collect());
        for value in up.iter_mut().chain(&mut down) {
            *value = value.max(-most).min(most);
        }
        let is_convolution = shape.len() == 4;
        let up_shape = if is_convolution { vec![rows, rank, 1, 1] } else { vec![rows, rank] };
        let down_shape = [&[rank], &shape[1..]].concat();
        self.tensors.push_f16(format!("{layer}.lora_up.weight"), up_shape, Content::Ready(up));
        self.tensors.push_f16(format!("{layer}.lora_down.weight"), down_shape, Content::Ready(down));
    }
}

/// The quantile of the elements, between two of them in proportion.
fn quantile(mut values: Vec<f32>) -> f32 {
    values.sort_unstable_by(f32::total_cmp);
    let place = CLAMP_QUANTILE * values.len().saturating_sub(1) as f64;
    let at = |i: usize| values.get(i).or(values.last()).copied().unwrap_or_default();
    let (low, high) = (at(place as usize), at(place as usize + 1));
    low + (high - low) * place.fract() as f32
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_between_elements() {
        // 0.99 of the way through 0..=10 is 9.9.
        assert!((quantile((0..=10).rev().map(|v| v as f32).collect()) - 9.9).abs() < 1e-5);
        assert_eq!((quantile(vec![3.0]), quantile(Vec::new())), (3.0, 0.0));
    }
}
