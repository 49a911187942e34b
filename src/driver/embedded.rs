//! The kernels that the build script compiled and this binary carries.

/// One kernel file, compiled.
#[derive(Debug)]
pub struct Module {
    /// File stem of the source.
    pub name: &'static str,
    /// Folder of the source.
    pub family: &'static str,
    /// Fatbin: machine code for each target, compressed.
    pub image: &'static [u8],
}

/// What the build script made.
#[derive(Debug)]
pub struct KernelBuild {
    /// The compiler and its version.
    pub compiler: &'static str,
    /// Targets, such as `sm_80 sm_90a`.
    pub targets: &'static str,
    /// Kernel files.
    pub modules: &'static [Module],
}

#[cfg(kiln_build_script)]
static BUILT: Option<KernelBuild> = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
/// Without the build script (the driver compiled as part of another crate) there are none.
#[cfg(not(kiln_build_script))]
static BUILT: Option<KernelBuild> = None;

/// The kernels' headers by name, for those that a folder of kernels lacks.
#[cfg(kiln_build_script)]
pub(super) static HEADERS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/headers.rs"));
#[cfg(not(kiln_build_script))]
pub(super) static HEADERS: &[(&str, &str)] = &[];

/// The kernels in this binary; none if there was no nvcc when it was built.
pub fn embedded() -> Option<&'static KernelBuild> {
    BUILT.as_ref()
}
