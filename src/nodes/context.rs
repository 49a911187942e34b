//! What a node may use while it runs.

use std::sync::Arc;

use serde_json::Value as Json;

use crate::files::Folders;
use crate::models::ModelStore;
use crate::tensor::HostTensor;

/// Long-lived services shared by all prompts.
#[derive(Clone)]
pub struct Services {
    /// The server's folders and file names.
    pub folders: Arc<Folders>,
    /// Loaded models and the backend they run on.
    pub models: Arc<ModelStore>,
    /// Whether PNG files carry the prompt and workflow (`--disable-metadata` turns it off).
    pub save_metadata: bool,
    /// PNG compression of SaveImage.
    pub png_level: u8,
    /// How previews are made while sampling.
    pub preview: PreviewMethod,
}

/// How previews are made while sampling (`--preview-method`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreviewMethod {
    /// No previews.
    #[default]
    None,
    /// A linear projection of the latent.
    Latent2Rgb,
    /// A tiny decoder; the linear projection where there is none.
    Taesd,
}

/// A picture of a running step, for whoever watches.
#[derive(Clone, Debug)]
pub struct PreviewFrame {
    /// `[1, H, W, 3]` in 0..1.
    pub image: HostTensor,
    /// The longer side is enlarged or reduced to this many pixels for display.
    pub max_size: u32,
}

/// Where a running node's progress goes. Implemented by the executor.
pub trait ProgressSink: Send + Sync {
    /// Step `value` of `max` is done.
    fn progress(&self, node_id: &str, value: u64, max: u64, preview: Option<PreviewFrame>);
    /// A finished picture that the node sends to the client right away.
    fn picture(&self, node_id: &str, image: &HostTensor);
    /// A text that the client shows on the node while or after it runs.
    fn text(&self, node_id: &str, text: &str) {
        let _ = (node_id, text);
    }
    /// Whether the user asked to stop the prompt.
    fn is_interrupted(&self) -> bool;
}

/// The context of one execution of a node.
pub struct NodeCtx<'a> {
    /// Shared services.
    pub services: &'a Services,
    /// The node's id in the prompt.
    pub node_id: &'a str,
    /// The prompt as stored (hidden input `PROMPT`).
    pub prompt: &'a Json,
    /// `extra_data.extra_pnginfo` (hidden input `EXTRA_PNGINFO`).
    pub extra_pnginfo: Option<&'a Json>,
    /// Progress and interruption.
    pub sink: &'a dyn ProgressSink,
}

impl NodeCtx<'_> {
    /// Reports progress; fails with [`NodeError::Interrupted`] if the user asked to stop.
    pub fn progress(&self, value: u64, max: u64, preview: Option<PreviewFrame>) -> Result<(), NodeError> {
        self.sink.progress(self.node_id, value, max, preview);
        self.check_interrupt()
    }

    /// Fails with [`NodeError::Interrupted`] if the user asked to stop.
    pub fn check_interrupt(&self) -> Result<(), NodeError> {
        if self.sink.is_interrupted() { Err(NodeError::Interrupted) } else { Ok(()) }
    }
}

/// Why a node failed. It ends its own prompt and nothing else.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The user stopped the prompt.
    #[error("interrupted")]
    Interrupted,
    /// An input is unusable.
    #[error("input '{name}' {what}")]
    Input {
        /// The input's name.
        name: String,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// Anything else.
    #[error("{message}")]
    Failed {
        /// Short type name for `execution_error.exception_type` (e.g. `WeightsError`).
        kind: &'static str,
        /// What happened, where, and what to do.
        message: String,
    },
}

impl NodeError {
    /// An unusable input.
    pub fn input(name: &str, what: &str) -> Self {
        NodeError::Input { name: name.to_owned(), what: what.to_owned() }
    }

    /// A failure with a type name for the client.
    pub fn failed(kind: &'static str, message: impl std::fmt::Display) -> Self {
        NodeError::Failed { kind, message: message.to_string() }
    }

    /// Type name for `execution_error.exception_type`.
    pub fn kind(&self) -> &'static str {
        match self {
            NodeError::Interrupted => "InterruptProcessingException",
            NodeError::Input { .. } => "ValueError",
            NodeError::Failed { kind, .. } => kind,
        }
    }
}
