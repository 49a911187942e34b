//! Memory that returns to its pool when dropped: host blocks and device blocks.

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

/// Takes device memory back; implemented by a backend's pool.
pub trait ReclaimDevice: Send + Sync {
    /// Takes `bytes` bytes at `address` back for reuse.
    fn reclaim(&self, address: u64, bytes: usize);
}

/// Device memory on loan from a pool; dropping it gives it back.
pub struct DeviceBuffer {
    address: u64,
    bytes: usize,
    /// Tells two loans of the same memory apart.
    loan: u64,
    home: Arc<dyn ReclaimDevice>,
}

impl DeviceBuffer {
    /// Lends `bytes` bytes at `address`, to be given back to `home`.
    pub fn new(address: u64, bytes: usize, loan: u64, home: Arc<dyn ReclaimDevice>) -> Self {
        Self { address, bytes, loan, home }
    }

    /// Where the memory begins, in the device's address space.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A number that no other loan of the pool has.
    pub fn loan(&self) -> u64 {
        self.loan
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        self.home.reclaim(self.address, self.bytes);
    }
}
