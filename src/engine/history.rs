//! Finished prompts, oldest first, the newest `cap` of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::events::Id;
use super::queue::Job;

/// A finished prompt.
#[derive(Debug)]
pub(super) struct Entry {
    pub job: Arc<Job>,
    /// `ui` data of the output nodes; empty unless the prompt succeeded.
    pub outputs: Map<String, Json>,
    pub is_success: bool,
    /// Names and data of the `execution_*` events.
    pub messages: Vec<(&'static str, Json)>,
}

impl Entry {
    fn to_json(&self) -> Json {
        let meta: Map<String, Json> = self
            .outputs
            .keys()
            .map(|id| {
                let ids = json!({"node_id": id, "display_node": id, "parent_node": null, "real_node_id": id});
                (id.clone(), ids)
            })
            .collect();
        json!({
            "prompt": self.job.to_json(),
            "outputs": self.outputs,
            "status": {
                "status_str": if self.is_success { "success" } else { "error" },
                "completed": self.is_success,
                "messages": self.messages,
            },
            "meta": meta,
        })
    }
}

/// Makes the JSON object of `/history` from entries taken out under the lock.
pub(super) fn to_json(entries: &[(Id, Arc<Entry>)]) -> Json {
    entries.iter().map(|(id, entry)| (id.to_string(), entry.to_json())).collect()
}

/// The newest finished prompts by order of completion.
#[derive(Debug)]
pub(super) struct History {
    entries: BTreeMap<u64, (Id, Arc<Entry>)>,
    places: HashMap<Id, u64>,
    next: u64,
    cap: usize,
}

impl History {
    pub fn new(cap: usize) -> Self {
        Self { entries: BTreeMap::new(), places: HashMap::new(), next: 0, cap: cap.max(1) }
    }

    /// Adds an entry; an older one of the same id gives way, as does the oldest above the cap.
    pub fn push(&mut self, entry: Entry) {
        let id = entry.job.id.clone();
        self.delete(&id);
        while self.entries.len() >= self.cap {
            if let Some((_, (oldest, _))) = self.entries.pop_first() {
                self.places.remove(&oldest);
            }
        }
        self.places.insert(id.clone(), self.next);
        self.entries.insert(self.next, (id, Arc::new(entry)));
        self.next += 1;
    }

    pub fn delete(&mut self, id: &str) {
        if let Some(place) = self.places.remove(id) {
            self.entries.remove(&place);
        }
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.places.clear();
    }

    pub fn get(&self, id: &str) -> Option<(Id, Arc<Entry>)> {
        self.places.get(id).and_then(|place| self.entries.get(place)).cloned()
    }

    /// `max_items` entries from `offset` on, counted from the oldest; without
    /// an offset the newest ones.
    pub fn slice(&self, max_items: Option<usize>, offset: Option<usize>) -> Vec<(Id, Arc<Entry>)> {
        let count = max_items.unwrap_or(usize::MAX);
        let start = offset.unwrap_or_else(|| self.entries.len().saturating_sub(count));
        self.entries.values().skip(start).take(count).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(history: &mut History, id: &str) {
        let job = Arc::new(Job {
            number: 0.into(),
            id: id.into(),
            prompt: json!({}),
            extra_data: Map::new(),
            outputs: vec![],
            client_id: None,
        });
        history.push(Entry { job, outputs: Map::new(), is_success: true, messages: vec![] });
    }

    fn ids(history: &History, max_items: Option<usize>, offset: Option<usize>) -> Vec<String> {
        history.slice(max_items, offset).iter().map(|(id, _)| id.to_string()).collect()
    }

    #[test]
    fn slices_count_from_the_oldest_or_give_the_newest() {
        let mut history = History::new(100);
        for id in ["a", "b", "c", "d"] {
            push(&mut history, id);
        }
        assert_eq!(ids(&history, Some(2), None), ["c", "d"]);
        assert_eq!(ids(&history, None, Some(1)), ["b", "c", "d"]);
        assert_eq!(ids(&history, Some(2), Some(1)), ["b", "c"]);
        assert_eq!(ids(&history, Some(9), None), ["a", "b", "c", "d"]);
        assert_eq!(ids(&history, Some(0), None), [""; 0]);
        history.delete("b");
        assert_eq!(ids(&history, None, None), ["a", "c", "d"]);
        assert!(history.get("b").is_none() && history.get("c").is_some());
    }

    #[test]
    fn the_oldest_goes_above_the_cap() {
        let mut history = History::new(3);
        for i in 0..10 {
            push(&mut history, &i.to_string());
        }
        assert_eq!(ids(&history, None, None), ["7", "8", "9"]);
        assert_eq!(history.places.len(), 3);
        push(&mut history, "8");
        assert_eq!(ids(&history, None, None), ["7", "9", "8"]);
    }
}
