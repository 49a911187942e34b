//! What the engine tells the outside: one typed event enum.
//!
//! The engine never makes WebSocket text; [`Event::to_json`] gives the JSON
//! message and the server turns it (and the binary kinds) into frames for each
//! socket. Every event names whom it is for: the client that queued the prompt,
//! or everybody when that client gave no id.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use serde_json::{Map, Number, Value as Json, json};

use crate::nodes::PreviewFrame;
use crate::tensor::HostTensor;

/// An id that many events share.
pub type Id = Arc<str>;

/// One event and whom it is for.
#[derive(Clone, Debug)]
pub struct Event {
    /// The client to tell; `None`: every client.
    pub client_id: Option<Id>,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// The JSON message `{"type": …, "data": …}`; `None` for purely binary kinds.
    pub fn to_json(&self) -> Option<Json> {
        self.kind.to_json()
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// The number of queued and running prompts changed (or might have).
    Status {
        /// Queued plus running prompts.
        queue_remaining: usize,
    },
    /// A prompt was taken up.
    ExecutionStart {
        /// The prompt.
        prompt_id: Id,
        /// Milliseconds since 1970.
        timestamp: u64,
    },
    /// Which nodes of the prompt are answered from the cache.
    ExecutionCached {
        /// Node ids, in prompt order.
        nodes: Vec<Id>,
        /// The prompt.
        prompt_id: Id,
        /// Milliseconds since 1970.
        timestamp: u64,
    },
    /// A node starts; `node: None` closes the prompt.
    Executing {
        /// The node.
        node: Option<Id>,
        /// The prompt.
        prompt_id: Id,
    },
    /// A running node got further. Sockets that know preview metadata get the
    /// preview before the text, all others after it.
    Progress {
        /// Steps done.
        value: u64,
        /// Steps in all.
        max: u64,
        /// The prompt.
        prompt_id: Id,
        /// The node.
        node: Id,
        /// A picture of the step.
        preview: Option<PreviewFrame>,
    },
    /// The state of all nodes started or finished in this run.
    ProgressState {
        /// The prompt.
        prompt_id: Id,
        /// In the order in which they started.
        nodes: Vec<NodeProgress>,
    },
    /// A node gave data for the client (`output: null` when a twin was answered from the cache).
    Executed {
        /// The node.
        node: Id,
        /// The prompt.
        prompt_id: Id,
        /// The node's `ui` data.
        output: Option<Arc<Map<String, Json>>>,
    },
    /// The prompt is through.
    ExecutionSuccess {
        /// The prompt.
        prompt_id: Id,
        /// Milliseconds since 1970.
        timestamp: u64,
    },
    /// A node failed and with it the prompt.
    ExecutionError(Box<ExecutionError>),
    /// The user stopped the prompt.
    ExecutionInterrupted {
        /// The prompt.
        prompt_id: Id,
        /// The node that was running.
        node_id: Id,
        /// Its class.
        node_type: Id,
        /// Nodes that finished in this run.
        executed: Vec<Id>,
        /// Milliseconds since 1970.
        timestamp: u64,
    },
    /// A prompt was taken out of the queue before it ran. No message: ComfyUI sends none.
    Cancelled {
        /// The prompt.
        prompt_id: Id,
    },
    /// A finished picture sent right away (`SaveImageWebsocket`); binary only.
    Picture {
        /// The prompt.
        prompt_id: Id,
        /// The node.
        node: Id,
        /// `[1, H, W, C]` in 0..1.
        image: HostTensor,
    },
    /// A text that the client shows on the node; binary only.
    Text {
        /// The prompt.
        prompt_id: Id,
        /// The node.
        node: Id,
        /// The text.
        text: String,
    },
}

/// Everything about a failed node.
#[derive(Clone, Debug)]
pub struct ExecutionError {
    /// The prompt.
    pub prompt_id: Id,
    /// The node that failed.
    pub node_id: Id,
    /// Its class.
    pub node_type: Id,
    /// Nodes that finished in this run.
    pub executed: Vec<Id>,
    /// What went wrong.
    pub exception_message: String,
    /// Short type name.
    pub exception_type: String,
    /// Text lines, never empty.
    pub traceback: Vec<String>,
    /// The inputs of the failed node: a list of values for each name.
    pub current_inputs: Map<String, Json>,
    /// All node ids of the prompt.
    pub current_outputs: Vec<Id>,
    /// Milliseconds since 1970.
    pub timestamp: u64,
}

/// Where one node stands.
#[derive(Clone, Debug)]
pub struct NodeProgress {
    /// The node.
    pub node: Id,
    /// Steps done. ComfyUI writes `0.0` and `1.0` until the node counts steps itself.
    pub value: Number,
    /// Steps in all.
    pub max: Number,
    /// Whether it finished.
    pub is_finished: bool,
}

/// Milliseconds since 1970, now.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn list(ids: &[Id]) -> Json {
    ids.iter().map(|id| Json::from(&**id)).collect()
}

