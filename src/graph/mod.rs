//! Node schemas, prompt JSON ⇄ typed graph, validation. No execution, no device.
//!
//! [`schema`] is the one source of `/object_info`, of validation and of the
//! node documentation: nothing about a node's inputs is listed twice.

mod convert;
mod errors;
mod info;
mod prompt;
mod python;
pub mod schema;
mod validate;
mod workflow;

use serde_json::{Map, Value as Json};

pub use info::object_info;
pub use prompt::{Graph, GraphNode, Source};
pub use python::{repr, text};
pub use schema::{ComboSource, FileList, Input, InputKind, Output, Presence, Schema};
pub use validate::{Refusal, Validated, validate};
pub use workflow::{WorkflowError, convert_workflow, is_ui_workflow};

/// Gives the file names behind a [`FileList`], as they are now.
pub trait FileLists {
    /// The names in the order shown to the user.
    fn list(&self, list: &FileList) -> Vec<String>;
}

/// What validation asks about node classes.
pub trait Classes: FileLists {
    /// The schema of a class, if there is such a class.
    fn schema(&self, class: &str) -> Option<&Schema>;

    /// Inputs that [`check`](Classes::check) looks at; their range and list are not checked otherwise.
    fn checked_inputs(&self, class: &str) -> &[&str];

    /// The class's own check of its literal inputs; `Err` says what is wrong.
    fn check(&self, class: &str, inputs: &Map<String, Json>) -> Result<(), String>;
}
