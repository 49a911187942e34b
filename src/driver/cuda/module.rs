//! Kernel modules: where their images come from, loading at first use, functions and their limits.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute as Attribute, CUmodule, CUresult, cuFuncGetParamInfo,
};

use super::super::embedded::embedded;
use super::super::kernel_folder;
use super::super::nvcc::{Arch, FatbinOptions, Nvcc, build_fatbins};
use super::super::toolchain::{ToolError, read};
use super::ffi::{check, cu, describe};
use super::handles::Handles;
use super::{DeviceInfo, DriverError, Function, FunctionInfo, Launch};

/// Where kernels come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Modules {
    /// Those that this binary carries.
    #[default]
    Embedded,
    /// Those that this binary carries, but the ones of a folder of sources laid out as `kernels/` from there,
    /// compiled with nvcc for the present device.
    Folder {
        /// The folder.
        kernels: PathBuf,
        /// Where compiled objects are kept.
        cache: PathBuf,
    },
    /// Images (fatbins or machine code) by module name.
    Images(Vec<(String, Vec<u8>)>),
}

/// A small kernel file that every network needs.
const PROBE: &str = "elementwise";

type Images = HashMap<String, Cow<'static, [u8]>>;

impl Modules {
    /// Those of the binary, or of the folder over them; compiled objects are kept in the user's cache.
    pub fn over(kernels: Option<&Path>) -> Result<Self, ToolError> {
        Ok(match kernels {
            Some(kernels) => Self::Folder { kernels: kernels.to_owned(), cache: kernel_folder::cache()? },
            None => Self::Embedded,
        })
    }

    /// The image of every module, compiled now if they come from a folder.
    fn images(&self, device: &DeviceInfo) -> Result<Images, DriverError> {
        let own = || -> Images {
            let modules = embedded().map_or(&[][..], |build| build.modules);
            modules.iter().map(|m| (m.name.to_owned(), Cow::Borrowed(m.image))).collect()
        };
        let images: Images = match self {
            Self::Embedded => own(),
            Self::Folder { kernels, cache } => {
                let sources = kernel_folder::sources(kernels)?;
                let options = FatbinOptions {
                    includes: &[kernel_folder::headers(kernels, cache)?],
                    archs: &[Arch::of_device(device.capability.major, device.capability.minor)],
                    with_ptx: false,
                    with_lines: true,
                    cache,
                };
                let mut images = own();
                for fatbin in build_fatbins(&Nvcc::find(&[])?, &sources, &options)? {
                    images.insert(fatbin.module, Cow::Owned(read(&fatbin.image)?));
                }
                images
            }
            Self::Images(images) => {
                images.iter().map(|(name, image)| (name.clone(), Cow::Owned(image.clone()))).collect()
            }
        };
        if images.is_empty() {
            let reason = match self {
                Self::Embedded => {
                    "this binary was built without nvcc; build it where nvcc is (KILN_NVCC)".into()
                }
                Self::Folder { kernels, .. } => format!("no kernel file in {} fits it", kernels.display()),
                Self::Images(_) => "no image was given".into(),
            };
            return Err(no_kernels(device, reason));
        }
        Ok(images)
    }
}

/// A kernel with what a launch needs to know of it.
pub(super) struct Kernel {
    /// The `CUfunction`.
    pub(super) raw: usize,
    pub(super) name: String,
    pub(super) info: FunctionInfo,
    /// Most dynamic shared memory of a block.
    pub(super) shared_limit: u32,
    /// Bytes of each parameter.
    pub(super) params: Vec<usize>,
}

