//! From the third step on a step stays on the device: one graph for every model call, no memory from the driver, no wait
//! of the host, and no byte in either direction but what is said here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use kiln::driver::Driver;
use kiln::driver::simt::SimtDriver;
use kiln::engine::Engine;
use safetensors::tensor::TensorView;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::pipeline::{engine, run, simt, status, workflow};

/// A change to a workflow.
type Change = Box<dyn Fn(&mut Json)>;

/// The sampler's settings.
fn sampler(inputs: Json) -> Change {
    with(json!({"3": inputs}))
}

/// Nodes between the model and the sampler, one behind the other: each works on what the one before made.
fn patched(nodes: &[(&str, Json)]) -> Change {
    let nodes: Vec<(String, Json)> =
        nodes.iter().map(|(class, inputs)| ((*class).to_owned(), inputs.clone())).collect();
    Box::new(move |prompt| {
        for (i, (class, inputs)) in nodes.iter().enumerate() {
            let (id, model) = (format!("{}", 20 + i), prompt["3"]["inputs"]["model"].clone());
            prompt[&id] = json!({"class_type": class, "inputs": inputs});
            prompt[&id]["inputs"]["model"] = model;
            prompt["3"]["inputs"]["model"] = json!([id, 0]);
        }
    })
}

/// Further nodes, and other inputs of those that are there.
fn with(nodes: Json) -> Change {
    Box::new(move |prompt| {
        for (id, node) in nodes.as_object().unwrap() {
            if node.get("class_type").is_some() {
                prompt[id] = node.clone();
            } else {
                let inputs = prompt[id]["inputs"].as_object_mut().unwrap();
                inputs.extend(node.as_object().unwrap().clone());
            }
        }
    })
}

/// A second positive prompt, whose conditioning a node has given a place.
fn region(class: &str, mut inputs: Json) -> Change {
    inputs["conditioning"] = json!(["7", 0]);
    with(json!({
        "30": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 64, "height": 64}},
        "32": {"class_type": class, "inputs": inputs},
        "33": {"class_type": "ConditioningCombine",
            "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["32", 0]}},
        "3": {"positive": ["33", 0]},
    }))
}

/// A guider in place of the sampler's own.
fn guided(class: &str, mut inputs: Json) -> Change {
    inputs["model"] = json!(["4", 0]);
    let class = class.to_owned();
    Box::new(move |prompt| {
        let steps = prompt["3"]["inputs"]["steps"].clone();
        with(json!({
            "3": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["40", 0], "guider": ["41", 0],
                "sampler": ["42", 0], "sigmas": ["43", 0], "latent_image": ["5", 0]}},
            "40": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
            "41": {"class_type": class, "inputs": inputs},
            "42": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
            "43": {"class_type": "BasicScheduler",
                "inputs": {"model": ["4", 0], "scheduler": "normal", "steps": steps, "denoise": 1.0}},
        }))(prompt);
    })
}

/// A hypernetwork for the demo model with Mish between two layers: for texts of 48 channels, and for 64 and 96.
fn write_hypernetwork(base: &Path) {
    let folder = base.join("models/hypernetworks");
    std::fs::create_dir_all(&folder).unwrap();
    let layer = |width: usize, salt: usize| -> Vec<u8> {
        let value = |i: usize| ((i * 37 + salt * 11) % 101) as f32 / 505.0 - 0.1;
        (0..width * width).flat_map(|i| value(i).to_le_bytes()).collect()
    };
    let sizes = [48, 64, 96].into_iter().flat_map(|width| [0, 1, 2, 3].map(|i| (width, i / 2, i % 2)));
    let layers: Vec<(String, usize, Vec<u8>)> = sizes
        .map(|(width, network, i)| (format!("{width}.{network}.linear.{i}.weight"), width, layer(width, i)))
        .collect();
    let views = layers.iter().map(|(name, width, data)| {
        (name, TensorView::new(safetensors::Dtype::F32, vec![*width; 2], data).unwrap())
    });
    let facts = HashMap::from([("activation_func".to_owned(), "mish".to_owned())]);
    safetensors::serialize_to_file(views, Some(facts), &folder.join("mish.safetensors")).unwrap();
}

/// An engine on a device that counts.
struct Counted {
    /// Side of the picture.
    size: usize,
    driver: Arc<SimtDriver>,
    engine: Arc<Engine>,
    _folder: TempDir,
}

impl Counted {
    fn new(size: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_hypernetwork(folder.path());
        let (driver, placement) = simt();
        Self { size, driver, engine: engine(placement, folder.path()), _folder: folder }
    }

    /// Graphs, allocations, waits, bytes down and bytes up of a prompt.
    fn costs(&self, change: &Change, steps: usize) -> [u64; 5] {
        let mut prompt = workflow(self.size, steps, 5);
        change(&mut prompt);
        // The picture is left out: the latent is saved.
        prompt["9"] = json!({"class_type": "SaveLatent",
            "inputs": {"samples": ["3", 0], "filename_prefix": format!("steady{steps}")}});
        prompt.as_object_mut().unwrap().remove("8");
        let before = self.driver.instruments().counts();
        assert_eq!(status(&run(&self.engine, prompt)), "success");
        let after = self.driver.instruments().counts();
        [
            after.graph_launches - before.graph_launches,
            after.allocations - before.allocations,
            after.syncs - before.syncs,
            after.downloaded - before.downloaded,
            after.uploaded - before.uploaded,
        ]
    }

