//! Prompts that wait, in the order in which they will run.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Number, Value as Json};

use super::events::Id;

/// An accepted prompt.
#[derive(Debug)]
pub(super) struct Job {
    /// Priority: lower runs first.
    pub number: Number,
    pub id: Id,
    /// The prompt with converted values.
    pub prompt: Json,
    pub extra_data: Map<String, Json>,
    /// Output nodes to run.
    pub outputs: Vec<String>,
    /// Who gets the events; `None`: everybody.
    pub client_id: Option<Id>,
}

impl Job {
    /// ComfyUI's tuple `[number, id, prompt, extra_data, outputs]`.
    pub fn to_json(&self) -> Json {
        Json::Array(vec![
            Json::Number(self.number.clone()),
            Json::from(&*self.id),
            self.prompt.clone(),
            Json::Object(self.extra_data.clone()),
            self.outputs.iter().cloned().collect(),
        ])
    }

    /// `extra_data.extra_pnginfo`, if it is there and not null.
    pub fn extra_pnginfo(&self) -> Option<&Json> {
        self.extra_data.get("extra_pnginfo").filter(|v| !v.is_null())
    }
}

/// Total order of priorities; equal numbers run in the order of arrival.
#[derive(Clone, Copy, Debug)]
struct Rank {
    number: f64,
    arrival: u64,
}

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.number.total_cmp(&other.number).then(self.arrival.cmp(&other.arrival))
    }
}

/// The waiting prompts by priority.
#[derive(Debug, Default)]
pub(super) struct PendingQueue {
    jobs: BTreeMap<Rank, Arc<Job>>,
    arrivals: u64,
}

impl PendingQueue {
    pub fn push(&mut self, job: Arc<Job>) {
        let number = job.number.as_f64().unwrap_or_default();
        self.jobs.insert(Rank { number, arrival: self.arrivals }, job);
        self.arrivals += 1;
    }

    pub fn pop(&mut self) -> Option<Arc<Job>> {
        self.jobs.pop_first().map(|(_, job)| job)
    }

    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Removes the prompts with these ids; returns how many there were.
    pub fn delete(&mut self, ids: &[String]) -> usize {
        let before = self.jobs.len();
        self.jobs.retain(|_, job| !ids.iter().any(|id| **id == *job.id));
        before - self.jobs.len()
    }

    pub fn clear(&mut self) {
        self.jobs.clear();
    }

    /// In the order in which they will run.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.jobs.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: f64, id: &str) -> Arc<Job> {
        Arc::new(Job {
            number: Number::from_f64(number).expect("finite"),
            id: id.into(),
            prompt: Json::Null,
            extra_data: Map::new(),
            outputs: vec![],
            client_id: None,
        })
    }

    #[test]
    fn lower_numbers_first_and_equal_ones_by_arrival() {
        let mut queue = PendingQueue::default();
        for (number, id) in [(3.0, "c"), (1.0, "a1"), (-7.0, "front"), (1.0, "a2"), (2.5, "b")] {
            queue.push(job(number, id));
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|j| j.id.to_string()).collect();
        assert_eq!(order, ["front", "a1", "a2", "b", "c"]);
    }

    #[test]
    fn delete_takes_only_the_named_ones() {
        let mut queue = PendingQueue::default();
        for i in 0..4 {
            queue.push(job(f64::from(i), &i.to_string()));
        }
        assert_eq!(queue.delete(&["1".into(), "3".into(), "9".into()]), 2);
        assert_eq!(queue.jobs().iter().map(|j| &*j.id).collect::<Vec<_>>(), ["0", "2"]);
    }
}
