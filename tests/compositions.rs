//! Workflows that a machine put together at random, against the pictures and values that ComfyUI 0.3.64 made of them.
//!
//! `tests/data/compositions` holds a set chosen from some thousand so that every class which needs no model file but
//! the demo checkpoint occurs in it: one JSON file a workflow (prompt and outputs by node), its pictures, and the input
//! pictures. They were recorded on a CPU in f32 (PyTorch 2.15, Pillow 13.0, kornia 0.9).
//!
//! Bound: at most 0.2 % of the values of a picture are off by more than 2/255. The two differ in the last bits of
//! sums; samplers, thresholds and rounding to 8 bits make levels of that here and there. Values (numbers, texts) are
//! equal.

mod local;

use std::fs;
use std::path::{Path, PathBuf};

use kiln::cli::client::Client;
use kiln::cli::device::DeviceArgs;
use serde_json::{Map, Value as Json, json};

use local::{on_cpu, with_server};

/// Largest difference of a value of 8 bits that is rounding.
const ROUNDING: u8 = 2;
/// Largest share of the values that is off by more.
const MAX_OFF: f64 = 2e-3;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/compositions")
}

/// Width, height and bytes.
fn pixels(png: &[u8]) -> (u32, u32, Vec<u8>) {
    let picture = image::load_from_memory(png).unwrap();
    let (w, h) = (picture.width(), picture.height());
    (
        w,
        h,
        if picture.color().has_alpha() {
            picture.to_rgba8().into_raw()
        } else {
            picture.to_rgb8().into_raw()
        },
    )
}

/// The share of values that are off by more than rounding; what else differs.
fn difference(got: &[u8], want: &[u8]) -> Result<f64, String> {
    let ((w, h, got), (want_w, want_h, want)) = (pixels(got), pixels(want));
    if (w, h, got.len()) != (want_w, want_h, want.len()) {
        return Err(format!("is {w}x{h} of {} bytes, not {want_w}x{want_h} of {}", got.len(), want.len()));
    }
    let off = got.iter().zip(&want).filter(|(a, b)| a.abs_diff(**b) > ROUNDING).count();
    Ok(off as f64 / want.len() as f64)
}

/// Draws a composition; what is wrong with it.
async fn compare(client: &Client, composition: &Json) -> Result<f64, String> {
    let body = json!({"prompt": composition["prompt"], "wait": true});
    let answer = client.post_json("/prompt", &body).await.map_err(|e| e.to_string())?;
    let id = answer["prompt_id"].as_str().ok_or_else(|| answer.to_string())?;
    let history = client.get_json(&format!("/history/{id}")).await.map_err(|e| e.to_string())?;
    let outputs = &history[id]["outputs"];
    assert!(!composition["outputs"].as_object().is_none_or(Map::is_empty), "nothing was recorded");
    let mut worst = 0.0f64;
    for (node, want) in composition["outputs"].as_object().into_iter().flatten() {
        let Some(pictures) = want.as_array().filter(|_| outputs[node]["images"].is_array()) else {
            let values = outputs[node].as_object().into_iter().flat_map(Map::values).next();
            if values != Some(want) {
                return Err(format!("node {node} shows {values:?}, not {want}"));
            }
            continue;
        };
        let got = outputs[node]["images"].as_array().map_or(&[][..], Vec::as_slice);
        if got.len() != pictures.len() {
            return Err(format!("node {node} has {} pictures, not {}", got.len(), pictures.len()));
        }
        for (got, want) in got.iter().zip(pictures) {
            let part = |key: &str| got[key].as_str().unwrap_or("").to_owned();
            let place = format!("/view?filename={}&type={}", part("filename"), part("type"));
            let png = client.get(&place).await.map_err(|e| e.to_string())?;
            let want = fs::read(folder().join(want.as_str().unwrap_or(""))).unwrap();
            let share = difference(&png, &want)?;
            worst = worst.max(share);
            if share > MAX_OFF {
                return Err(format!("node {node}: {:.2} % of the values are off", share * 100.0));
            }
        }
    }
    Ok(worst)
}

#[test]
fn every_composition_equals_its_recording() {
    let scratch = tempfile::tempdir().unwrap();
    fs::create_dir(scratch.path().join("input")).unwrap();
    for picture in fs::read_dir(folder().join("input")).unwrap().flatten() {
        fs::copy(picture.path(), scratch.path().join("input").join(picture.file_name())).unwrap();
    }
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder()).unwrap().flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    files.sort();
    assert!(files.len() >= 50, "{} compositions", files.len());
    let wrong = with_server(&on_cpu(DeviceArgs::default()), scratch.path(), async |client| {
        let mut wrong = Vec::new();
        for path in &files {
            let composition: Json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            match compare(client, &composition).await {
                Ok(share) => {
                    println!("{name}: {:.3} % of the values off by more than {ROUNDING}/255", share * 100.0)
                }
                Err(what) => wrong.push(format!("{name}: {what}")),
            }
        }
        wrong
    });
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}
