//! Networks that enlarge pictures: ESRGAN and RealESRGAN (RRDB), and the compact SRVGG.
//!
//! Pictures are `[B, 3, H, W]` in 0..1. What a file holds is told by its tensors'
//! names and shapes; several layouts of one architecture are in use.

mod rrdb;
mod shuffle;
mod srvgg;

use std::sync::Arc;

use super::ModelError;
use super::layers::Loader;
use super::store::{Network, Opening};
use crate::tensor::HostTensor;
use rrdb::Rrdb;
pub(super) use shuffle::unshuffle;
use srvgg::Srvgg;

enum Architecture {
    Rrdb(Box<Rrdb>),
    Srvgg(Box<Srvgg>),
}

/// An upscaler on a backend.
pub struct Upscaler {
    network: Architecture,
    scale: usize,
}

impl Network for Upscaler {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let file = opening.file;
        let backend = opening.placement.diffusion.clone();
        let prefix = ["", "params_ema.", "params.", "module."].into_iter().find(|prefix| {
            let has = |name: &str| file.contains(&format!("{prefix}{name}"));
            has("conv_first.weight") || has("model.0.weight") || has("body.0.weight")
        });
        let Some(prefix) = prefix else {
            return Err(opening.is_not("an upscaler of a kind that kiln knows"));
        };
        let names: Vec<String> =
            file.names().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect();
        let loader = Loader::new(opening.source.clone(), backend.clone(), prefix);
        if let Some(layout) = rrdb::Layout::of(&names) {
            let network = Rrdb::load(backend, &loader, &layout)?;
            let scale = network.scale();
            return Ok(Self { network: Architecture::Rrdb(Box::new(network)), scale });
        }
        if names.iter().any(|name| name == "body.0.weight") {
            let network = Srvgg::load(backend, &loader)?;
            let scale = network.scale();
            return Ok(Self { network: Architecture::Srvgg(Box::new(network)), scale });
        }
        Err(opening.is_not("an upscaler of a kind that kiln knows"))
    }
}

impl Upscaler {
    /// How many times larger the result is, in each direction.
    pub fn scale(&self) -> usize {
        self.scale
    }

    /// Enlarges `[B, 3, H, W]`; the result is clamped to 0..1.
    pub fn forward(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        let out = match &self.network {
            Architecture::Rrdb(network) => network.forward(picture),
            Architecture::Srvgg(network) => network.forward(picture),
        }?;
        ModelError::check_numbers("upscaler", picture.data(), out.data())?;
        Ok(out.map(|v| v.clamp(0.0, 1.0)))
    }
}

/// Extents of a tensor that the architecture needs.
fn dims(loader: &Loader, name: &str) -> Result<Vec<usize>, ModelError> {
    loader.shape(name).ok_or_else(|| ModelError::Missing { name: name.to_owned() })
}

/// Shared by the networks: where they run.
type Device = Arc<dyn crate::tensor::Backend>;
