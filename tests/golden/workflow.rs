//! Cases that are workflows: run the nodes, compare the recorded outputs.

use kiln::diffusion::{CondEntry, Conditioning, Latent};
use kiln::image::{Limits, decode};
use kiln::nodes::Value;
use kiln::nodes::loaders::VaeHandle;
use kiln::tensor::HostTensor;
use serde_json::{Map, Value as Json};

use super::Group;
use super::bench::{Bench, link};
use super::compare::{self, Measure, WIDE_CONDITIONING};
use super::report::Outcome;
use super::steps::Controlled;

/// A case under way.
#[derive(Clone, Copy)]
struct Case<'a> {
    group: &'a Group,
    name: &'a str,
    prompt: &'a Map<String, Json>,
    bench: &'a Bench,
}

/// Runs a case and compares everything that is recorded for it.
pub fn run(group: &Group, name: &str, case: &Json, bench: &Bench) -> Outcome {
    let Some(prompt) = case["workflow"].as_object() else { return Outcome::Skip("no workflow".into()) };
    let prompt = &with_sink(prompt, case);
    Case { group, name, prompt, bench }.compare(case).unwrap_or_else(|outcome| outcome)
}

/// A prompt with a recorded file but without the node that wrote it gets that node.
fn with_sink(prompt: &Map<String, Json>, case: &Json) -> Map<String, Json> {
    let mut prompt = prompt.clone();
    let has_sink = prompt.values().any(|n| n["class_type"] == "SaveImage");
    let outputs = case["outputs"].as_object().into_iter().flatten();
    let image = outputs.map(|(_, o)| o).find(|o| o["type"] == "IMAGE");
    if let (Some(image), true, false) = (image, case["png"].is_array(), has_sink) {
        let inputs = serde_json::json!({"images": image["link"], "filename_prefix": "golden"});
        prompt.insert("save".into(), serde_json::json!({"class_type": "SaveImage", "inputs": inputs}));
    }
    prompt
}

fn fail(what: impl Into<String>) -> Outcome {
    Outcome::Fail(what.into())
}

