//! From options to backends on a GPU or on the SIMT layer.

use std::sync::Arc;

use super::backend::{CudaBackend, Shared};
use super::{CudaError, Element, Gpu};
use crate::backend::{Device, DeviceOptions, OpenError, Precision};
use crate::driver::cuda::{CudaDriver, Modules};
use crate::driver::simt::{self, SimtDriver, SimtOptions};
use crate::driver::toolchain::SimtVariant;
use crate::driver::{Capability, Driver, DriverError};
use crate::tensor::{Backend, Placement, TensorError};

/// The backends for `options`; `cpu` makes the one for parts that stay on the CPU.
pub fn open<B: Backend + 'static>(
    options: &DeviceOptions,
    cpu: impl FnOnce() -> Result<Arc<B>, TensorError>,
) -> Result<Placement, OpenError> {
    open_on(open_driver(options)?, options, cpu)
}

/// The same on a driver that the caller has opened.
pub fn open_on<B: Backend + 'static>(
    driver: Arc<dyn Driver>,
    options: &DeviceOptions,
    cpu: impl FnOnce() -> Result<Arc<B>, TensorError>,
) -> Result<Placement, OpenError> {
    let gpu = Arc::new(Gpu::new(driver).map_err(|error| match error {
        CudaError::Driver(error) => OpenError::Driver(error),
        error => OpenError::Tensor(error.into()),
    })?);
    let vae = vae_element(gpu.capability());
    let shared = Shared::new(gpu, options.memory_limit);
    shared.set_draws_noise(options.gpu_noise);
    let mut made: Vec<(Element, Arc<dyn Backend>)> = Vec::new();
    let mut backend = |precision: Option<Precision>, default: Element| -> Arc<dyn Backend> {
        let element = precision.map_or(default, element);
        if let Some((_, backend)) = made.iter().find(|(e, _)| *e == element) {
            return backend.clone();
        }
        let backend: Arc<dyn Backend> = Arc::new(CudaBackend::new(shared.clone(), element));
        made.push((element, backend.clone()));
        backend
    };
    Ok(Placement {
        diffusion: backend(options.diffusion, Element::F16),
        text: backend(options.text, Element::F16),
        vae: if options.vae_on_cpu { cpu()? } else { backend(options.vae, vae) },
    })
}

/// What autoencoders compute in unless asked otherwise: f16 overflows in some of them, and the tensor cores before Ampere have
/// no bf16, whose products are then slower than those of f32.
fn vae_element(capability: Capability) -> Element {
    if capability.major < 8 { Element::F32 } else { Element::BF16 }
}

fn element(precision: Precision) -> Element {
    match precision {
        Precision::F16 => Element::F16,
        Precision::BF16 => Element::BF16,
        Precision::F32 => Element::F32,
    }
}

/// The driver for `options`: the SIMT layer or a GPU.
pub fn open_driver(options: &DeviceOptions) -> Result<Arc<dyn Driver>, DriverError> {
    let kernels = options.kernels.as_deref();
    match options.device {
        Device::Simt => {
            let library = simt::library(kernels, SimtVariant::Fast)?;
            Ok(Arc::new(SimtDriver::open(&library, SimtOptions::default())?))
        }
        _ => Ok(Arc::new(CudaDriver::open(options.ordinal, &Modules::over(kernels)?)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoencoders_before_ampere_compute_in_f32() {
        let of = |major, minor| vae_element(Capability { major, minor });
        assert_eq!((of(7, 5), of(8, 0), of(9, 0)), (Element::F32, Element::BF16, Element::BF16));
    }
}
