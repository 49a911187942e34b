//! Prompts that wait, in the order in which they will run.
//!
//! A waiting prompt is kept as text: a tree of JSON values takes some eight times the
//! memory, and thousands may wait.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Number, Value as Json};

use super::events::Id;
use crate::nodes::PreviewMethod;

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
    /// Who counts as its sender for the limit on waiting prompts.
    pub owner: Option<Id>,
    /// When it was accepted, in milliseconds since 1970.
    pub created_ms: u64,
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

    /// `extra_data.preview_method`: how this prompt's previews are made; the server's way without it.
    pub fn preview_method(&self) -> Option<PreviewMethod> {
        match self.extra_data.get("preview_method")?.as_str()? {
            "none" => Some(PreviewMethod::None),
            "auto" | "latent2rgb" => Some(PreviewMethod::Latent2Rgb),
            "taesd" => Some(PreviewMethod::Taesd),
            _ => None,
        }
    }

    /// `extra_data.extra_pnginfo`, if it is there and not null.
    pub fn extra_pnginfo(&self) -> Option<&Json> {
        self.extra_data.get("extra_pnginfo").filter(|v| !v.is_null())
    }
}

/// A prompt at rest.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub id: Id,
    pub client_id: Option<Id>,
    pub owner: Option<Id>,
    pub created_ms: u64,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    /// The row of `/queue`.
    Text(Arc<str>),
    /// Nested deeper than the parser goes, which only a program that embeds kiln can cause.
    Whole(Arc<Job>),
}

impl From<Job> for Waiting {
    fn from(job: Job) -> Self {
        let row = job.to_json();
        let text = row.to_string();
        let is_same = serde_json::from_str::<Json>(&text).is_ok_and(|back| back == row);
        Self {
            id: job.id.clone(),
            client_id: job.client_id.clone(),
            owner: job.owner.clone(),
            created_ms: job.created_ms,
            form: if is_same { Form::Text(text.into()) } else { Form::Whole(Arc::new(job)) },
        }
    }
}

impl Waiting {
    /// The prompt as it was.
    pub fn job(&self) -> Arc<Job> {
        let text = match &self.form {
            Form::Whole(job) => return job.clone(),
            Form::Text(text) => text,
        };
        // Was read back before it was kept.
        let mut row: Json = serde_json::from_str(text).unwrap_or_default();
        let mut take = |at: usize| row.get_mut(at).map(Json::take).unwrap_or_default();
        Arc::new(Job {
            number: take(0).as_number().cloned().unwrap_or_else(|| 0.into()),
            id: self.id.clone(),
            prompt: take(2),
            extra_data: match take(3) {
                Json::Object(extra) => extra,
                _ => Map::new(),
            },
            outputs: match take(4) {
                Json::Array(ids) => ids.iter().filter_map(|id| Some(id.as_str()?.to_owned())).collect(),
                _ => Vec::new(),
            },
            client_id: self.client_id.clone(),
            owner: self.owner.clone(),
            created_ms: self.created_ms,
        })
    }

    /// Appends the row of `/queue`.
    pub fn write(&self, out: &mut String) {
        match &self.form {
            Form::Text(text) => out.push_str(text),
            Form::Whole(job) => out.push_str(&job.to_json().to_string()),
        }
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
    jobs: BTreeMap<Rank, Waiting>,
    arrivals: u64,
}

impl PendingQueue {
    pub fn push(&mut self, job: Job) {
        let number = job.number.as_f64().unwrap_or_default();
        self.jobs.insert(Rank { number, arrival: self.arrivals }, job.into());
        self.arrivals += 1;
    }

    pub fn pop(&mut self) -> Option<Arc<Job>> {
        self.jobs.pop_first().map(|(_, waiting)| waiting.job())
    }

    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Removes the prompts with these ids and gives them back.
    pub fn delete(&mut self, ids: &[String]) -> Vec<Waiting> {
        let is_named = |job: &Waiting| ids.iter().any(|id| **id == *job.id);
        let ranks: Vec<Rank> =
            self.jobs.iter().filter(|(_, job)| is_named(job)).map(|(rank, _)| *rank).collect();
        ranks.iter().filter_map(|rank| self.jobs.remove(rank)).collect()
    }

    /// Removes all prompts and gives them back.
    pub fn clear(&mut self) -> Vec<Waiting> {
        std::mem::take(&mut self.jobs).into_values().collect()
    }

    /// How many of this sender's prompts wait.
    pub fn count_of(&self, owner: &str) -> usize {
        self.jobs.values().filter(|job| job.owner.as_deref() == Some(owner)).count()
    }

    /// The prompt of that id, and how many wait before it.
    pub fn find(&self, id: &str) -> Option<(usize, Waiting)> {
        let mut waiting = self.jobs.values().enumerate();
        waiting.find(|(_, job)| *job.id == *id).map(|(at, job)| (at, job.clone()))
    }

    /// In the order in which they will run.
    pub fn waiting(&self) -> Vec<Waiting> {
        self.jobs.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: f64, id: &str) -> Job {
        Job {
            number: Number::from_f64(number).expect("finite"),
            id: id.into(),
            prompt: Json::Null,
            extra_data: Map::new(),
            outputs: vec![],
            client_id: None,
            owner: None,
            created_ms: 0,
        }
    }

    #[test]
    fn a_prompt_comes_back_as_it_was() {
        let prompt = serde_json::json!({"z": [u64::MAX, i64::MIN, 8.0, 0.1, 1e300, -0.0, null, true], "a": {"t": "\u{0} ü 🦀"}});
        let extra_data = Map::from_iter([("client_id".to_owned(), "me".into())]);
        let (client_id, owner) = (Some("me".into()), Some("10.0.0.1".into()));
        let whole = Job { prompt, extra_data, outputs: vec!["z".into()], client_id, owner, ..job(2.5, "a") };
        let (row, text) = (whole.to_json(), format!("{whole:?}"));
        let waiting = Waiting::from(whole);
        assert!(matches!(waiting.form, Form::Text(_)));
        assert_eq!(format!("{:?}", waiting.job()), text);
        let mut out = String::new();
        waiting.write(&mut out);
        assert_eq!(out, row.to_string());
        let deep = (0..200).fold(Json::from(7), |inner, _| Json::Array(vec![inner]));
        let waiting = Waiting::from(Job { prompt: deep.clone(), ..job(0.0, "deep") });
        assert_eq!(waiting.job().prompt, deep);
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
        assert_eq!(queue.delete(&["1".into(), "3".into(), "9".into()]).len(), 2);
        assert_eq!(queue.waiting().iter().map(|j| &*j.id).collect::<Vec<_>>(), ["0", "2"]);
    }
}
