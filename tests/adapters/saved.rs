//! Checkpoints of SD2.x and SDXL that CheckpointSave writes: the same names, the same picture when loaded again.

use std::collections::BTreeSet;
use std::path::Path;

use kiln::models::tiny;
use kiln::tensor::DType;
use kiln::weights::WeightsFile;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};

use crate::{Bench, distance, files, with};

fn names(file: &WeightsFile) -> BTreeSet<&str> {
    file.names().collect()
}

/// What a saved file has besides the original's tensors, as the reference writes it.
fn additions(family: &str) -> BTreeSet<&'static str> {
    let text: &[&str] = match family {
        "sdxl" => &[
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "conditioner.embedders.1.model.logit_scale",
        ],
        "sdxl-refiner" => &["conditioner.embedders.0.model.logit_scale"],
        _ => &["cond_stage_model.model.logit_scale"],
    };
    let predicts_v = !matches!(family, "sd2" | "sdxl" | "sdxl-refiner");
    text.iter().copied().chain(predicts_v.then_some("v_pred")).collect()
}

/// The tensors of `from` with the texts of `texts`: what shapes don't tell about tiny models.
fn with_texts(from: &WeightsFile, texts: &WeightsFile, to: &Path) {
    let raw: Vec<_> = from.names().map(|name| (name, from.get(name).unwrap())).collect();
    let views = raw.iter().map(|(name, raw)| {
        let dtype = match raw.dtype {
            DType::F16 => Dtype::F16,
            DType::I64 => Dtype::I64,
            _ => Dtype::F32,
        };
        (*name, TensorView::new(dtype, raw.shape.to_vec(), &raw.bytes).unwrap())
    });
    let metadata = texts.metadata().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    safetensors::serialize_to_file(views, Some(metadata), to).unwrap();
}

#[test]
fn saved_checkpoints_load_again_as_the_same_model() {
    let bench = Bench::new();
    let folder = bench.folder.path().join("models/checkpoints");
    std::fs::create_dir_all(&folder).unwrap();
    for family in ["sd2", "sd2-v", "sd2-unclip-l", "sd2-unclip-h", "sdxl", "sdxl-refiner"] {
        let original = folder.join(format!("{family}.safetensors"));
        tiny::write(family, &original, DType::F16).unwrap().unwrap();
        let workflow = || match family.contains("unclip") {
            true => {
                let mut steered = files::workflow("../sd2_unclip_one_picture");
                steered["20"] = json!({"class_type": "EmptyImage",
                    "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 11184640}});
                steered
            }
            false => files::workflow("txt2img"),
        };
        let prompt = |name: String| with(workflow(), "4", "ckpt_name", json!(name));
        let picture = bench.picture(prompt(format!("{family}.safetensors")));
        let save: Json = json!({
            "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": format!("{family}.safetensors")}},
            "9": {"class_type": "CheckpointSave", "inputs": {"model": ["4", 0], "clip": ["4", 1], "vae": ["4", 2],
                "filename_prefix": format!("saved/{family}")}},
        });
        let entry = bench.run(save);
        assert_eq!(entry["status"]["status_str"], "success", "{}", entry["status"]);
        let saved = bench.folder.path().join(format!("output/saved/{family}_00001_.safetensors"));
        let (saved, original) = (WeightsFile::open(&saved).unwrap(), WeightsFile::open(&original).unwrap());
        let added: BTreeSet<&str> = names(&saved).difference(&names(&original)).copied().collect();
        assert_eq!(added, additions(family), "{family}");
        for info in original.infos() {
            assert_eq!(saved.info(info.name).unwrap().shape, info.shape, "{family} {}", info.name);
            if info.name.starts_with("embedder.") || info.name.starts_with("noise_augmentor.") {
                assert_eq!(saved.get(info.name).unwrap().bytes, original.get(info.name).unwrap().bytes);
            }
        }
        if family == "sdxl" {
            let name = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids";
            let ids = saved.get(name).unwrap();
            assert_eq!((ids.dtype, ids.shape), (DType::I64, &[1, 77][..]));
            assert_eq!(ids.to_f32(), (0..77).map(|i| i as f32).collect::<Vec<_>>());
        }
        with_texts(&saved, &original, &folder.join(format!("{family}-again.safetensors")));
        assert_eq!(bench.picture(prompt(format!("{family}-again.safetensors"))), picture, "{family}");
    }
}

/// `up · down`, through `rank`.
fn product(up: &[f32], down: &[f32], rank: usize) -> Vec<f32> {
    let columns = down.len() / rank;
    let row = |up: &[f32], j: usize| (0..rank).map(|k| up[k] * down[k * columns + j]).sum();
    up.chunks_exact(rank).flat_map(|up| (0..columns).map(|j| row(up, j)).collect::<Vec<f32>>()).collect()
}

