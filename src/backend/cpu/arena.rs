//! Activation memory: page-aligned blocks, recycled by size.
//!
//! A denoise step allocates and drops the same sequence of tensors each time,
//! so after the first step every request finds a block that fits and the
//! system is not asked again: no page faults, no zeroing. Blocks come straight
//! from anonymous maps, huge pages where the system grants them, so giving one
//! back really lowers the process's memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use crate::tensor::buffer::{Block, CacheLine, HostBuffer, Recycle};
use crate::tensor::{MemoryUse, TensorError, system_available};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Anonymous, zeroed, page-aligned memory.
pub(super) struct Mapped(MmapMut);

impl Mapped {
    /// Maps at least `bytes`; `None` if the system has none.
    pub(super) fn new(bytes: usize) -> Option<Self> {
        let map = MmapMut::map_anon(bytes.max(1).checked_next_multiple_of(PAGE)?).ok()?;
        #[cfg(target_os = "linux")]
        if map.len() >= HUGE_PAGE {
            // Only speed depends on it: a kernel without huge pages refuses.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Some(Self(map))
    }

    /// The memory as elements.
    pub(super) fn as_slice<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }

    /// The memory as elements, mutable.
    pub(super) fn as_mut_slice<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

impl Block for Mapped {
    fn lines(&self) -> &[CacheLine] {
        self.as_slice()
    }

    fn lines_mut(&mut self) -> &mut [CacheLine] {
        self.as_mut_slice()
    }
}

#[derive(Default)]
struct State {
    free: BTreeMap<usize, Vec<Box<dyn Block>>>,
    on_loan: usize,
    cached: usize,
    peak: usize,
    system_allocations: u64,
}

/// The pool of blocks.
pub(super) struct Arena {
    state: Mutex<State>,
    limit: usize,
}

impl Arena {
    /// A pool that holds at most `limit` bytes.
    pub(super) fn new(limit: Option<usize>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), limit: limit.unwrap_or(usize::MAX) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least `bytes`, with whatever content it had.
    pub(super) fn alloc(self: &Arc<Self>, bytes: usize) -> Result<HostBuffer, TensorError> {
        let mut state = self.state();
        let out_of_memory = |in_use| TensorError::OutOfMemory { bytes, in_use };
        let size = size_class(bytes).ok_or(out_of_memory(state.on_loan))?;
        // A quarter of slack keeps big blocks for big requests.
        let fit = state.free.range(size..=size + size / 4).next().map(|(&s, _)| s);
        if let Some(found) = fit
            && let Some(list) = state.free.get_mut(&found)
            && let Some(block) = list.pop()
        {
            if list.is_empty() {
                state.free.remove(&found);
            }
            state.cached -= found;
            state.on_loan += found;
            return Ok(HostBuffer::new(block, self.clone()));
        }
        let fits = |s: &State| s.on_loan.saturating_add(s.cached).saturating_add(size) <= self.limit;
        if !fits(&state) {
            state.free.clear();
            state.cached = 0;
        }
        if !fits(&state) {
            return Err(out_of_memory(state.on_loan));
        }
        let block = Mapped::new(size).ok_or(out_of_memory(state.on_loan))?;
        state.system_allocations += 1;
        state.on_loan += size;
        state.peak = state.peak.max(state.on_loan + state.cached);
        Ok(HostBuffer::new(Box::new(block), self.clone()))
    }

    /// Unmaps all free blocks.
    pub(super) fn trim(&self) {
        let free = {
            let mut state = self.state();
            state.cached = 0;
            std::mem::take(&mut state.free)
        };
        drop(free);
    }

    /// The accounts; `weights` is left zero.
    pub(super) fn memory(&self) -> MemoryUse {
        let s = self.state();
        MemoryUse {
            activations: s.on_loan,
            cached: s.cached,
            workspace: 0,
            weights: 0,
            peak: s.peak,
            system_allocations: s.system_allocations,
            available: self.limit.saturating_sub(s.on_loan + s.cached).min(system_available()),
            device_total: None,
        }
    }
}

impl Recycle for Arena {
    fn recycle(&self, block: Box<dyn Block>) {
        let size = std::mem::size_of_val(block.lines());
        let mut state = self.state();
        state.on_loan -= size;
        state.cached += size;
        state.free.entry(size).or_default().push(block);
    }
}

/// Rounds up to one of eight sizes an octave, so that similar shapes share
/// blocks and at most an eighth is wasted.
fn size_class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(1).checked_next_multiple_of(PAGE)?;
    let step = (bytes.checked_next_power_of_two()? / 16).max(PAGE);
    bytes.checked_next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in [1, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 10_485_760, 134_217_729] {
            let class = size_class(bytes).unwrap();
            assert!(class >= bytes && class.is_multiple_of(PAGE));
            assert!(class <= (bytes + bytes / 8).max(bytes + PAGE), "{bytes} → {class}");
        }
        assert_eq!(size_class(usize::MAX), None);
    }

    #[test]
    fn blocks_are_reused_and_accounted() {
        let arena = Arena::new(None);
        for _ in 0..5 {
            let a = arena.alloc(1 << 20).unwrap();
            let b = arena.alloc(3 << 20).unwrap();
            assert_eq!(arena.memory().activations, 4 << 20);
            drop((a, b));
        }
        let m = arena.memory();
        assert_eq!((m.activations, m.cached, m.peak, m.system_allocations), (0, 4 << 20, 4 << 20, 2));
        arena.trim();
        assert_eq!(arena.memory().cached, 0);
    }

    #[test]
    fn the_limit_counts_cached_blocks_but_gives_them_up() {
        let arena = Arena::new(Some(4 << 20));
        drop(arena.alloc(3 << 20).unwrap());
        let whole = arena.alloc(4 << 20).unwrap();
        match arena.alloc(1) {
            Err(TensorError::OutOfMemory { bytes, in_use }) => assert_eq!((bytes, in_use), (1, 4 << 20)),
            _ => panic!("must be out of memory"),
        }
        drop(whole);
        assert!(arena.alloc(1).is_ok());
        assert!(matches!(arena.alloc(usize::MAX), Err(TensorError::OutOfMemory { .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn trim_gives_memory_back_to_the_system() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
        };
        let arena = Arena::new(None);
        let mut block = arena.alloc(256 << 20).unwrap();
        block.as_mut_slice::<u8>().fill(1);
        drop(block);
        let before = resident();
        arena.trim();
        let after = resident();
        // Other tests of this process may allocate a little at the same time.
        assert!(after + (192 << 20) < before, "{before} → {after}");
    }

    #[test]
    fn blocks_are_aligned() {
        let arena = Arena::new(None);
        let block = arena.alloc(100).unwrap();
        assert_eq!(block.as_slice::<f32>().as_ptr() as usize % 64, 0);
    }
}
