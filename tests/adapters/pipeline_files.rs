//! Checkpoints as folders of the diffusers library: the same numbers under that library's names.

use std::path::Path;

use kiln::models::layouts::Names;
use kiln::tensor::{DType, RawTensor};
use kiln::weights::WeightsFile;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// What names of a UNet begin with in a checkpoint.
pub const UNET: &str = "model.diffusion_model.";

/// Writes the checkpoint as a folder.
pub fn write(checkpoint: &Path, folder: &Path) {
    let file = WeightsFile::open(checkpoint).unwrap();
    let names = Names::of(&file);
    let part =
        |part: &str, name: &str, extra: Option<(&str, &str)>, rename: &dyn Fn(&str) -> Option<String>| {
            let tensors = names.iter().filter_map(|(name, _)| Some((rename(name)?, names.get(&file, name)?)));
            let tensors: Vec<_> = tensors.collect();
            if !tensors.is_empty() {
                save(&file, &folder.join(part).join(name), &tensors, extra);
            }
        };
    const NETWORK: &str = "diffusion_pytorch_model.safetensors";
    let units = Units::of(&names, UNET);
    part("unet", NETWORK, None, &|name| Some(units.rename(name.strip_prefix(UNET)?)));
    part("vae", NETWORK, None, &|name| Some(vae(name.strip_prefix("first_stage_model.")?)));
    for (folder, variant, prefix) in [
        ("text_encoder", "l", "cond_stage_model.transformer."),
        ("text_encoder", "l", "conditioner.embedders.0.transformer."),
        ("text_encoder", "h", "clip_h.transformer."),
        ("text_encoder_2", "g", "clip_g.transformer."),
    ] {
        let extra = Some(("clip.variant", variant));
        part(folder, "model.safetensors", extra, &|name| Some(name.strip_prefix(prefix)?.to_owned()));
    }
    std::fs::write(folder.join("model_index.json"), "{}").unwrap();
}

/// Writes tensors with the texts of `from`: what shapes don't tell about tiny models.
pub fn save(from: &WeightsFile, to: &Path, tensors: &[(String, RawTensor<'_>)], extra: Option<(&str, &str)>) {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    let views = tensors.iter().map(|(name, raw)| {
        let dtype = if raw.dtype == DType::F16 { Dtype::F16 } else { Dtype::F32 };
        (name, TensorView::new(dtype, raw.shape.to_vec(), &raw.bytes).unwrap())
    });
    let texts = from.metadata().iter().map(|(key, value)| (key.clone(), value.clone()));
    let texts = texts.chain(extra.map(|(key, value)| (key.to_owned(), value.to_owned()))).collect();
    safetensors::serialize_to_file(views, Some(texts), to).unwrap();
}

/// What the numbered blocks of a UNet are called there.
pub struct Units {
    /// Block by block: level, unit, and whether it is a downsampler.
    down: Vec<(usize, usize, bool)>,
    up: Vec<(usize, usize)>,
}

impl Units {
    /// The blocks of the UNet, whole or half, whose names begin with `prefix`.
    pub fn of(names: &Names, prefix: &str) -> Self {
        let has = |name: String| names.shape(&format!("{prefix}{name}")).is_some();
        let (mut down, mut up) = (vec![(0, 0, false)], Vec::new());
        let (mut level, mut unit) = (0, 0);
        for block in 1.. {
            let is_sampler = has(format!("input_blocks.{block}.0.op.weight"));
            if !is_sampler && !has(format!("input_blocks.{block}.0.in_layers.0.weight")) {
                break;
            }
            down.push((level, unit, is_sampler));
            (level, unit) = if is_sampler { (level + 1, 0) } else { (level, unit + 1) };
        }
        (level, unit) = (0, 0);
        for block in 0.. {
            if !has(format!("output_blocks.{block}.0.in_layers.0.weight")) {
                break;
            }
            up.push((level, unit));
            let is_last = (1..3).any(|place| has(format!("output_blocks.{block}.{place}.conv.weight")));
            (level, unit) = if is_last { (level + 1, 0) } else { (level, unit + 1) };
        }
        Self { down, up }
    }

