//! Giving freed heap memory back to the system.

/// Asks the C allocator to return free memory. glibc keeps what small and
/// middle-sized blocks leave behind, which after unloading a model is tens of megabytes.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim has no preconditions and may be called from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
