//! Nested dictionaries to one list of names.
//!
//! As ComfyUI and the loaders below it find a model's weights: under
//! `state_dict` if there is one, in the only entry if there is just one, then
//! under the names that trainers of upscalers use. What is left is joined by
//! points: `string_to_param.*`, `768.0.linear.0.weight`. Pickled modules are
//! taken by their parameters and buffers. Plain values beside tensors become
//! metadata.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::PickleFault;
use super::value::{Graph, Id, Node, Tensor};

/// Names of a dictionary that is the model, in a file with other entries. The second and later: spandrel's.
const WRAPPERS: [&str; 6] = ["state_dict", "params_ema", "params-ema", "params", "model", "net"];
/// How often a wrapper may be in a wrapper.
const MAX_WRAPPERS: usize = 4;
const MAX_DEPTH: usize = 32;
const MAX_VISITS: usize = 1_000_000;
const MAX_NAME: usize = 1024;
/// Longer texts are no metadata.
const MAX_TEXT: usize = 4096;

/// A file's tensors and texts.
#[derive(Default)]
pub(super) struct Flat<'a> {
    pub tensors: Vec<(String, &'a Tensor)>,
    pub metadata: BTreeMap<String, String>,
}

/// The tensors under `root`.
pub(super) fn flatten(graph: &Graph, root: Id) -> Result<Flat<'_>, PickleFault> {
    let mut flat = Flat::default();
    let mut root = root;
    note_texts(graph, root, &mut flat.metadata);
    for _ in 0..MAX_WRAPPERS {
        let Some(inner) = unwrapped(graph, root) else { break };
        root = inner;
    }
    let mut walk = Walk { graph, tensors: Vec::new(), visits: 0 };
    walk.visit("", root, 0)?;
    flat.tensors = walk.tensors;
    if flat.tensors.is_empty() {
        return Err(PickleFault::NoTensors { foreign: graph.foreign.iter().take(5).cloned().collect() });
    }
    let mut seen = HashSet::new();
    match flat.tensors.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        Some((name, _)) => Err(PickleFault::Duplicate { name: name.clone() }),
        None => Ok(flat),
    }
}

/// The dictionary inside `id` that is meant, if it is not `id` itself.
fn unwrapped(graph: &Graph, id: Id) -> Option<Id> {
    let pairs = graph.pairs(id)?;
    if let [(_, only)] = pairs
        && graph.pairs(*only).is_some()
    {
        return Some(*only);
    }
    let found = WRAPPERS.iter().filter_map(|key| graph.get(id, key));
    found.into_iter().find(|inner| graph.pairs(*inner).is_some_and(|pairs| !pairs.is_empty()))
}

/// The plain values of a dictionary, as texts.
fn note_texts(graph: &Graph, id: Id, metadata: &mut BTreeMap<String, String>) {
    for &(key, value) in graph.pairs(id).unwrap_or_default() {
        let Some(key) = graph.text(key).filter(|key| key.len() <= MAX_NAME) else { continue };
        let text = match graph.node(value) {
            Node::Text(text) if text.len() <= MAX_TEXT => text.clone(),
            Node::Bool(value) => value.to_string(),
            Node::Int(value) => value.to_string(),
            Node::Float(value) => value.to_string(),
            _ => continue,
        };
        metadata.insert(key.to_owned(), text);
    }
}

struct Walk<'a> {
    graph: &'a Graph,
    tensors: Vec<(String, &'a Tensor)>,
    visits: usize,
}

impl<'a> Walk<'a> {
    fn visit(&mut self, name: &str, id: Id, depth: usize) -> Result<(), PickleFault> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(PickleFault::Limit { what: "values", cap: MAX_VISITS });
        }
        if depth > MAX_DEPTH {
            return Err(PickleFault::Limit { what: "dictionaries inside each other", cap: MAX_DEPTH });
        }
        if name.len() > MAX_NAME {
            return Err(PickleFault::Limit { what: "bytes in a name", cap: MAX_NAME });
        }
        match self.graph.node(id) {
            Node::Tensor(tensor) => {
                let name = if name.is_empty() { "tensor" } else { name };
                self.tensors.push((name.to_owned(), tensor));
                Ok(())
            }
            Node::Dict(pairs) => self.dict(name, pairs, depth),
            Node::List(items) | Node::Tuple(items) => {
                // Long lists of numbers are settings; tensors stand in front if there are any.
                for (i, &item) in items.iter().enumerate() {
                    if self.is_branch(item) {
                        self.visit(&joined(name, &i.to_string()), item, depth + 1)?;
                    }
                }
                Ok(())
            }
            Node::Object { class, state } => self.object(name, class, *state, depth),
            _ => Ok(()),
        }
    }

    fn is_branch(&self, id: Id) -> bool {
        matches!(
            self.graph.node(id),
            Node::Tensor(_) | Node::Dict(_) | Node::List(_) | Node::Tuple(_) | Node::Object { .. }
        )
    }

    fn dict(&mut self, name: &str, pairs: &[(Id, Id)], depth: usize) -> Result<(), PickleFault> {
        // A key that is set again keeps its place and takes the new value, as in Python.
        let mut last: HashMap<String, Id> = HashMap::new();
        let mut order = Vec::new();
        for &(key, value) in pairs {
            if !self.is_branch(value) {
                continue;
            }
            let key = match self.graph.node(key) {
                Node::Text(text) => text.clone(),
                Node::Int(number) => number.to_string(),
                _ => continue,
            };
            if last.insert(key.clone(), value).is_none() {
                order.push(key);
            }
        }
        for key in order {
            if let Some(&value) = last.get(&key) {
                self.visit(&joined(name, &key), value, depth + 1)?;
            }
        }
        Ok(())
    }

    /// A module's weights; a tensor of an unknown kind is an error, any other object is passed over.
    fn object(
        &mut self,
        name: &str,
        class: &str,
        state: Option<Id>,
        depth: usize,
    ) -> Result<(), PickleFault> {
        if class.starts_with("torch._utils._rebuild") || class.starts_with("torch._tensor._rebuild") {
            return Err(PickleFault::Foreign { name: name.to_owned(), function: class.to_owned() });
        }
        let Some(state) = state else { return Ok(()) };
        for part in ["_parameters", "_buffers", "_modules"] {
            if let Some(part) = self.graph.get(state, part) {
                self.visit(name, part, depth + 1)?;
            }
        }
        Ok(())
    }
}

fn joined(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}
