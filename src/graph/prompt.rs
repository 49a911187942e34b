//! A prompt as a typed graph: nodes by position, links by position and slot.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value as Json;

use super::{Classes, Presence};

/// Where the value of an input comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Written in the prompt.
    Literal(Json),
    /// An output slot of another node.
    Link {
        /// Position of that node.
        node: usize,
        /// The slot.
        slot: usize,
    },
    /// A link to nothing.
    Dangling,
}

/// A node of a prompt.
#[derive(Clone, Debug)]
pub struct GraphNode {
    /// Its id.
    pub id: Arc<str>,
    /// Its class.
    pub class: &'static str,
    /// The inputs that are given and that the class has, in the class's order.
    pub inputs: Vec<(&'static str, Source)>,
}

impl GraphNode {
    /// Positions of the nodes that its links lead to; one that several links lead to comes several times.
    pub fn upstream(&self) -> impl Iterator<Item = usize> + '_ {
        self.inputs.iter().filter_map(|(_, source)| match source {
            Source::Link { node, .. } => Some(*node),
            _ => None,
        })
    }

    fn is_dangling(&self) -> bool {
        self.inputs.iter().any(|(_, source)| *source == Source::Dangling)
    }
}

/// A prompt as a typed graph, in prompt order.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<GraphNode>,
    index: HashMap<Arc<str>, usize>,
}

impl Graph {
    /// Reads a validated prompt. Parts that lead to no good output may be
    /// broken: their bad links become [`Source::Dangling`].
    pub fn new(prompt: &Json, classes: &dyn Classes) -> Self {
        let Some(entries) = prompt.as_object() else { return Self::default() };
        let known: Vec<_> = entries
            .iter()
            .filter_map(|(id, entry)| {
                let schema = classes.schema(entry.get("class_type")?.as_str()?)?;
                Some((Arc::<str>::from(id.as_str()), schema, entry.get("inputs")))
            })
            .collect();
        let index: HashMap<_, _> = known.iter().enumerate().map(|(i, (id, ..))| (id.clone(), i)).collect();
        let source = |value: &Json| match link(value) {
            None => Source::Literal(value.clone()),
            Some((id, slot)) => match index.get(id) {
                Some(&node) if slot < known[node].1.outputs.len() => Source::Link { node, slot },
                _ => Source::Dangling,
            },
        };
        let node = |(id, schema, inputs): &(Arc<str>, &super::Schema, Option<&Json>)| GraphNode {
            id: id.clone(),
            class: schema.class,
            inputs: schema
                .inputs
                .iter()
                .filter(|input| input.presence != Presence::Hidden)
                .filter_map(|input| Some((input.name, source(inputs.as_ref()?.get(input.name)?))))
                .collect(),
        };
        Self { nodes: known.iter().map(node).collect(), index }
    }

    /// The nodes in prompt order.
    pub fn nodes(&self) -> &[GraphNode] {
        &self.nodes
    }

    /// The position of a node.
    pub fn find(&self, id: &str) -> Option<usize> {
        self.index.get(id).copied()
    }

    /// For each node, whether one of these is made from it (or is it).
    pub fn needed_for(&self, outputs: impl Iterator<Item = usize>) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        let mut stack: Vec<usize> = outputs.collect();
        while let Some(node) = stack.pop() {
            if !std::mem::replace(&mut needed[node], true) {
                stack.extend(self.nodes[node].upstream());
            }
        }
        needed
    }

    /// Sources first; without the nodes that can't run because a cycle or a
    /// dangling link is upstream.
    pub fn topological(&self) -> Vec<usize> {
        let mut consumers: Vec<Vec<usize>> = vec![Vec::new(); self.nodes.len()];
        let mut waits_for = vec![0_usize; self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            // One link too many to wait for keeps a dangling node out for ever.
            waits_for[i] = node.upstream().count() + usize::from(node.is_dangling());
            node.upstream().for_each(|source| consumers[source].push(i));
        }
        let mut order: Vec<usize> = (0..self.nodes.len()).filter(|&i| waits_for[i] == 0).collect();
        let mut next = 0;
        while let Some(&node) = order.get(next) {
            next += 1;
            for &consumer in &consumers[node] {
                waits_for[consumer] -= 1;
                if waits_for[consumer] == 0 {
                    order.push(consumer);
                }
            }
        }
        order
    }
}

/// Node id and slot, if the value is a link.
fn link(value: &Json) -> Option<(&str, usize)> {
    match value.as_array()?.as_slice() {
        [Json::String(id), Json::Number(slot)] => {
            Some((id, usize::try_from(slot.as_u64()?).unwrap_or(usize::MAX)))
        }
        _ => None,
    }
}
