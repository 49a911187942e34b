//! Runs one prompt: nodes in order, results from and into the cache, events.
//!
//! The messages and their order are ComfyUI's, as clients depend on both:
//!
//! ```text
//! execution_start, execution_cached,
//!   per node:  progress_state, executing, [progress…], [executed], progress_state
//!   or cached: executed, progress_state          (outputs and twins only)
//! execution_success | execution_error | execution_interrupted
//! ```
//!
//! A node that fails or panics ends its prompt and nothing else; what the
//! nodes before it gave stays in the cache.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::cache::NodeResult;
use super::catalog::Class;
use super::events::{EventKind, ExecutionError, Id, now_ms};
use super::history::Entry;
use super::mapping::{self, InputLists};
use super::order::Order;
use super::progress::Progress;
use super::queue::Job;
use super::signature::{Signature, signatures};
use super::{Running, Shared, lock};
use crate::graph::{self, Graph, Input, Presence};
use crate::nodes::{NodeCtx, NodeError, ProgressSink, Services, Value};

/// Runs a prompt to its end and makes its history entry. Never panics.
pub(super) fn run(shared: &Shared, running: &Arc<Running>) -> Entry {
    let job = &running.job;
    let span = tracing::info_span!("prompt", prompt_id = %job.id);
    let _entered = span.enter();
    let started = std::time::Instant::now();
    let entry = catch_unwind(AssertUnwindSafe(|| {
        let graph = Graph::new(&job.prompt, &shared.catalog);
        Run::new(shared, running, &graph).run()
    }))
    .unwrap_or_else(|panic| executor_failed(shared, job, panic_text(&*panic)));
    lock(&running.live).current = None;
    tracing::info!(success = entry.is_success, seconds = started.elapsed().as_secs_f64(), "prompt done");
    entry
}

/// The end of a prompt on which the executor itself panicked: no node is to blame.
fn executor_failed(shared: &Shared, job: &Arc<Job>, panic: &str) -> Entry {
    tracing::error!(panic, "the executor panicked");
    let error = EventKind::ExecutionError(Box::new(ExecutionError {
        prompt_id: job.id.clone(),
        node_id: Id::from(""),
        node_type: Id::from(""),
        executed: Vec::new(),
        exception_message: format!("kiln itself failed on this prompt: {panic}\n"),
        exception_type: "Panic".to_owned(),
        traceback: vec![format!("Panic: {panic}\n")],
        current_inputs: Map::new(),
        current_outputs: Vec::new(),
        timestamp: now_ms(),
    }));
    let messages = error.type_name().map(|name| (name, error.data())).into_iter().collect();
    shared.emit(job.client_id.clone(), error);
    Entry { job: job.clone(), outputs: Map::new(), is_success: false, messages }
}

/// Why a node ended the prompt.
struct Failure {
    node: usize,
    error: NodeError,
    /// What the node got, if it got that far.
    inputs: InputLists,
}

/// A prompt under way.
struct Run<'a> {
    shared: &'a Shared,
    running: &'a Running,
    job: &'a Arc<Job>,
    graph: &'a Graph,
    progress: Progress<'a>,
    /// The engine's services with this prompt's choice of previews.
    services: Services,
    signatures: Vec<Option<Signature>>,
    /// What later nodes of this prompt need, by node.
    results: Vec<Option<Arc<NodeResult>>>,
    /// Data for the client, by node.
    ui: BTreeMap<usize, Arc<Map<String, Json>>>,
    /// Nodes that ran, in order.
    executed: Vec<Id>,
    messages: Vec<(&'static str, Json)>,
}

impl<'a> Run<'a> {
    fn new(shared: &'a Shared, running: &'a Running, graph: &'a Graph) -> Self {
        Self {
            shared,
            running,
            job: &running.job,
            graph,
            progress: Progress::new(shared, running),
            services: Services {
                preview: running.job.preview_method().unwrap_or(shared.services.preview),
                ..shared.services.clone()
            },
            signatures: Vec::new(),
            results: Vec::new(),
            ui: BTreeMap::new(),
            executed: Vec::new(),
            messages: Vec::new(),
        }
    }

