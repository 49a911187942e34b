//! Tiny ControlNets, made of the layers of the models that they are for, in all layouts that they are stored in.

use std::path::Path;

use kiln::files::{DEMO_BYTES, DEMO_CHECKPOINT};
use kiln::models::layouts::Names;
use kiln::tensor::{DType, RawTensor};
use kiln::weights::WeightsFile;
use serde_json::{Map, Value as Json, json};

use super::pipeline_files::{UNET, Units, save};
use super::write;

/// What names begin with in a ControlNet's file.
const NET: &str = "control_model.";

/// The demo checkpoint.
pub fn demo() -> std::sync::Arc<WeightsFile> {
    WeightsFile::from_static(DEMO_BYTES, DEMO_CHECKPOINT).unwrap()
}

/// Layers of the half UNet in a checkpoint with their shapes, without prefix.
fn half(model: &WeightsFile) -> Vec<(String, Vec<u64>)> {
    let parts = ["time_embed.", "label_emb.", "input_blocks.", "middle_block."];
    let infos = model.infos().filter_map(|info| {
        let name = info.name.strip_prefix(UNET)?;
        let is_half = parts.iter().any(|part| name.starts_with(part));
        is_half.then(|| (name.to_owned(), info.shape.iter().map(|n| *n as u64).collect()))
    });
    infos.collect()
}

/// What a ControlNet has besides its half UNet.
fn besides(half: &[(String, Vec<u64>)]) -> Map<String, Json> {
    let block =
        |name: &str| -> Option<usize> { name.strip_prefix("input_blocks.")?.split('.').next()?.parse().ok() };
    let blocks = half.iter().filter_map(|(name, _)| block(name)).max().unwrap() + 1;
    let shape = |name: &str| half.iter().find(|(n, _)| n == name).map(|(_, shape)| shape[0]);
    let width = |block: usize| {
        let at = |part: &str| shape(&format!("input_blocks.{block}.0.{part}"));
        at("out_layers.3.weight").or(at("op.weight")).or(at("weight")).unwrap()
    };
    let bottom = shape("middle_block.0.in_layers.2.weight").unwrap();
    let mut tensors = Map::new();
    let zero_convs = (0..blocks).map(|i| (format!("zero_convs.{i}.0"), width(i)));
    for (name, c) in zero_convs.chain([("middle_block_out.0".to_owned(), bottom)]) {
        tensors.insert(format!("{name}.weight"), json!({"shape": [c, c, 1, 1], "scale": 0.05}));
        tensors.insert(format!("{name}.bias"), json!([c]));
    }
    let hint = [3, 8, 8, 8, 16, 16, 24, 24, width(0)];
    for (i, pair) in hint.windows(2).enumerate() {
        let name = format!("input_hint_block.{}", 2 * i);
        tensors.insert(format!("{name}.weight"), json!([pair[1], pair[0], 3, 3]));
        tensors.insert(format!("{name}.bias"), json!([pair[1]]));
    }
    tensors
}

fn texts(model: &WeightsFile) -> Vec<(&str, &str)> {
    let texts = model.metadata().iter().map(|(key, value)| (key.as_str(), value.as_str()));
    texts.filter(|(key, _)| ["group_norm.num_groups", "unet.num_heads"].contains(key)).collect()
}

/// A ControlNet for a model; `context` is the width of its text conditioning, if it is not the model's.
pub fn net(model: &WeightsFile, path: &Path, context: Option<u64>) {
    let half = half(model);
    let mut tensors: Map<String, Json> = besides(&half);
    for (name, mut shape) in half {
        if let (Some(context), true) = (context, name.contains("attn2.to_k") || name.contains("attn2.to_v")) {
            shape[1] = context;
        }
        tensors.insert(name, json!(shape));
    }
    let named = tensors.into_iter().map(|(name, shape)| (format!("{NET}{name}"), shape)).collect();
    write(path, named, &texts(model));
}

