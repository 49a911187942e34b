//! Jobs: one view over the prompts that wait, run and have ended.
//!
//! `/queue` and `/history` are ComfyUI's two lists; newer clients ask for jobs,
//! with a state, times, progress and outputs. What a list filters and sorts by
//! is copied under the lock; the rows of the page asked for are made after it.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Map, Number, Value as Json};

use super::events::{EventKind, Id, NodeProgress, now_ms};
use super::history::{Entry, Facts, Kept};
use super::queue::{Job, Waiting};
use super::{Engine, Running, Shared, State, lock};
use crate::nodes::PreviewFrame;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// It waits.
    Pending,
    /// It runs.
    InProgress,
    /// It ended well.
    Completed,
    /// A node of it failed.
    Failed,
    /// It was stopped, or taken out of the queue.
    Cancelled,
}

impl JobStatus {
    /// Every state.
    pub const ALL: [JobStatus; 5] =
        [Self::Pending, Self::InProgress, Self::Completed, Self::Failed, Self::Cancelled];

    /// ComfyUI's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }

    /// Whether the job will not change any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// How far a running job is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobProgress {
    /// Nodes that ran or were answered from the cache.
    pub nodes_done: usize,
    /// Nodes that the outputs need.
    pub nodes_total: usize,
    /// The node that runs now, and its class.
    pub current: Option<(String, String)>,
    /// Step and number of steps of that node, if it counts any.
    pub step: Option<(u64, u64)>,
}

impl JobProgress {
    /// The done part of all work, 0 to 1: nodes count alike, the current one by its steps.
    pub fn fraction(&self) -> f64 {
        let part = self.step.map_or(0.0, |(step, steps)| step as f64 / (steps.max(1)) as f64);
        let done = self.nodes_done as f64 + part.min(1.0);
        (done / self.nodes_total.max(1) as f64).clamp(0.0, 1.0)
    }
}

/// Everything about one job.
#[derive(Clone, Debug)]
pub struct JobView {
    /// The prompt's id.
    pub id: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Whether it runs but was asked to stop.
    pub is_cancelling: bool,
    /// Its priority.
    pub number: Number,
    /// When it was accepted, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it began to run.
    pub started_ms: Option<u64>,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// How many prompts wait before it, if it waits.
    pub queue_position: Option<usize>,
    /// How far it is, if it runs.
    pub progress: Option<JobProgress>,
    /// The prompt with converted values.
    pub prompt: Json,
    /// What the client sent with it.
    pub extra_data: Json,
    /// `ui` data by node id; of a running job what is there so far.
    pub outputs: Map<String, Json>,
    /// ComfyUI's `status` of a job that is over: `status_str`, `completed`, `messages`.
    pub end: Json,
}

impl JobView {
    /// The id of the workflow it was made from, if the client's page sent one.
    pub fn workflow_id(&self) -> Option<&str> {
        self.extra_data.get("extra_pnginfo")?.get("workflow")?.get("id")?.as_str()
    }

    /// The data of `execution_error`, if that ended it.
    pub fn error(&self) -> Option<&Json> {
        let messages = self.end.get("messages")?.as_array()?;
        messages.iter().find(|m| m.get(0).is_some_and(|name| name == "execution_error"))?.get(1)
    }
}

/// What a list of jobs is sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobSort {
    /// When they were accepted.
    #[default]
    CreatedAt,
    /// How long they ran.
    Duration,
}

/// Which jobs are asked for.
#[derive(Clone, Debug, Default)]
pub struct JobQuery {
    /// Only these states; all if empty.
    pub statuses: Vec<JobStatus>,
    /// Only jobs of this workflow.
    pub workflow_id: Option<String>,
    /// The order.
    pub sort: JobSort,
    /// Smallest first instead of largest first.
    pub is_ascending: bool,
    /// How many to leave out.
    pub offset: usize,
    /// How many to give at most.
    pub limit: Option<usize>,
}

/// A page of jobs.
#[derive(Clone, Debug, Default)]
pub struct JobList {
    /// The jobs of the page.
    pub jobs: Vec<JobView>,
    /// How many there are on all pages.
    pub total: usize,
}

/// What came of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelling {
    /// It waited and is out of the queue.
    Removed,
    /// It runs and stops at the next step.
    Asked,
    /// It was over before.
    WasOver,
}