impl EventKind {
    /// The `type` of the JSON message; `None` for purely binary kinds.
    pub fn type_name(&self) -> Option<&'static str> {
        Some(match self {
            EventKind::Status { .. } => "status",
            EventKind::ExecutionStart { .. } => "execution_start",
            EventKind::ExecutionCached { .. } => "execution_cached",
            EventKind::Executing { .. } => "executing",
            EventKind::Progress { .. } => "progress",
            EventKind::ProgressState { .. } => "progress_state",
            EventKind::Executed { .. } => "executed",
            EventKind::ExecutionSuccess { .. } => "execution_success",
            EventKind::ExecutionError(_) => "execution_error",
            EventKind::ExecutionInterrupted { .. } => "execution_interrupted",
            EventKind::Cancelled { .. } | EventKind::Picture { .. } | EventKind::Text { .. } => return None,
        })
    }

    /// The `data` of the JSON message; null for purely binary kinds.
    pub fn data(&self) -> Json {
        match self {
            EventKind::Status { queue_remaining } => {
                json!({"status": {"exec_info": {"queue_remaining": queue_remaining}}})
            }
            EventKind::ExecutionStart { prompt_id, timestamp }
            | EventKind::ExecutionSuccess { prompt_id, timestamp } => {
                json!({"prompt_id": **prompt_id, "timestamp": timestamp})
            }
            EventKind::ExecutionCached { nodes, prompt_id, timestamp } => {
                json!({"nodes": list(nodes), "prompt_id": **prompt_id, "timestamp": timestamp})
            }
            EventKind::Executing { node: Some(node), prompt_id } => {
                json!({"node": **node, "display_node": **node, "prompt_id": **prompt_id})
            }
            EventKind::Executing { node: None, prompt_id } => json!({"node": null, "prompt_id": **prompt_id}),
            EventKind::Progress { value, max, prompt_id, node, .. } => {
                json!({"value": value, "max": max, "prompt_id": **prompt_id, "node": **node})
            }
            EventKind::ProgressState { prompt_id, nodes } => {
                let nodes: Map<String, Json> =
                    nodes.iter().map(|n| (n.node.to_string(), n.to_json(prompt_id))).collect();
                json!({"prompt_id": **prompt_id, "nodes": nodes})
            }
            EventKind::Executed { node, prompt_id, output } => {
                let output = output.as_ref().map_or(Json::Null, |ui| Json::Object((**ui).clone()));
                json!({"node": **node, "display_node": **node, "output": output, "prompt_id": **prompt_id})
            }
            EventKind::ExecutionError(e) => e.data(),
            EventKind::ExecutionInterrupted { prompt_id, node_id, node_type, executed, timestamp } => json!({
                "prompt_id": **prompt_id, "node_id": **node_id, "node_type": **node_type,
                "executed": list(executed), "timestamp": timestamp,
            }),
            EventKind::Cancelled { .. } | EventKind::Picture { .. } | EventKind::Text { .. } => Json::Null,
        }
    }

    /// The prompt that ends with this event, which is the last one about it.
    pub fn ended_prompt(&self) -> Option<&Id> {
        match self {
            EventKind::Executing { node: None, prompt_id } | EventKind::Cancelled { prompt_id } => {
                Some(prompt_id)
            }
            _ => None,
        }
    }

    /// The prompt that this event is about; `None` if it is about the queue.
    pub fn prompt_id(&self) -> Option<&Id> {
        match self {
            EventKind::Status { .. } => None,
            EventKind::ExecutionError(error) => Some(&error.prompt_id),
            EventKind::ExecutionStart { prompt_id, .. }
            | EventKind::ExecutionCached { prompt_id, .. }
            | EventKind::Executing { prompt_id, .. }
            | EventKind::Progress { prompt_id, .. }
            | EventKind::ProgressState { prompt_id, .. }
            | EventKind::Executed { prompt_id, .. }
            | EventKind::ExecutionSuccess { prompt_id, .. }
            | EventKind::ExecutionInterrupted { prompt_id, .. }
            | EventKind::Cancelled { prompt_id }
            | EventKind::Picture { prompt_id, .. }
            | EventKind::Text { prompt_id, .. } => Some(prompt_id),
        }
    }

    /// The JSON message `{"type": …, "data": …}`; `None` for purely binary kinds.
    pub fn to_json(&self) -> Option<Json> {
        self.type_name().map(|name| json!({"type": name, "data": self.data()}))
    }
}

impl Serialize for EventKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl ExecutionError {
    fn data(&self) -> Json {
        json!({
            "prompt_id": *self.prompt_id,
            "node_id": *self.node_id,
            "node_type": *self.node_type,
            "executed": list(&self.executed),
            "exception_message": self.exception_message,
            "exception_type": self.exception_type,
            "traceback": self.traceback,
            "current_inputs": self.current_inputs,
            "current_outputs": list(&self.current_outputs),
            "timestamp": self.timestamp,
        })
    }
}

impl NodeProgress {
    fn to_json(&self, prompt_id: &str) -> Json {
        json!({
            "value": self.value,
            "max": self.max,
            "state": if self.is_finished { "finished" } else { "running" },
            "node_id": *self.node,
            "prompt_id": prompt_id,
            "display_node_id": *self.node,
            "parent_node_id": null,
            "real_node_id": *self.node,
        })
    }
}
