//! Progress of the nodes of a running prompt: the executor's [`ProgressSink`].

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Number;

use super::events::{EventKind, Id, NodeProgress};
use super::{Running, Shared, lock};
use crate::nodes::{PreviewFrame, ProgressSink};
use crate::tensor::HostTensor;

/// With more nodes than this, not every change of a node's state is sent:
/// each message lists all nodes, which would be quadratic in all.
const ALWAYS_SENT_NODES: usize = 256;

/// How far apart the messages are then.
const SEND_INTERVAL: Duration = Duration::from_millis(100);

/// Sends the progress of one prompt.
pub(super) struct Progress<'a> {
    shared: &'a Shared,
    running: &'a Running,
    states: Mutex<States>,
}

#[derive(Default)]
struct States {
    nodes: Vec<NodeProgress>,
    places: HashMap<Id, usize>,
    last_sent: Option<Instant>,
    is_unsent: bool,
}

impl States {
    /// The node's entry; a new one counts `0` of `1`.
    fn entry(&mut self, node: &str) -> &mut NodeProgress {
        let next = self.nodes.len();
        let place = match self.places.get(node) {
            Some(&place) => place,
            None => {
                let id = Id::from(node);
                self.places.insert(id.clone(), next);
                self.nodes.push(NodeProgress {
                    node: id,
                    value: 0.into(),
                    max: 1.into(),
                    is_finished: false,
                });
                next
            }
        };
        &mut self.nodes[place]
    }
}

/// ComfyUI writes these as floats until the node counts steps.
fn float(x: f64) -> Number {
    Number::from_f64(x).unwrap_or_else(|| 0.into())
}

impl<'a> Progress<'a> {
    pub fn new(shared: &'a Shared, running: &'a Running) -> Self {
        Self { shared, running, states: Mutex::default() }
    }

    /// A node starts.
    pub fn start(&self, node: &str) {
        let mut states = lock(&self.states);
        let entry = states.entry(node);
        (entry.value, entry.max) = (float(0.0), float(1.0));
        self.send_states(&mut states, false);
    }

    /// A node has finished or was answered from the cache.
    pub fn finish(&self, node: &str) {
        let mut states = lock(&self.states);
        let entry = states.entry(node);
        entry.value = entry.max.clone();
        entry.is_finished = true;
        let id = entry.node.clone();
        {
            let mut live = lock(&self.running.live);
            live.done.insert(id);
            live.step = None;
        }
        self.send_states(&mut states, false);
    }

    /// Sends the last state if it was held back.
    pub fn flush(&self) {
        let mut states = lock(&self.states);
        if states.is_unsent {
            self.send_states(&mut states, true);
        }
    }

    fn send_states(&self, states: &mut States, is_last: bool) {
        let is_too_soon = || states.last_sent.is_some_and(|sent| sent.elapsed() < SEND_INTERVAL);
        states.is_unsent = !is_last && states.nodes.len() > ALWAYS_SENT_NODES && is_too_soon();
        if !states.is_unsent {
            states.last_sent = Some(Instant::now());
            let prompt_id = self.running.job.id.clone();
            lock(&self.running.live).states.clone_from(&states.nodes);
            self.send(EventKind::ProgressState { prompt_id, nodes: states.nodes.clone() });
        }
    }

    fn send(&self, kind: EventKind) {
        self.shared.emit(self.running.job.client_id.clone(), kind);
    }
}

impl ProgressSink for Progress<'_> {
    fn progress(&self, node_id: &str, value: u64, max: u64, preview: Option<PreviewFrame>) {
        let mut states = lock(&self.states);
        let entry = states.entry(node_id);
        (entry.value, entry.max) = (value.into(), max.into());
        let node = entry.node.clone();
        {
            let mut live = lock(&self.running.live);
            live.step = Some((value, max));
            if let Some(preview) = &preview {
                live.preview = Some((node.clone(), preview.clone()));
            }
        }
        self.send_states(&mut states, false);
        let prompt_id = self.running.job.id.clone();
        self.send(EventKind::Progress { value, max, prompt_id, node, preview });
    }

    fn picture(&self, node_id: &str, image: &HostTensor) {
        let prompt_id = self.running.job.id.clone();
        self.send(EventKind::Picture { prompt_id, node: node_id.into(), image: image.clone() });
    }

    fn text(&self, node_id: &str, text: &str) {
        let prompt_id = self.running.job.id.clone();
        self.send(EventKind::Text { prompt_id, node: node_id.into(), text: text.to_owned() });
    }

    fn is_interrupted(&self) -> bool {
        self.running.is_interrupted.load(Ordering::Relaxed)
    }
}
