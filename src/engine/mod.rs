//! Queue, executor, cache, history, events, residency.
//!
//! ```text
//! submit ─▶ graph::validate ─▶ queue ─▶ worker thread ─▶ executor ─▶ nodes
//!                                            │               │
//!                                         history ◀──────── events ─▶ subscribers
//! ```
//!
//! [`Engine`] is what the server (or a program that embeds kiln) talks to; its
//! methods never wait for a node. One worker thread takes the prompts, one at a
//! time, each to a thread of its own (which leaves less memory behind). The
//! running prompts are a list nonetheless, so that several can be in flight once
//! devices can share their steps.

mod cache;
mod catalog;
pub mod events;
mod executor;
mod history;
pub mod jobs;
mod mapping;
mod order;
mod progress;
mod queue;
mod residency;
mod signature;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use serde_json::{Map, Number, Value as Json, json};
use tokio::sync::broadcast;

use crate::graph;
use crate::nodes::{Node, Services};
use crate::tensor::{BackendInfo, MemoryUse};
pub use cache::CachePolicy;
use cache::ResultCache;
use catalog::Catalog;
use events::Id;
pub use events::{Event, EventKind};
use history::{Entry, History};
use jobs::Live;
pub use jobs::{Cancelling, JobList, JobProgress, JobQuery, JobSort, JobStatus, JobView};
use queue::{Job, PendingQueue};
pub use residency::FreeRequest;

/// How many prompts that were cancelled while they waited are remembered.
const CANCELLED_CAP: usize = 1000;

/// What an engine is made of.
pub struct EngineConfig {
    /// Long-lived services for nodes.
    pub services: Services,
    /// The node classes, in the order of `/object_info`.
    pub nodes: Vec<Box<dyn Node>>,
    /// How many finished prompts the history keeps.
    pub history_cap: usize,
    /// Which results are kept for later prompts.
    pub cache: CachePolicy,
    /// How many events a subscriber may fall behind before it loses the oldest.
    pub event_capacity: usize,
}

impl EngineConfig {
    /// ComfyUI's limits: 10000 history entries, results of the last prompt are kept.
    pub fn new(services: Services, nodes: Vec<Box<dyn Node>>) -> Self {
        let cache = CachePolicy::default();
        Self { services, nodes, history_cap: 10_000, cache, event_capacity: 16_384 }
    }
}

/// A prompt to queue: the body of `POST /prompt`.
#[derive(Clone, Debug, Default)]
pub struct Submission {
    /// The prompt; null if the body had none.
    pub prompt: Json,
    /// The client's own id for it; a new UUID otherwise.
    pub prompt_id: Option<String>,
    /// Priority, lower runs first; the next number otherwise.
    pub number: Option<f64>,
    /// Whether to run before everything that waits (negates the number).
    pub front: bool,
    /// Kept with the prompt; `extra_pnginfo` reaches the nodes.
    pub extra_data: Map<String, Json>,
    /// Who gets the events; without it everybody does.
    pub client_id: Option<String>,
    /// Runs only these output nodes.
    pub partial_execution_targets: Option<Vec<String>>,
    /// Who counts as the sender for [`QueueLimits::per_owner`].
    pub owner: Option<String>,
    /// How long the queue may be with it.
    pub limits: QueueLimits,
}

/// How many prompts may wait or run.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// In all.
    pub total: usize,
    /// Of one owner.
    pub per_owner: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { total: usize::MAX, per_owner: usize::MAX }
    }
}

/// The answer to an accepted prompt.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The prompt's id.
    pub prompt_id: String,
    /// Its priority.
    pub number: Number,
    /// Errors of nodes that only lead to outputs left out; an empty object if all is well.
    pub node_errors: Json,
}

/// The answer to a prompt that can't run.
#[derive(Clone, Debug, thiserror::Error)]
#[error("prompt refused: {error}")]
pub struct Refused {
    /// ComfyUI's error object: `type`, `message`, `details`, `extra_info`.
    pub error: Json,
    /// Errors by node id.
    pub node_errors: Json,
    /// Whether only the length of the queue is in the way.
    pub is_queue_full: bool,
}

impl Refused {
    fn full(kind: &str, message: String) -> Box<Self> {
        let error = json!({"type": kind, "message": message, "details": message, "extra_info": {}});
        Box::new(Self { error, node_errors: json!({}), is_queue_full: true })
    }
}

/// What runs and what waits: tuples `[number, id, prompt, extra_data, outputs]`.
#[derive(Clone, Debug, Default)]
pub struct QueueSnapshot {
    /// Prompts that run.
    pub running: Vec<Json>,
    /// Prompts that wait, next one first.
    pub pending: Vec<Json>,
}

