//! Objects of the driver behind numbers that are never reused.
//!
//! The driver API trusts its handles: a destroyed one is read as memory. So
//! callers get numbers, unique in the process, and a number that is not alive
//! is a typed error.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};

use super::DriverError;

/// A number for a new object of any kind.
pub(super) fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// The living objects of one kind.
pub(super) struct Handles<T> {
    what: &'static str,
    alive: RwLock<HashMap<u64, T>>,
}

impl<T: Clone> Handles<T> {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, alive: RwLock::default() }
    }

    pub(super) fn insert(&self, object: T) -> u64 {
        let id = fresh();
        self.alive.write().unwrap_or_else(PoisonError::into_inner).insert(id, object);
        id
    }

    pub(super) fn get(&self, id: u64) -> Result<T, DriverError> {
        let alive = self.alive.read().unwrap_or_else(PoisonError::into_inner);
        alive.get(&id).cloned().ok_or_else(|| self.dead())
    }

    pub(super) fn remove(&self, id: u64) -> Result<T, DriverError> {
        let mut alive = self.alive.write().unwrap_or_else(PoisonError::into_inner);
        alive.remove(&id).ok_or_else(|| self.dead())
    }

    /// All that are alive; none are afterwards.
    pub(super) fn take_all(&self) -> Vec<T> {
        let mut alive = self.alive.write().unwrap_or_else(PoisonError::into_inner);
        alive.drain().map(|(_, object)| object).collect()
    }

    fn dead(&self) -> DriverError {
        let reason = "it was destroyed, or belongs to another device".into();
        DriverError::Invalid { what: self.what, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_handle_is_an_error_and_its_number_is_not_used_again() {
        let handles = Handles::new("event");
        let other = Handles::new("stream");
        let first = handles.insert(10usize);
        let second = other.insert(20usize);
        assert_ne!(first, second);
        assert_eq!(handles.get(first).unwrap(), 10);
        assert!(handles.get(second).is_err());
        assert_eq!(handles.remove(first).unwrap(), 10);
        let error = handles.get(first).unwrap_err().to_string();
        assert!(error.starts_with("event: it was destroyed"), "{error}");
        assert_ne!(handles.insert(10), first);
        assert_eq!(handles.take_all(), [10]);
    }
}
