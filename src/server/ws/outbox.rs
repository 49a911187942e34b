//! The queue of one WebSocket: what it may hold, and what goes first when it overflows.
//!
//! Producers never wait. A client that reads slowly loses previews first, then
//! outdated progress; what it must not lose (`executed`, `execution_error`, …)
//! is kept up to a hard bound, beyond which the connection is given up.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Message;

/// What may happen to a message when its client reads slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Must arrive.
    Vital,
    /// Outdated by the next one of its kind.
    Progress,
    /// A picture of a step; nice to have.
    Preview,
}

const PREVIEW_BYTES: usize = 512 * 1024;
const PROGRESS_BYTES: usize = 128 * 1024;
const VITAL_BYTES: usize = 64 * 1024 * 1024;
const VITAL_MESSAGES: usize = 20_000;

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<(Weight, Message)>,
    /// Bytes queued, by [`Weight`].
    bytes: [usize; 3],
    vital_messages: usize,
    is_closed: bool,
}

impl State {
    fn add(&mut self, weight: Weight, message: Message) {
        self.bytes[weight as usize] += message.len();
        self.vital_messages += usize::from(weight == Weight::Vital);
        self.queue.push_back((weight, message));
    }

    fn remove(&mut self, at: usize) -> Option<Message> {
        let (weight, message) = self.queue.remove(at)?;
        self.bytes[weight as usize] -= message.len();
        self.vital_messages -= usize::from(weight == Weight::Vital);
        Some(message)
    }

    /// Drops the oldest messages of this weight until `extra` more bytes fit into `limit`.
    fn make_room(&mut self, weight: Weight, extra: usize, limit: usize) {
        while self.bytes[weight as usize] + extra > limit {
            let oldest = self.queue.iter().position(|(w, _)| *w == weight);
            if oldest.and_then(|at| self.remove(at)).is_none() {
                break;
            }
        }
    }
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Notify,
}

impl Outbox {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a message; `false` if the connection is given up.
    pub(super) fn push(&self, weight: Weight, message: Message) -> bool {
        let mut state = self.state();
        if state.is_closed {
            return false;
        }
        let bytes = message.len();
        match weight {
            Weight::Preview => state.make_room(weight, bytes, PREVIEW_BYTES),
            Weight::Progress => state.make_room(weight, bytes, PROGRESS_BYTES),
            Weight::Vital => {
                let is_full = state.vital_messages >= VITAL_MESSAGES
                    || state.bytes[weight as usize] + bytes > VITAL_BYTES;
                if is_full && state.vital_messages > 0 {
                    *state = State { is_closed: true, ..State::default() };
                    drop(state);
                    self.changed.notify_one();
                    return false;
                }
            }
        }
        state.add(weight, message);
        drop(state);
        self.changed.notify_one();
        true
    }

    /// The next message to send, if any.
    pub(super) fn pop(&self) -> Option<Message> {
        self.state().remove(0)
    }

    /// Whether the connection is given up.
    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Waits until something was pushed or the connection was given up. Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(bytes: usize) -> Message {
        Message::binary(vec![0_u8; bytes])
    }

    fn drain(outbox: &Outbox) -> Vec<Message> {
        std::iter::from_fn(|| outbox.pop()).collect()
    }

    #[test]
    fn previews_go_first_and_vital_messages_stay() {
        let outbox = Outbox::default();
        for i in 0..1000 {
            assert!(outbox.push(Weight::Preview, binary(33_000)));
            assert!(outbox.push(Weight::Progress, Message::text(format!("p{i:01023}"))));
            if i % 100 == 0 {
                assert!(outbox.push(Weight::Vital, Message::text(format!("v{i}"))));
            }
        }
        let left = drain(&outbox);
        assert_eq!(left.iter().filter(|m| m.is_binary()).count(), PREVIEW_BYTES / 33_000);
        let texts: Vec<_> = left.iter().filter(|m| m.is_text()).map(|m| m.to_string()).collect();
        let vital: Vec<_> = texts.iter().filter(|t| t.starts_with('v')).cloned().collect();
        assert_eq!(vital, (0..10).map(|i| format!("v{}", i * 100)).collect::<Vec<_>>());
        assert_eq!(texts.len() - vital.len(), PROGRESS_BYTES / 1024);
        assert!(texts.last().is_some_and(|t| t.ends_with("0999")), "the newest progress is kept");
    }

    #[test]
    fn a_large_picture_alone_passes() {
        let outbox = Outbox::default();
        assert!(outbox.push(Weight::Preview, binary(PREVIEW_BYTES * 2)));
        assert!(outbox.push(Weight::Vital, binary(VITAL_BYTES + 1)));
        assert_eq!(drain(&outbox).len(), 2);
    }

    #[test]
    fn gives_up_when_vital_messages_pile_up() {
        let outbox = Outbox::default();
        let kept = (0..VITAL_MESSAGES + 5).filter(|_| outbox.push(Weight::Vital, Message::text("x"))).count();
        assert_eq!(kept, VITAL_MESSAGES);
        assert!(outbox.is_closed());
        assert_eq!(drain(&outbox).len(), 0);
        assert!(!outbox.push(Weight::Preview, binary(1)));
    }
}
