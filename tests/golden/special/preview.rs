//! Preview pictures of a step's prediction.

use kiln::diffusion::preview::{Latent2Rgb, SD1, SDXL};
use serde_json::Value as Json;

use crate::Group;
use crate::compare;
use crate::report::Outcome;

pub fn compare(group: &Group, name: &str, case: &Json) -> Result<Outcome, Outcome> {
    let note = case["note"].as_str().unwrap_or_default();
    let factors: &Latent2Rgb = match () {
        () if name.contains("taesd") => return Err(Outcome::Later(vec!["previews by TAESD".to_owned()])),
        () if note.contains("SDXL") => &SDXL,
        () => &SD1,
    };
    // The prediction is stored once, with the first case that needs it.
    let own = format!("{name}.x0");
    let x0 = match group.tensors.get(&own) {
        Some(x0) => x0,
        None => {
            let shared = group.tensors.names().find(|n| n.ends_with(".x0")).unwrap_or(&own).to_owned();
            group.tensors.need(&shared).map_err(Outcome::Fail)?
        }
    };
    let recorded = group.tensors.need(&format!("{name}.rgb_u8")).map_err(Outcome::Fail)?;
    let recorded: Vec<u8> = recorded.data().iter().map(|v| *v as u8).collect();
    Ok(compare::pictures(&compare::bytes(factors.picture(&x0).data()), &recorded))
}
