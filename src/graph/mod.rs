//! Node schemas, prompt JSON ⇄ typed graph, validation. No execution, no device.
//!
//! [`schema`] is the one source of `/object_info`, of validation and of the
//! node documentation: nothing about a node's inputs is listed twice.

pub mod schema;

pub use schema::{ComboSource, FileList, Input, InputKind, Output, Presence, Schema};
