//! Control-LoRA (Stability AI 2023): a ControlNet that is stored as low-rank changes of the UNet that it steers.
//!
//! The file has what a ControlNet has besides its half UNet, and of that the
//! biases, the norms and pairs `….up`, `….down`. The rest is the UNet's own: the net is made when it is known which
//! model is sampled, with the patches of that model.

use std::collections::HashMap;
use std::sync::Arc;

use super::ControlNet;
use crate::models::ModelError;
use crate::models::detect::UnetConfig;
use crate::models::layers::{Loader, WeightSource};
use crate::models::patch::{Change, DIFFUSION, Patch, PatchedSource, Patches, Scale, Values};
use crate::models::store::{Base, Opening};
use crate::tensor::RawTensor;

/// The tensor by which the files are told.
pub const MARK: &str = "lora_controlnet";

/// A file's tensors, and for what it lacks those of another model.
struct Over {
    own: Arc<dyn WeightSource>,
    base: Arc<dyn WeightSource>,
    /// What names in `base` begin with besides.
    prefix: String,
}

impl WeightSource for Over {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.own.raw(name).or_else(|| self.base.raw(&format!("{}{name}", self.prefix)))
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.own.shape(name).or_else(|| self.base.shape(&format!("{}{name}", self.prefix)))
    }

    fn packed(&self, name: &str) {
        match self.own.shape(name) {
            Some(_) => self.own.packed(name),
            None => self.base.packed(&format!("{}{name}", self.prefix)),
        }
    }
}

impl ControlNet {
    /// The net that a control-LoRA makes of a UNet.
    ///
    /// # Errors
    /// If the file is incomplete or was made for another family of models.
    pub fn from_lora(opening: &Opening<'_>, base: &Base<'_>) -> Result<Self, ModelError> {
        let prefix = base.unet.prefix.clone();
        let changes = changes(opening, base)?;
        let over = Over { own: opening.source.clone(), base: base.source.clone(), prefix };
        let mut config = UnetConfig { prefix: String::new(), ..base.unet.clone() };
        if let Some(&[_, in_channels, ..]) = over.shape("input_blocks.0.0.weight") {
            config.in_channels = in_channels;
        }
        let names = vec![(String::new(), DIFFUSION.to_owned())];
        let source = PatchedSource::new(Arc::new(over), names, Patches::default().with(changes));
        let backend = opening.placement.diffusion.clone();
        let loader = Loader::new(Arc::new(source), backend.clone(), "");
        Self::load(config, backend, &loader)
    }
}

/// The low-rank changes by patch name.
fn changes(opening: &Opening<'_>, base: &Base<'_>) -> Result<HashMap<String, Patch>, ModelError> {
    let mut changes = HashMap::new();
    for layer in opening.file.names().filter_map(|name| name.strip_suffix(".up")) {
        let part = |part: &str| {
            let name = format!("{layer}.{part}");
            Values::of(&opening.source, &name).ok_or(ModelError::Missing { name })
        };
        let (up, down) = (part("up")?, part("down")?);
        let change = Change::LowRank { up, down, mid: None, scale: Scale::default() };
        let weight = format!("{layer}.weight");
        let shape = base.source.shape(&format!("{}{weight}", base.unet.prefix)).unwrap_or_default();
        if shape.is_empty() || !change.fits(shape.iter().product()) {
            let file = opening.file.path().display();
            return Err(ModelError::File(format!(
                "the control-LoRA {file} is made for another family of models: its change of '{weight}' doesn't \
                 fit the model's tensor of shape {shape:?}; choose one for this model"
            )));
        }
        let patch = Patch { strength: 1.0, change: Arc::new(change), strength_model: 1.0 };
        changes.insert(format!("{DIFFUSION}{weight}"), patch);
    }
    Ok(changes)
}