    fn run(mut self) -> Entry {
        let prompt_id = self.job.id.clone();
        let timestamp = now_ms();
        lock(&self.running.live).started_ms = Some(timestamp);
        self.announce(EventKind::ExecutionStart { prompt_id: prompt_id.clone(), timestamp });
        self.signatures = signatures(self.graph, &self.shared.catalog, &self.shared.services);
        self.results = lock(&self.shared.cache).begin(&self.signatures);
        let cached = self.graph.nodes().iter().zip(&self.results).filter(|(_, result)| result.is_some());
        let nodes: Vec<Id> = cached.map(|(node, _)| node.id.clone()).collect();
        self.count_nodes(&nodes);
        self.announce(EventKind::ExecutionCached {
            nodes,
            prompt_id: prompt_id.clone(),
            timestamp: now_ms(),
        });
        let outcome = self.run_nodes();
        self.progress.flush();
        let is_success = outcome.is_ok();
        let closing = match outcome {
            Ok(()) => EventKind::ExecutionSuccess { prompt_id, timestamp: now_ms() },
            Err(failure) => self.describe(failure),
        };
        self.announce(closing);
        let ui = std::mem::take(&mut self.ui).into_iter().filter(|_| is_success);
        let outputs = ui
            .map(|(node, ui)| (self.graph.nodes()[node].id.to_string(), Json::Object((*ui).clone())))
            .collect();
        Entry { job: self.job.clone(), outputs, is_success, messages: self.messages }
    }

    /// Notes how many nodes the outputs need, and which of those are there already.
    fn count_nodes(&self, cached: &[Id]) {
        let outputs = self.job.outputs.iter().filter_map(|id| self.graph.find(id));
        let needed = self.graph.needed_for(outputs);
        let mut live = lock(&self.running.live);
        live.nodes_total = needed.iter().filter(|is_needed| **is_needed).count();
        let is_needed = |id: &&Id| self.graph.find(id).is_some_and(|node| needed[node]);
        live.done = cached.iter().filter(is_needed).cloned().collect();
    }

    /// Sends an event and notes it for the history.
    fn announce(&mut self, kind: EventKind) {
        if let Some(name) = kind.type_name() {
            self.messages.push((name, kind.data()));
        }
        self.send(kind);
    }

    fn send(&self, kind: EventKind) {
        self.shared.emit(self.job.client_id.clone(), kind);
    }