/// How far a running prompt is; filled by the executor.
#[derive(Debug, Default)]
pub(super) struct Live {
    pub started_ms: Option<u64>,
    pub nodes_total: usize,
    pub done: HashSet<Id>,
    pub current: Option<(Id, &'static str)>,
    pub step: Option<(u64, u64)>,
    pub outputs: Map<String, Json>,
    /// The states of the last `progress_state`.
    pub states: Vec<NodeProgress>,
    pub preview: Option<(Id, PreviewFrame)>,
}

impl Live {
    fn progress(&self) -> JobProgress {
        JobProgress {
            nodes_done: self.done.len().min(self.nodes_total),
            nodes_total: self.nodes_total,
            current: self.current.as_ref().map(|(id, class)| (id.to_string(), (*class).to_owned())),
            step: self.step,
        }
    }
}

/// A job before its view is made.
enum Row {
    Pending(Waiting, usize),
    Running(Arc<Running>),
    Over(Kept),
}

impl Row {
    fn facts(&self) -> Facts {
        let of = |created_ms, status, started_ms| Facts { status, created_ms, started_ms, ended_ms: None };
        match self {
            Row::Pending(waiting, _) => of(waiting.created_ms, JobStatus::Pending, None),
            Row::Running(running) => {
                of(running.job.created_ms, JobStatus::InProgress, lock(&running.live).started_ms)
            }
            Row::Over(kept) => kept.facts,
        }
    }

    fn view(&self) -> JobView {
        match self {
            Row::Pending(waiting, position) => {
                JobView { queue_position: Some(*position), ..of_job(&waiting.job(), JobStatus::Pending) }
            }
            Row::Running(running) => {
                let live = lock(&running.live);
                JobView {
                    is_cancelling: running.is_interrupted.load(Ordering::Relaxed),
                    started_ms: live.started_ms,
                    progress: Some(live.progress()),
                    outputs: live.outputs.clone(),
                    ..of_job(&running.job, JobStatus::InProgress)
                }
            }
            Row::Over(kept) => of_entry(kept),
        }
    }
}

fn of_job(job: &Job, status: JobStatus) -> JobView {
    JobView {
        id: job.id.to_string(),
        status,
        is_cancelling: false,
        number: job.number.clone(),
        created_ms: job.created_ms,
        started_ms: None,
        ended_ms: None,
        queue_position: None,
        progress: None,
        prompt: job.prompt.clone(),
        extra_data: Json::Object(job.extra_data.clone()),
        outputs: Map::new(),
        end: Json::Null,
    }
}

fn of_entry(kept: &Kept) -> JobView {
    let mut entry = kept.to_json();
    let mut take = |path: &str| entry.pointer_mut(path).map(Json::take).unwrap_or_default();
    let number = match take("/prompt/0") {
        Json::Number(number) => number,
        _ => 0.into(),
    };
    JobView {
        id: kept.id.to_string(),
        status: kept.facts.status,
        is_cancelling: false,
        number,
        created_ms: kept.facts.created_ms,
        started_ms: kept.facts.started_ms,
        ended_ms: kept.facts.ended_ms,
        queue_position: None,
        progress: None,
        prompt: take("/prompt/2"),
        extra_data: take("/prompt/3"),
        outputs: match take("/outputs") {
            Json::Object(outputs) => outputs,
            _ => Map::new(),
        },
        end: take("/status"),
    }
}

impl State {
    /// Every job: what runs, what waits, what is over (newest last in each).
    fn rows(&self) -> Vec<Row> {
        let running = self.running.iter().cloned().map(Row::Running);
        let pending = self.queue.waiting().into_iter().enumerate().map(|(i, job)| Row::Pending(job, i));
        let over = self.history.slice(None, None).into_iter().chain(self.cancelled.slice(None, None));
        over.map(Row::Over).chain(running).chain(pending).collect()
    }

