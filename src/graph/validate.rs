//! Checks a prompt the way ComfyUI does, with the same errors in the same form.
//!
//! Every output node is checked with everything upstream of it. Good outputs
//! run even if others are bad. Literals are converted in place, so that the
//! stored prompt shows what the nodes get. The walk keeps its own stack: a
//! chain of any length is fine, and a cycle is found because a node on the
//! stack is met again.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::convert::{compare, convert, is_equal};
use super::errors::{Raised, error};
use super::info::{combo_options, type_and_options};
use super::python::{repr, text, type_name};
use super::{Classes, ComboSource, Input, InputKind, Presence, Schema};

/// Above this many options an error doesn't list them.
const MAX_LISTED_OPTIONS: usize = 20;

/// A prompt of which at least one output can run.
#[derive(Clone, Debug)]
pub struct Validated {
    /// Output nodes to run, in prompt order.
    pub outputs: Vec<String>,
    /// Errors by node id, of nodes that lead to other outputs.
    pub node_errors: Json,
}

/// A prompt that can't run.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// ComfyUI's error object.
    pub error: Json,
    /// Errors by node id.
    pub node_errors: Json,
}

impl Refusal {
    fn of_prompt(kind: &str, message: &str, details: &str) -> Box<Self> {
        Box::new(Self { error: error(kind, message, details, json!({})), node_errors: json!({}) })
    }
}

/// Checks a prompt and converts its literals in place. With `targets`, only
/// those output nodes count.
pub fn validate(
    prompt: &mut Json,
    classes: &dyn Classes,
    targets: Option<&[String]>,
) -> Result<Validated, Box<Refusal>> {
    let nodes = match prompt {
        Json::Object(nodes) => nodes,
        Json::Null => {
            return Err(Refusal::of_prompt("no_prompt", "No prompt provided", "No prompt provided"));
        }
        other => {
            let details = format!("a prompt is an object of nodes by id, not a {}", type_name(other));
            return Err(Refusal::of_prompt("invalid_prompt", "Cannot execute this prompt.", &details));
        }
    };
    let mut walk = Walk::new(nodes, classes)?;
    let outputs: Vec<usize> = (0..walk.nodes.len())
        .filter(|&n| walk.nodes[n].schema.is_output_node)
        .filter(|&n| targets.is_none_or(|t| t.contains(&walk.nodes[n].id)))
        .collect();
    if outputs.is_empty() {
        return Err(Refusal::of_prompt("prompt_no_outputs", "Prompt has no outputs", ""));
    }
    let bad: Vec<usize> = outputs.iter().copied().filter(|&output| !walk.is_output_good(output)).collect();
    let node_errors = walk.node_errors(&bad);
    if bad.len() == outputs.len() {
        let details = walk.summary(&bad);
        let error = error(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            &details,
            json!({}),
        );
        return Err(Box::new(Refusal { error, node_errors }));
    }
    let is_good = |n: &&usize| walk.nodes[**n].verdict.as_ref().is_some_and(|v| v.is_valid);
    let good = outputs.iter().filter(is_good).map(|&n| walk.nodes[n].id.clone()).collect();
    Ok(Validated { outputs: good, node_errors })
}

/// A node of the prompt and what is known about it.
struct Checked<'a> {
    id: String,
    schema: &'a Schema,
    /// `None` until its check is complete.
    verdict: Option<Verdict>,
    is_on_stack: bool,
    /// Nodes that its links lead to.
    upstream: Vec<usize>,
}

#[derive(Default)]
struct Verdict {
    is_valid: bool,
    /// The node's own errors; none if it is only invalid because of nodes upstream.
    errors: Vec<Json>,
}

/// A node whose check is under way.
struct Frame {
    node: usize,
    /// The input that is looked at.
    input: usize,
    errors: Vec<Json>,
    is_upstream_valid: bool,
}

/// How the check of a node ended.
enum Outcome {
    Done { is_valid: bool },
    Raised(Raised),
}

