//! Keeping the C heap small: few arenas, large blocks in maps of their own, free memory given back.

/// Asks the C allocator to return free memory. glibc keeps what small and
/// middle-sized blocks leave behind, which after unloading a model is tens of megabytes.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim has no preconditions and may be called from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Blocks from here on are maps of their own, which go back to the system when freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAP_FROM_BYTES: libc::c_int = 256 << 10;
/// glibc would make an arena for every few threads, each with its own leftovers.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS: libc::c_int = 1;

/// Sets the C allocator up so that unloading a model leaves little behind.
pub(super) fn set_up() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes plain numbers and is thread-safe in glibc; a refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAP_FROM_BYTES);
    }
}