impl Case<'_> {
    fn compare(&self, case: &Json) -> Result<Outcome, Outcome> {
        let outcome = self.outputs(case)?;
        Ok(if outcome.is_pass() == Some(false) { self.on_the_recorded_side(outcome, case) } else { outcome })
    }

    fn outputs(&self, case: &Json) -> Result<Outcome, Outcome> {
        let outputs: Vec<_> = case["outputs"].as_object().into_iter().flatten().collect();
        let links = outputs
            .iter()
            .map(|(label, o)| link(&o["link"]).ok_or_else(|| fail(format!("{label}: no link"))));
        let links = links.collect::<Result<Vec<_>, _>>()?;
        let ran = self.bench.run(self.prompt, &links)?;
        let mut outcomes = Vec::new();
        for (((label, output), (id, _)), values) in outputs.iter().zip(&links).zip(&ran.values) {
            let compared = match values.as_slice() {
                [value] => self.output(output, id, value),
                values => self.list(output, id, values),
            };
            outcomes.push(compared.unwrap_or_else(|e| fail(format!("{label}: {e}"))));
        }
        let files = case["png"].as_array().into_iter().flatten().filter_map(Json::as_str);
        for (index, file) in files.enumerate() {
            outcomes.push(self.png(file, index, &ran.ui).unwrap_or_else(|e| fail(format!("{file}: {e}"))));
        }
        let raw = format!("{}.raw_before_output_scaling", self.name);
        if let Some(recorded) = self.group.tensors.get(&raw) {
            outcomes.push(self.raw_decoded(&recorded)?);
        }
        let wide = format!("{}.image_u16", self.name);
        if let Some(recorded) = self.group.tensors.get(&wide) {
            outcomes.push(self.picture_of_16_bits(&recorded)?);
        }
        Ok(Outcome::worst(outcomes).unwrap_or_else(|| Outcome::Skip("no outputs recorded".into())))
    }

    /// A case of step-size control, compared on the recorded side of a timestep on
    /// the edge of rounding ([`Controlled`]); the line says what happened.
    fn on_the_recorded_side(&self, as_given: Outcome, case: &Json) -> Outcome {
        let Outcome::Compared { error: given, .. } = as_given else { return as_given };
        let traced = || {
            let steps = self.group.tensors.get(&format!("{}.trace_x", self.name))?;
            let golden = self.group.tensors.get(&format!("{}.latent", self.name))?;
            let is_only = case["outputs"].as_object()?.len() == 1;
            let controlled = Controlled::find(self.prompt, self.bench).filter(|_| is_only)?;
            let (samples, words) = controlled.on_the_recorded_side(&steps)?;
            let id = link(&case["outputs"]["latent"]["link"])?.0;
            let near = compare::tensors(&samples, &golden, compare::tolerance(self.prompt, id, "LATENT"));
            let Outcome::Compared { error, tolerance, measure, .. } = near else { return None };
            Some(Outcome::Compared {
                error,
                tolerance,
                measure,
                detail: format!("{words}, {given:.1e} without"),
            })
        };
        traced().filter(|near| near.is_pass() == Some(true)).unwrap_or(as_given)
    }

    fn golden(&self, name: &Json) -> Result<HostTensor, String> {
        let name = name.as_str().ok_or("no name of a recorded tensor")?;
        self.group.tensors.get(name).ok_or_else(|| format!("no recorded tensor {name}"))
    }

    /// A list slot: recorded tensors are numbered or stacked along the first axis.
    fn list(&self, output: &Json, id: &str, values: &[Value]) -> Result<Outcome, String> {
        let tensors: Vec<_> = values.iter().filter_map(Value::downcast::<HostTensor>).collect();
        let Some(first) = tensors.first().filter(|_| tensors.len() == values.len()) else {
            return Err(format!("{} values on the link", values.len()));
        };
        let mut shape = first.shape().to_vec();
        if let Some(batch) = shape.first_mut() {
            *batch = tensors.iter().map(|t| t.dim(0)).sum();
        }
        let data = tensors.iter().flat_map(|t| t.data().iter().copied()).collect();
        let stacked = HostTensor::new(&shape, data).ok_or("the list's tensors differ in shape")?;
        self.output(output, id, &Value::object("IMAGE", stacked))
    }

    fn output(&self, output: &Json, id: &str, value: &Value) -> Result<Outcome, String> {
        let type_name = output["type"].as_str().unwrap_or_default();
        let measure = compare::tolerance(self.prompt, id, type_name);
        match type_name {
            "CONDITIONING" => self.conditioning(value, &output["entries"], measure),
            "LATENT" => {
                let latent = value.downcast::<Latent>().ok_or("not a latent")?;
                self.latent(&latent, output, measure)
            }
            _ => {
                let ours = value
                    .downcast::<HostTensor>()
                    .ok_or_else(|| format!("not a tensor: {}", value.describe()))?;
                self.tensor(&ours, &output["tensors"][""], measure)
            }
        }
    }

    /// Pictures may be recorded as 8 or 16 bits a value, rounded.
    fn tensor(&self, ours: &HostTensor, name: &Json, measure: Measure) -> Result<Outcome, String> {
        let golden = self.golden(name)?;
        let name = name.as_str().unwrap_or_default();
        if name.ends_with("_u8") {
            let rounded =
                |t: &HostTensor| t.data().iter().map(|v| (v * 255.0).round() as u8).collect::<Vec<_>>();
            let recorded: Vec<u8> = golden.data().iter().map(|v| *v as u8).collect();
            return Ok(compare::pictures(&rounded(ours), &recorded));
        }
        if name.ends_with("_u16") {
            return Ok(compare::tensors(ours, &golden.map(|v| v / 65535.0), measure));
        }
        Ok(compare::tensors(ours, &golden, measure))
    }

    fn latent(&self, latent: &Latent, output: &Json, measure: Measure) -> Result<Outcome, String> {
        let mut outcomes = Vec::new();
        for (part, name) in output["tensors"].as_object().into_iter().flatten() {
            let (ours, measure) = match part.as_str() {
                "samples" => (Some(&latent.samples), measure),
                // Masks are resized, not sampled.
                "noise_mask" => (latent.noise_mask.as_ref(), Measure::Absolute(1e-5)),
                other => return Err(format!("unknown part {other} of a latent")),
            };
            let ours = ours.ok_or_else(|| format!("the latent has no {part}"))?;
            outcomes.push(self.tensor(ours, name, measure)?);
        }
        for (field, recorded) in output["fields"].as_object().into_iter().flatten() {
            let ours = match field.as_str() {
                "batch_index" => serde_json::json!(latent.batch_index),
                other => return Err(format!("unknown field {other} of a latent")),
            };
            if ours != *recorded {
                return Err(format!("{field} is {ours}, recorded {recorded}"));
            }
        }
        Outcome::worst(outcomes).ok_or_else(|| "nothing recorded".into())
    }

    fn conditioning(&self, value: &Value, entries: &Json, measure: Measure) -> Result<Outcome, String> {
        let ours = value.downcast::<Conditioning>().ok_or("not a conditioning")?;
        let entries = entries.as_array().ok_or("no entries recorded")?;
        if ours.len() != entries.len() {
            return Err(format!("{} entries, recorded {}", ours.len(), entries.len()));
        }
        let mut outcomes = Vec::new();
        for (ours, entry) in ours.iter().zip(entries) {
            let golden = self.golden(&entry["cond"])?;
            let is_wide = golden.shape().last().is_some_and(|&width| width > 768);
            let measure = if is_wide { WIDE_CONDITIONING } else { measure };
            outcomes.push(compare::tensors(&ours.cond, &golden, measure));
            for (part, name) in entry["tensors"].as_object().into_iter().flatten() {
                let tensor = match part.as_str() {
                    "pooled_output" => ours.pooled.as_ref(),
                    "mask" => ours.mask.as_ref(),
                    other => return Err(format!("unknown tensor {other} of a conditioning")),
                };
                let tensor = tensor.ok_or_else(|| format!("the conditioning has no {part}"))?;
                outcomes.push(self.tensor(tensor, name, measure)?);
            }
            for (field, recorded) in entry["fields"].as_object().into_iter().flatten() {
                check_field(ours, field, recorded)?;
            }
        }
        Outcome::worst(outcomes).ok_or_else(|| "no entries recorded".into())
    }

    /// Compares the pixels of the file that SaveImage wrote, and the prompt in it.
    fn png(&self, file: &str, index: usize, ui: &Json) -> Result<Outcome, String> {
        let images = ui.as_object().into_iter().flat_map(Map::values).filter_map(|o| o["images"].as_array());
        let image = images.flatten().nth(index).ok_or("the workflow saved no such picture")?;
        let name = image["filename"].as_str().ok_or("the saved picture has no file name")?;
        let pixels = |bytes: Vec<u8>| -> Result<Vec<u8>, String> {
            let picture = decode(&bytes, &Limits::default()).map_err(|e| e.to_string())?;
            Ok(picture.images().data().iter().map(|v| (v * 255.0).round() as u8).collect())
        };
        let read =
            |path: std::path::PathBuf| std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()));
        let folder = self.bench.output_folder().join(image["subfolder"].as_str().unwrap_or_default());
        let ours = pixels(read(folder.join(name))?)?;
        Ok(compare::pictures(&ours, &pixels(read(self.group.folder.join(file))?)?))
    }

    /// The first node of a class: its id and inputs.
    fn node_of(&self, class: &str) -> Result<(&str, &Json), Outcome> {
        let found = self.prompt.iter().find(|(_, n)| n["class_type"] == class);
        found
            .map(|(id, n)| (id.as_str(), &n["inputs"]))
            .ok_or_else(|| fail(format!("the workflow has no {class}")))
    }

    /// The decoder's output before it is scaled to 0..1.
    fn raw_decoded(&self, recorded: &HostTensor) -> Result<Outcome, Outcome> {
        let (_, inputs) = self.node_of("VAEDecode")?;
        let links =
            [link(&inputs["samples"]), link(&inputs["vae"])].into_iter().flatten().collect::<Vec<_>>();
        let ran = self.bench.run(self.prompt, &links)?;
        let value = |i: usize| ran.values.get(i).and_then(|v| v.first());
        let latent =
            value(0).and_then(Value::downcast::<Latent>).ok_or_else(|| fail("VAEDecode got no latent"))?;
        let vae =
            value(1).and_then(Value::downcast::<VaeHandle>).ok_or_else(|| fail("VAEDecode got no VAE"))?;
        let decoded = vae.file.vae().and_then(|vae| vae.decode_raw(&latent.samples));
        let decoded = decoded.map_err(|e| fail(e.to_string()))?;
        Ok(compare::tensors(&decoded, recorded, Measure::Absolute(2e-5)))
    }

    /// A picture recorded beside the outputs as round(65535·value).
    fn picture_of_16_bits(&self, recorded: &HostTensor) -> Result<Outcome, Outcome> {
        let (id, _) = self.node_of("VAEDecode")?;
        let ran = self.bench.run(self.prompt, &[(id, 0)])?;
        let value = ran.values.first().and_then(|v| v.first()).and_then(Value::downcast::<HostTensor>);
        let ours = value.ok_or_else(|| fail("VAEDecode gave no picture"))?;
        let measure = compare::tolerance(self.prompt, id, "IMAGE");
        Ok(compare::tensors(&ours, &recorded.map(|v| v / 65535.0), measure))
    }
}

/// A plain value of a conditioning.
fn check_field(entry: &CondEntry, field: &str, recorded: &Json) -> Result<(), String> {
    let ours = match field {
        "strength" => Some(entry.strength),
        "mask_strength" => Some(entry.mask_strength),
        "set_area_to_bounds" => Some(f64::from(u8::from(entry.set_area_to_bounds))),
        "start_percent" => entry.start_percent,
        "end_percent" => entry.end_percent,
        other => entry.extra.get::<f64>(other).map(|v| *v),
    };
    let recorded_number = recorded.as_f64().or_else(|| recorded.as_bool().map(|b| f64::from(u8::from(b))));
    if ours.is_some() && ours == recorded_number {
        return Ok(());
    }
    Err(format!("field {field} is {ours:?}, recorded {recorded}"))
}