/// How the check of one input ended.
enum Step {
    Next,
    /// The check goes on once this node has been checked.
    Descend(usize),
}

/// The walk from the outputs to the sources.
struct Walk<'a> {
    prompt: &'a mut Map<String, Json>,
    classes: &'a dyn Classes,
    nodes: Vec<Checked<'a>>,
    index: HashMap<String, usize>,
    /// Checked nodes in the order in which their checks ended.
    finished: Vec<usize>,
}

impl<'a> Walk<'a> {
    fn new(prompt: &'a mut Map<String, Json>, classes: &'a dyn Classes) -> Result<Self, Box<Refusal>> {
        let mut nodes = Vec::with_capacity(prompt.len());
        let mut index = HashMap::with_capacity(prompt.len());
        for (id, node) in prompt.iter() {
            let invalid =
                |message: &str| Refusal::of_prompt("invalid_prompt", message, &format!("Node ID '#{id}'"));
            let Some(class) = node.get("class_type") else {
                return Err(invalid("Cannot execute because a node is missing the class_type property."));
            };
            let Some(schema) = class.as_str().and_then(|class| classes.schema(class)) else {
                let message = format!("Cannot execute because node {} does not exist.", text(class));
                return Err(invalid(&message));
            };
            index.insert(id.clone(), nodes.len());
            let (id, upstream) = (id.clone(), Vec::new());
            nodes.push(Checked { id, schema, verdict: None, is_on_stack: false, upstream });
        }
        Ok(Self { prompt, classes, nodes, index, finished: Vec::new() })
    }

    /// Checks an output node and everything upstream that is not checked yet.
    fn is_output_good(&mut self, output: usize) -> bool {
        if let Some(verdict) = &self.nodes[output].verdict {
            return verdict.is_valid;
        }
        match self.check_from(output) {
            Some(Outcome::Done { is_valid }) => is_valid,
            Some(Outcome::Raised(raised)) => {
                let error = raised.of_output(&self.nodes[output].id);
                self.set_verdict(output, Verdict { is_valid: false, errors: vec![error] });
                false
            }
            None => {
                tracing::warn!(output = %self.nodes[output].id, "the prompt has a cycle upstream of this output");
                false
            }
        }
    }

    /// `None`: there is a cycle.
    fn check_from(&mut self, output: usize) -> Option<Outcome> {
        let mut stack = vec![self.enter(output)];
        let mut returned: Option<Outcome> = None;
        while let Some(frame) = stack.last_mut() {
            if let Some(outcome) = returned.take() {
                self.take_outcome(frame, outcome);
            }
            match self.advance(frame) {
                Ok(Some(node)) if self.nodes[node].is_on_stack => {
                    stack.iter().for_each(|frame| self.nodes[frame.node].is_on_stack = false);
                    return None;
                }
                Ok(Some(node)) => {
                    let frame = self.enter(node);
                    stack.push(frame);
                }
                Ok(None) => {
                    let (node, is_upstream_valid) = (frame.node, frame.is_upstream_valid);
                    let errors = std::mem::take(&mut frame.errors);
                    let is_valid = is_upstream_valid && errors.is_empty();
                    self.set_verdict(node, Verdict { is_valid, errors });
                    returned = self.leave(&mut stack, Outcome::Done { is_valid });
                }
                Err(raised) => returned = self.leave(&mut stack, Outcome::Raised(raised)),
            }
        }
        returned
    }

    fn enter(&mut self, node: usize) -> Frame {
        self.nodes[node].is_on_stack = true;
        Frame { node, input: 0, errors: Vec::new(), is_upstream_valid: true }
    }

    fn leave(&mut self, stack: &mut Vec<Frame>, outcome: Outcome) -> Option<Outcome> {
        if let Some(frame) = stack.pop() {
            self.nodes[frame.node].is_on_stack = false;
        }
        Some(outcome)
    }

