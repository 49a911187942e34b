//! Text to conditioning.

use std::sync::Arc;

use super::control::CONTROL_TEXT;
use super::loaders::{ClipHandle, ClipPart};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value, shapes};
use crate::diffusion::{CondEntry, Conditioning};
use crate::graph::Input;
use crate::models::ModelError;
use crate::models::clip::{ClipToken, Encoded, WeightedToken};
use crate::models::text::{self, TextPart};
use crate::tokenizer::{self, EmbeddingLookup, EmbeddingRows, Token, TokenizerOptions};
use crate::weights::WeightsFile;

/// The text nodes.
pub fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(ClipTextEncode), Box::new(ClipTextEncodeControlnet), Box::new(ClipSetLastLayer)]
}

/// `CLIPTextEncode`.
pub struct ClipTextEncode;

impl Node for ClipTextEncode {
    fn schema(&self) -> Schema {
        Schema::new("CLIPTextEncode", "conditioning")
            .display("CLIP Text Encode (Prompt)")
            .describe("Encodes a text with a text encoder, as conditioning that guides the diffusion model.")
            .input(Input::string("text").opt("multiline", true).opt("dynamicPrompts", true))
            .input(Input::link("clip", "CLIP"))
            .output("CONDITIONING")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let text = inputs.string("text")?;
        let entry = encode(&clip, |part| tokenize(ctx.services, text, part))?;
        Ok(NodeOutput::one(Value::object("CONDITIONING", Conditioning::from(vec![entry]))))
    }
}

/// `CLIPTextEncodeControlnet`.
pub struct ClipTextEncodeControlnet;

impl Node for ClipTextEncodeControlnet {
    fn schema(&self) -> Schema {
        let schema = Schema::new("CLIPTextEncodeControlnet", "_for_testing/conditioning")
            .module("comfy_extras.nodes_cond")
            .describe("Gives ControlNets a text of their own; the diffusion model keeps the conditioning's.")
            .input(Input::link("clip", "CLIP"))
            .input(Input::link("conditioning", "CONDITIONING"))
            .input(Input::string("text").opt("multiline", true).opt("dynamicPrompts", true))
            .output("CONDITIONING");
        shapes::newer_unnamed(schema, true)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let text = inputs.string("text")?;
        let encoded = encode(&clip, |part| tokenize(ctx.services, text, part))?.cond;
        let mut conds = (*inputs.object::<Conditioning>("conditioning")?).clone();
        for cond in &mut conds {
            cond.extra.insert_shared(CONTROL_TEXT, encoded.clone());
        }
        Ok(NodeOutput::one(Value::object("CONDITIONING", conds)))
    }
}

/// Encodes a prompt that `tokens` gives in each encoder's own chunks.
pub(super) fn encode(
    clip: &ClipHandle,
    mut tokens: impl FnMut(&ClipPart) -> Result<Chunks, NodeError>,
) -> Result<CondEntry, NodeError> {
    let kind = clip.kind()?;
    let mut parts = Vec::new();
    for part in &clip.parts {
        let encoder = part.encoder()?;
        parts.push(TextPart { encoder, chunks: tokens(part)? });
    }
    let encoded = text::encode(kind, &parts, clip.layer)
        .map_err(|error| blamed(error, || text::encode(kind, &unpatched(clip, &parts)?, clip.layer)))?;
    let mut entry = CondEntry::new(Arc::new(encoded.cond));
    entry.pooled = Some(Arc::new(encoded.pooled));
    Ok(entry)
}

/// The same prompt for encoders without patches.
fn unpatched(clip: &ClipHandle, parts: &[TextPart]) -> Result<Vec<TextPart>, ModelError> {
    let pairs = clip.parts.iter().zip(parts);
    pairs
        .map(|(part, TextPart { chunks, .. })| {
            Ok(TextPart { encoder: part.file.clip(part.variant)?, chunks: chunks.clone() })
        })
        .collect()
}

/// The error of a result that is no number: the patches' if it is one without them.
fn blamed(error: ModelError, unpatched: impl FnOnce() -> Result<Encoded, ModelError>) -> ModelError {
    match error {
        ModelError::NotANumber { network, .. } if unpatched().is_ok() => {
            ModelError::damaged_by_patches(network)
        }
        error => error,
    }
}