impl Kernel {
    /// Asks the driver about a function and lets it use all the shared memory there is.
    fn describe(raw: CUfunction, name: &str, device: &DeviceInfo) -> Result<Self, DriverError> {
        // Without this the code would be loaded at the first launch, perhaps inside a graph capture.
        // SAFETY: the function belongs to a loaded module.
        unsafe { cu!(cuFuncLoad(raw)) }?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: `value` is written; the function is alive.
            unsafe { cu!(cuFuncGetAttribute(&mut value, which, raw)) }?;
            Ok::<u32, DriverError>(u32::try_from(value).unwrap_or(0))
        };
        let info = FunctionInfo {
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_shared: attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            compiled_for: attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?,
        };
        let shared_limit = device.shared_memory.saturating_sub(info.static_shared);
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive.
        unsafe { cu!(cuFuncSetAttribute(raw, most, i32::try_from(shared_limit).unwrap_or(0))) }?;
        let mut params = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: both are written; an index behind the last parameter is an invalid value.
            let result = unsafe { cuFuncGetParamInfo(raw, params.len(), &mut offset, &mut size) };
            if result == CUresult::CUDA_ERROR_INVALID_VALUE {
                break;
            }
            check("cuFuncGetParamInfo", result)?;
            params.push(size);
        }
        Ok(Self { raw: raw as usize, name: name.to_owned(), info, shared_limit, params })
    }

    /// Whether the code has the instruction by which it waits for the kernel before it (`griddepcontrol.wait`): what the
    /// compiler wrote for an earlier architecture has not, on whatever device it runs.
    pub(super) fn waits_by_itself(&self) -> bool {
        self.info.compiled_for >= 90
    }

    /// Checks a launch against the kernel's and the device's limits, which the driver would call "invalid value".
    pub(super) fn check_launch(
        &self,
        launch: &Launch,
        params: &[&[u8]],
        device: &DeviceInfo,
    ) -> Result<(), DriverError> {
        let wrong = |reason| DriverError::Parameters { kernel: self.name.clone(), reason };
        if params.len() != self.params.len() {
            return Err(wrong(format!("{} parameters given, {} declared", params.len(), self.params.len())));
        }
        for (i, (given, declared)) in params.iter().zip(&self.params).enumerate() {
            if given.len() != *declared {
                let given = given.len();
                return Err(wrong(format!(
                    "parameter {i} has {given} bytes, the kernel declares {declared}"
                )));
            }
        }
        let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
        if threads == 0 || threads > u64::from(self.info.max_threads) {
            let limit = self.info.max_threads;
            return Err(wrong(format!("blocks of {:?} threads, 1 to {limit} are possible", launch.block)));
        }
        if launch.grid[0] > i32::MAX as u32
            || launch.grid.contains(&0)
            || launch.grid[1..].iter().any(|n| *n > 65_535)
        {
            return Err(wrong(format!("a grid of {:?} blocks is not possible", launch.grid)));
        }
        if launch.shared > self.shared_limit {
            let (asked, limit) = (launch.shared, self.shared_limit);
            return Err(wrong(format!("{asked} bytes of shared memory, {limit} are possible")));
        }
        let cluster = launch.cluster;
        if cluster != [1, 1, 1] {
            let blocks: u32 = cluster.iter().fold(1, |a, b| a.saturating_mul(*b));
            let fits = launch.grid.iter().zip(&cluster).all(|(grid, n)| *n > 0 && grid % n == 0);
            if device.capability.major < 9 || !fits || blocks > 8 {
                let (grid, capability) = (launch.grid, device.capability);
                return Err(wrong(format!(
                    "clusters of {cluster:?} in a grid of {grid:?} on capability {capability}: \
                     9.0 is needed, at most 8 blocks, and the grid must be a multiple"
                )));
            }
        }
        Ok(())
    }
}

/// A loaded module. The driver may read the image until it is unloaded.
struct Loaded {
    /// The `CUmodule`.
    raw: usize,
    _image: Vec<u64>,
}

/// All modules of a driver.
pub(super) struct Loader {
    images: Images,
    loaded: Mutex<HashMap<String, Loaded>>,
    found: RwLock<HashMap<String, HashMap<String, Function>>>,
    kernels: Handles<Arc<Kernel>>,
}

impl Loader {
    pub(super) fn new(modules: &Modules, device: &DeviceInfo) -> Result<Self, DriverError> {
        Ok(Self {
            images: modules.images(device)?,
            loaded: Mutex::default(),
            found: RwLock::default(),
            kernels: Handles::new("kernel"),
        })
    }

