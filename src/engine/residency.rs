//! `/free`: which results and models leave memory, and when.
//!
//! A request waits in the engine's state until the next safe point: at once
//! when no prompt runs, otherwise between two nodes of the running prompt.
//! Results that a running prompt still needs live on in that prompt only.

use super::{Shared, lock};

/// What `/free` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreeRequest {
    /// Models leave the device and memory.
    pub unload_models: bool,
    /// Cached results are dropped too.
    pub free_memory: bool,
}

impl FreeRequest {
    pub(super) fn is_any(self) -> bool {
        self.unload_models || self.free_memory
    }

    pub(super) fn merge(&mut self, other: FreeRequest) {
        self.unload_models |= other.unload_models;
        self.free_memory |= other.free_memory;
    }
}

impl Shared {
    /// Frees what was asked for. Only at a safe point: no node is running.
    pub(super) fn free_now(&self, request: FreeRequest) {
        on_thread_of_its_own("kiln-free", || {
            if request.free_memory {
                lock(&self.cache).clear();
            }
            if request.unload_models {
                self.services.models.unload_all();
            }
        });
        if request.is_any() {
            self.services.models.trim();
        }
        tracing::info!(request.unload_models, request.free_memory, "freed memory");
    }
}

/// Runs `work` on a thread that ends with it.
///
/// glibc keeps small blocks for the thread that freed them until that thread
/// ends. Loading and dropping a model leaves some 200 KB of them, each on a
/// page of its own if it comes to the worst, which then can't be given back.
pub(super) fn on_thread_of_its_own(name: &str, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned());
        if thread.spawn_scoped(scope, &work).is_err() {
            work();
        }
    });
}
