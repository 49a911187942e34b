//! The workflow zoo: every file of `tests/workflows/demo` runs on the demo model, on the CPU.
//!
//! Each is a workflow in API format that a user might have saved: img2img, inpainting,
//! two passes, area composition, model patches, …. A run must succeed and write at
//! least one picture that shows something; runs that change the model must change the picture.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln::backend::{self, Device, DeviceOptions};
use kiln::engine::{Engine, EngineConfig, Submission};
use kiln::files::{FolderOptions, Folders};
use kiln::models::ModelStore;
use kiln::nodes::{self, PreviewMethod, Services};
use kiln::weights::OpenOptions;
use serde_json::Value as Json;

/// Workflows that differ from `txt2img` in a patch of the model only.
const PATCHED: &[&str] = &[
    "rescale_cfg",
    "lcm",
    "perturbed_attention",
    "deep_shrink",
    "clip_skip",
    "tiled_vae",
    "texts_and_numbers",
];

fn workflows() -> BTreeMap<String, Json> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/workflows/demo");
    let entries = std::fs::read_dir(folder).unwrap();
    let files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    let read = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        (name, serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
    };
    files.iter().map(read).collect()
}

/// A picture with colours, shapes and a hole in its alpha.
fn write_input(folder: &Path) {
    let picture = image::RgbaImage::from_fn(64, 64, |x, y| {
        let is_hole = (20..44).contains(&x) && (20..44).contains(&y);
        image::Rgba([
            x as u8 * 4,
            y as u8 * 4,
            if (x / 16 + y / 16) % 2 == 0 { 200 } else { 40 },
            if is_hole { 0 } else { 255 },
        ])
    });
    std::fs::create_dir_all(folder).unwrap();
    picture.save(folder.join("picture.png")).unwrap();
}

fn engine(base: &Path) -> Arc<Engine> {
    let options = FolderOptions { base: base.to_owned(), ..FolderOptions::default() };
    let placement = backend::open(DeviceOptions { device: Device::Cpu, ..DeviceOptions::default() }).unwrap();
    let services = Services {
        folders: Arc::new(Folders::open(&options).unwrap()),
        models: Arc::new(ModelStore::new(placement, OpenOptions::default())),
        save_metadata: true,
        png_level: 1,
        preview: PreviewMethod::None,
    };
    Engine::new(EngineConfig::new(services, nodes::registry()))
}

