//! Nodes that read and write files, list nodes, and limits: on a throw-away
//! server folder.

use std::sync::{Arc, Mutex};

use serde_json::{Map, Value as Json, json};

use super::*;
use crate::backend::{self, Device, DeviceOptions};
use crate::diffusion::Latent;
use crate::files::{FolderOptions, Folders, Kind};
use crate::image::{Limits, decode, read_text_chunks};
use crate::models::ModelStore;
use crate::tensor::HostTensor;

/// An empty model store: these nodes need none.
pub(super) fn no_models() -> Arc<ModelStore> {
    let options = DeviceOptions { device: Device::Cpu, threads: Some(1), ..Default::default() };
    Arc::new(ModelStore::new(backend::open(options).unwrap(), Default::default()))
}

#[derive(Default)]
struct Sink(Mutex<Vec<String>>);

impl ProgressSink for Sink {
    fn progress(&self, id: &str, value: u64, max: u64, _: Option<PreviewFrame>) {
        self.0.lock().unwrap().push(format!("{id} {value}/{max}"));
    }
    fn picture(&self, id: &str, image: &HostTensor) {
        self.0.lock().unwrap().push(format!("{id} {:?}", image.shape()));
    }
    fn is_interrupted(&self) -> bool {
        false
    }
}

struct Bench {
    // Removed when dropped.
    _base: tempfile::TempDir,
    services: Services,
    sink: Sink,
}

impl Bench {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let options = FolderOptions { base: base.path().into(), ..Default::default() };
        let services = Services {
            folders: Arc::new(Folders::open(&options).unwrap()),
            models: no_models(),
            save_metadata: true,
            png_level: 1,
            preview: PreviewMethod::None,
        };
        Self { _base: base, services, sink: Sink::default() }
    }

    fn run(&self, class: &str, inputs: &[(&str, Value)]) -> Result<NodeOutput, NodeError> {
        let node = registry().into_iter().find(|n| n.schema().class == class).unwrap();
        let mut values = Inputs::default();
        inputs.iter().for_each(|(name, value)| values.insert(*name, value.clone()));
        let prompt = json!({"7": {"class_type": class, "inputs": {"cfg": 1e-5}}});
        let extra = json!({"workflow": {"text": "ü"}, "more": [1]});
        let mut ctx = NodeCtx {
            services: &self.services,
            node_id: "7",
            prompt: &prompt,
            extra_pnginfo: Some(&extra),
            sink: &self.sink,
        };
        node.execute(&mut ctx, &values)
    }

    fn read(&self, kind: Kind, entry: &Json) -> Vec<u8> {
        assert_eq!(entry["type"], kind.name());
        let text = |key: &str| entry[key].as_str().unwrap().to_owned();
        let path = self.services.folders.resolve(kind, &text("subfolder"), &text("filename")).unwrap();
        std::fs::read(path).unwrap()
    }
}

fn text(value: &str) -> Value {
    Value::Json(value.into())
}

fn pictures(batch: usize) -> Value {
    let x = HostTensor::from_fn(&[batch, 8, 12, 3], |i| (i % 256) as f32 / 255.0);
    Value::object("IMAGE", x)
}

fn ui(output: NodeOutput, key: &str) -> Vec<Json> {
    output.ui.unwrap()[key].as_array().unwrap().clone()
}

