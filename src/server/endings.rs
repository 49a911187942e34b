//! Who waits for the end of a prompt: `wait`, webhooks.
//!
//! One map of waiters, fed by the task that reads the engine's events, so that a
//! waiting prompt costs no task that wakes at every step of another one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::engine::{Engine, Event, JobStatus};

type Waiters = HashMap<String, Vec<oneshot::Sender<()>>>;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Endings(Mutex<Waiters>);

impl Endings {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when the prompt is over (or the server ends). To be called before the prompt is queued.
    pub(super) fn watch(&self, prompt_id: &str) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut waiters = self.waiters();
        let of_prompt = waiters.entry(prompt_id.to_owned()).or_default();
        of_prompt.retain(|waiter| !waiter.is_closed());
        of_prompt.push(sender);
        receiver
    }

    /// Forgets waiters that gave up.
    pub(super) fn tidy(&self, prompt_id: &str) {
        let mut waiters = self.waiters();
        if let Some(of_prompt) = waiters.get_mut(prompt_id) {
            of_prompt.retain(|waiter| !waiter.is_closed());
            if of_prompt.is_empty() {
                waiters.remove(prompt_id);
            }
        }
    }

    /// Wakes those who wait for this event.
    pub(super) fn note(&self, event: &Event) {
        if let Some(id) = event.kind.ended_prompt() {
            self.wake(id);
        }
    }

    fn wake(&self, id: &str) {
        let woken = self.waiters().remove(id);
        for waiter in woken.into_iter().flatten() {
            // An error says that a waiter gave up.
            let _ = waiter.send(());
        }
    }

    /// Wakes those whose event was lost.
    pub(super) fn catch_up(&self, engine: &Engine) {
        let ids: Vec<String> = self.waiters().keys().cloned().collect();
        for id in ids {
            if engine.job_status(&id).is_some_and(JobStatus::is_over) {
                self.wake(&id);
            }
        }
    }
}
