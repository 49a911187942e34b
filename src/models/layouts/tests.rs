use std::collections::BTreeSet;

use super::*;
use crate::weights::synth::Manifest;

/// Weight and bias of every name.
fn affine(out: &mut Vec<String>, names: &[String]) {
    for name in names {
        out.extend(["weight", "bias"].map(|kind| format!("{name}.{kind}")));
    }
}

fn residual(out: &mut Vec<String>, unit: &str, has_time: bool, has_shortcut: bool) {
    let mut parts = vec!["norm1", "conv1", "norm2", "conv2"];
    parts.extend(has_time.then_some("time_emb_proj"));
    parts.extend(has_shortcut.then_some("conv_shortcut"));
    affine(out, &parts.iter().map(|part| format!("{unit}.{part}")).collect::<Vec<_>>());
}

fn transformer(out: &mut Vec<String>, unit: &str) {
    let block = format!("{unit}.transformer_blocks.0");
    let mut parts: Vec<String> = ["norm", "proj_in", "proj_out"].map(|p| format!("{unit}.{p}")).to_vec();
    parts.extend(["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"].map(|p| format!("{block}.{p}")));
    parts.extend(["attn1", "attn2"].map(|a| format!("{block}.{a}.to_out.0")));
    affine(out, &parts);
    for attention in ["attn1", "attn2"] {
        out.extend(["q", "k", "v"].map(|p| format!("{block}.{attention}.to_{p}.weight")));
    }
}

/// The tensors of SD1.5's UNet as diffusers names them.
fn diffusers_sd15() -> Vec<String> {
    let mut out = Vec::new();
    let outside =
        ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out"];
    affine(&mut out, &outside.map(str::to_owned));
    for level in 0..4 {
        for unit in 0..2 {
            let widens = unit == 0 && (level == 1 || level == 2);
            residual(&mut out, &format!("down_blocks.{level}.resnets.{unit}"), true, widens);
            if level < 3 {
                transformer(&mut out, &format!("down_blocks.{level}.attentions.{unit}"));
            }
        }
        for unit in 0..3 {
            residual(&mut out, &format!("up_blocks.{level}.resnets.{unit}"), true, true);
            if level > 0 {
                transformer(&mut out, &format!("up_blocks.{level}.attentions.{unit}"));
            }
        }
        if level < 3 {
            affine(&mut out, &[format!("down_blocks.{level}.downsamplers.0.conv")]);
            affine(&mut out, &[format!("up_blocks.{level}.upsamplers.0.conv")]);
        }
    }
    for unit in 0..2 {
        residual(&mut out, &format!("mid_block.resnets.{unit}"), true, false);
    }
    transformer(&mut out, "mid_block.attentions.0");
    out
}

/// The tensors of the VAE as diffusers names them.
fn diffusers_vae() -> Vec<String> {
    let mut out = Vec::new();
    affine(&mut out, &["quant_conv".to_owned(), "post_quant_conv".to_owned()]);
    for coder in ["encoder", "decoder"] {
        affine(&mut out, &["conv_in", "conv_out", "conv_norm_out"].map(|p| format!("{coder}.{p}")));
        for unit in 0..2 {
            residual(&mut out, &format!("{coder}.mid_block.resnets.{unit}"), false, false);
        }
        let attention = ["group_norm", "to_q", "to_k", "to_v", "to_out.0"];
        affine(&mut out, &attention.map(|p| format!("{coder}.mid_block.attentions.0.{p}")));
    }
    for level in 0..4 {
        for unit in 0..2 {
            let widens = unit == 0 && (level == 1 || level == 2);
            residual(&mut out, &format!("encoder.down_blocks.{level}.resnets.{unit}"), false, widens);
        }
        for unit in 0..3 {
            let narrows = unit == 0 && level >= 2;
            residual(&mut out, &format!("decoder.up_blocks.{level}.resnets.{unit}"), false, narrows);
        }
        if level < 3 {
            affine(&mut out, &[format!("encoder.down_blocks.{level}.downsamplers.0.conv")]);
            affine(&mut out, &[format!("decoder.up_blocks.{level}.upsamplers.0.conv")]);
        }
    }
    out
}

