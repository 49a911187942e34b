//! `/free`: which results and models leave memory, and when.
//!
//! A request waits in the engine's state until the next safe point: at once
//! when no prompt runs, otherwise between two nodes of the running prompt.
//! Results that a running prompt still needs live on in that prompt only.

use super::{Shared, lock};
use crate::tokenizer;

/// What `/free` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreeRequest {
    /// Models leave the device and memory, and the text encoders' vocabulary with them.
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
        on_thread_of_its_own(|| {
            if request.free_memory {
                lock(&self.cache).clear();
            }
            if request.unload_models {
                self.services.models.unload_all();
                tokenizer::release();
            }
        });
        if request.is_any() {
            self.services.models.trim();
        }
        tracing::info!(request.unload_models, request.free_memory, "freed memory");
    }
}

/// Runs `free` on a thread that ends with it.
///
/// glibc keeps small blocks for the thread that freed them until that thread
/// ends. A model leaves some 200 KB of them, spread over as many pages of the
/// heap as there are blocks, and none of these pages could be given back.
fn on_thread_of_its_own(free: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("kiln-free".to_owned());
        if thread.spawn_scoped(scope, &free).is_err() {
            free();
        }
    });
}