/// The `rank` largest parts of a singular value decomposition in f64, by one-sided Jacobi rotations: left vectors
/// times values `[rows, rank]`, right vectors `[rank, columns]`.
fn decomposed(matrix: &[f32], rows: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let n = matrix.len() / rows;
    let mut a: Vec<Vec<f64>> =
        (0..n).map(|j| (0..rows).map(|i| f64::from(matrix[i * n + j])).collect()).collect();
    let mut v: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for _ in 0..12 {
        for p in 0..n {
            for q in p + 1..n {
                let (pp, qq, pq) = (dot(&a[p], &a[p]), dot(&a[q], &a[q]), dot(&a[p], &a[q]));
                if pq * pq <= 1e-30 * pp * qq {
                    continue;
                }
                let angle = 0.5 * (2.0 * pq).atan2(qq - pp);
                let (sin, cos) = angle.sin_cos();
                for all in [&mut a, &mut v] {
                    let (front, back) = all.split_at_mut(q);
                    for (x, y) in front[p].iter_mut().zip(&mut back[0]) {
                        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
                    }
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| dot(&a[*y], &a[*y]).total_cmp(&dot(&a[*x], &a[*x])));
    let order = &order[..rank];
    let left = (0..rows).flat_map(|i| order.iter().map(|&j| a[j][i] as f32).collect::<Vec<_>>()).collect();
    (left, order.iter().flat_map(|&j| v[j].iter().map(|v| *v as f32).collect::<Vec<_>>()).collect())
}

/// A LoRA of rank 4 on the demo model, extracted again from the difference: the same product, but for the
/// reference's cut of the largest hundredth and half precision.
#[test]
fn an_extracted_lora_is_the_one_that_was_merged() {
    let bench = Bench::new();
    let prompt = json!({
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "demo-sd.safetensors"}},
        "5": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4", 0],
            "lora_name": "tiny-lora.safetensors", "strength_model": 1.0}},
        "6": {"class_type": "ModelMergeSubtract", "inputs": {"model1": ["5", 0], "model2": ["4", 0], "multiplier": 1.0}},
        "9": {"class_type": "LoraSave", "inputs": {"filename_prefix": "saved/lora", "rank": 4,
            "lora_type": "standard", "bias_diff": true, "model_diff": ["6", 0]}},
        "10": {"class_type": "LoraSave", "inputs": {"filename_prefix": "saved/full", "rank": 4,
            "lora_type": "full_diff", "bias_diff": false, "model_diff": ["6", 0]}},
    });
    let entry = bench.run(prompt);
    assert_eq!(entry["status"]["status_str"], "success", "{}", entry["status"]);
    let folder = bench.folder.path().join("output/saved");
    let open = |name: &str| WeightsFile::open(&folder.join(name)).unwrap();
    let (low, full) = (open("lora_00001_.safetensors"), open("full_00001_.safetensors"));
    assert!(full.names().all(|name| name.ends_with(".diff")));
    assert!(low.names().any(|name| name.ends_with(".diff_b")));
    let read = |file: &WeightsFile, name: &str| file.get(name).unwrap().to_f32();
    let mut checked = 0;
    for up in low.names().filter(|name| name.ends_with("attn1.to_q.lora_up.weight")) {
        let layer = up.strip_suffix(".lora_up.weight").unwrap();
        let shape = low.info(up).unwrap().shape;
        let down = read(&low, &format!("{layer}.lora_down.weight"));
        let found = product(&read(&low, up), &down, shape[1]);
        let most = read(&low, up).iter().chain(&down).fold(0.0f32, |most, v| most.max(v.abs()));
        let (mut left, mut right) = decomposed(&read(&full, &format!("{layer}.diff")), shape[0], shape[1]);
        // Of n elements those beyond 0.99 of the way become equal; one more may round to the same.
        let all = left.len() + right.len();
        let beyond = all - 1 - ((all - 1) as f64 * 0.99) as usize;
        let equal = read(&low, up).iter().chain(&down).filter(|v| **v == most).count();
        assert!((beyond..beyond + 2).contains(&equal), "{layer}: {equal} of {all} are equal, not {beyond}");
        for value in left.iter_mut().chain(&mut right) {
            *value = value.clamp(-most, most);
        }
        let want = product(&left, &right, shape[1]);
        let norm = |values: &mut dyn Iterator<Item = f32>| -> f64 {
            values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
        };
        let rest = norm(&mut found.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
        println!("{layer}: rest {rest:.1e}");
        // Factors and differences are in half precision: 5e-4 of an element.
        assert!(rest < 1e-3, "{layer}: {rest}");
        checked += 1;
    }
    assert!(checked > 2, "{checked} layers");
    // It loads as a LoRA.
    std::fs::copy(
        folder.join("lora_00001_.safetensors"),
        bench.folder.path().join("models/loras/made.safetensors"),
    )
    .unwrap();
    let plain = bench.picture(files::workflow("txt2img"));
    let stack = |name: &str| {
        let prompt = with(files::workflow("lora-stack"), "12", "strength_model", json!(0.0));
        let prompt =
            with(with(prompt, "11", "strength_model", json!(0.0)), "11", "strength_clip", json!(0.0));
        bench.picture(with(with(prompt, "10", "lora_name", json!(name)), "10", "strength_clip", json!(0.0)))
    };
    let (made, first) = (stack("made.safetensors"), stack("tiny-lora.safetensors"));
    println!("from the first {:.2}, from the plain {:.2}", distance(&made, &first), distance(&plain, &first));
    assert!(distance(&made, &first) < 0.25 * distance(&plain, &first));
}
