//! What a pickle is made of, as plain values in an arena.

use std::collections::BTreeSet;

use crate::tensor::DType;

/// A node's place in the arena.
pub(super) type Id = u32;

/// A value. Lists and dictionaries may hold themselves, so walks need a limit.
#[derive(Clone, Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// A whole number of more than 64 bits, little-endian.
    Long(Vec<u8>),
    Float(f64),
    Text(String),
    Bytes,
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// `module.name`, never looked up.
    Global(String),
    Storage(Storage),
    Tensor(Tensor),
    /// What a name that is not known would have made.
    Object {
        class: String,
        state: Option<Id>,
    },
}

/// Raw numbers that tensors are views of.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub key: String,
    /// Its Python type.
    pub type_name: String,
    /// What its elements are, if it says so and they are read.
    pub dtype: Option<DType>,
    /// First element within the storage of that key.
    pub begin: u64,
    pub elements: u64,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub storage: Storage,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// All values of a pickle.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub nodes: Vec<Node>,
    /// Names that became placeholders.
    pub foreign: BTreeSet<String>,
}

impl Graph {
    pub fn node(&self, id: Id) -> &Node {
        self.nodes.get(id as usize).unwrap_or(&Node::None)
    }

    pub fn text(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn count(&self, id: Id) -> Option<u64> {
        match self.node(id) {
            Node::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn items(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::List(items) | Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The pairs of a dictionary.
    pub fn pairs(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.node(id) {
            Node::Dict(pairs) => Some(pairs),
            _ => None,
        }
    }

    /// A dictionary's value of a text key; the last one counts.
    pub fn get(&self, id: Id, key: &str) -> Option<Id> {
        let pairs = self.pairs(id)?;
        pairs.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|(_, value)| *value)
    }
}
