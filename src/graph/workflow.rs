//! The web page's workflow format to the API's.
//!
//! The page saves what it draws: nodes with positions and widgets, links, groups. The API
//! wants what runs: for each node its class and its inputs by name. In between:
//!
//! | on the page | in the prompt |
//! | --- | --- |
//! | widgets (a list in the order of the node's inputs, or an object) | inputs by name; the entry after a seed that says what happens to it is left out; missing ones have their defaults |
//! | a muted node | nothing, and what it fed gets no link |
//! | a bypassed node | its consumers take the input that fits the output's type |
//! | reroutes, primitives | the source, the value |
//! | notes, groups | nothing |
//! | a subgraph's instance | its nodes, as `instance:node` |
//!
//! Nodes of classes that this build lacks are kept as far as the file describes them, so that
//! validation can name them.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value as Json, json};

use super::{Input, InputKind, Presence, Schema};

/// Nodes that only the page knows.
const NOTES: &[&str] = &["Note", "MarkdownNote"];
const REROUTE: &str = "Reroute";
const PRIMITIVE: &str = "PrimitiveNode";
/// Values of the widget after a seed.
const SEED_CONTROLS: &[&str] = &["fixed", "increment", "decrement", "randomize"];
/// Numbers that have such a widget by their name alone.
const SEEDS: &[&str] = &["seed", "noise_seed"];
/// The nodes that stand for a subgraph's own inputs and outputs.
const SUBGRAPH_INPUT: &str = "-10";
const SUBGRAPH_OUTPUT: &str = "-20";
const NEVER: i64 = 2;
const BYPASS: i64 = 4;
/// Subgraphs in subgraphs.
const MAX_DEPTH: usize = 16;
/// Nodes of one workflow, subgraphs unfolded.
const MAX_NODES: usize = 50_000;
/// Nodes that one link may lead through.
const MAX_HOPS: usize = 10_000;

/// A workflow that can't be converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkflowError {
    /// It lacks nodes or links, or they are of another form.
    #[error("this is no workflow of the web page: {0}")]
    Shape(String),
    /// A subgraph holds itself, or there are too many.
    #[error("subgraph '{0}' lies more than {MAX_DEPTH} subgraphs deep; does it hold itself?")]
    TooDeep(String),
    /// More nodes than anybody draws.
    #[error("the workflow has more than {MAX_NODES} nodes with its subgraphs unfolded")]
    TooLarge,
    /// Links in a circle.
    #[error("a link of node {0} leads in a circle")]
    Circle(String),
}

/// Whether a JSON value is a workflow as the web page saves it.
pub fn is_ui_workflow(value: &Json) -> bool {
    value.get("nodes").is_some_and(Json::is_array) && value.get("links").is_some_and(Json::is_array)
}

/// Where a link comes from: node id and slot.
type Origin<'a> = (String, usize, &'a Json);

/// One level of nodes: the workflow itself, or one instance of a subgraph.
struct Scope<'a> {
    /// What stands before the ids of its nodes.
    prefix: String,
    nodes: HashMap<String, &'a Json>,
    /// Links by id.
    links: HashMap<String, Origin<'a>>,
    /// The links that lead to the subgraph's outputs, by slot.
    outputs: HashMap<usize, String>,
    /// The scope and node that this is an instance of.
    parent: Option<(usize, &'a Json)>,
    /// Scopes of the subgraph instances in it, by node id.
    children: HashMap<String, usize>,
}

/// What feeds an input.
#[derive(Debug, PartialEq)]
enum Source {
    Node(String, usize),
    Value(Json),
}

/// A number or text as an id.
fn id(value: &Json) -> Option<String> {
    match value {
        Json::String(text) => Some(text.clone()),
        Json::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn slot(value: &Json) -> usize {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

fn list<'a>(value: &'a Json, key: &str) -> &'a [Json] {
    value.get(key).and_then(Json::as_array).map_or(&[], Vec::as_slice)
}

fn class(node: &Json) -> &str {
    node.get("type").and_then(Json::as_str).unwrap_or_default()
}

fn mode(node: &Json) -> i64 {
    node.get("mode").and_then(Json::as_i64).unwrap_or(0)
}

fn kind(socket: &Json) -> &str {
    socket.get("type").and_then(Json::as_str).unwrap_or("*")
}

/// A link in either form: id, origin, target node, target slot.
fn link(value: &Json) -> Option<(String, Origin<'_>, String, usize)> {
    if let Some([link, origin, origin_slot, target, target_slot, ..]) = value.as_array().map(Vec::as_slice) {
        return Some((id(link)?, (id(origin)?, slot(origin_slot), value), id(target)?, slot(target_slot)));
    }
    let part = |key: &str| id(value.get(key)?);
    let origin = (part("origin_id")?, slot(&value["origin_slot"]), value);
    Some((part("id")?, origin, part("target_id")?, slot(&value["target_slot"])))
}

struct Converter<'a> {
    definitions: HashMap<&'a str, &'a Json>,
    scopes: Vec<Scope<'a>>,
    schema: &'a dyn Fn(&str) -> Option<&'a Schema>,
    count: usize,
}