fn run(engine: &Engine, prompt: Json) -> Result<Json, String> {
    let refused = |r: Box<kiln::engine::Refused>| format!("{} {}", r.error, r.node_errors);
    let accepted = engine.submit(Submission { prompt, ..Submission::default() }).map_err(refused)?;
    let until = Instant::now() + Duration::from_secs(300);
    loop {
        if let Some(entry) = engine.history_one(&accepted.prompt_id).get(&accepted.prompt_id) {
            let is_success = entry["status"]["status_str"] == "success";
            return if is_success { Ok(entry["outputs"].clone()) } else { Err(entry["status"].to_string()) };
        }
        if Instant::now() > until {
            return Err("the prompt does not end".to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The pictures of node 9, as sizes and bytes.
fn pictures(outputs: &Json, base: &Path) -> Vec<(u32, u32, Vec<u8>)> {
    let files = outputs["9"]["images"].as_array().cloned().unwrap_or_default();
    let open = |file: &Json| {
        let folder = base.join("output").join(file["subfolder"].as_str().unwrap());
        let picture = image::open(folder.join(file["filename"].as_str().unwrap())).unwrap().to_rgb8();
        (picture.width(), picture.height(), picture.into_raw())
    };
    files.iter().map(open).collect()
}

/// Standard deviation of bytes.
fn deviation(bytes: &[u8]) -> f64 {
    let n = bytes.len() as f64;
    let mean = bytes.iter().map(|b| f64::from(*b)).sum::<f64>() / n;
    (bytes.iter().map(|b| (f64::from(*b) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// A change to a workflow, as (node, input, value).
type Change = (&'static str, &'static str, Json);

/// Odd sizes work, impossible ones are errors that say so, and the next prompt is fine.
#[test]
fn odd_input_works_or_is_an_error_that_says_why() {
    let base = tempfile::tempdir().unwrap();
    write_input(&base.path().join("input"));
    let engine = engine(base.path());
    let workflows = workflows();
    let cases: &[(&str, &str, &[Change], Option<&str>)] = &[
        ("a batch of nothing", "txt2img", &[("5", "batch_size", 0.into())], Some("value_smaller_than_min")),
        (
            "a side that is no multiple of 64",
            "txt2img",
            &[("5", "width", 72.into()), ("5", "height", 40.into())],
            None,
        ),
        ("one cell", "txt2img", &[("5", "width", 16.into()), ("5", "height", 16.into())], None),
        ("no steps", "txt2img", &[("3", "steps", 0.into())], Some("value_smaller_than_min")),
        (
            "a sampler that isn't there",
            "txt2img",
            &[("3", "sampler_name", "none".into())],
            Some("value_not_in_list"),
        ),
        (
            "a file that isn't there",
            "img2img",
            &[("1", "image", "none.png".into())],
            Some("Invalid image file"),
        ),
        ("a mask of another size", "inpaint", &[("5", "pixels", serde_json::json!(["20", 0]))], None),
        (
            "a picture of one pixel",
            "img2img",
            &[("5", "pixels", serde_json::json!(["21", 0]))],
            Some("execution_error"),
        ),
        ("a very long picture", "img2img", &[("5", "pixels", serde_json::json!(["22", 0]))], None),
    ];
    let image = |width: u32, height: u32| {
        serde_json::json!({"class_type": "EmptyImage",
            "inputs": {"width": width, "height": height, "batch_size": 1, "color": 8_421_504}})
    };
    for (name, workflow, changes, error) in cases {
        let mut prompt = workflows[*workflow].clone();
        prompt["20"] = image(96, 48);
        prompt["21"] = image(1, 1);
        prompt["22"] = image(8192, 8);
        for (node, input, value) in *changes {
            prompt[*node]["inputs"][*input] = value.clone();
        }
        match (run(&engine, prompt), error) {
            (Ok(outputs), None) => assert_eq!(pictures(&outputs, base.path()).len(), 1, "{name}"),
            (Err(text), Some(error)) => assert!(text.contains(error), "{name}: {text}"),
            (result, _) => panic!("{name}: {result:?}"),
        }
        run(&engine, workflows["txt2img"].clone()).unwrap_or_else(|e| panic!("after {name}: {e}"));
    }
    engine.shutdown();
}

#[test]
fn every_workflow_draws_a_picture() {
    let base = tempfile::tempdir().unwrap();
    write_input(&base.path().join("input"));
    let engine = engine(base.path());
    let workflows = workflows();
    assert!(workflows.len() >= 30, "{} workflows", workflows.len());
    let mut failed = Vec::new();
    let mut drawn = BTreeMap::new();
    for (name, prompt) in workflows {
        let started = Instant::now();
        let result = run(&engine, prompt).map(|outputs| pictures(&outputs, base.path()));
        println!(
            "{name}: {:.1} s, {}",
            started.elapsed().as_secs_f64(),
            if result.is_ok() { "ok" } else { "failed" }
        );
        match result {
            Ok(pictures) if pictures.is_empty() => failed.push(format!("{name}: no picture")),
            Ok(pictures) => {
                let flat = pictures.iter().filter(|p| deviation(&p.2) < 2.0).count();
                if flat > 0 {
                    failed.push(format!("{name}: {flat} of {} pictures are flat", pictures.len()));
                }
                drawn.insert(name, pictures);
            }
            Err(error) => failed.push(format!("{name}: {error}")),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let size = |name: &str| drawn[name].iter().map(|p| (p.0, p.1)).collect::<Vec<_>>();
    assert_eq!(size("txt2img_batch"), [(64, 64); 2]);
    assert_eq!(size("outpaint"), [(96, 64)]);
    assert_eq!(size("hires_fix"), [(96, 96)]);
    assert_eq!(size("post_processing"), [(128, 64)]);
    for name in PATCHED {
        assert_ne!(drawn[*name][0].2, drawn["txt2img"][0].2, "{name} changes nothing");
    }
    engine.shutdown();
}
