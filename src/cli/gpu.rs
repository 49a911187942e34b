//! Flags of commands that work with kernels: which device, which kernels.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::ValueEnum;

use crate::driver::cuda::{CudaDriver, Modules};
use crate::driver::simt::{self, Order, SimtDriver, SimtOptions};
use crate::driver::toolchain::SimtVariant;
use crate::driver::{Capability, Driver, DriverError};

/// Where the kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KernelDevice {
    /// The GPU
    Cuda,
    /// The SIMT layer on the CPU
    Simt,
}

/// Order of the SIMT layer's threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ThreadOrder {
    /// Lowest thread first
    #[default]
    Forward,
    /// Highest thread first
    Reverse,
    /// At random, by --order-seed
    Random,
}

/// Device and kernels.
#[derive(clap::Args, Debug)]
pub struct GpuArgs {
    /// Where the kernels run; the GPU if there is one, else the SIMT layer.
    #[arg(long, value_enum)]
    device: Option<KernelDevice>,
    /// Index of the GPU.
    #[arg(long, value_name = "N", default_value_t = 0)]
    cuda_device: usize,
    /// Kernels from this folder (laid out as kernels/, or a part of it), compiled now, instead of those in the binary.
    #[arg(long, value_name = "DIR")]
    kernels_dir: Option<PathBuf>,
    /// SIMT: check every access for bounds, initialisation and races.
    #[arg(long)]
    checked: bool,
    /// SIMT: order of threads.
    #[arg(long, value_enum, default_value_t)]
    order: ThreadOrder,
    /// SIMT: seed of the random order.
    #[arg(long, value_name = "N", default_value_t = 1)]
    order_seed: u64,
    /// SIMT: compute capability to claim; 9.0 chooses the Hopper kernels.
    #[arg(long, value_name = "X.Y", default_value = "8.0", value_parser = parse_capability)]
    capability: Capability,
}

fn parse_capability(text: &str) -> Result<Capability, String> {
    let wrong = || format!("'{text}' is not a compute capability such as 9.0");
    let (major, minor) = text.split_once('.').ok_or_else(wrong)?;
    let number = |part: &str| part.parse::<u32>().map_err(|_| wrong());
    Ok(Capability { major: number(major)?, minor: number(minor)? })
}

impl GpuArgs {
    /// The driver that the flags name.
    pub fn driver(&self) -> Result<Arc<dyn Driver>> {
        let opened = match self.device {
            Some(KernelDevice::Cuda) => self.cuda(),
            Some(KernelDevice::Simt) => self.simt(),
            None => match self.cuda() {
                Err(reason @ (DriverError::NoDriver { .. } | DriverError::NoKernels { .. })) => {
                    eprintln!("no GPU in use: {reason}");
                    self.simt()
                }
                opened => opened,
            },
        };
        Ok(opened?)
    }

    fn cuda(&self) -> Result<Arc<dyn Driver>, DriverError> {
        let modules = Modules::over(self.kernels_dir.as_deref())?;
        Ok(Arc::new(CudaDriver::open(self.cuda_device, &modules)?))
    }

    fn simt(&self) -> Result<Arc<dyn Driver>, DriverError> {
        let variant = if self.checked { SimtVariant::Checked } else { SimtVariant::Fast };
        let library = simt::library(self.kernels_dir.as_deref(), variant)?;
        let order = match self.order {
            ThreadOrder::Forward => Order::Forward,
            ThreadOrder::Reverse => Order::Reverse,
            ThreadOrder::Random => Order::Random(self.order_seed),
        };
        let options = SimtOptions { order, capability: self.capability, ..SimtOptions::default() };
        Ok(Arc::new(SimtDriver::open(&library, options)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_parsed() {
        assert_eq!(parse_capability("9.0"), Ok(Capability { major: 9, minor: 0 }));
        assert!(parse_capability("nine").unwrap_err().contains("'nine'"));
    }
}
