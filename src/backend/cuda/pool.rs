//! Device memory: blocks are kept for reuse, so that a denoise step asks the driver for nothing.
//!
//! All work runs on one stream in order, so a block may be lent again as soon
//! as the host drops it: the next kernel that writes it runs after the last
//! one that reads it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{CudaError, Gpu};
use crate::driver::{DeviceMemory, DevicePtr};
use crate::tensor::buffer::{DeviceBuffer, ReclaimDevice};
use crate::tensor::{MemoryUse, TensorError};

/// Blocks are multiples of this, so that sizes that differ little share blocks.
const GRAIN: usize = 512;
/// A cached block may be larger than asked for by one part in this.
const SLACK: usize = 8;
/// What fresh memory holds under the SIMT layer: NaN in every element type.
const POISON: u8 = 0xff;

/// What is in use on the device, by class.
#[derive(Default)]
pub struct Usage {
    activations: AtomicUsize,
    cached: AtomicUsize,
    weights: AtomicUsize,
    peak: AtomicUsize,
    allocations: AtomicU64,
    loans: AtomicU64,
}

impl Usage {
    /// The numbers as the tensor layer names them.
    pub fn report(&self, memory: DeviceMemory, workspace: usize) -> MemoryUse {
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        MemoryUse {
            activations: self.activations.load(Relaxed),
            workspace,
            cached: self.cached.load(Relaxed),
            weights: self.weights.load(Relaxed),
            peak: self.peak.load(Relaxed),
            system_allocations: self.allocations.load(Relaxed),
            available: bytes(memory.free),
            device_total: Some(bytes(memory.total)),
        }
    }
}

/// A pool of activation memory.
pub struct Pool {
    gpu: Arc<Gpu>,
    usage: Arc<Usage>,
    /// Free blocks by size.
    free: Mutex<BTreeMap<usize, Vec<DevicePtr>>>,
    /// Most bytes of activations, lent and cached.
    limit: Option<usize>,
    /// Nothing may be asked of the driver: a stream is being captured.
    is_frozen: AtomicBool,
    /// Something would have been asked since the pool was frozen.
    was_short: AtomicBool,
}

impl Pool {
    /// An empty pool.
    pub fn new(gpu: Arc<Gpu>, usage: Arc<Usage>, limit: Option<usize>) -> Arc<Self> {
        let (is_frozen, was_short) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { gpu, usage, free: Mutex::default(), limit, is_frozen, was_short })
    }

    /// While frozen the pool lends what it has and fails otherwise. Returns
    /// whether it failed for that reason since the last call.
    pub fn freeze(&self, on: bool) -> bool {
        self.is_frozen.store(on, Relaxed);
        self.was_short.swap(false, Relaxed)
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<DevicePtr>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the SIMT layer sizes are exact, so that an overrun meets the page behind the block.
    fn rounded(&self, bytes: usize) -> usize {
        if self.gpu.driver().device().is_simulated {
            bytes.max(1)
        } else {
            bytes.max(1).next_multiple_of(GRAIN)
        }
    }

    /// Lends memory with undefined content.
    pub fn lend(self: &Arc<Self>, bytes: usize) -> Result<DeviceBuffer, TensorError> {
        let bytes = self.rounded(bytes);
        let (ptr, bytes) = match self.reuse(bytes) {
            Some(block) => block,
            None => (self.fresh(bytes)?, bytes),
        };
        if self.gpu.driver().device().is_simulated {
            self.gpu.driver().fill(ptr, POISON, bytes, self.gpu.stream()).map_err(CudaError::from)?;
        }
        let usage = &self.usage;
        let in_use = usage.activations.fetch_add(bytes, Relaxed) + bytes;
        usage.peak.fetch_max(in_use + usage.cached.load(Relaxed), Relaxed);
        let loan = usage.loans.fetch_add(1, Relaxed);
        Ok(DeviceBuffer::new(ptr.0, bytes, loan, self.clone()))
    }

    fn reuse(&self, bytes: usize) -> Option<(DevicePtr, usize)> {
        let is_exact = self.gpu.driver().device().is_simulated;
        let most = if is_exact { bytes } else { bytes + bytes / SLACK };
        let mut free = self.free();
        let size = *free.range(bytes..=most).next()?.0;
        let blocks = free.get_mut(&size)?;
        let ptr = blocks.pop()?;
        if blocks.is_empty() {
            free.remove(&size);
        }
        self.usage.cached.fetch_sub(size, Relaxed);
        Some((ptr, size))
    }

    fn fresh(&self, bytes: usize) -> Result<DevicePtr, TensorError> {
        if self.is_frozen.load(Relaxed) {
            self.was_short.store(true, Relaxed);
            return Err(TensorError::Device("a capture needs more memory than the run before it".into()));
        }
        let usage = &self.usage;
        let in_use = || usage.activations.load(Relaxed);
        if let Some(limit) = self.limit {
            if in_use().saturating_add(bytes) > limit {
                return Err(TensorError::OutOfMemory { bytes, in_use: in_use() });
            }
            if in_use() + usage.cached.load(Relaxed) + bytes > limit {
                self.trim();
            }
        }
        let ptr = self.gpu.allocate(bytes).map_err(CudaError::from)?;
        usage.allocations.fetch_add(1, Relaxed);
        Ok(ptr)
    }

    /// Gives cached blocks back to the driver.
    pub fn trim(&self) {
        let blocks = std::mem::take(&mut *self.free());
        for (size, ptrs) in blocks {
            for ptr in ptrs {
                self.usage.cached.fetch_sub(size, Relaxed);
                if let Err(error) = self.gpu.driver().free(ptr, self.gpu.stream()) {
                    tracing::warn!(%error, "device memory was not freed");
                }
            }
        }
    }
}

impl ReclaimDevice for Pool {
    fn reclaim(&self, address: u64, bytes: usize) {
        self.usage.activations.fetch_sub(bytes, Relaxed);
        self.usage.cached.fetch_add(bytes, Relaxed);
        self.free().entry(bytes).or_default().push(DevicePtr(address));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.trim();
    }
}

/// Memory of packed weights: goes back to the driver when dropped.
pub struct WeightMemory {
    gpu: Arc<Gpu>,
    usage: Arc<Usage>,
}

impl WeightMemory {
    /// Weights of `gpu`, counted in `usage`.
    pub fn new(gpu: Arc<Gpu>, usage: Arc<Usage>) -> Arc<Self> {
        Arc::new(Self { gpu, usage })
    }

    /// Memory for a weight.
    pub fn lend(self: &Arc<Self>, bytes: usize) -> Result<DeviceBuffer, TensorError> {
        let bytes = bytes.max(1);
        let ptr = self.gpu.allocate(bytes).map_err(CudaError::from)?;
        self.usage.weights.fetch_add(bytes, Relaxed);
        let loan = self.usage.loans.fetch_add(1, Relaxed);
        Ok(DeviceBuffer::new(ptr.0, bytes, loan, self.clone()))
    }
}

impl ReclaimDevice for WeightMemory {
    fn reclaim(&self, address: u64, bytes: usize) {
        self.usage.weights.fetch_sub(bytes, Relaxed);
        if let Err(error) = self.gpu.driver().free(DevicePtr(address), self.gpu.stream()) {
            tracing::warn!(%error, "device memory of a weight was not freed");
        }
    }
}