/// A ControlNet for the demo model.
pub fn of_demo(path: &Path, context: Option<u64>) {
    net(&demo(), path, context);
}

/// The ControlNet in `from`, named as the diffusers library does.
pub fn as_diffusers(from: &Path, to: &Path) {
    let file = WeightsFile::open(from).unwrap();
    let names = Names::of(&file);
    let units = Units::of(&names, NET);
    let last = (0..).take_while(|i| names.shape(&format!("{NET}input_hint_block.{}.bias", 2 * i)).is_some());
    let last = last.last().unwrap();
    let rename = |name: &str| -> String {
        if let Some(rest) = name.strip_prefix("middle_block_out.0.") {
            return format!("controlnet_mid_block.{rest}");
        }
        if let Some(rest) = name.strip_prefix("zero_convs.") {
            return format!("controlnet_down_blocks.{}", rest.replacen(".0.", ".", 1));
        }
        let Some(rest) = name.strip_prefix("input_hint_block.") else { return units.rename(name) };
        let (place, rest) = rest.split_once('.').unwrap();
        let at = match place.parse::<usize>().unwrap() / 2 {
            0 => "conv_in".to_owned(),
            i if i == last => "conv_out".to_owned(),
            i => format!("blocks.{}", i - 1),
        };
        format!("controlnet_cond_embedding.{at}.{rest}")
    };
    let tensors = names
        .iter()
        .map(|(name, _)| (rename(name.strip_prefix(NET).unwrap()), names.get(&file, name).unwrap()));
    save(&file, to, &tensors.collect::<Vec<_>>(), None);
}

/// A control-LoRA of rank 4 for a model: changes of all matrices, biases and norms of its own.
pub fn lora(model: &WeightsFile, path: &Path) {
    let half = half(model);
    let mut tensors = besides(&half);
    for (name, shape) in half {
        match name.strip_suffix(".weight") {
            Some(layer) if shape.len() > 1 => {
                let down = [&[4], &shape[1..]].concat();
                tensors.insert(format!("{layer}.down"), json!({"shape": down, "scale": 0.3}));
                tensors.insert(format!("{layer}.up"), json!({"shape": [shape[0], 4], "scale": 0.3}));
            }
            _ => {
                tensors.insert(name, json!(shape));
            }
        }
    }
    tensors.insert("lora_controlnet".to_owned(), json!([0]));
    write(path, tensors, &[]);
}

/// The ControlNet that a control-LoRA makes of a model, whose weights `base` gives, in f32.
pub fn merged(lora: &Path, model: &WeightsFile, base: impl Fn(&str) -> Vec<f32>, to: &Path) {
    let file = WeightsFile::open(lora).unwrap();
    let read = |name: &str| file.get(name).map(|raw| raw.to_f32());
    let mut made: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for info in file.infos() {
        match info.name.strip_suffix(".up") {
            None if info.name.ends_with(".down") || info.name == "lora_controlnet" => {}
            None => made.push((info.name.to_owned(), info.shape.to_vec(), read(info.name).unwrap())),
            Some(layer) => {
                let name = format!("{layer}.weight");
                let (up, down) = (read(info.name).unwrap(), read(&format!("{layer}.down")).unwrap());
                let (rank, columns) = (info.shape[1], down.len() / info.shape[1]);
                let change = |i: usize| {
                    let products =
                        (0..rank).map(|k| up[i / columns * rank + k] * down[k * columns + i % columns]);
                    products.fold(0.0f32, |sum, product| sum + product)
                };
                let values = base(&name).into_iter().enumerate().map(|(i, w)| w + change(i)).collect();
                made.push((
                    name.clone(),
                    model.info(&format!("{UNET}{name}")).unwrap().shape.to_vec(),
                    values,
                ));
            }
        }
    }
    let raw = made.iter().map(|(name, shape, values)| {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
        (name.clone(), RawTensor { dtype: DType::F32, shape, bytes })
    });
    save(model, to, &raw.collect::<Vec<_>>(), None);
}