    /// The library's name of a tensor.
    pub fn rename(&self, name: &str) -> String {
        for (ours, theirs) in [
            ("input_blocks.0.0.", "conv_in."),
            ("time_embed.0.", "time_embedding.linear_1."),
            ("time_embed.2.", "time_embedding.linear_2."),
            ("label_emb.0.0.", "add_embedding.linear_1."),
            ("label_emb.0.2.", "add_embedding.linear_2."),
            ("out.0.", "conv_norm_out."),
            ("out.2.", "conv_out."),
            ("middle_block.1.", "mid_block.attentions.0."),
        ] {
            if let Some(rest) = name.strip_prefix(ours) {
                return format!("{theirs}{rest}");
            }
        }
        for (ours, theirs) in [("middle_block.0.", "resnets.0"), ("middle_block.2.", "resnets.1")] {
            if let Some(rest) = name.strip_prefix(ours) {
                return format!("mid_block.{theirs}.{}", residual(rest));
            }
        }
        let parts: Vec<&str> = name.splitn(4, '.').collect();
        let &[side, block, place, rest] = parts.as_slice() else { panic!("{name}") };
        let block: usize = block.parse().unwrap();
        let (side, level, unit) = match side {
            "input_blocks" => {
                let (level, unit, is_sampler) = self.down[block];
                if is_sampler {
                    return format!("down_blocks.{level}.downsamplers.0.{}", rest.replace("op.", "conv."));
                }
                ("down", level, unit)
            }
            _ => ("up", self.up[block].0, self.up[block].1),
        };
        match place {
            "0" => format!("{side}_blocks.{level}.resnets.{unit}.{}", residual(rest)),
            _ if rest.starts_with("conv.") => format!("{side}_blocks.{level}.upsamplers.0.{rest}"),
            _ => format!("{side}_blocks.{level}.attentions.{unit}.{rest}"),
        }
    }
}

/// A part of a residual unit of a UNet.
fn residual(name: &str) -> String {
    replaced(
        name,
        &[
            ("in_layers.0.", "norm1."),
            ("in_layers.2.", "conv1."),
            ("emb_layers.1.", "time_emb_proj."),
            ("out_layers.0.", "norm2."),
            ("out_layers.3.", "conv2."),
            ("skip_connection.", "conv_shortcut."),
        ],
    )
}

fn replaced(name: &str, table: &[(&str, &str)]) -> String {
    let found = table.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
    found.unwrap_or_else(|| name.to_owned())
}

/// The library's name of a tensor of the VAE, which has four levels.
fn vae(name: &str) -> String {
    let Some((coder @ ("encoder" | "decoder"), rest)) = name.split_once('.') else { return name.to_owned() };
    let rest = rest.replace("nin_shortcut.", "conv_shortcut.");
    let rest = replaced(
        &rest,
        &[
            ("norm_out.", "conv_norm_out."),
            ("mid.block_1.", "mid_block.resnets.0."),
            ("mid.block_2.", "mid_block.resnets.1."),
            ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
            ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
            ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
            ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
            ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
        ],
    );
    let parts: Vec<&str> = rest.splitn(4, '.').collect();
    let inner = match *parts.as_slice() {
        ["down", level, "block", rest] => format!("down_blocks.{level}.resnets.{rest}"),
        ["down", level, "downsample", rest] => format!("down_blocks.{level}.downsamplers.0.{rest}"),
        ["up", level, kind, rest] => {
            let level = 3 - level.parse::<usize>().unwrap();
            let kind = if kind == "block" { "resnets" } else { "upsamplers.0" };
            format!("up_blocks.{level}.{kind}.{rest}")
        }
        _ => rest,
    };
    format!("{coder}.{inner}")
}
