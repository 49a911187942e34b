//! Validation.
use serde_json::{Value as Json, json};
use super::Classes;
/// A prompt that may run.
pub struct Validated {
    /// Output nodes to run.
    pub outputs: Vec<String>,
    /// Errors by node.
    pub node_errors: Json,
}
/// A prompt that can't run.
pub struct Refusal {
    /// The error.
    pub error: Json,
    /// Errors by node.
    pub node_errors: Json,
}
/// Validates.
pub fn validate(_: &mut Json, _: &dyn Classes, _: Option<&[String]>) -> Result<Validated, Refusal> {
    Err(Refusal { error: json!({}), node_errors: json!({}) })
}