    fn set_verdict(&mut self, node: usize, verdict: Verdict) {
        self.nodes[node].verdict = Some(verdict);
        self.finished.push(node);
    }

    /// Notes how the node behind the current link of `frame` was judged.
    fn take_outcome(&mut self, frame: &mut Frame, outcome: Outcome) {
        let input = &self.nodes[frame.node].schema.inputs[frame.input];
        frame.input += 1;
        match outcome {
            Outcome::Done { is_valid } => frame.is_upstream_valid &= is_valid,
            Outcome::Raised(raised) => {
                frame.is_upstream_valid = false;
                let link = self.literal(frame.node, input.name).cloned().unwrap_or_default();
                let Some(&linked) = self.nodes[frame.node].upstream.last() else { return };
                let config = self.input_config(input);
                let error = raised.of_linked(&self.nodes[linked].id, input.name, &config, &link);
                self.set_verdict(linked, Verdict { is_valid: false, errors: vec![error] });
            }
        }
    }

    /// Checks inputs until one leads to a node that has to be checked first.
    fn advance(&mut self, frame: &mut Frame) -> Result<Option<usize>, Raised> {
        let schema = self.nodes[frame.node].schema;
        self.inputs(frame.node)?;
        while let Some(input) = schema.inputs.get(frame.input) {
            if let Step::Descend(node) = self.check_input(frame, input)? {
                return Ok(Some(node));
            }
            frame.input += 1;
        }
        self.check_by_class(frame);
        Ok(None)
    }

    fn inputs(&self, node: usize) -> Result<&Map<String, Json>, Raised> {
        match self.prompt.get(&self.nodes[node].id).and_then(|n| n.get("inputs")) {
            Some(Json::Object(inputs)) => Ok(inputs),
            Some(other) => {
                Err(Raised::new("TypeError", format!("inputs are a '{}', not a 'dict'", type_name(other))))
            }
            None => Err(Raised::new("KeyError", "'inputs'")),
        }
    }

    fn literal(&self, node: usize, input: &str) -> Option<&Json> {
        self.inputs(node).ok()?.get(input)
    }

    /// Type and options of an input as errors show them.
    fn input_config(&self, input: &Input) -> Json {
        let (kind, options) = type_and_options(input, self.classes);
        json!([kind, options])
    }

    fn check_input(&mut self, frame: &mut Frame, input: &Input) -> Result<Step, Raised> {
        if input.presence == Presence::Hidden {
            return Ok(Step::Next);
        }
        match self.literal(frame.node, input.name) {
            None if input.presence == Presence::Required => {
                let extra = json!({"input_name": input.name});
                let found = error("required_input_missing", "Required input is missing", input.name, extra);
                frame.errors.push(found);
                Ok(Step::Next)
            }
            None => Ok(Step::Next),
            Some(Json::Array(link)) => {
                let link = link.clone();
                self.check_link(frame, input, link)
            }
            Some(_) => {
                if let Err(found) = self.check_literal(frame.node, input) {
                    frame.errors.push(found);
                }
                Ok(Step::Next)
            }
        }
    }

    fn check_link(&mut self, frame: &mut Frame, input: &Input, link: Vec<Json>) -> Result<Step, Raised> {
        let [source, slot] = link.as_slice() else {
            let extra = json!({"input_name": input.name, "input_config": self.input_config(input),
                "received_value": link});
            let message = "Bad linked input, must be a length-2 list of [node_id, slot_index]";
            frame.errors.push(error("bad_linked_input", message, input.name, extra));
            return Ok(Step::Next);
        };
        let linked = self.find(source)?;
        let received = received_type(self.nodes[linked].schema, slot)?;
        if !is_compatible(received, input) {
            let (kind, options) = type_and_options(input, self.classes);
            let details =
                format!("{}, received_type({received}) mismatch input_type({})", input.name, text(&kind));
            let extra = json!({"input_name": input.name, "input_config": [kind, options],
                "received_type": received, "linked_node": link});
            let message = "Return type mismatch between linked nodes";
            frame.errors.push(error("return_type_mismatch", message, &details, extra));
            return Ok(Step::Next);
        }
        self.nodes[frame.node].upstream.push(linked);
        match &self.nodes[linked].verdict {
            Some(verdict) => {
                frame.is_upstream_valid &= verdict.is_valid;
                Ok(Step::Next)
            }
            None => Ok(Step::Descend(linked)),
        }
    }

