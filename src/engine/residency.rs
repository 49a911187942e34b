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
/// ends; loading and dropping a model leaves enough of them, spread over the
/// heap, to hold a megabyte.
pub(super) fn on_thread_of_its_own<T: Send>(name: &str, work: impl Fn() -> T + Sync) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned());
        match thread.spawn_scoped(scope, &work).map(|thread| thread.join()) {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => work(),
        }
    })
}
