//! Prompts to token ids and weights, for four text encoders.

use kiln::tokenizer::{EmbeddingRows, Token, TokenizerOptions, tokenize};
use kiln::weights::synth::Manifest;
use serde_json::Value as Json;

use crate::Group;
use crate::bench::Bench;
use crate::compare;
use crate::report::{Outcome, Report};

pub fn run(group: &Group, _: &Bench, report: &mut Report) {
    for (place, case) in group.json["cases"].as_array().into_iter().flatten().enumerate() {
        let prompt = case["prompt"].as_str().unwrap_or_default();
        let begin: String = prompt.chars().take(30).collect();
        for (encoder, _) in case.as_object().into_iter().flatten().filter(|(key, _)| *key != "prompt") {
            let name = format!("{place}.{encoder} {begin:?}");
            if report.wants(&group.name, &name) {
                report.case(&group.name, &name, compare(case, prompt, encoder).unwrap_or_else(Outcome::Fail));
            }
        }
    }
}

fn compare(case: &Json, prompt: &str, encoder: &str) -> Result<Outcome, String> {
    let mut recorded = &case[encoder];
    while let Some(other) = recorded.as_str() {
        recorded = &case[other.trim_start_matches("same as ")];
    }
    let recorded = recorded.as_array().ok_or("no chunks recorded")?;
    // OpenCLIP's encoders are those of SDXL's second part and of SD2; the recording
    // gave both the same embeddings.
    let is_open_clip = matches!(encoder, "sdxl_g" | "sd2_h");
    let options = if is_open_clip { TokenizerOptions::open_clip() } else { TokenizerOptions::sd1() };
    let chunks = tokenize(prompt, &options, &|name: &str| synthetic(name, is_open_clip));
    if chunks.len() != recorded.len() {
        return Err(format!("{} chunks, recorded {}", chunks.len(), recorded.len()));
    }
    let (mut differ, mut detail) = (0, String::new());
    for (index, (chunk, recorded)) in chunks.iter().zip(recorded).enumerate() {
        let ids = recorded["ids"].as_array().ok_or("no ids recorded")?;
        if chunk.len() != ids.len() {
            return Err(format!("{} tokens, recorded {}", chunk.len(), ids.len()));
        }
        for (place, ((token, weight), id)) in chunk.iter().zip(ids).enumerate() {
            let recorded_weight = recorded["weights"].get(place).unwrap_or(&recorded["weights"]);
            if is_same(token, id) && is_same_weight(*weight, recorded_weight) {
                continue;
            }
            if differ == 0 {
                detail = format!(
                    " first in chunk {index} at {place}: {token:?} weighing {weight}, recorded {id} weighing {recorded_weight}"
                );
            }
            differ += 1;
        }
    }
    Ok(compare::exact(differ, "tokens that differ", detail))
}

/// The embeddings of the recording by name: tensor, rows, width.
fn synthetic(name: &str, is_open_clip: bool) -> Option<EmbeddingRows> {
    let (tensor, rows, width) = match name.strip_suffix(".safetensors").unwrap_or(name) {
        "synth-embed" => ("emb_params", 3, 768),
        "synth-embed-l" => ("clip_l", 2, 768),
        "synth-embed-xl" if is_open_clip => ("clip_g", 2, 1280),
        "synth-embed-xl" => ("clip_l", 2, 768),
        _ => return None,
    };
    let manifest = Manifest::from_json(&format!(r#"{{"{tensor}": [{rows}, {width}]}}"#)).ok()?;
    let values = manifest.values(tensor, 0..rows * width)?;
    // The files are f16.
    let values: Vec<f32> = values.into_iter().map(|v| half::f16::from_f32(v).to_f32()).collect();
    Some(values.chunks(width as usize).map(std::sync::Arc::from).collect())
}

/// A recorded row is its width and first four values with six decimals.
fn is_same(token: &Token, recorded: &Json) -> bool {
    match token {
        Token::Id(id) => recorded.as_u64() == Some(u64::from(*id)),
        Token::Vector(row) => {
            let first = recorded["emb_first"].as_array().map(Vec::as_slice).unwrap_or_default();
            let is_close =
                |(r, v): (&Json, &f32)| r.as_f64().is_some_and(|r| (r - f64::from(*v)).abs() < 6e-7);
            recorded["dim"].as_u64() == Some(row.len() as u64)
                && first.len() == 4
                && first.iter().zip(row.iter()).all(is_close)
        }
    }
}

fn is_same_weight(weight: f32, recorded: &Json) -> bool {
    match recorded {
        Json::String(nan) => nan == "NaN" && weight.is_nan(),
        _ => recorded.as_f64().is_some_and(|r| r as f32 == weight),
    }
}
