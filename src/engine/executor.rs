//! Executor.
use std::sync::Arc;
use serde_json::Map;
use super::{Entry, Running, Shared};
pub(super) fn run(_: &Shared, r: &Arc<Running>) -> Entry {
    Entry { job: r.job.clone(), outputs: Map::new(), is_success: true, messages: vec![] }
}
