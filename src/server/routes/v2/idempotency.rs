//! `Idempotency-Key`: each key is good for one submission.
//!
//! A second request with the same key is refused, not answered again. A key whose
//! submission failed without making a job is free again. Keys are forgotten after 24 hours,
//! the oldest of more than 100,000 before that.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::{HeaderMap, StatusCode};

use crate::server::http::Failure;

const LIFETIME: Duration = Duration::from_secs(24 * 3600);
const MOST: usize = 100_000;
/// Longest key.
const MAX_KEY: usize = 256;

#[derive(Debug, Default)]
struct Keys {
    claimed: HashMap<String, Instant>,
    order: VecDeque<(String, Instant)>,
}

/// The keys that are taken.
#[derive(Debug, Default)]
pub(in crate::server) struct Idempotency(Mutex<Keys>);

impl Idempotency {
    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the request's key, if it has one.
    pub(super) fn claim(&self, scope: &str, headers: &HeaderMap) -> Result<Option<String>, Failure> {
        let refuse = |message: &str| {
            Err(Failure::coded(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reuse", message))
        };
        let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
        let key = match key.to_str() {
            Ok(key) if (1..=MAX_KEY).contains(&key.len()) => format!("{scope} {key}"),
            _ => return refuse("the Idempotency-Key must be 1 to 256 plain characters"),
        };
        let mut keys = self.keys();
        let now = Instant::now();
        while let Some((_, since)) = keys.order.front()
            && (now.duration_since(*since) > LIFETIME || keys.order.len() >= MOST)
        {
            if let Some((old, since)) = keys.order.pop_front()
                && keys.claimed.get(&old) == Some(&since)
            {
                keys.claimed.remove(&old);
            }
        }
        if keys.claimed.contains_key(&key) {
            return refuse(
                "this Idempotency-Key was used before; look for the job it made, or take a new key",
            );
        }
        keys.claimed.insert(key.clone(), now);
        keys.order.push_back((key.clone(), now));
        Ok(Some(key))
    }

    /// Frees a key whose submission made nothing.
    pub(super) fn release(&self, key: Option<String>) {
        if let Some(key) = key {
            self.keys().claimed.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_good_for_one_submission() {
        let keys = Idempotency::default();
        let mut headers = HeaderMap::new();
        assert!(keys.claim("jobs", &headers).unwrap().is_none());
        headers.insert("idempotency-key", "k".parse().unwrap());
        let claimed = keys.claim("jobs", &headers).unwrap();
        assert!(claimed.is_some() && keys.claim("jobs", &headers).is_err());
        assert!(keys.claim("assets", &headers).is_ok(), "another kind of request");
        keys.release(claimed);
        assert!(keys.claim("jobs", &headers).is_ok());
        headers.insert("idempotency-key", "x".repeat(300).parse().unwrap());
        assert!(keys.claim("jobs", &headers).is_err());
    }
}
