//! Finished prompts, oldest first, the newest `cap` of them.
//!
//! An entry is kept as the text that `/history` shows: a tree of JSON values
//! takes some eight times the memory, in hundreds of small blocks that keep the
//! heap from shrinking when a model is unloaded.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::events::{Id, now_ms};
use super::jobs::JobStatus;
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
    /// A prompt that was taken out of the queue before it ran.
    pub fn cancelled(job: Arc<Job>) -> Self {
        let data = json!({"prompt_id": *job.id, "timestamp": now_ms()});
        Self { job, outputs: Map::new(), is_success: false, messages: vec![("execution_interrupted", data)] }
    }

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

/// A finished prompt at rest. Its blocks outlive the model they were made beside, and
/// each may hold a page of the heap: they are two, made one after the other.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub id: Id,
    pub facts: Facts,
    form: Form,
}

/// What lists of jobs need to know of an entry without reading its text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub status: JobStatus,
    /// Milliseconds since 1970, as all times here.
    pub created_ms: u64,
    pub started_ms: Option<u64>,
    pub ended_ms: Option<u64>,
}

impl Facts {
    fn of(entry: &Entry) -> Self {
        let time = |names: &[&str]| {
            let (_, data) = entry.messages.iter().find(|(name, _)| names.contains(name))?;
            data.get("timestamp")?.as_u64()
        };
        let is_interrupted = entry.messages.iter().any(|(name, _)| *name == "execution_interrupted");
        Self {
            status: match entry.is_success {
                true => JobStatus::Completed,
                false if is_interrupted => JobStatus::Cancelled,
                false => JobStatus::Failed,
            },
            created_ms: entry.job.created_ms,
            started_ms: time(&["execution_start"]),
            ended_ms: time(&["execution_success", "execution_error", "execution_interrupted"]),
        }
    }
}

#[derive(Clone, Debug)]
enum Form {
    Text(Arc<str>),
    /// Nested deeper than the parser goes, which only a program that embeds kiln can cause.
    Tree(Arc<Json>),
}

impl Kept {
    /// The entry as `/history` shows it.
    pub fn to_json(&self) -> Json {
        match &self.form {
            // Was read back before it was kept.
            Form::Text(text) => serde_json::from_str(text).unwrap_or_default(),
            Form::Tree(tree) => (**tree).clone(),
        }
    }
}

/// The text of [`to_json`]'s object.
pub(super) fn to_text(entries: &[Kept]) -> String {
    let mut out = String::from("{");
    for (i, entry) in entries.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        out.extend([comma, &Json::from(&*entry.id).to_string(), ":"]);
        match &entry.form {
            Form::Text(text) => out.push_str(text),
            Form::Tree(tree) => out.push_str(&tree.to_string()),
        }
    }
    out.push('}');
    out
}

impl From<Entry> for Kept {
    fn from(entry: Entry) -> Self {
        let tree = entry.to_json();
        let text = tree.to_string();
        let is_same = serde_json::from_str::<Json>(&text).is_ok_and(|back| back == tree);
        let form = if is_same { Form::Text(text.into()) } else { Form::Tree(tree.into()) };
        Self { id: Id::from(&*entry.job.id), facts: Facts::of(&entry), form }
    }
}

/// Makes the JSON object of `/history` from entries taken out under the lock.
pub(super) fn to_json(entries: &[Kept]) -> Json {
    entries.iter().map(|entry| (entry.id.to_string(), entry.to_json())).collect()
}

/// The newest finished prompts by order of completion.
#[derive(Debug)]
pub(super) struct History {
    entries: BTreeMap<u64, Kept>,
    places: HashMap<Id, u64>,
    next: u64,
    cap: usize,
}

impl History {
    pub fn new(cap: usize) -> Self {
        Self { entries: BTreeMap::new(), places: HashMap::new(), next: 0, cap: cap.max(1) }
    }

    /// Adds an entry; an older one of the same id gives way, as does the oldest above the cap.
    pub fn push(&mut self, entry: Kept) {
        let id = entry.id.clone();
        self.delete(&id);
        while self.entries.len() >= self.cap {
            if let Some((_, oldest)) = self.entries.pop_first() {
                self.places.remove(&oldest.id);
            }
        }
        self.places.insert(id, self.next);
        self.entries.insert(self.next, entry);
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

    pub fn get(&self, id: &str) -> Option<Kept> {
        self.places.get(id).and_then(|place| self.entries.get(place)).cloned()
    }

    /// `max_items` entries from `offset` on, counted from the oldest; without an offset, or with
    /// a negative one, the newest ones. As in ComfyUI, whoever asks for less than one entry gets
    /// one, if there is one from the offset on.
    pub fn slice(&self, max_items: Option<i64>, offset: Option<i64>) -> Vec<Kept> {
        let offset = offset.unwrap_or(-1);
        let start = match max_items {
            Some(count) if offset < 0 => (self.entries.len() as i64).saturating_sub(count),
            _ => offset,
        };
        let rest = self.entries.values().skip(usize::try_from(start).unwrap_or(0)).cloned();
        match max_items {
            Some(count) => rest.take(usize::try_from(count).unwrap_or(0).max(1)).collect(),
            None => rest.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, prompt: Json) -> Entry {
        let job = Arc::new(Job {
            number: 0.into(),
            id: id.into(),
            prompt,
            extra_data: Map::new(),
            outputs: vec![],
            client_id: None,
            owner: None,
            created_ms: 0,
        });
        Entry { job, outputs: Map::new(), is_success: true, messages: vec![] }
    }

    fn push(history: &mut History, id: &str) {
        history.push(entry(id, json!({})).into());
    }

    fn ids(history: &History, max_items: Option<i64>, offset: Option<i64>) -> Vec<String> {
        history.slice(max_items, offset).iter().map(|entry| entry.id.to_string()).collect()
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
        assert_eq!(ids(&history, Some(2), Some(-7)), ["c", "d"]);
        assert_eq!(ids(&history, None, Some(-7)), ["a", "b", "c", "d"]);
        for none in [(Some(0), None), (Some(-1), None), (Some(i64::MIN), None), (Some(3), Some(4))] {
            assert_eq!(ids(&history, none.0, none.1), [""; 0], "{none:?}");
        }
        for one in [(Some(0), Some(1)), (Some(-5), Some(1)), (Some(1), Some(1))] {
            assert_eq!(ids(&history, one.0, one.1), ["b"], "{one:?}");
        }
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

    #[test]
    fn text_gives_back_the_same_values() {
        let prompt = json!({
            "z": [u64::MAX, i64::MIN, 8.0, 0.1, 1e300, -0.0, null, true],
            "a": {"text": "\u{0}\"\\ ü 🦀", "empty": {}, "none": []},
        });
        let kept = Kept::from(entry("a", prompt.clone()));
        assert!(matches!(kept.form, Form::Text(_)));
        assert_eq!(kept.to_json()["prompt"][2].to_string(), prompt.to_string(), "order and forms of numbers");
        let deep = (0..200).fold(json!(7), |inner, _| json!([inner]));
        let nested = Kept::from(entry("\"b\"", deep.clone()));
        assert_eq!(nested.to_json()["prompt"][2], deep);
        let both = [kept, nested];
        assert_eq!(to_text(&both), to_json(&both).to_string());
        assert_eq!(to_text(&[]), "{}");
    }
}
