//! Preview pictures of a step's prediction.

use kiln::diffusion::preview::{Latent2Rgb, SD1, SDXL};
use kiln::models::ModelSource;
use kiln::models::taesd::{self, Tiny};
use kiln::tensor::HostTensor;
use serde_json::Value as Json;

use crate::Group;
use crate::bench::Bench;
use crate::compare;
use crate::report::Outcome;

/// The picture of a tiny decoder, as the previewer makes it.
fn tiny(bench: &Bench, x0: &HostTensor) -> Result<HostTensor, Outcome> {
    let path =
        bench.model("taesd_decoder.safetensors").ok_or_else(|| Outcome::Fail("no TAESD".to_owned()))?;
    let fail = |e: kiln::models::ModelError| Outcome::Fail(e.to_string());
    let decoder = bench.services().models.file(ModelSource::File(path)).network::<Tiny>().map_err(fail)?;
    let picture = taesd::decode(&decoder, x0).map_err(fail)?;
    let (c, plane) = (picture.dim(1), picture.dim(2) * picture.dim(3));
    let shape = [1, picture.dim(2), picture.dim(3), c];
    Ok(HostTensor::from_fn(&shape, |i| picture.data()[i % c * plane + i / c].clamp(0.0, 1.0)))
}

pub fn compare(group: &Group, name: &str, case: &Json, bench: &Bench) -> Result<Outcome, Outcome> {
    let note = case["note"].as_str().unwrap_or_default();
    let factors: &Latent2Rgb = if note.contains("SDXL") { &SDXL } else { &SD1 };
    // The prediction is stored once, with the first case that needs it.
    let own = format!("{name}.x0");
    let x0 = match group.tensors.get(&own) {
        Some(x0) => x0,
        None => {
            let shared = group.tensors.names().find(|n| n.ends_with(".x0")).unwrap_or(&own).to_owned();
            group.tensors.need(&shared).map_err(Outcome::Fail)?
        }
    };
    let picture = if name.contains("taesd") { tiny(bench, &x0)? } else { factors.picture(&x0) };
    let recorded = group.tensors.need(&format!("{name}.rgb_u8")).map_err(Outcome::Fail)?;
    let recorded: Vec<u8> = recorded.data().iter().map(|v| *v as u8).collect();
    Ok(compare::pictures(&compare::bytes(picture.data()), &recorded))
}
