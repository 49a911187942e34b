//! Aligned buffers: packed weights, and scratch memory that a thread keeps.
//!
//! Scratch grows to the largest request a thread has seen and is then reused,
//! so a denoise loop allocates nothing and takes no page faults after its first
//! step. Large buffers ask for huge pages: tile loads walk 32 rows at once,
//! which is more 4 KiB pages than the first-level TLB likes.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::ptr::NonNull;

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

/// A zero-initialised buffer on a cache-line (or huge-page) boundary.
pub(super) struct AlignedBytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its memory like a Vec<u8>.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// Allocates `len` zero bytes, rounded up to whole cache lines.
    pub fn zeroed(len: usize) -> AlignedBytes {
        let align = if len >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let size = len.max(1).next_multiple_of(CACHE_LINE);
        let Ok(layout) = Layout::from_size_align(size, align) else {
            handle_alloc_error(Layout::new::<u8>());
        };
        // SAFETY: the size is not zero.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout);
        };
        #[cfg(target_os = "linux")]
        if size >= HUGE_PAGE {
            // SAFETY: advice on memory we own; a refusal changes nothing.
            unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
        // Only now, so that the first touch already finds the advice.
        // SAFETY: `size` bytes are ours.
        unsafe { start.as_ptr().write_bytes(0, size) };
        AlignedBytes { start, layout }
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// The bytes as plain values.
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: initialised at allocation, aligned to at least 64 bytes, any bits are a T.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len() / size_of::<T>()) }
    }

    /// The bytes as plain values, to write.
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len() / size_of::<T>()) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// What a scratch buffer is for; a thread keeps one of each.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    /// Packed rows of A, or a convolution's band of the image.
    Rows,
    /// f32 accumulators.
    Accumulators,
    /// Row, tile and k-step tables.
    Tables,
    /// Attention: packed keys.
    Keys,
    /// Attention: packed values.
    Values,
    /// Attention: scores and probabilities.
    Scores,
}

const SLOTS: usize = 6;

thread_local! {
    static KEPT: [Cell<Option<AlignedBytes>>; SLOTS] = const { [const { Cell::new(None) }; SLOTS] };
}

/// A thread's scratch buffer, on loan until dropped. Contents are stale.
pub(super) struct Scratch {
    bytes: Option<AlignedBytes>,
    slot: Slot,
}

impl Scratch {
    /// Borrows at least `len` bytes of the thread's buffer for `slot`.
    pub fn take(slot: Slot, len: usize) -> Scratch {
        let kept = KEPT.try_with(|kept| kept[slot as usize].take()).ok().flatten();
        let bytes = match kept {
            Some(bytes) if bytes.len() >= len => bytes,
            smaller => {
                drop(smaller);
                AlignedBytes::zeroed(if len > HUGE_PAGE / 8 { len.next_multiple_of(HUGE_PAGE) } else { len })
            }
        };
        Scratch { bytes: Some(bytes), slot }
    }

    /// The buffer as plain values, to write.
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        self.bytes.as_mut().map(AlignedBytes::as_mut_slice).unwrap_or_default()
    }
}

/// Frees the calling thread's buffers; they come back when needed.
pub(in crate::backend::cpu) fn release_scratch() {
    // A thread that is being torn down has no cell left, and so nothing to free.
    let _ = KEPT.try_with(|kept| kept.iter().for_each(|slot| drop(slot.take())));
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let bytes = self.bytes.take();
        // A thread that is being torn down has no cell left: the buffer is freed.
        let _ = KEPT.try_with(|kept| kept[self.slot as usize].set(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_reused_and_grows() {
        let mut first = Scratch::take(Slot::Tables, 100);
        first.as_mut_slice::<u32>()[0] = 7;
        let address = first.as_mut_slice::<u8>().as_ptr();
        drop(first);
        let mut again = Scratch::take(Slot::Tables, 100);
        assert_eq!(again.as_mut_slice::<u8>().as_ptr(), address);
        assert_eq!(again.as_mut_slice::<u32>()[0], 7);
        drop(again);
        let mut larger = Scratch::take(Slot::Tables, 5000);
        assert!(larger.as_mut_slice::<u8>().len() >= 5000);
        assert_eq!(larger.as_mut_slice::<u8>().as_ptr() as usize % CACHE_LINE, 0);
    }
}