/// A prompt in chunks of tokens.
pub(super) type Chunks = Vec<Vec<WeightedToken>>;

/// The chunks of `text` for one encoder.
pub(super) fn tokenize(services: &Services, text: &str, part: &ClipPart) -> Result<Chunks, NodeError> {
    let width = part.encoder()?.config().width;
    let lookup = EmbeddingFiles { services, width, key: part.variant.key() };
    let options = TokenizerOptions { pad_token: part.variant.pad_token() };
    Ok(weighted_tokens(tokenizer::tokenize(text, &options, &lookup)))
}

/// Chunks of the tokenizer as the text encoder takes them.
pub fn weighted_tokens(chunks: Vec<Vec<(Token, f32)>>) -> Vec<Vec<WeightedToken>> {
    let convert = |(token, weight)| WeightedToken {
        token: match token {
            Token::Id(id) => ClipToken::Id(id),
            Token::Vector(v) => ClipToken::Vector(v),
        },
        weight,
    };
    chunks.into_iter().map(|chunk| chunk.into_iter().map(convert).collect()).collect()
}

/// Textual-inversion embeddings in the `embeddings` folder.
struct EmbeddingFiles<'a> {
    services: &'a Services,
    width: usize,
    /// The encoder's name in files with a table for each encoder.
    key: &'static str,
}

impl EmbeddingLookup for EmbeddingFiles<'_> {
    fn rows(&self, name: &str) -> Option<EmbeddingRows> {
        let path = self.services.folders.embedding(name)?;
        let file = WeightsFile::open(&path)
            .inspect_err(|e| tracing::warn!("embedding '{name}' can't be used: {e}"))
            .ok()?;
        let mut rows = Vec::new();
        for table in tables(&file, self.key) {
            let raw = file.get(table)?;
            let values = raw.to_f32();
            if !values.iter().all(|v| v.is_finite()) {
                tracing::warn!("embedding '{name}' has values that are not a number; get its file again");
                return None;
            }
            if raw.shape.last() == Some(&self.width) {
                rows.extend(values.chunks_exact(self.width).map(Arc::from));
            } else {
                let shape = raw.shape;
                tracing::warn!("embedding '{name}' has vectors of {shape:?}, not of {}", self.width);
            }
        }
        if rows.is_empty() { None } else { Some(rows) }
    }
}

/// The tables of an embedding's file for the encoder `key`. Files of SD1.x hold one table, under various
/// names; files of several encoders name the tables after the encoder; a list's tables count all.
fn tables<'a>(file: &'a WeightsFile, key: &str) -> Vec<&'a str> {
    let names: Vec<&str> = file.names().collect();
    let is_item = |name: &&str| name.split_once('.').is_some_and(|(i, _)| i.parse::<usize>().is_ok());
    let named = |wanted: &str| names.iter().find(|name| **name == wanted);
    let inverted = || names.iter().find(|name| name.starts_with("string_to_param."));
    match inverted().or_else(|| named(key)).or_else(|| named("emb_params")) {
        Some(table) => vec![table],
        None if names.iter().all(is_item) => names,
        None => names.into_iter().take(1).collect(),
    }
}

/// `CLIPSetLastLayer`.
pub struct ClipSetLastLayer;

impl Node for ClipSetLastLayer {
    fn schema(&self) -> Schema {
        Schema::new("CLIPSetLastLayer", "conditioning")
            .display("CLIP Set Last Layer")
            .describe("Ends the text encoder at an earlier layer (\"clip skip\").")
            .input(Input::link("clip", "CLIP"))
            .input(Input::int("stop_at_clip_layer", -1, -24, -1).opt("step", 1))
            .output("CLIP")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let clip = inputs.object::<ClipHandle>("clip")?;
        let layer = inputs.int("stop_at_clip_layer")?;
        Ok(NodeOutput::one(Value::object("CLIP", ClipHandle { layer: Some(layer), ..clip.as_ref().clone() })))
    }
}