fn renamed(stored: &[String]) -> BTreeSet<String> {
    let names = Names::from_stored(stored.iter().map(|n| (n.as_str(), DType::F16, &[][..])));
    assert_eq!(names.iter().count(), stored.len(), "no two names became one");
    names.iter().map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn a_diffusers_unet_gets_the_names_of_latent_diffusion() {
    let stored = diffusers_sd15();
    assert_eq!(stored.len(), 686);
    let manifest = Manifest::built_in("sd15").unwrap();
    let wanted: BTreeSet<String> =
        manifest.shapes().map(|(name, _)| name.to_owned()).filter(|n| n.starts_with(UNET_PREFIX)).collect();
    assert_eq!(renamed(&stored), wanted);
}

/// What SD1.5 has not: a vector, more than one transformer block, an upsampler behind a transformer at the coarsest level.
#[test]
fn an_sdxl_unet_of_diffusers_gets_the_names_of_latent_diffusion() {
    let units = |side: &str, counts: [usize; 3]| -> Vec<String> {
        let unit = |(level, n): (usize, usize)| (0..n).map(move |u| (level, u));
        let all = counts.into_iter().enumerate().flat_map(unit);
        all.map(|(level, u)| format!("{side}_blocks.{level}.resnets.{u}.conv1.weight")).collect()
    };
    let pairs = [
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
        ("add_embedding.linear_2.bias", "label_emb.0.2.bias"),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
        ),
        ("down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight"),
        ("mid_block.resnets.1.conv_shortcut.weight", "middle_block.2.skip_connection.weight"),
        ("up_blocks.0.attentions.0.proj_in.weight", "output_blocks.0.1.proj_in.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
        ("up_blocks.1.attentions.0.proj_in.weight", "output_blocks.3.1.proj_in.weight"),
        ("up_blocks.1.upsamplers.0.conv.bias", "output_blocks.5.2.conv.bias"),
        ("up_blocks.2.resnets.2.time_emb_proj.weight", "output_blocks.8.0.emb_layers.1.weight"),
    ];
    let mut stored = [units("down", [2, 2, 2]), units("up", [3, 3, 3])].concat();
    stored.extend(["conv_in.weight", "time_embedding.linear_1.weight"].map(str::to_owned));
    stored.extend(pairs.map(|(from, _)| from.to_owned()));
    let found = renamed(&stored);
    for (from, to) in pairs {
        assert!(found.contains(&format!("{UNET_PREFIX}{to}")), "{from}: no {to} in {found:?}");
    }
}

#[test]
fn a_diffusers_vae_gets_the_names_of_latent_diffusion() {
    let stored = diffusers_vae();
    let manifest = Manifest::from_json(include_str!("../../../tests/data/manifests/vae.json")).unwrap();
    let wanted: BTreeSet<String> = manifest.shapes().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(renamed(&stored), wanted);
}

#[test]
fn a_bare_unet_gets_its_prefix_and_a_controlnet_does_not() {
    let stored = ["input_blocks.0.0.weight", "out.2.weight"].map(str::to_owned);
    let found = renamed(&stored);
    assert!(found.contains("model.diffusion_model.out.2.weight"), "{found:?}");
    let control = ["input_blocks.0.0.weight", "input_hint_block.0.weight"].map(str::to_owned);
    assert_eq!(renamed(&control), BTreeSet::from(control));
}

/// A file of f32 tensors; the values count up from 0 over the whole file.
fn file(tensors: &[(&str, &[usize])]) -> std::sync::Arc<WeightsFile> {
    let mut header = String::from("{");
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += shape.iter().product::<usize>() * 4;
        header += &format!(
            "\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}},"
        );
    }
    header.pop();
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..end / 4).flat_map(|i| (i as f32).to_le_bytes()));
    WeightsFile::from_bytes(bytes, "test").unwrap()
}

#[test]
fn parts_of_open_clip_tensors_are_views_of_the_right_rows() {
    let file = file(&[
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight", &[6, 2]),
        ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias", &[6]),
        ("conditioner.embedders.1.model.text_projection", &[2, 3]),
        ("conditioner.embedders.1.model.positional_embedding", &[2]),
    ]);
    let names = Names::of(&file);
    let get = |name: &str| {
        let raw =
            names.get(&file, &format!("clip_g.transformer.{name}")).unwrap_or_else(|| panic!("no {name}"));
        (raw.shape.to_vec(), raw.to_f32())
    };
    let layer = "text_model.encoder.layers.0.self_attn";
    assert_eq!(get(&format!("{layer}.q_proj.weight")), (vec![2, 2], vec![0.0, 1.0, 2.0, 3.0]));
    assert_eq!(get(&format!("{layer}.v_proj.weight")), (vec![2, 2], vec![8.0, 9.0, 10.0, 11.0]));
    assert_eq!(get(&format!("{layer}.k_proj.bias")), (vec![2], vec![14.0, 15.0]));
    assert_eq!(get("text_projection.weight"), (vec![3, 2], vec![18.0, 21.0, 19.0, 22.0, 20.0, 23.0]));
    assert_eq!(get("text_model.embeddings.position_embedding.weight"), (vec![2], vec![24.0, 25.0]));
    let stored = names.stored_name(&format!("clip_g.transformer.{layer}.k_proj.weight")).unwrap();
    assert!(stored.ends_with("attn.in_proj_weight"), "{stored}");
    assert!(names.get(&file, stored).is_none(), "the fused tensor has no name of its own any more");
}

#[test]
fn tensors_without_the_wanted_parts_are_left_out() {
    let file = file(&[
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias", &[7]),
        ("cond_stage_model.model.text_projection", &[4]),
    ]);
    assert_eq!(Names::of(&file).iter().count(), 0);
}