    /// What one step more costs: all of a prompt of four steps, less all of one of three.
    fn check(&self, name: &str, change: Change, expected: [u64; 5]) {
        self.costs(&change, 2);
        let (three, four) = (self.costs(&change, 3), self.costs(&change, 4));
        let cost: [u64; 5] = std::array::from_fn(|i| four[i] - three[i]);
        println!("{name}: graphs, allocations, waits, bytes down, bytes up {cost:?}");
        assert_eq!(cost, expected, "{name}");
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.engine.shutdown();
    }
}

#[test]
fn a_steady_step_stays_on_the_device() {
    let (counted, latent) = (Counted::new(64), 4 * 4 * 8 * 8);
    counted.check("plain", sampler(json!({})), [1, 0, 0, 0, 0]);
    counted.check("second order", sampler(json!({"sampler_name": "heun"})), [2, 0, 0, 0, 0]);
    counted.check("ancestral", sampler(json!({"sampler_name": "euler_ancestral"})), [1, 0, 0, 0, latent]);
    let inside = [
        ("HyperTile", json!({"tile_size": 32, "swap_size": 1, "max_depth": 1, "scale_depth": false})),
        ("FreeU", json!({"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2})),
        ("FreeU_V2", json!({"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2})),
        (
            "PatchModelAddDownscale",
            json!({"block_number": 2, "downscale_factor": 2.0, "start_percent": 0.0,
            "end_percent": 1.0, "downscale_after_skip": true, "downscale_method": "bicubic",
            "upscale_method": "bilinear"}),
        ),
        (
            "PatchModelAddDownscale",
            json!({"block_number": 1, "downscale_factor": 1.5, "start_percent": 0.0,
            "end_percent": 1.0, "downscale_after_skip": false, "downscale_method": "bislerp",
            "upscale_method": "bislerp"}),
        ),
        ("HypernetworkLoader", json!({"hypernetwork_name": "mish.safetensors", "strength": 0.8})),
        ("UNetSelfAttentionMultiply", json!({"q": 1.1, "k": 1.0, "v": 0.9, "out": 1.0})),
    ];
    counted.check("patches of the network", patched(&inside), [1, 0, 0, 0, 0]);
    // Asks the model once more for the negative side, blurred where the places of the lowest level drew attention.
    let blurred = patched(&[("SelfAttentionGuidance", json!({"scale": 0.5, "blur_sigma": 2.0}))]);
    counted.check("SelfAttentionGuidance", blurred, [2, 0, 0, 0, 0]);
    // An area of both sides is a call of its own.
    let place = json!({"width": 64, "height": 64, "x": 32, "y": 0, "strength": 1.0});
    counted.check("ConditioningSetArea", region("ConditioningSetArea", place), [2, 0, 0, 0, 0]);
}

#[test]
fn a_steady_step_of_any_guidance_stays_on_the_device() {
    let (counted, mask) = (Counted::new(32), 4 * 4 * 4);
    let patches = [
        ("TCFG", json!({})),
        ("FreSca", json!({"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 2})),
        ("APG", json!({"eta": 0.8, "norm_threshold": 5.0, "momentum": -0.5})),
        ("RenormCFG", json!({"cfg_trunc": 100.0, "renorm_cfg": 1.0})),
        ("RescaleCFG", json!({"multiplier": 0.7})),
        ("CFGZeroStar", json!({})),
        ("CFGNorm", json!({"strength": 1.0})),
        ("Epsilon Scaling", json!({"scaling_factor": 1.005})),
    ];
    counted.check("patches of the guidance", patched(&patches), [1, 0, 0, 0, 0]);
    // These ask the model once more.
    let asking = [
        ("PerturbedAttentionGuidance", json!({"scale": 2.0})),
        ("PerpNeg", json!({"empty_conditioning": ["7", 0], "neg_scale": 1.0})),
    ];
    for node in asking {
        counted.check(node.0, patched(std::slice::from_ref(&node)), [2, 0, 0, 0, 0]);
    }
    let dual = json!({"cond1": ["6", 0], "cond2": ["7", 0], "negative": ["7", 0], "cfg_conds": 4.0,
        "cfg_cond2_negative": 2.5, "style": "regular"});
    counted.check("DualCFGGuider", guided("DualCFGGuider", dual), [1, 0, 0, 0, 0]);
    let perp = json!({"positive": ["6", 0], "negative": ["7", 0], "empty_conditioning": ["7", 0], "cfg": 4.0,
        "neg_scale": 1.0});
    counted.check("PerpNegGuider", guided("PerpNegGuider", perp), [1, 0, 0, 0, 0]);
    // Under a mask that changes from step to step.
    let differential = patched(&[("DifferentialDiffusion", json!({}))]);
    let masked = with(json!({
        "30": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 64, "height": 64}},
        "31": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["5", 0], "mask": ["30", 0]}},
        "3": {"latent_image": ["31", 0]},
    }));
    let both: Change =
        Box::new(move |prompt| [&differential, &masked].iter().for_each(|change| change(prompt)));
    counted.check("DifferentialDiffusion", both, [1, 0, 0, 0, mask]);
    // A third part of the one call.
    let place = json!({"mask": ["30", 0], "strength": 1.0, "set_cond_area": "default"});
    counted.check("ConditioningSetMask", region("ConditioningSetMask", place), [1, 0, 0, 0, 0]);
}
