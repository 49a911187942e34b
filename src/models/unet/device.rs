//! Passes on latents that stay on the device: nothing waits for the device, and what is the same in every step of a
//! run is copied there once.

use std::sync::{Arc, Mutex, PoisonError};

use super::hooks::{HookCall, HookScope, Hooks};
use super::{Call, ContextKv, Unet};
use crate::models::ModelError;
use crate::models::controlnet::{self, ControlInput};
use crate::models::layers::Ops;
use crate::tensor::{HostTensor, LatentOps, ModelInput, Planes, Tensor, TensorError};

/// Things kept on the device; the least recently used goes.
const KEPT: usize = 4;

/// One forward pass on latents on the device.
pub struct DeviceInput<'a> {
    /// The latents of all samples, scaled for the model, without what is beside them.
    pub latents: &'a ModelInput<'a>,
    /// Channels beside the latents `[B, C, h, w]`, for models that see some.
    pub beside: Option<&'a HostTensor>,
    /// One timestep a sample.
    pub timesteps: &'a [f32],
    /// Text conditioning; its batch divides `B`.
    pub context: &'a ContextKv,
    /// `[B, adm_channels]`, for models that have such an input.
    pub vector: Option<&'a HostTensor>,
}

/// Host tensors that are on the device already.
pub(super) struct Kept {
    vectors: Recent<Tensor>,
    beside: Recent<Planes>,
}

impl Default for Kept {
    fn default() -> Self {
        Self { vectors: Recent(Mutex::default()), beside: Recent(Mutex::default()) }
    }
}

/// Copies by content, the most recently used last.
struct Recent<T>(Mutex<Vec<(HostTensor, Arc<T>)>>);

impl<T> Recent<T> {
    fn get(
        &self,
        x: &HostTensor,
        upload: impl FnOnce() -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match kept.iter().position(|(other, _)| other == x) {
            Some(at) => kept.remove(at),
            None => (x.clone(), Arc::new(upload()?)),
        };
        let copy = entry.1.clone();
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(entry);
        Ok(copy)
    }
}

impl Unet {
    /// The model's raw prediction `[B, h, w, out_channels]`, queued.
    ///
    /// # Errors
    /// Inputs that do not fit, a backend without [`LatentOps`], and what the device reports.
    pub fn forward_on_device(
        &self,
        input: &DeviceInput<'_>,
        controls: &[ControlInput],
        hooks: Hooks<'_>,
    ) -> Result<Tensor, ModelError> {
        let (ops, device) = (Ops(self.backend.as_ref()), self.latent_ops()?);
        let beside = input.beside.map(|x| self.kept.beside.get(x, || Ok(device.upload_latent(x)?)));
        let beside = beside.transpose()?;
        let x = device.model_input(&ModelInput { beside: beside.as_deref(), ..*input.latents })?;
        let shape = x.shape();
        self.check_channels(shape.c)?;
        let vector = self.vector_rows(input.vector, shape.n)?;
        let vector =
            vector.map(|rows| self.kept.vectors.get(&rows, || ops.upload_nchw(&rows))).transpose()?;
        let latents = match controlnet::fewer_channels(shape.c, controls) {
            Some(_) => Some(device.model_input(input.latents)?),
            None => None,
        };
        let call = Call {
            x: &x,
            timesteps: input.timesteps,
            context: input.context,
            vector: vector.as_deref(),
            latents: latents.as_ref(),
        };
        let (list, sigma, sides) = (hooks.list, hooks.sigma, hooks.sides);
        let scope = HookScope::new(list, HookCall { ops, sigma, size: (shape.h, shape.w), sides });
        self.run(ops, &call, controls, (None, (!list.is_empty()).then_some(&scope)))
    }

    fn latent_ops(&self) -> Result<&dyn LatentOps, ModelError> {
        self.backend.latent_ops().ok_or_else(|| {
            let what = format!("sampling on {}", self.backend.info().name);
            TensorError::Unsupported { op: "model_input", what }.into()
        })
    }
}
