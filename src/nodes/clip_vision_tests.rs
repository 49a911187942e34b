//! The picture encoder against `transformers` and PyTorch (`tests/data/clip_vision/make.py`).

use std::path::{Path, PathBuf};

use super::*;
use crate::models::{ModelSource, ModelStore};
use crate::weights::WeightsFile;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/clip_vision")
}

fn recorded(name: &str) -> HostTensor {
    let file = WeightsFile::open(&folder().join("outputs.safetensors")).unwrap();
    let raw = file.get(name).unwrap();
    HostTensor::new(raw.shape, raw.to_f32()).unwrap()
}

fn worst(got: &HostTensor, want: &HostTensor) -> f32 {
    assert_eq!(got.shape(), want.shape());
    got.data().iter().zip(want.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn pictures_are_prepared_as_pytorch_does() {
    for name in ["large", "small"] {
        for (crop, is_cropped) in [("center", true), ("none", false)] {
            let got = prepared(&recorded(name), 32, is_cropped).unwrap();
            let want = recorded(&format!("{name}.{crop}"));
            // A value between two of the 256 steps may round the other way: one step is 0.0146 here.
            let steps = got.data().iter().zip(want.data()).filter(|(a, b)| (*a - *b).abs() > 1e-5).count();
            assert!(steps * 1000 <= got.len(), "{name} {crop}: {steps} of {} values", got.len());
            assert!(worst(&got, &want) < 0.0153, "{name} {crop}");
        }
    }
}

#[test]
fn encoders_are_those_of_transformers() {
    let store = ModelStore::default();
    let pictures = recorded("large.center");
    for (file, name) in [("shallow", "shallow"), ("shallow-open-clip", "shallow"), ("deep", "deep")] {
        let path = folder().join(format!("{file}.safetensors"));
        let encoder = store.file(ModelSource::File(path)).network::<ClipVision>().unwrap();
        assert_eq!(encoder.side(), 32);
        let output = encoder.encode(&pictures).unwrap();
        for (part, got) in [
            ("image_embeds", &output.image_embeds),
            ("last", &output.last_hidden_state),
            ("penultimate", &output.penultimate_hidden_states),
        ] {
            let error = worst(got, &recorded(&format!("{name}.{part}")));
            println!("{file} {part}: {error:.2e}");
            // f32 sums in another order; values have a spread of 1 to 5, and deep is 32 layers.
            assert!(error < 1e-4, "{file} {part}: {error:e}");
        }
    }
}

#[test]
fn another_file_is_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lycoris.safetensors");
    let file = ModelStore::default().file(ModelSource::File(path));
    let error = VisionHandle::of(file).err().unwrap().to_string();
    assert!(error.contains("not a CLIP picture encoder"), "{error}");
}