    /// The node that a link names.
    fn find(&self, source: &Json) -> Result<usize, Raised> {
        match source {
            Json::Array(_) | Json::Object(_) => {
                Err(Raised::new("TypeError", format!("unhashable type: '{}'", type_name(source))))
            }
            Json::String(id) if self.index.contains_key(id) => Ok(self.index[id]),
            other => Err(Raised::new("KeyError", repr(other))),
        }
    }

    /// Converts a literal in place and checks its range or list.
    fn check_literal(&mut self, node: usize, input: &Input) -> Result<(), Json> {
        let Checked { id, schema, .. } = &self.nodes[node];
        let is_checked_by_class = self.classes.checked_inputs(schema.class).contains(&input.name);
        let slot =
            self.prompt.get_mut(id).and_then(|n| n.get_mut("inputs")).and_then(|i| i.get_mut(input.name));
        let Some(slot) = slot else { return Ok(()) };
        // A list as a literal comes wrapped, because a bare list is a link.
        if let Some(wrapped) = slot.get_mut("__value__") {
            *slot = wrapped.take();
        }
        match convert(&input.kind, slot) {
            Ok(converted) => *slot = converted,
            Err(exception) => {
                let value = slot.clone();
                let message =
                    format!("Failed to convert an input value to a {} value", input.kind.type_name());
                let details = format!("{}, {}, {exception}", input.name, text(&value));
                let extra = json!({"input_name": input.name, "input_config": self.input_config(input),
                    "received_value": value, "exception_message": exception});
                return Err(error("invalid_input_type", &message, &details, extra));
            }
        }
        if is_checked_by_class {
            return Ok(());
        }
        let value = slot.clone();
        self.check_range(input, &value)?;
        match &input.kind {
            InputKind::Combo(source) => self.check_options(input, source, &value),
            _ => Ok(()),
        }
    }

    fn check_range(&self, input: &Input, value: &Json) -> Result<(), Json> {
        let limit = |name: &str| input.options.as_ref().and_then(|o| o.get(name));
        for (name, wrong, kind, relation) in [
            ("min", std::cmp::Ordering::Less, "value_smaller_than_min", "smaller than min"),
            ("max", std::cmp::Ordering::Greater, "value_bigger_than_max", "bigger than max"),
        ] {
            let Some(limit) = limit(name).filter(|limit| compare(value, limit) == Some(wrong)) else {
                continue;
            };
            let message = format!("Value {} {relation} of {}", text(value), text(limit));
            let extra = json!({"input_name": input.name, "input_config": self.input_config(input),
                "received_value": value});
            return Err(error(kind, &message, input.name, extra));
        }
        Ok(())
    }

    fn check_options(&self, input: &Input, source: &ComboSource, value: &Json) -> Result<(), Json> {
        let options = combo_options(source, self.classes);
        if options.iter().any(|option| is_equal(option, value)) {
            return Ok(());
        }
        let (config, list) = if options.len() > MAX_LISTED_OPTIONS {
            (Json::Null, format!("(list of length {})", options.len()))
        } else {
            (self.input_config(input), repr(&Json::Array(options)))
        };
        let details = format!("{}: '{}' not in {list}", input.name, text(value));
        let extra = json!({"input_name": input.name, "input_config": config, "received_value": value});
        Err(error("value_not_in_list", "Value not in list", &details, extra))
    }