    /// An error unless the device can run the kernels: whether there is code for it shows when a module is loaded.
    pub(super) fn probe(&self, device: &DeviceInfo) -> Result<(), DriverError> {
        if !self.images.contains_key(PROBE) {
            return Ok(());
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        self.ensure(&mut loaded, PROBE, device).map(|_| ())
    }

    /// Whether the module is there and has code for the device; loads it.
    pub(super) fn has(&self, module: &str, device: &DeviceInfo) -> Result<bool, DriverError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        match self.ensure(&mut loaded, module, device) {
            Ok(found) => Ok(found.is_some()),
            Err(DriverError::NoKernels { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// The module, loaded; none if there is no image of it.
    fn ensure(
        &self,
        loaded: &mut HashMap<String, Loaded>,
        module: &str,
        device: &DeviceInfo,
    ) -> Result<Option<CUmodule>, DriverError> {
        if let Some(module) = loaded.get(module) {
            return Ok(Some(module.raw as CUmodule));
        }
        let Some(image) = self.images.get(module) else { return Ok(None) };
        let fresh = load_module(module, image, device)?;
        let raw = fresh.raw as CUmodule;
        loaded.insert(module.to_owned(), fresh);
        Ok(Some(raw))
    }

    pub(super) fn kernel(&self, function: Function) -> Result<Arc<Kernel>, DriverError> {
        self.kernels.get(function.0)
    }

    /// The function, if it was asked for before.
    pub(super) fn known(&self, module: &str, name: &str) -> Option<Function> {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        found.get(module)?.get(name).copied()
    }

    /// Loads the function, and its module if it is the first; the context must be current.
    pub(super) fn load(
        &self,
        module: &str,
        name: &str,
        device: &DeviceInfo,
    ) -> Result<Function, DriverError> {
        let missing = || DriverError::NoFunction { module: module.to_owned(), name: name.to_owned() };
        let c_name = CString::new(name).map_err(|_| missing())?;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = self.known(module, name) {
            return Ok(function);
        }
        let raw_module = self.ensure(&mut loaded, module, device)?.ok_or_else(missing)?;
        let mut raw: CUfunction = std::ptr::null_mut();
        // SAFETY: `raw` is written; the module is loaded and the name a C string.
        let result = unsafe { sys::cuModuleGetFunction(&mut raw, raw_module, c_name.as_ptr()) };
        if result == CUresult::CUDA_ERROR_NOT_FOUND {
            return Err(missing());
        }
        check("cuModuleGetFunction", result)?;
        let kernel = Kernel::describe(raw, name, device)?;
        let function = Function(self.kernels.insert(Arc::new(kernel)));
        let mut found = self.found.write().unwrap_or_else(PoisonError::into_inner);
        found.entry(module.to_owned()).or_default().insert(name.to_owned(), function);
        Ok(function)
    }

    /// Unloads everything; no kernel may be running.
    pub(super) fn unload(&self) {
        self.kernels.take_all();
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, module) in loaded.drain() {
            // SAFETY: loaded once, unloaded once; its functions are forgotten.
            let _ = unsafe { cu!(cuModuleUnload(module.raw as CUmodule)) };
        }
    }
}

fn no_kernels(device: &DeviceInfo, reason: String) -> DriverError {
    let DeviceInfo { name, capability, .. } = device;
    DriverError::NoKernels { device: format!("{name} (compute capability {capability})"), reason }
}

fn load_module(name: &str, image: &[u8], device: &DeviceInfo) -> Result<Loaded, DriverError> {
    let mut aligned = vec![0u64; image.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut aligned)[..image.len()].copy_from_slice(image);
    let mut raw: CUmodule = std::ptr::null_mut();
    // SAFETY: `raw` is written; the image is a whole fatbin, aligned, and kept as long as the module.
    let result = unsafe { sys::cuModuleLoadData(&mut raw, aligned.as_ptr().cast()) };
    match result {
        CUresult::CUDA_SUCCESS => Ok(Loaded { raw: raw as usize, _image: aligned }),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED => {
            let targets = embedded().map_or("no GPU", |build| build.targets);
            let reason = format!(
                "this binary was built for {targets}, and module {name} has no code for the device ({}); \
                 build with another KILN_CUDA_ARCHS, or update the NVIDIA driver",
                describe(result),
            );
            Err(no_kernels(device, reason))
        }
        _ => {
            let message = format!("module {name}: {}", describe(result));
            Err(DriverError::Call { call: "cuModuleLoadData", message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Capability, Stream};

    fn device(major: u32) -> DeviceInfo {
        DeviceInfo {
            name: "test".into(),
            ordinal: 0,
            capability: Capability { major, minor: 0 },
            multiprocessors: 1,
            shared_memory: 1000,
            memory: 0,
            l2_cache: 0,
            driver_version: 0,
            is_simulated: false,
        }
    }

    #[test]
    fn a_launch_that_cannot_be_is_refused_with_both_values() {
        let info = FunctionInfo { max_threads: 256, ..FunctionInfo::default() };
        let kernel = Kernel { raw: 0, name: "k".into(), info, shared_limit: 900, params: vec![8, 4] };
        let good = Launch::new(Function(1), [4, 1, 1], [256, 1, 1], Stream(1));
        let (a, b) = ([0u8; 8], [0u8; 4]);
        let refused = |launch: &Launch, params: &[&[u8]], major| {
            kernel.check_launch(launch, params, &device(major)).unwrap_err().to_string()
        };
        assert!(kernel.check_launch(&good, &[&a, &b], &device(8)).is_ok());
        assert!(refused(&good, &[&a], 8).contains("1 parameters given, 2 declared"));
        assert!(refused(&good, &[&a, &a], 8).contains("parameter 1 has 8 bytes, the kernel declares 4"));
        let change = |change: &dyn Fn(&mut Launch)| {
            let mut launch = good;
            change(&mut launch);
            launch
        };
        assert!(refused(&change(&|l| l.block[1] = 2), &[&a, &b], 8).contains("1 to 256"));
        assert!(refused(&change(&|l| l.grid[2] = 0), &[&a, &b], 8).contains("[4, 1, 0]"));
        assert!(
            refused(&change(&|l| l.shared = 901), &[&a, &b], 8).contains("901 bytes of shared memory, 900")
        );
        let cluster = change(&|l| l.cluster[0] = 2);
        assert!(refused(&cluster, &[&a, &b], 8).contains("9.0 is needed"));
        assert!(kernel.check_launch(&cluster, &[&a, &b], &device(9)).is_ok());
        assert!(refused(&change(&|l| l.cluster[0] = 3), &[&a, &b], 9).contains("multiple"));
    }
}
