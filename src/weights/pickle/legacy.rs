//! The form before the zip: five pickles in a row, then the storages.
//!
//! A magic number, the protocol (1001), facts about the machine, the object, the
//! storages' keys; then for every key its number of elements in eight bytes and
//! the elements.

use std::collections::HashMap;

use super::machine::Machine;
use super::value::{Graph, Id, Node};
use super::{Contents, PickleFault};

/// 0x1950a86a20f9469cfc6c, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// The next pickle from `at`, which is moved behind it.
fn next(bytes: &[u8], at: &mut usize) -> Result<(Graph, Id), PickleFault> {
    let rest = bytes.get(*at..).unwrap_or_default();
    let (graph, root, length) = Machine::run(rest)?;
    *at += length;
    Ok((graph, root))
}

/// Takes the file apart.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, PickleFault> {
    let mut at = 0;
    let (graph, magic) = next(bytes, &mut at)?;
    if !matches!(graph.node(magic), Node::Long(digits) if *digits == MAGIC) {
        return Err(PickleFault::NotSaved { what: "it does not begin with the magic number" });
    }
    let (graph, protocol) = next(bytes, &mut at)?;
    if !matches!(graph.node(protocol), Node::Int(PROTOCOL)) {
        return Err(PickleFault::NotSaved { what: "its protocol is not 1001" });
    }
    let (graph, facts) = next(bytes, &mut at)?;
    if graph.get(facts, "little_endian").is_some_and(|id| matches!(graph.node(id), Node::Bool(false))) {
        return Err(PickleFault::BigEndian);
    }
    let (graph, root) = next(bytes, &mut at)?;
    let (key_graph, keys) = next(bytes, &mut at)?;
    let keys =
        key_graph.items(keys).ok_or(PickleFault::NotSaved { what: "the list of storages is missing" })?;
    // The sizes of elements stand in the object's pickle only.
    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for node in &graph.nodes {
        if let Node::Storage(storage) = node {
            sizes.insert(&storage.key, storage.dtype.map_or(element_bytes(&storage.type_name), |d| d.size()));
        }
    }
    let mut storages = HashMap::new();
    for &key in keys {
        let key = key_graph.text(key).ok_or(PickleFault::NotSaved { what: "a storage's key is no text" })?;
        let short = PickleFault::Short { part: "storages", at };
        let count = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or(short.clone())?;
        let count = usize::try_from(u64::from_le_bytes(*count)).map_err(|_| short.clone())?;
        let begin = at + 8;
        let length = count.checked_mul(sizes.get(key).copied().unwrap_or(1)).ok_or(short.clone())?;
        let end = begin.checked_add(length).filter(|end| *end <= bytes.len()).ok_or(short)?;
        storages.insert(key.to_owned(), begin..end);
        at = end;
    }
    Ok(Contents { graph, root, storages })
}

/// Bytes of an element of a storage whose type is not read.
fn element_bytes(type_name: &str) -> usize {
    match type_name.rsplit('.').next() {
        Some("ComplexDoubleStorage") => 16,
        Some("ComplexFloatStorage") => 8,
        Some("QInt32Storage") => 4,
        _ => 1,
    }
}
