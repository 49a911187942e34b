//! The last lines of the log, for the web page's terminal.
//!
//! A [`LogTail`] is a writer for `tracing_subscriber`; what is written to it is
//! kept, the newest 300 messages, and shown by `/internal/logs`. Clients that
//! asked for it get new lines over their WebSocket as well.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde_json::{Value as Json, json};
use tokio::sync::Notify;
use tracing_subscriber::fmt::MakeWriter;

use crate::files::LocalTime;

/// Messages kept.
const KEPT: usize = 300;
/// Longest message, in bytes.
const MAX_BYTES: usize = 16 * 1024;

#[derive(Clone, Debug)]
struct Line {
    time: SystemTime,
    text: String,
}

impl Line {
    fn to_json(&self) -> Json {
        json!({"t": LocalTime::iso(self.time), "m": self.text})
    }
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<Line>,
    /// Messages ever written.
    count: u64,
}

/// See the [module](self). Clones share their lines.
#[derive(Clone, Debug, Default)]
pub struct LogTail {
    lines: Arc<Mutex<Lines>>,
    changed: Arc<Notify>,
}

impl LogTail {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, text: String) {
        let mut lines = self.lines();
        if lines.kept.len() >= KEPT {
            lines.kept.pop_front();
        }
        lines.kept.push_back(Line { time: SystemTime::now(), text });
        lines.count += 1;
        drop(lines);
        self.changed.notify_one();
    }

    /// What is kept, one text: `time - message` a line.
    pub(super) fn text(&self) -> String {
        let lines = self.lines();
        lines.kept.iter().map(|l| format!("{} - {}", LocalTime::iso(l.time), l.text)).collect()
    }

    /// What is kept: `[{"t", "m"}]`.
    pub(super) fn entries(&self) -> Json {
        self.since(0).1
    }

    /// Messages after the first `seen` ones, as far as they are kept, and how many there were in all.
    pub(super) fn since(&self, seen: u64) -> (u64, Json) {
        let lines = self.lines();
        let fresh = usize::try_from(lines.count.saturating_sub(seen)).unwrap_or(usize::MAX);
        let skipped = lines.kept.len().saturating_sub(fresh);
        (lines.count, lines.kept.iter().skip(skipped).map(Line::to_json).collect())
    }

    /// Waits for a message.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// The size of the terminal that the page draws.
pub(super) fn size() -> Json {
    json!({"cols": 80, "rows": 24})
}

/// One message on its way in.
pub struct LineWriter {
    tail: LogTail,
    bytes: Vec<u8>,
}

impl io::Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = MAX_BYTES.saturating_sub(self.bytes.len());
        self.bytes.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.tail.push(String::from_utf8_lossy(&self.bytes).into_owned());
        }
    }
}

impl MakeWriter<'_> for LogTail {
    type Writer = LineWriter;

    fn make_writer(&self) -> LineWriter {
        LineWriter { tail: self.clone(), bytes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_newest_lines_are_kept() {
        let tail = LogTail::default();
        for i in 0..KEPT + 5 {
            writeln!(tail.make_writer(), "line {i}").unwrap();
        }
        drop(tail.make_writer());
        let (count, entries) = tail.since(KEPT as u64 + 3);
        assert_eq!(count, KEPT as u64 + 5);
        let texts: Vec<&str> = entries.as_array().unwrap().iter().map(|e| e["m"].as_str().unwrap()).collect();
        assert_eq!(texts, ["line 303\n", "line 304\n"]);
        let all = tail.entries();
        assert_eq!((all.as_array().unwrap().len(), &all[0]["m"]), (KEPT, &json!("line 5\n")));
        let time = all[0]["t"].as_str().unwrap();
        assert!(time.len() == 26 && time.as_bytes()[10] == b'T' && time.as_bytes()[19] == b'.', "{time}");
        assert_eq!(tail.since(1_000_000).1, json!([]));
        assert!(tail.text().ends_with(" - line 304\n") && tail.text().lines().count() == KEPT);
    }

    #[test]
    fn long_messages_are_cut() {
        let tail = LogTail::default();
        tail.make_writer().write_all(&vec![b'x'; MAX_BYTES * 3]).unwrap();
        assert_eq!(tail.entries()[0]["m"].as_str().unwrap().len(), MAX_BYTES);
    }
}