impl<'a> Converter<'a> {
    /// Reads a level and the subgraphs in it.
    fn read(
        &mut self,
        level: &'a Json,
        prefix: String,
        parent: Option<(usize, &'a Json)>,
        depth: usize,
    ) -> Result<usize, WorkflowError> {
        let at = self.scopes.len();
        let nodes: HashMap<_, _> =
            list(level, "nodes").iter().filter_map(|node| Some((id(node.get("id")?)?, node))).collect();
        self.count += nodes.len();
        if self.count > MAX_NODES {
            return Err(WorkflowError::TooLarge);
        }
        let (mut links, mut outputs) = (HashMap::new(), HashMap::new());
        for (id, origin, target, target_slot) in list(level, "links").iter().filter_map(link) {
            if target == SUBGRAPH_OUTPUT {
                outputs.insert(target_slot, id.clone());
            }
            links.insert(id, origin);
        }
        let instances: Vec<(String, &'a Json, &'a Json)> = nodes
            .iter()
            .filter(|(_, node)| !matches!(mode(node), NEVER | BYPASS))
            .filter_map(|(id, node)| Some((id.clone(), *node, *self.definitions.get(class(node))?)))
            .collect();
        let scope = Scope { prefix: prefix.clone(), nodes, links, outputs, parent, children: HashMap::new() };
        self.scopes.push(scope);
        for (id, node, definition) in instances {
            if depth >= MAX_DEPTH {
                return Err(WorkflowError::TooDeep(class(node).to_owned()));
            }
            let child = self.read(definition, format!("{prefix}{id}:"), Some((at, node)), depth + 1)?;
            self.scopes[at].children.insert(id, child);
        }
        Ok(at)
    }

    /// Follows a link to what really feeds it; `None` if that is nothing.
    fn source(&self, mut at: usize, first: &str) -> Result<Option<Source>, WorkflowError> {
        let mut link = first.to_owned();
        for _ in 0..MAX_HOPS {
            let scope = &self.scopes[at];
            let Some((origin, origin_slot, _)) = scope.links.get(&link) else { return Ok(None) };
            let next = if origin == SUBGRAPH_INPUT {
                let Some((parent, instance)) = scope.parent else { return Ok(None) };
                let Some(input) = list(instance, "inputs").get(*origin_slot) else { return Ok(None) };
                at = parent;
                match input.get("link").and_then(id) {
                    Some(link) => Some(link),
                    None => return Ok(widget_of(instance, input).map(Source::Value)),
                }
            } else {
                let Some(node) = scope.nodes.get(origin) else { return Ok(None) };
                match (mode(node), class(node)) {
                    (NEVER, _) => return Ok(None),
                    (BYPASS, _) => bypass(node, *origin_slot),
                    (_, REROUTE) => list(node, "inputs").first().and_then(|input| id(input.get("link")?)),
                    (_, PRIMITIVE) => {
                        return Ok(list(node, "widgets_values").first().cloned().map(Source::Value));
                    }
                    _ => match scope.children.get(origin) {
                        Some(&child) => {
                            let inner = self.scopes[child].outputs.get(origin_slot).cloned();
                            at = child;
                            inner
                        }
                        None => {
                            return Ok(Some(Source::Node(format!("{}{origin}", scope.prefix), *origin_slot)));
                        }
                    },
                }
            };
            match next {
                Some(next) => link = next,
                None => return Ok(None),
            }
        }
        Err(WorkflowError::Circle(first.to_owned()))
    }

    /// One node as the API wants it.
    fn node(&self, at: usize, node: &Json) -> Result<Json, WorkflowError> {
        let class = class(node);
        let schema = (self.schema)(class);
        let mut inputs = widgets(node, schema);
        for input in list(node, "inputs") {
            let name = input.get("name").and_then(Json::as_str).unwrap_or_default();
            let Some(link) = input.get("link").and_then(id) else { continue };
            match self.source(at, &link)? {
                Some(Source::Node(id, slot)) => inputs.insert(name.to_owned(), json!([id, slot])),
                Some(Source::Value(value)) => inputs.insert(name.to_owned(), value),
                None => None,
            };
        }
        let display = schema.map_or(class, |schema| schema.display_name);
        let title = node.get("title").and_then(Json::as_str).unwrap_or(display);
        Ok(json!({"inputs": inputs, "class_type": class, "_meta": {"title": title}}))
    }
}

/// The link that a bypassed node's output stands for: the input of its type in the same
/// place, else the first of its type.
fn bypass(node: &Json, output: usize) -> Option<String> {
    let inputs = list(node, "inputs");
    let wanted = kind(list(node, "outputs").get(output)?);
    let fits = |input: &&Json| kind(input) == wanted || kind(input) == "*" || wanted == "*";
    let linked = |input: &Json| input.get("link").and_then(id);
    let same = inputs.get(output).filter(fits).and_then(linked);
    same.or_else(|| inputs.iter().filter(|i| kind(i) == wanted).find_map(linked))
        .or_else(|| inputs.iter().filter(fits).find_map(linked))
}

/// The value of the widget behind an input of a subgraph's instance.
fn widget_of(node: &Json, input: &Json) -> Option<Json> {
    let name = input.get("widget")?.get("name")?.as_str()?;
    if let Some(values) = node.get("widgets_values").and_then(Json::as_object) {
        return values.get(name).cloned();
    }
    let named = list(node, "inputs").iter().filter_map(|i| i.get("widget")?.get("name")?.as_str());
    let at = named.into_iter().position(|other| other == name)?;
    list(node, "widgets_values").get(at).filter(|value| !value.is_null()).cloned()
}

/// A node's widgets, in order: names, and what the schema says of them.
fn widget_inputs<'n>(node: &'n Json, schema: Option<&'n Schema>) -> Vec<(&'n str, Option<&'n Input>)> {
    let Some(schema) = schema else {
        let named = list(node, "inputs").iter().filter_map(|i| i.get("widget")?.get("name")?.as_str());
        return named.map(|name| (name, None)).collect();
    };
    let of = |presence| {
        let inputs = schema.inputs.iter().filter(move |input| input.presence == presence);
        inputs.filter(|input| !matches!(input.kind, InputKind::Link(_)) && !input.is_set("forceInput"))
    };
    of(Presence::Required).chain(of(Presence::Optional)).map(|input| (input.name, Some(input))).collect()
}