    fn row(&self, id: &str) -> Option<Row> {
        let running = self.running.iter().find(|r| *r.job.id == *id).cloned().map(Row::Running);
        let pending = || self.queue.find(id).map(|(at, waiting)| Row::Pending(waiting, at));
        let over = || self.history.get(id).or_else(|| self.cancelled.get(id)).map(Row::Over);
        running.or_else(pending).or_else(over)
    }
}

impl Shared {
    /// Remembers prompts that left the queue without running, and says so.
    pub(super) fn note_cancelled(&self, state: &mut State, jobs: Vec<Waiting>) {
        let forgotten = jobs.len().saturating_sub(super::CANCELLED_CAP);
        for (i, job) in jobs.into_iter().enumerate() {
            let (client_id, prompt_id) = (job.client_id.clone(), job.id.clone());
            if i >= forgotten {
                state.cancelled.push(Entry::cancelled(job.job()).into());
            }
            self.emit(client_id, EventKind::Cancelled { prompt_id });
        }
    }
}

impl Engine {
    /// A page of jobs.
    pub fn jobs(&self, query: &JobQuery) -> JobList {
        let rows = lock(&self.shared.state).rows();
        let wanted = |status| query.statuses.is_empty() || query.statuses.contains(&status);
        let mut rows: Vec<(Facts, Row)> = rows
            .into_iter()
            .map(|row| (row.facts(), row))
            .filter(|(facts, _)| wanted(facts.status))
            .collect();
        if let Some(workflow) = &query.workflow_id {
            rows.retain(|(_, row)| row.view().workflow_id() == Some(workflow));
        }
        let key = |facts: &Facts| match query.sort {
            JobSort::CreatedAt => facts.created_ms,
            JobSort::Duration => match (facts.started_ms, facts.ended_ms) {
                (Some(start), Some(end)) => end.saturating_sub(start),
                _ => 0,
            },
        };
        if query.is_ascending {
            rows.sort_by_key(|(facts, _)| key(facts));
        } else {
            rows.reverse();
            rows.sort_by_key(|(facts, _)| Reverse(key(facts)));
        }
        let page = rows.iter().skip(query.offset).take(query.limit.unwrap_or(usize::MAX));
        JobList { jobs: page.map(|(_, row)| row.view()).collect(), total: rows.len() }
    }

    /// One job; the newest of that id.
    pub fn job(&self, id: &str) -> Option<JobView> {
        let row = lock(&self.shared.state).row(id);
        row.map(|row| row.view())
    }

    /// Where a job stands.
    pub fn job_status(&self, id: &str) -> Option<JobStatus> {
        let row = lock(&self.shared.state).row(id);
        row.map(|row| row.facts().status)
    }

    /// How far a running job is; `None` if it doesn't run.
    pub fn job_progress(&self, id: &str) -> Option<JobProgress> {
        let state = lock(&self.shared.state);
        let running = state.running.iter().find(|r| *r.job.id == *id)?.clone();
        drop(state);
        let progress = lock(&running.live).progress();
        Some(progress)
    }

    /// Takes a waiting job out of the queue, or asks a running one to stop; `None` for an unknown id.
    pub fn cancel(&self, id: &str) -> Option<Cancelling> {
        if self.delete_pending(&[id.to_owned()]) > 0 {
            return Some(Cancelling::Removed);
        }
        match self.job_status(id)? {
            JobStatus::InProgress => {
                self.interrupt(Some(id));
                Some(Cancelling::Asked)
            }
            // Taken up by the worker between the two questions.
            JobStatus::Pending => self.cancel(id),
            _ => Some(Cancelling::WasOver),
        }
    }

    /// The messages that tell a late client what its running prompt has done so far:
    /// `execution_start`, the states of its nodes, the node that runs and its step.
    /// Without an owner a prompt is everybody's.
    pub fn catch_up(&self, client_id: &str) -> Vec<EventKind> {
        let state = lock(&self.shared.state);
        let is_mine = |r: &&Arc<Running>| r.job.client_id.as_deref().is_none_or(|id| id == client_id);
        let running: Vec<_> = state.running.iter().filter(is_mine).cloned().collect();
        drop(state);
        running.iter().flat_map(|r| r.catch_up()).collect()
    }

    /// The last preview of a running job, and its node.
    pub fn last_preview(&self, id: &str) -> Option<(Id, PreviewFrame)> {
        let state = lock(&self.shared.state);
        let running = state.running.iter().find(|r| *r.job.id == *id)?;
        lock(&running.live).preview.clone()
    }
}

impl Running {
    fn catch_up(&self) -> Vec<EventKind> {
        let live = lock(&self.live);
        let prompt_id = self.job.id.clone();
        let Some((node, _)) = live.current.clone() else { return Vec::new() };
        let timestamp = live.started_ms.unwrap_or_else(now_ms);
        let mut events = vec![
            EventKind::ExecutionStart { prompt_id: prompt_id.clone(), timestamp },
            EventKind::ProgressState { prompt_id: prompt_id.clone(), nodes: live.states.clone() },
            EventKind::Executing { node: Some(node.clone()), prompt_id: prompt_id.clone() },
        ];
        if let Some((value, max)) = live.step {
            events.push(EventKind::Progress { value, max, prompt_id, node, preview: None });
        }
        events
    }
}
