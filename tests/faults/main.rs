//! What peers, files and operators may do to a server, one file a row of the fault list:
//! each states its number and measures it on the real binary.
#![cfg(target_os = "linux")]

mod active_content;
mod bodies;
mod exposure;
mod graphs;
mod json_bombs;
mod origins;
mod overload;
mod path_traversal;
#[path = "../process/mod.rs"]
mod process;
mod slow_sockets;
mod wire;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by every test: they measure time and memory, so they run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
