//! Working memory of a worker thread: grows to the largest need and stays.

use super::arena::Mapped;
use crate::tensor::buffer::CacheLine;

/// A cache-line aligned buffer of `f32`, with undefined content.
#[derive(Default)]
pub(super) struct Scratch {
    small: Vec<CacheLine>,
    large: Option<Mapped>,
}

/// From here on a map of its own pays, because it gets huge pages.
const LARGE: usize = 1 << 20;

impl Scratch {
    /// A buffer of `len` values.
    pub(super) fn take(&mut self, len: usize) -> &mut [f32] {
        let bytes = len * size_of::<f32>();
        if bytes >= LARGE {
            if self.large.as_ref().is_none_or(|m| m.as_slice::<u8>().len() < bytes) {
                self.large = Mapped::new(bytes.next_multiple_of(2 << 20));
            }
            if let Some(map) = &mut self.large {
                return &mut map.as_mut_slice()[..len];
            }
        }
        let lines = bytes.div_ceil(size_of::<CacheLine>());
        if self.small.len() < lines {
            self.small = vec![bytemuck::Zeroable::zeroed(); lines];
        }
        &mut bytemuck::cast_slice_mut(&mut self.small)[..len]
    }
}