/// A prompt in flight.
struct Running {
    job: Arc<Job>,
    is_interrupted: AtomicBool,
    /// The thread that runs it.
    thread: OnceLock<ThreadId>,
    /// How far it is, for whoever asks or connects late.
    live: Mutex<Live>,
}

/// What the lock guards.
struct State {
    queue: PendingQueue,
    running: Vec<Arc<Running>>,
    history: History,
    /// Prompts taken out of the queue before they ran.
    cancelled: History,
    free: FreeRequest,
    next_number: i64,
    is_shut_down: bool,
}

/// What the worker and the callers share.
struct Shared {
    catalog: Catalog,
    services: Services,
    cache: Mutex<ResultCache>,
    state: Mutex<State>,
    wake: Condvar,
    events: broadcast::Sender<Arc<Event>>,
}

/// What the worker does next.
enum Task {
    Run(Arc<Running>),
    Free(FreeRequest),
    Stop,
}

/// A lock whose holder panicked is still good: every change under our locks is complete or absent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Whether one more prompt may wait.
    fn check_room(&self, job: &Job, limits: QueueLimits) -> Result<(), Box<Refused>> {
        let total = self.queue.len() + self.running.len();
        if total >= limits.total {
            let message = format!("the queue is full: {total} prompts run or wait; try again later");
            return Err(Refused::full("queue_full", message));
        }
        let Some(owner) = job.owner.as_deref().filter(|_| limits.per_owner < limits.total) else {
            return Ok(());
        };
        let runs = self.running.iter().filter(|r| r.job.owner.as_deref() == Some(owner)).count();
        let mine = runs + self.queue.count_of(owner);
        if mine >= limits.per_owner {
            let message = format!("{mine} of your prompts run or wait, which is the limit; try again later");
            return Err(Refused::full("client_queue_full", message));
        }
        Ok(())
    }
}

impl Shared {
    fn emit(&self, client_id: Option<Id>, kind: EventKind) {
        // An error only says that nobody listens.
        let _ = self.events.send(Arc::new(Event { client_id, kind }));
    }

    /// Sends the queue length; under the lock, so that lengths arrive in order.
    fn emit_status(&self, state: &State) {
        let queue_remaining = state.queue.len() + state.running.len();
        self.emit(None, EventKind::Status { queue_remaining });
    }

