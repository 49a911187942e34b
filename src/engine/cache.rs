//! Results of nodes, kept for later prompts.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::signature::Signature;
use crate::nodes::Value;

/// Which results are kept for later prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Those that the newest prompt uses (ComfyUI's default).
    #[default]
    LastPrompt,
    /// Up to so many, those used longest ago go first (`--cache-lru`).
    Lru(usize),
    /// None (`--cache-none`).
    Off,
}

/// What a node gave: for each output slot a list of values, and data for the client.
#[derive(Debug, Default)]
pub(super) struct NodeResult {
    pub slots: Vec<Arc<[Value]>>,
    /// Never empty if there.
    pub ui: Option<Arc<Map<String, Json>>>,
}

struct Kept {
    result: Arc<NodeResult>,
    last_used: u64,
}

/// Results by signature.
pub(super) struct ResultCache {
    policy: CachePolicy,
    kept: HashMap<Signature, Kept>,
    /// Counts prompts.
    clock: u64,
}

impl ResultCache {
    pub fn new(policy: CachePolicy) -> Self {
        Self { policy, kept: HashMap::new(), clock: 0 }
    }

    /// A prompt starts that uses these results: gives those that are there,
    /// and drops what the policy doesn't keep beside it.
    pub fn begin(&mut self, used: &[Option<Signature>]) -> Vec<Option<Arc<NodeResult>>> {
        self.clock += 1;
        let found = used.iter().map(|key| self.get(key.as_ref()?)).collect();
        if self.policy == CachePolicy::LastPrompt {
            self.kept.retain(|_, kept| kept.last_used == self.clock);
        }
        found
    }

    pub fn get(&mut self, key: &Signature) -> Option<Arc<NodeResult>> {
        let kept = self.kept.get_mut(key)?;
        kept.last_used = self.clock;
        Some(kept.result.clone())
    }

    pub fn insert(&mut self, key: Signature, result: Arc<NodeResult>) {
        let limit = match self.policy {
            CachePolicy::Off => return,
            CachePolicy::LastPrompt => usize::MAX,
            CachePolicy::Lru(limit) => limit,
        };
        self.kept.insert(key, Kept { result, last_used: self.clock });
        while self.kept.len() > limit {
            // Results of the prompt that runs now stay, however many there are.
            let earlier = self.kept.iter().filter(|(_, kept)| kept.last_used < self.clock);
            let Some(oldest) = earlier.min_by_key(|(_, kept)| kept.last_used).map(|(key, _)| *key) else {
                return;
            };
            self.kept.remove(&oldest);
        }
    }

    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// Whether results are dropped as soon as no node of their prompt needs them.
    pub fn is_off(&self) -> bool {
        self.policy == CachePolicy::Off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(cache: &mut ResultCache, keys: &[u8]) -> Vec<bool> {
        let keys: Vec<_> = keys.iter().map(|&k| Some([k; 32])).collect();
        let found = cache.begin(&keys).iter().map(Option::is_some).collect();
        keys.iter().flatten().for_each(|key| cache.insert(*key, Arc::default()));
        found
    }

    #[test]
    fn last_prompt_keeps_what_the_newest_prompt_uses() {
        let mut cache = ResultCache::new(CachePolicy::LastPrompt);
        assert_eq!(fill(&mut cache, &[1, 2]), [false, false]);
        assert_eq!(fill(&mut cache, &[2, 3]), [true, false]);
        assert_eq!(fill(&mut cache, &[1, 2, 3]), [false, true, true]);
        assert_eq!(cache.kept.len(), 3);
    }

    #[test]
    fn lru_keeps_earlier_prompts_up_to_the_limit() {
        let mut cache = ResultCache::new(CachePolicy::Lru(3));
        fill(&mut cache, &[1]);
        fill(&mut cache, &[2]);
        fill(&mut cache, &[3]);
        assert_eq!(fill(&mut cache, &[1, 4]), [true, false]);
        assert_eq!(fill(&mut cache, &[3, 1]), [true, true]);
        assert_eq!(fill(&mut cache, &[2]), [false]);
        assert_eq!(fill(&mut cache, &[5, 6, 7, 8]), [false; 4]);
        assert_eq!(cache.kept.len(), 4);
    }

    #[test]
    fn off_keeps_nothing() {
        let mut cache = ResultCache::new(CachePolicy::Off);
        fill(&mut cache, &[1]);
        assert_eq!(fill(&mut cache, &[1]), [false]);
    }

    #[test]
    fn clearing_frees_the_values() {
        let mut cache = ResultCache::new(CachePolicy::LastPrompt);
        let picture = Arc::new(vec![0.0_f32; 10]);
        let slots = vec![Arc::from([Value::shared("IMAGE", picture.clone())])];
        cache.insert([1; 32], Arc::new(NodeResult { slots, ui: None }));
        assert_eq!(Arc::strong_count(&picture), 2);
        cache.clear();
        assert_eq!(Arc::strong_count(&picture), 1);
    }
}
