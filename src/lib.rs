//! **kiln**: ComfyUI's whole API on a hand-written runtime.
//!
//! A prompt (a workflow graph) flows down through these layers; imports point
//! downward only (`tests/layers.rs` checks it):
//!
//! | module | what |
//! | --- | --- |
//! | [`cli`] | one file a sub-command |
//! | [`embed`] | a server inside another program, with that program's nodes |
//! | [`server`] | HTTP and WebSocket: ComfyUI's API |
//! | [`engine`] | queue, executor, cache, history, events, residency |
//! | [`nodes`] | the node library, one file a category |
//! | [`graph`] | prompt JSON ⇄ typed graph, node schemas, validation |
//! | [`diffusion`] | schedules, samplers, noise, guidance, conditioning |
//! | [`models`] | pure architecture: CLIP, UNet, VAE, family detection |
//! | [`tokenizer`], [`weights`], [`image`], [`files`] | leaves |
//! | [`tensor`] | host tensors, op descriptors, the backend trait |
//! | [`backend`] | the CPU implementation of the op set |
//! | [`driver`] | the seam to a GPU: the CUDA driver, and the SIMT layer that stands in for it |

pub mod backend;
pub mod cli;
#[forbid(unsafe_code)]
pub mod diffusion;
pub mod driver;
#[forbid(unsafe_code)]
pub mod embed;
#[forbid(unsafe_code)]
pub mod engine;
#[forbid(unsafe_code)]
pub mod files;
#[forbid(unsafe_code)]
pub mod graph;
#[forbid(unsafe_code)]
pub mod image;
#[forbid(unsafe_code)]
pub mod models;
#[forbid(unsafe_code)]
pub mod nodes;
#[forbid(unsafe_code)]
pub mod server;
#[forbid(unsafe_code)]
pub mod tensor;
#[forbid(unsafe_code)]
pub mod tokenizer;
pub mod weights;

pub use embed::{RunningServer, Server, ServerBuilder, ServerError};