    fn next_task(&self) -> Task {
        let mut state = lock(&self.state);
        loop {
            if state.is_shut_down {
                return Task::Stop;
            }
            if state.free.is_any() {
                return Task::Free(std::mem::take(&mut state.free));
            }
            if let Some(job) = state.queue.pop() {
                let running = Arc::new(Running {
                    job,
                    is_interrupted: AtomicBool::new(false),
                    thread: OnceLock::new(),
                    live: Mutex::new(Live::default()),
                });
                state.running.push(running.clone());
                self.emit_status(&state);
                return Task::Run(running);
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a waiting `/free` for a running prompt's safe point.
    fn take_free(&self) -> FreeRequest {
        std::mem::take(&mut lock(&self.state).free)
    }

    fn finish(&self, running: &Arc<Running>, entry: Entry) {
        let job = running.job.clone();
        let entry = entry.into();
        let mut state = lock(&self.state);
        state.running.retain(|r| !Arc::ptr_eq(r, running));
        state.history.push(entry);
        self.emit_status(&state);
        drop(state);
        self.emit(job.client_id.clone(), EventKind::Executing { node: None, prompt_id: job.id.clone() });
    }

    fn work(&self) {
        loop {
            match self.next_task() {
                Task::Stop => return,
                Task::Free(request) => self.free_now(request),
                Task::Run(running) => {
                    // The job ends on that thread too, for the sake of its many small blocks.
                    let slot = Mutex::new(Some(running));
                    residency::on_thread_of_its_own("kiln-prompt", || {
                        if let Some(running) = lock(&slot).take() {
                            running.thread.get_or_init(|| std::thread::current().id());
                            self.finish(&running, executor::run(self, &running));
                        }
                    });
                }
            }
        }
    }
}

/// ComfyUI's queue and executor.
pub struct Engine {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the worker thread.
    pub fn new(config: EngineConfig) -> Arc<Self> {
        let EngineConfig { services, nodes, history_cap, cache, event_capacity } = config;
        let state = State {
            queue: PendingQueue::default(),
            running: Vec::new(),
            history: History::new(history_cap),
            cancelled: History::new(CANCELLED_CAP.min(history_cap)),
            free: FreeRequest::default(),
            next_number: 0,
            is_shut_down: false,
        };
        let shared = Arc::new(Shared {
            catalog: Catalog::new(nodes, services.clone()),
            services,
            cache: Mutex::new(ResultCache::new(cache)),
            state: Mutex::new(state),
            wake: Condvar::new(),
            events: broadcast::channel(event_capacity.max(16)).0,
        });
        let worker = {
            let shared = shared.clone();
            std::thread::Builder::new().name("kiln-queue".to_owned()).spawn(move || shared.work())
        };
        if let Err(error) = &worker {
            tracing::error!(%error, "the worker thread did not start: prompts will be queued but not run");
        }
        Arc::new(Self { shared, worker: Mutex::new(worker.ok()) })
    }

    /// Stops the running prompt, leaves the waiting ones and ends the worker thread;
    /// called by a node, it doesn't wait for that.
    pub fn shutdown(&self) {
        let mut state = lock(&self.shared.state);
        state.is_shut_down = true;
        for running in &state.running {
            running.is_interrupted.store(true, Ordering::Relaxed);
        }
        let me = std::thread::current().id();
        let is_own_prompt = state.running.iter().any(|r| r.thread.get() == Some(&me));
        drop(state);
        self.shared.wake.notify_all();
        let worker = lock(&self.worker).take();
        if let Some(worker) = worker.filter(|w| !is_own_prompt && w.thread().id() != me)
            && worker.join().is_err()
        {
            tracing::error!("the worker thread ended with a panic");
        }
    }

    /// Checks a prompt and queues it.
    pub fn submit(&self, submission: Submission) -> Result<Accepted, Box<Refused>> {
        let Submission { mut prompt, prompt_id, number, front, mut extra_data, client_id, .. } = submission;
        let (owner, limits) = (submission.owner.map(Id::from), submission.limits);
        let number = self.take_number(number, front);
        let targets = submission.partial_execution_targets;
        let validated =
            graph::validate(&mut prompt, &self.shared.catalog, targets.as_deref()).map_err(|r| {
                Box::new(Refused { error: r.error, node_errors: r.node_errors, is_queue_full: false })
            })?;
        if let Some(client_id) = client_id {
            extra_data.insert("client_id".to_owned(), Json::String(client_id));
        }
        let prompt_id = prompt_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let job = Job {
            number: number.clone(),
            id: prompt_id.as_str().into(),
            prompt,
            client_id: extra_data.get("client_id").and_then(Json::as_str).map(Id::from),
            extra_data,
            outputs: validated.outputs,
            owner,
            created_ms: events::now_ms(),
        };
        let mut state = lock(&self.shared.state);
        state.check_room(&job, limits)?;
        state.queue.push(job);
        self.shared.emit_status(&state);
        drop(state);
        self.shared.wake.notify_one();
        Ok(Accepted { prompt_id, number, node_errors: validated.node_errors })
    }

    /// Checks a prompt without queueing it.
    pub fn validate(&self, submission: Submission) -> Result<graph::Validated, Box<Refused>> {
        let Submission { mut prompt, partial_execution_targets: targets, .. } = submission;
        graph::validate(&mut prompt, &self.shared.catalog, targets.as_deref()).map_err(|r| {
            Box::new(Refused { error: r.error, node_errors: r.node_errors, is_queue_full: false })
        })
    }

    /// A workflow as the web page saves it, as a prompt.
    pub fn convert_workflow(&self, workflow: &Json) -> Result<Json, graph::WorkflowError> {
        graph::convert_workflow(workflow, &|class| self.shared.catalog.class(class).map(|c| &c.schema))
    }

    /// The given priority or the next number. Counts up in every case, as ComfyUI does.
    fn take_number(&self, given: Option<f64>, front: bool) -> Number {
        if let Some(number) = given.and_then(Number::from_f64) {
            return number;
        }
        let mut state = lock(&self.shared.state);
        let number = state.next_number;
        state.next_number += 1;
        if front { (-number).into() } else { number.into() }
    }

    /// What runs and what waits.
    pub fn queue(&self) -> QueueSnapshot {
        let state = lock(&self.shared.state);
        let running: Vec<_> = state.running.iter().map(|r| r.job.clone()).collect();
        let pending = state.queue.waiting();
        drop(state);
        QueueSnapshot {
            running: running.iter().map(|job| job.to_json()).collect(),
            pending: pending.iter().map(|waiting| waiting.job().to_json()).collect(),
        }
    }

    /// `{"queue_running": […], "queue_pending": […]}`, made without the trees.
    pub fn queue_text(&self) -> String {
        let state = lock(&self.shared.state);
        let running: Vec<_> = state.running.iter().map(|r| r.job.clone()).collect();
        let pending = state.queue.waiting();
        drop(state);
        let running: Vec<Json> = running.iter().map(|job| job.to_json()).collect();
        let mut text = format!("{{\"queue_running\":{},\"queue_pending\":[", Json::Array(running));
        for (i, waiting) in pending.iter().enumerate() {
            text.push_str(if i > 0 { "," } else { "" });
            waiting.write(&mut text);
        }
        text.push_str("]}");
        text
    }

    /// Running plus waiting prompts.
    pub fn queue_remaining(&self) -> usize {
        let state = lock(&self.shared.state);
        state.queue.len() + state.running.len()
    }

    /// Takes prompts out of the queue; running ones and unknown ids are left alone.
    /// Returns how many were taken out.
    pub fn delete_pending(&self, ids: &[String]) -> usize {
        let mut state = lock(&self.shared.state);
        let jobs = state.queue.delete(ids);
        let count = jobs.len();
        if count > 0 {
            self.shared.emit_status(&state);
        }
        self.shared.note_cancelled(&mut state, jobs);
        count
    }

    /// Takes all waiting prompts out of the queue.
    pub fn clear_pending(&self) {
        let mut state = lock(&self.shared.state);
        let jobs = state.queue.clear();
        self.shared.emit_status(&state);
        self.shared.note_cancelled(&mut state, jobs);
    }

    /// Asks the running prompt of that id to stop, or any that runs. Does nothing while idle.
    pub fn interrupt(&self, prompt_id: Option<&str>) {
        let state = lock(&self.shared.state);
        for running in state.running.iter().filter(|r| prompt_id.is_none_or(|id| *r.job.id == *id)) {
            running.is_interrupted.store(true, Ordering::Relaxed);
        }
    }

    /// Finished prompts by id, oldest first: `max_items` from `offset` on, or
    /// the newest `max_items` without an offset.
    pub fn history(&self, max_items: Option<i64>, offset: Option<i64>) -> Json {
        let entries = lock(&self.shared.state).history.slice(max_items, offset);
        history::to_json(&entries)
    }

    /// `{id: entry}`, or an empty object for an unknown id.
    pub fn history_one(&self, prompt_id: &str) -> Json {
        let entry = lock(&self.shared.state).history.get(prompt_id);
        history::to_json(entry.as_slice())
    }

    /// The text of [`Engine::history`], made without the tree.
    pub fn history_text(&self, max_items: Option<i64>, offset: Option<i64>) -> String {
        let entries = lock(&self.shared.state).history.slice(max_items, offset);
        history::to_text(&entries)
    }

    /// The text of [`Engine::history_one`], made without the tree.
    pub fn history_one_text(&self, prompt_id: &str) -> String {
        let entry = lock(&self.shared.state).history.get(prompt_id);
        history::to_text(entry.as_slice())
    }

    /// Forgets finished prompts.
    pub fn delete_history(&self, ids: &[String]) {
        let mut state = lock(&self.shared.state);
        for id in ids {
            state.history.delete(id);
            state.cancelled.delete(id);
        }
    }

    /// Forgets all finished prompts.
    pub fn clear_history(&self) {
        let mut state = lock(&self.shared.state);
        state.history.clear();
        state.cancelled.clear();
    }

    /// The device that diffusion models run on, and its memory.
    pub fn device(&self) -> (BackendInfo, MemoryUse) {
        let backend = &self.shared.services.models.placement().diffusion;
        (backend.info(), backend.memory())
    }

    /// Frees memory at the next safe point: at once while idle, else before the next node.
    pub fn free(&self, request: FreeRequest) {
        lock(&self.shared.state).free.merge(request);
        self.shared.wake.notify_one();
    }

    /// `/object_info` of one class (an empty object if unknown) or of all, with the files of now.
    pub fn object_info(&self, class: Option<&str>) -> Json {
        let catalog = &self.shared.catalog;
        let classes: Map<String, Json> = catalog
            .iter()
            .filter(|c| class.is_none_or(|name| name == c.schema.class))
            .map(|c| (c.schema.class.to_owned(), graph::object_info(&c.schema, catalog)))
            .collect();
        Json::Object(classes)
    }

    /// The node that a prompt of this client runs right now: `(prompt id, node id)`.
    /// A client that connects again is told.
    pub fn executing(&self, client_id: &str) -> Option<(String, String)> {
        let state = lock(&self.shared.state);
        state.running.iter().filter(|r| r.job.client_id.as_deref() == Some(client_id)).find_map(|r| {
            let (node, _) = lock(&r.live).current.clone()?;
            Some((r.job.id.to_string(), node.to_string()))
        })
    }

    /// All events from now on. A receiver that falls more than the capacity
    /// behind loses the oldest events, never stops the engine.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.shared.events.subscribe()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}
