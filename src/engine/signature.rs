//! The cache key of a node: a hash over everything that its result depends on.
//!
//! Class, literal inputs, the keys of the nodes upstream with their slots, and
//! the class's fingerprint of the outside world. Node ids don't count, except
//! for classes that get their own id as a hidden input.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use super::catalog::{Catalog, Class};
use crate::graph::{Graph, GraphNode, Input, InputKind, Presence, Source};
use crate::nodes::Services;

/// A cache key.
pub(super) type Signature = [u8; 32];

/// The keys of all nodes; `None` for those whose result must not be reused or that can't run.
pub(super) fn signatures(graph: &Graph, catalog: &Catalog, services: &Services) -> Vec<Option<Signature>> {
    let mut keys: Vec<Option<Signature>> = vec![None; graph.nodes().len()];
    for i in graph.topological() {
        let node = &graph.nodes()[i];
        keys[i] = catalog.class(node.class).and_then(|class| signature(node, class, services, &keys));
    }
    keys
}

fn signature(
    node: &GraphNode,
    class: &Class,
    services: &Services,
    keys: &[Option<Signature>],
) -> Option<Signature> {
    if !class.node.is_cacheable() {
        return None;
    }
    let mut hash = Sha256::new();
    absorb_text(&mut hash, b'c', node.class);
    if class.schema.inputs.iter().any(is_own_id) {
        absorb_text(&mut hash, b'u', &node.id);
    }
    let mut literals = Map::new();
    for (name, source) in &node.inputs {
        absorb_text(&mut hash, b'n', name);
        match source {
            Source::Literal(value) => {
                absorb_json(&mut hash, value);
                literals.insert((*name).to_owned(), value.clone());
            }
            Source::Link { node, slot } => {
                hash.update(b"l");
                hash.update(keys.get(*node).copied().flatten()?);
                hash.update((*slot as u64).to_le_bytes());
            }
            Source::Dangling => return None,
        }
    }
    let fingerprint = catch_unwind(AssertUnwindSafe(|| class.node.fingerprint(services, &literals)));
    match fingerprint {
        Ok(Some(text)) => absorb_text(&mut hash, b'f', &text),
        Ok(None) => {}
        Err(_) => return None,
    }
    Some(hash.finalize().into())
}

fn is_own_id(input: &Input) -> bool {
    input.presence == Presence::Hidden && input.kind == InputKind::Link("UNIQUE_ID")
}

fn absorb_text(hash: &mut Sha256, tag: u8, text: &str) {
    hash.update([tag]);
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text.as_bytes());
}

/// Every value has a form of its own; `7` and `7.0` are the same, as in Python.
fn absorb_json(hash: &mut Sha256, value: &Json) {
    match value {
        Json::Null => hash.update(b"0"),
        Json::Bool(b) => hash.update([b'b', u8::from(*b)]),
        Json::Number(n) => {
            let whole = n.as_f64().filter(|x| n.is_f64() && x.fract() == 0.0 && x.abs() < 9e15);
            let text = whole.map_or_else(|| n.to_string(), |x| (x as i64).to_string());
            absorb_text(hash, b'd', &text);
        }
        Json::String(s) => absorb_text(hash, b's', s),
        Json::Array(items) => {
            hash.update([b'a']);
            hash.update((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| absorb_json(hash, item));
        }
        Json::Object(map) => {
            hash.update([b'o']);
            hash.update((map.len() as u64).to_le_bytes());
            for (key, item) in map {
                absorb_text(hash, b'k', key);
                absorb_json(hash, item);
            }
        }
    }
}
