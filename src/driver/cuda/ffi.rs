//! The CUDA driver library: whether it is there, and its errors in words.
//!
//! cudarc loads the library at run time and each function at its first use, and
//! panics where one is missing; so presence is checked here, once, before any call.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use super::DriverError;

/// Every function that this driver calls without asking first.
const REQUIRED: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncGetParamInfo",
    "cuFuncLoad",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAllocFromPoolAsync",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemPoolCreate",
    "cuMemPoolDestroy",
    "cuMemPoolGetAttribute",
    "cuMemPoolSetAttribute",
    "cuMemPoolTrimTo",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
];

/// Calls a function of the driver API and turns its result into a `Result` that names the call.
macro_rules! cu {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::driver::cuda::ffi::check(stringify!($function), cudarc::driver::sys::$function($($argument),*))
    };
}
pub(super) use cu;

/// Loads the driver library and initialises it; after this every required function is there.
pub(super) fn load() -> Result<(), DriverError> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        // SAFETY: loading the vendor's library runs its constructors, which have no preconditions.
        if !unsafe { sys::is_culib_present() } {
            return Err("its library (libcuda) is not on this machine".to_owned());
        }
        // SAFETY: it is present, so this does not panic.
        let library = unsafe { sys::culib() };
        for name in REQUIRED {
            // SAFETY: only its presence is looked at; it is never called through this type.
            let symbol = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
            if symbol.is_err() {
                return Err(format!(
                    "the installed one is too old, it lacks {name}: CUDA 12.8 or later is needed"
                ));
            }
        }
        // SAFETY: no preconditions.
        unsafe { cu!(cuInit(0)) }.map_err(|error| error.to_string())
    });
    loaded.clone().map_err(|reason| DriverError::NoDriver { reason })
}

/// The error of a call in CUDA's words.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), DriverError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(DriverError::Call { call, message: describe(result) })
}

/// Name and meaning of a result.
pub(super) fn describe(result: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: the driver writes a pointer to a static C string, or null.
        let done = unsafe { get(result, &mut text) };
        if done != CUresult::CUDA_SUCCESS || text.is_null() {
            return String::new();
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    format!("{} ({}): {}", text(sys::cuGetErrorName), result as u32, text(sys::cuGetErrorString))
}
