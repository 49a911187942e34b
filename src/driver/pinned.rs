//! Page-locked host memory.

/// Page-locked host memory; freed when dropped.
pub struct PinnedBuffer {
    ptr: *mut u8,
    bytes: usize,
    release: Release,
}

/// Gives the memory back; it may hold what must outlive the memory.
pub(super) type Release = Box<dyn Fn(*mut u8, usize) + Send + Sync>;

// SAFETY: the buffer is owned memory without thread affinity; access needs the usual & or &mut.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Wraps memory of a driver.
    ///
    /// # Safety
    /// `ptr` is valid for `bytes` bytes, initialised, used by nobody else, and
    /// `release(ptr, bytes)` frees it.
    pub(super) unsafe fn new(ptr: *mut u8, bytes: usize, release: Release) -> Self {
        Self { ptr, bytes, release }
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `new`'s contract: valid, initialised and owned by this buffer.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        (self.release)(self.ptr, self.bytes);
    }
}
