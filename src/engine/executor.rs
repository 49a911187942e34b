//! Executor.
use super::{Entry, Running, Shared};
use serde_json::Map;
use std::sync::Arc;
pub(super) fn run(_: &Shared, r: &Arc<Running>) -> Entry {
    Entry { job: r.job.clone(), outputs: Map::new(), is_success: true, messages: vec![] }
}