/// The values of a node's widgets by name; a widget that the file says nothing of has its default.
fn widgets(node: &Json, schema: Option<&Schema>) -> Map<String, Json> {
    let widgets = widget_inputs(node, schema);
    let mut inputs = Map::new();
    match node.get("widgets_values") {
        Some(Json::Object(values)) => {
            let known = |(name, _): &(&str, _)| Some(((*name).to_owned(), values.get(*name)?.clone()));
            inputs.extend(widgets.iter().filter_map(known));
        }
        Some(Json::Array(values)) => {
            let mut rest = values.iter().peekable();
            for (name, input) in &widgets {
                let Some(value) = rest.next() else { break };
                inputs.insert((*name).to_owned(), value.clone());
                if value.is_number() && rest.peek().is_some_and(|next| is_seed_control(next, *input)) {
                    rest.next();
                }
            }
        }
        _ => {}
    }
    for (name, input) in widgets {
        if let Some(default) = input.and_then(Input::initial)
            && !inputs.contains_key(name)
        {
            inputs.insert(name.to_owned(), default);
        }
    }
    inputs
}

/// Whether a widget's value is what happens to the seed before it; old files say it with a switch.
fn is_seed_control(value: &Json, input: Option<&Input>) -> bool {
    let is_seed = || input.is_some_and(|i| SEEDS.contains(&i.name) || i.is_set("control_after_generate"));
    value.as_str().is_some_and(|text| SEED_CONTROLS.contains(&text)) || value.is_boolean() && is_seed()
}

/// A workflow as the web page saves it, as a prompt. `schema` gives the schema of a class.
///
/// # Errors
/// [`WorkflowError`] if it is of another form, or endless.
pub fn convert_workflow<'a>(
    workflow: &'a Json,
    schema: &'a dyn Fn(&str) -> Option<&'a Schema>,
) -> Result<Json, WorkflowError> {
    if !is_ui_workflow(workflow) {
        return Err(WorkflowError::Shape("it has no lists 'nodes' and 'links'".to_owned()));
    }
    let subgraphs = workflow.get("definitions").map_or(&[][..], |d| list(d, "subgraphs"));
    let definitions = subgraphs.iter().filter_map(|s| Some((s.get("id")?.as_str()?, s))).collect();
    let mut converter = Converter { definitions, scopes: Vec::new(), schema, count: 0 };
    converter.read(workflow, String::new(), None, 0)?;
    let mut prompt = Map::new();
    let mut seen = HashSet::new();
    for (at, scope) in converter.scopes.iter().enumerate() {
        let mut ids: Vec<&String> = scope.nodes.keys().collect();
        ids.sort_by_key(|id| (id.parse::<u64>().unwrap_or(u64::MAX), *id));
        for id in ids {
            let node = scope.nodes[id];
            let class = class(node);
            let is_virtual = NOTES.contains(&class) || class == REROUTE || class == PRIMITIVE;
            let runs = !is_virtual && !matches!(mode(node), NEVER | BYPASS);
            if !runs || scope.children.contains_key(id) {
                continue;
            }
            let full = format!("{}{id}", scope.prefix);
            if seen.insert(full.clone()) {
                prompt.insert(full, converter.node(at, node)?);
            }
        }
    }
    Ok(Json::Object(prompt))
}

#[cfg(test)]
#[path = "workflow_tests.rs"]
mod tests;
