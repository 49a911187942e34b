//! A device and its primary context.

use std::ffi::{c_char, c_int};

use cudarc::driver::sys::{self, CUcontext, CUdevice_attribute as Attribute};

use super::ffi::cu;
use super::{Capability, DeviceInfo, DriverError};

/// The primary context of a device, retained; released when dropped.
pub(super) struct Context {
    device: sys::CUdevice,
    /// The `CUcontext`: contexts belong to no thread.
    raw: usize,
}

impl Context {
    /// Retains the primary context of the device of that index. The driver must be loaded.
    pub(super) fn open(ordinal: usize) -> Result<Self, DriverError> {
        let count = device_count()?;
        if ordinal >= count {
            return Err(DriverError::NoDevice { ordinal, count });
        }
        let mut device = 0;
        // SAFETY: `device` is written; the index is below the count.
        unsafe { cu!(cuDeviceGet(&mut device, ordinal as c_int)) }?;
        let mut raw: CUcontext = std::ptr::null_mut();
        // SAFETY: `raw` is written; the device exists.
        unsafe { cu!(cuDevicePrimaryCtxRetain(&mut raw, device)) }?;
        Ok(Self { device, raw: raw as usize })
    }

    /// Makes this the calling thread's context. Cheap when it is already.
    pub(super) fn enter(&self) -> Result<(), DriverError> {
        let mut current: CUcontext = std::ptr::null_mut();
        // SAFETY: `current` is written.
        unsafe { cu!(cuCtxGetCurrent(&mut current)) }?;
        if current as usize != self.raw {
            // SAFETY: the context is retained as long as `self` lives.
            unsafe { cu!(cuCtxSetCurrent(self.raw as CUcontext)) }?;
        }
        Ok(())
    }

    /// What the device is.
    pub(super) fn info(&self, ordinal: usize) -> Result<DeviceInfo, DriverError> {
        describe(self.device, ordinal)
    }
}

/// What the device of that index is, without a context on it. The driver must be loaded.
pub(super) fn device(ordinal: usize) -> Result<DeviceInfo, DriverError> {
    let mut device = 0;
    // SAFETY: `device` is written; an index without a device is an error.
    unsafe { cu!(cuDeviceGet(&mut device, ordinal as c_int)) }?;
    describe(device, ordinal)
}

/// A number that a device reports.
fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<u32, DriverError> {
    let mut value = 0;
    // SAFETY: `value` is written; the device exists.
    unsafe { cu!(cuDeviceGetAttribute(&mut value, attribute, device)) }?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn describe(device: sys::CUdevice, ordinal: usize) -> Result<DeviceInfo, DriverError> {
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: `name` is writable for its length.
    unsafe { cu!(cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device)) }?;
    let name: Vec<u8> = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    let mut memory = 0;
    // SAFETY: `memory` is written.
    unsafe { cu!(cuDeviceTotalMem_v2(&mut memory, device)) }?;
    let number = |which| attribute(device, which);
    Ok(DeviceInfo {
        name: String::from_utf8_lossy(&name).into_owned(),
        ordinal,
        capability: Capability {
            major: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory: memory as u64,
        l2_cache: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        driver_version: driver_version()?,
        is_simulated: false,
    })
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `open`. At the end of the process the driver may be gone: its refusal means nothing.
        let _ = unsafe { cu!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

/// Devices on this machine. The driver must be loaded.
pub(super) fn device_count() -> Result<usize, DriverError> {
    let mut count = 0;
    // SAFETY: `count` is written.
    unsafe { cu!(cuDeviceGetCount(&mut count)) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Version of the driver, such as 13000. The driver must be loaded.
pub(super) fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: `version` is written.
    unsafe { cu!(cuDriverGetVersion(&mut version)) }?;
    Ok(version)
}