#[test]
fn save_image_then_load_image() {
    let bench = Bench::new();
    let save = |batch| {
        let inputs = [("images", pictures(batch)), ("filename_prefix", text("sub/%width%x%height%"))];
        ui(bench.run("SaveImage", &inputs).unwrap(), "images")
    };
    let saved = save(2);
    assert_eq!(saved[0], json!({"filename": "12x8_00001_.png", "subfolder": "sub", "type": "output"}));
    assert_eq!(saved[1]["filename"], "12x8_00002_.png");
    assert_eq!(save(1)[0]["filename"], "12x8_00003_.png");
    let file = bench.read(Kind::Output, &saved[1]);
    let texts = read_text_chunks(&file).unwrap();
    assert_eq!(texts[0].1, r#"{"7": {"class_type": "SaveImage", "inputs": {"cfg": 1e-05}}}"#);
    assert_eq!(texts[1], ("workflow".to_owned(), r#"{"text": "\u00fc"}"#.to_owned()));
    assert_eq!(texts[2], ("more".to_owned(), "[1]".to_owned()));

    let name = [("image", text("sub/12x8_00001_.png [output]"))];
    let loaded = bench.run("LoadImage", &name).unwrap();
    let first = HostTensor::from_fn(&[1, 8, 12, 3], |i| (i % 256) as f32 / 255.0);
    assert_eq!(*loaded.values[0].downcast::<HostTensor>().unwrap(), first);
    assert_eq!(loaded.values[1].downcast::<HostTensor>().unwrap().shape(), [1, 64, 64]);

    let outside = [("images", pictures(1)), ("filename_prefix", text("../../x"))];
    let error = bench.run("SaveImage", &outside).unwrap_err();
    assert_eq!(error.kind(), "Exception");
    assert!(error.to_string().contains("outside the output folder"), "{error}");
}

#[test]
fn metadata_can_be_left_out() {
    let mut bench = Bench::new();
    bench.services.save_metadata = false;
    let inputs = [("images", pictures(1)), ("filename_prefix", text("x"))];
    let saved = ui(bench.run("SaveImage", &inputs).unwrap(), "images");
    assert!(read_text_chunks(&bench.read(Kind::Output, &saved[0])).unwrap().is_empty());
}

#[test]
fn previews_go_to_the_temp_folder() {
    let bench = Bench::new();
    let shown = ui(bench.run("PreviewImage", &[("images", pictures(2))]).unwrap(), "images");
    for (number, entry) in (1..).zip(&shown) {
        let name = entry["filename"].as_str().unwrap();
        let letters =
            name.strip_prefix("ComfyUI_temp_").unwrap().strip_suffix(&format!("_{number:05}_.png")).unwrap();
        assert!(letters.len() == 5 && letters.bytes().all(|b| b.is_ascii_lowercase()), "{name}");
        assert!(decode(&bench.read(Kind::Temp, entry), &Limits::default()).is_ok());
    }
    let mask = Value::object("MASK", HostTensor::full(&[1, 4, 5], 0.5));
    let shown = ui(bench.run("MaskPreview", &[("mask", mask)]).unwrap(), "images");
    let picture = decode(&bench.read(Kind::Temp, &shown[0]), &Limits::default()).unwrap();
    assert_eq!((picture.width, picture.height, &picture.frames[0][..4]), (5, 4, &[127, 127, 127, 255][..]));
}

#[test]
fn websocket_pictures_count_from_zero() {
    let bench = Bench::new();
    bench.run("SaveImageWebsocket", &[("images", pictures(2))]).unwrap();
    let sent = bench.sink.0.lock().unwrap().clone();
    assert_eq!(sent, ["7 0/2", "7 [1, 8, 12, 3]", "7 1/2", "7 [1, 8, 12, 3]"]);
    let node = registry().into_iter().find(|n| n.schema().class == "SaveImageWebsocket").unwrap();
    assert!(!node.is_cacheable());
}

#[test]
fn animations() {
    let bench = Bench::new();
    let common = [("images", pictures(3)), ("filename_prefix", text("a")), ("fps", Value::Json(5.0.into()))];
    let with = |more: &[(&'static str, Value)]| common.iter().chain(more).cloned().collect::<Vec<_>>();
    let png = bench.run("SaveAnimatedPNG", &with(&[("compress_level", Value::Json(4.into()))])).unwrap();
    let webp = [
        ("lossless", Value::Json(true.into())),
        ("quality", Value::Json(80.into())),
        ("method", text("fastest")),
    ];
    let webp = bench.run("SaveAnimatedWEBP", &with(&webp)).unwrap();
    for (output, name) in [(png, "a_00001_.png"), (webp, "a_00002_.webp")] {
        assert_eq!(output.ui.as_ref().unwrap()["animated"], json!([true]));
        let saved = ui(output, "images");
        assert_eq!(saved[0]["filename"], name);
        assert_eq!(decode(&bench.read(Kind::Output, &saved[0]), &Limits::default()).unwrap().frames.len(), 3);
    }
}

#[test]
fn load_image_checks_and_fingerprints_its_file() {
    let bench = Bench::new();
    let file = bench.services.folders.root(Kind::Input).join("a.png");
    std::fs::write(&file, b"one").unwrap();
    let node = registry().into_iter().find(|n| n.schema().class == "LoadImage").unwrap();
    let inputs = |name: &str| Map::from_iter([("image".to_owned(), Json::from(name))]);
    assert_eq!(node.validate(&bench.services, &inputs("a.png")), Ok(()));
    for bad in ["b.png", "../a.png", "a.png [output]", "", "/etc/passwd"] {
        assert_eq!(node.validate(&bench.services, &inputs(bad)), Err(format!("Invalid image file: {bad}")));
        assert_eq!(node.fingerprint(&bench.services, &inputs(bad)), None);
    }
    let before = node.fingerprint(&bench.services, &inputs("a.png")).unwrap();
    assert_eq!(before, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed");
    std::fs::write(&file, b"two").unwrap();
    assert_ne!(node.fingerprint(&bench.services, &inputs("a.png")), Some(before));
    assert!(bench.run("LoadImage", &[("image", text("a.png"))]).is_err());
}

#[test]
fn latents_survive_a_file() {
    let bench = Bench::new();
    let samples = HostTensor::from_fn(&[2, 4, 3, 5], |i| (i as f32).sin());
    let latent = Value::object("LATENT", Latent::new(samples.clone()));
    let inputs = [("samples", latent), ("filename_prefix", text("latents/x"))];
    let saved = ui(bench.run("SaveLatent", &inputs).unwrap(), "latents");
    assert_eq!(saved[0], json!({"filename": "x_00001_.latent", "subfolder": "latents", "type": "output"}));
    let name = [("latent", text("latents/x_00001_.latent [output]"))];
    let loaded = bench.run("LoadLatent", &name).unwrap().values[0].downcast::<Latent>().unwrap();
    assert_eq!(loaded.samples, samples);
    let file = bench.services.folders.root(Kind::Input).join("bad.latent");
    for broken in [&b""[..], b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\x02\0\0\0\0\0\0\0{}"] {
        std::fs::write(&file, broken).unwrap();
        let error = bench.run("LoadLatent", &[("latent", text("bad.latent"))]).unwrap_err();
        assert_eq!(error.kind(), "SafetensorError");
    }
}

#[test]
fn lists_are_cut_into_batches() {
    let bench = Bench::new();
    let size = |n: u32| ("batch_size", Value::List(vec![Value::Json(n.into())]));
    let images = ("images", Value::List(vec![pictures(3), pictures(2)]));
    let output = bench.run("RebatchImages", &[images, size(2)]).unwrap();
    let Value::List(batches) = &output.values[0] else { panic!("no list") };
    let counts: Vec<usize> = batches.iter().map(|b| b.downcast::<HostTensor>().unwrap().dim(0)).collect();
    assert_eq!(counts, [2, 2, 1]);

    let latent = |batch: usize, h: usize| Latent::new(HostTensor::zeros(&[batch, 4, h, 2]));
    let masked = Latent { noise_mask: Some(HostTensor::zeros(&[1, 1, 16, 16])), ..latent(1, 2) };
    let items = [latent(2, 2), masked, latent(3, 5)].map(|x| Value::object("LATENT", x));
    let output = bench.run("RebatchLatents", &[("latents", Value::List(items.to_vec())), size(2)]).unwrap();
    let Value::List(batches) = &output.values[0] else { panic!("no list") };
    let latents: Vec<_> = batches.iter().map(|b| b.downcast::<Latent>().unwrap()).collect();
    let shapes: Vec<_> = latents.iter().map(|x| (x.samples.dim(0), x.samples.dim(2))).collect();
    assert_eq!(shapes, [(2, 2), (1, 2), (2, 5), (1, 5)]);
    let places: Vec<_> = latents.iter().flat_map(|x| x.batch_index.clone().unwrap()).collect();
    assert_eq!(places, [0, 1, 2, 3, 4, 5]);
    let masks: Vec<_> = latents.iter().map(|x| x.noise_mask.as_ref().map(|m| m.shape().to_vec())).collect();
    assert_eq!(masks, [None, Some(vec![1, 1, 16, 16]), None, None]);
}

#[test]
fn absurd_sizes_are_errors() {
    let bench = Bench::new();
    let number = |name: &'static str, n: u64| (name, Value::Json(n.into()));
    let huge =
        [number("width", 16384), number("height", 16384), number("batch_size", 4096), number("color", 0)];
    for class in ["EmptyImage", "EmptyLatentImage"] {
        let error = bench.run(class, &huge).unwrap_err();
        assert!(error.to_string().contains("at most"), "{error}");
    }
    let many = [("image", pictures(4)), number("amount", u64::MAX >> 1)];
    assert!(bench.run("RepeatImageBatch", &many).is_err());
    let radius = [("image", pictures(1)), number("blur_radius", 31), ("sigma", Value::Json(1.0.into()))];
    assert!(bench.run("ImageBlur", &radius).is_err());
    let empty = ("image", Value::object("IMAGE", HostTensor::zeros(&[0, 8, 8, 3])));
    assert!(bench.run("ImageFromBatch", &[empty, number("batch_index", 0), number("length", 1)]).is_err());
}