    /// The class's own check, once its literals are all there and sound.
    fn check_by_class(&self, frame: &mut Frame) {
        let schema = self.nodes[frame.node].schema;
        let names = self.classes.checked_inputs(schema.class);
        let Ok(inputs) = self.inputs(frame.node) else { return };
        let literals: Map<String, Json> = inputs
            .iter()
            .filter(|(name, value)| !value.is_array() && schema.find_input(name).is_some())
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !names.iter().all(|name| literals.contains_key(*name)) {
            return;
        }
        let Err(problem) = self.classes.check(schema.class, &literals) else { return };
        let mut report = |details: &str, extra| {
            let message = "Custom validation failed for node";
            frame.errors.push(error("custom_validation_failed", message, details, extra));
        };
        for name in names {
            let details = if problem.is_empty() { (*name).to_owned() } else { format!("{name} - {problem}") };
            report(&details, json!({"input_name": name}));
        }
        if names.is_empty() {
            report(&problem, json!({}));
        }
    }

    /// Errors by node id, each with the bad outputs that depend on the node.
    fn node_errors(&self, bad_outputs: &[usize]) -> Json {
        let own_errors = |node: usize| self.nodes[node].verdict.as_ref().map_or(&[][..], |v| &v.errors);
        let with_errors: Vec<usize> =
            self.finished.iter().copied().filter(|&n| !own_errors(n).is_empty()).collect();
        if with_errors.is_empty() {
            return json!({});
        }
        let mut dependents: Vec<Vec<&str>> = vec![Vec::new(); self.nodes.len()];
        let mut seen_from = vec![usize::MAX; self.nodes.len()];
        for &output in bad_outputs {
            let mut stack = vec![output];
            while let Some(node) = stack.pop() {
                if std::mem::replace(&mut seen_from[node], output) == output {
                    continue;
                }
                if !own_errors(node).is_empty() {
                    dependents[node].push(&self.nodes[output].id);
                }
                stack.extend(&self.nodes[node].upstream);
            }
        }
        let entry = |&n: &usize| {
            let Checked { id, schema, .. } = &self.nodes[n];
            let entry = json!({"errors": own_errors(n), "dependent_outputs": dependents[n],
                "class_type": schema.class});
            (id.clone(), entry)
        };
        with_errors.iter().map(entry).collect()
    }

    /// The outputs' own errors, one a line; those of nodes upstream are not repeated.
    fn summary(&self, bad_outputs: &[usize]) -> String {
        let errors =
            bad_outputs.iter().filter_map(|&n| self.nodes[n].verdict.as_ref()).flat_map(|v| &v.errors);
        let line = |e: &Json| format!("{}: {}", text(&e["message"]), text(&e["details"]));
        errors.map(line).collect::<Vec<_>>().join("\n")
    }
}

/// The type of an output slot.
fn received_type<'s>(schema: &'s Schema, slot: &Json) -> Result<&'s str, Raised> {
    match slot {
        Json::Number(n) if !n.is_f64() => {
            let slot = n.as_u64().and_then(|n| usize::try_from(n).ok());
            let output = slot.and_then(|slot| schema.outputs.get(slot));
            output.map(|o| o.type_name).ok_or_else(|| Raised::new("IndexError", "tuple index out of range"))
        }
        other => {
            let message = format!("tuple indices must be integers or slices, not {}", type_name(other));
            Err(Raised::new("TypeError", message))
        }
    }
}

/// Whether a link of this type fits: types may be lists with commas, `*` fits all.
fn is_compatible(received: &str, input: &Input) -> bool {
    let split = |types: &'_ str| types.split(',').map(|t| t.trim().to_owned()).collect::<Vec<_>>();
    let (received, wanted) = (split(received), split(input.kind.type_name()));
    let is_any = |types: &[String]| types.iter().any(|t| t == "*");
    is_any(&received) || is_any(&wanted) || received.iter().any(|t| wanted.contains(t))
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