    fn class(&self, node: usize) -> Option<&'a Class> {
        self.shared.catalog.class(self.graph.nodes()[node].class)
    }

    fn run_nodes(&mut self) -> Result<(), Failure> {
        let outputs: Vec<usize> = self.job.outputs.iter().filter_map(|id| self.graph.find(id)).collect();
        let is_cached = self.results.iter().map(Option::is_some).collect();
        let is_output_node = |node| self.class(node).is_some_and(|c| c.schema.is_output_node);
        let mut order = Order::new(self.graph, &outputs, is_cached, is_output_node);
        let keeps_results = !lock(&self.shared.cache).is_off();
        while let Some(node) = order.next() {
            let request = self.shared.take_free();
            if request.is_any() {
                self.drop_results(&order);
                self.shared.free_now(request);
            }
            self.run_node(node)?;
            for unneeded in order.done(node) {
                if !keeps_results {
                    self.results[unneeded] = None;
                }
            }
        }
        Ok(())
    }

    /// Lets go of results that no node of this prompt needs any more.
    fn drop_results(&mut self, order: &Order<'_>) {
        for (node, result) in self.results.iter_mut().enumerate() {
            if !order.is_needed(node) {
                *result = None;
            }
        }
    }

    fn run_node(&mut self, node: usize) -> Result<(), Failure> {
        let id = self.graph.nodes()[node].id.clone();
        if let Some(result) = self.find_result(node) {
            let output = result.ui.clone();
            if let Some(ui) = &output {
                self.keep_ui(node, ui);
            }
            self.results[node] = Some(result);
            self.send(EventKind::Executed { node: id.clone(), prompt_id: self.job.id.clone(), output });
            self.progress.finish(&id);
            return Ok(());
        }
        {
            let mut live = lock(&self.running.live);
            (live.current, live.step) = (Some((id.clone(), self.graph.nodes()[node].class)), None);
        }
        self.progress.start(&id);
        self.send(EventKind::Executing { node: Some(id.clone()), prompt_id: self.job.id.clone() });
        let result = Arc::new(self.compute(node)?);
        if let Some(signature) = self.signatures[node] {
            lock(&self.shared.cache).insert(signature, result.clone());
        }
        if let Some(ui) = &result.ui {
            self.keep_ui(node, ui);
            let prompt_id = self.job.id.clone();
            self.send(EventKind::Executed { node: id.clone(), prompt_id, output: Some(ui.clone()) });
        }
        self.results[node] = Some(result);
        self.executed.push(id.clone());
        self.progress.finish(&id);
        Ok(())
    }

    /// Keeps a node's data for the history and for whoever asks before the end.
    fn keep_ui(&mut self, node: usize, ui: &Arc<Map<String, Json>>) {
        let id = self.graph.nodes()[node].id.to_string();
        lock(&self.running.live).outputs.insert(id, Json::Object((**ui).clone()));
        self.ui.insert(node, ui.clone());
    }

    /// A result from an earlier prompt or from a twin in this one.
    fn find_result(&self, node: usize) -> Option<Arc<NodeResult>> {
        let twin = || lock(&self.shared.cache).get(self.signatures[node].as_ref()?);
        self.results[node].clone().or_else(twin)
    }

    fn compute(&self, node: usize) -> Result<NodeResult, Failure> {
        let this = &self.graph.nodes()[node];
        let fail = |error, inputs| Failure { node, error, inputs };
        let Some(class) = self.class(node) else {
            return Err(fail(NodeError::failed("KeyError", format!("no class {}", this.class)), Vec::new()));
        };
        let inputs = mapping::gather(this, &self.results).map_err(|error| fail(error, Vec::new()))?;
        let mut ctx = NodeCtx {
            services: &self.services,
            node_id: &this.id,
            prompt: &self.job.prompt,
            extra_pnginfo: self.job.extra_pnginfo(),
            sink: &self.progress,
        };
        if self.progress.is_interrupted() {
            return Err(fail(NodeError::Interrupted, inputs));
        }
        let span = tracing::debug_span!("node", id = %this.id, class = this.class);
        let _entered = span.enter();
        catch_unwind(AssertUnwindSafe(|| mapping::execute(class, &mut ctx, &inputs)))
            .unwrap_or_else(|panic| Err(NodeError::failed("Panic", panic_text(&*panic))))
            .map_err(|error| fail(error, inputs))
    }

    /// The event that ends a prompt whose node failed or was interrupted.
    fn describe(&mut self, failure: Failure) -> EventKind {
        let Failure { node, error, inputs } = failure;
        let node_id = self.graph.nodes()[node].id.clone();
        let node_type = Id::from(self.graph.nodes()[node].class);
        let executed = std::mem::take(&mut self.executed);
        let prompt_id = self.job.id.clone();
        if matches!(error, NodeError::Interrupted) {
            return EventKind::ExecutionInterrupted {
                prompt_id,
                node_id,
                node_type,
                executed,
                timestamp: now_ms(),
            };
        }
        tracing::warn!(node = %node_id, class = %node_type, %error, "a node failed");
        let traceback =
            vec![format!("  node {node_id} ({node_type})\n"), format!("{}: {error}\n", error.kind())];
        EventKind::ExecutionError(Box::new(ExecutionError {
            prompt_id,
            node_id,
            node_type,
            executed,
            exception_message: format!("{error}\n"),
            exception_type: error.kind().to_owned(),
            traceback,
            current_inputs: self.current_inputs(node, &inputs),
            current_outputs: self.graph.nodes().iter().map(|n| n.id.clone()).collect(),
            timestamp: now_ms(),
        }))
    }

    /// The failed node's inputs, hidden ones included, as lists of short values.
    fn current_inputs(&self, node: usize, inputs: &InputLists) -> Map<String, Json> {
        let shown =
            inputs.iter().map(|(name, values)| ((*name).to_owned(), values.iter().map(show).collect()));
        let hidden = |input: &Input| {
            let value = match input.kind.type_name() {
                "PROMPT" => graph::repr(&self.job.prompt).into(),
                "EXTRA_PNGINFO" => self.job.extra_pnginfo().map_or(Json::Null, |v| graph::repr(v).into()),
                "UNIQUE_ID" => Json::from(&*self.graph.nodes()[node].id),
                _ => return None,
            };
            Some((input.name.to_owned(), Json::Array(vec![value])))
        };
        let declared = self.class(node).map_or(&[][..], |class| &class.schema.inputs);
        let hidden = declared.iter().filter(|i| i.presence == Presence::Hidden).filter_map(hidden);
        shown.chain(hidden).collect()
    }
}

/// Simple literals as they are, everything else as text.
fn show(value: &Value) -> Json {
    match value {
        Value::Json(list @ (Json::Array(_) | Json::Object(_))) => graph::repr(list).into(),
        Value::Json(simple) => simple.clone(),
        other => other.describe().into(),
    }
}

/// What a panic says.
fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic without a message")
}
