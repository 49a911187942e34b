//! The error objects that clients know from ComfyUI.

use serde_json::{Value as Json, json};

/// Why a prompt or a node of it is refused: `type`, `message`, `details`, `extra_info`.
pub(super) fn error(kind: &str, message: &str, details: &str, extra_info: Json) -> Json {
    json!({"type": kind, "message": message, "details": details, "extra_info": extra_info})
}

/// A mistake for which ComfyUI's validation itself fails; clients see the
/// Python exception that it would raise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{exception}: {message}")]
pub(super) struct Raised {
    /// Exception type.
    pub exception: &'static str,
    /// The exception's text.
    pub message: String,
}

impl Raised {
    pub fn new(exception: &'static str, message: impl Into<String>) -> Self {
        Self { exception, message: message.into() }
    }

    fn traceback(&self, node: &str) -> Json {
        json!([format!("  validation of node {node}\n"), format!("{self}\n")])
    }

    /// The error of an output node whose own validation failed.
    pub fn of_output(&self, node: &str) -> Json {
        error(
            "exception_during_validation",
            "Exception when validating node",
            &self.message,
            json!({"exception_type": self.exception, "traceback": self.traceback(node)}),
        )
    }

    /// The error of a node inside the graph, seen through the link that leads to it.
    pub fn of_linked(&self, node: &str, input: &str, input_config: &Json, link: &Json) -> Json {
        error(
            "exception_during_inner_validation",
            "Exception when validating inner node",
            &self.message,
            json!({
                "input_name": input,
                "input_config": input_config,
                "exception_message": self.message,
                "exception_type": self.exception,
                "traceback": self.traceback(node),
                "linked_node": link,
            }),
        )
    }
}
