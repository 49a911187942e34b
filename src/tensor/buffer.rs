//! Host memory blocks that return to their pool when dropped.

use std::sync::Arc;

/// One cache line of memory; the unit of [`HostBuffer`], so that buffers are 64-byte aligned.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct CacheLine([u8; 64]);

/// A 64-byte aligned block of memory.
pub trait Block: Send + Sync {
    /// The memory.
    fn lines(&self) -> &[CacheLine];
    /// The memory, mutable.
    fn lines_mut(&mut self) -> &mut [CacheLine];
}

/// Takes blocks back; implemented by a backend's arena.
pub trait Recycle: Send + Sync {
    /// Takes a block back for reuse.
    fn recycle(&self, block: Box<dyn Block>);
}

/// A block on loan from an arena; dropping it gives it back.
pub struct HostBuffer {
    block: Option<Box<dyn Block>>,
    home: Arc<dyn Recycle>,
}

impl HostBuffer {
    /// Lends `block`, to be given back to `home`.
    pub fn new(block: Box<dyn Block>, home: Arc<dyn Recycle>) -> Self {
        Self { block: Some(block), home }
    }

    /// The bytes as elements of `T`; shorter by what doesn't fill one element.
    pub fn as_slice<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&self) -> &[T] {
        self.block.as_deref().map_or(&[], |b| bytemuck::cast_slice(b.lines()))
    }

    /// The bytes as elements of `T`, mutable.
    pub fn as_mut_slice<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&mut self) -> &mut [T] {
        self.block.as_deref_mut().map_or(&mut [], |b| bytemuck::cast_slice_mut(b.lines_mut()))
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.home.recycle(block);
        }
    }
}
