//! `--trace`: every kernel launch with its shapes and its time on the device, for Chrome and Perfetto.
//!
//! The file is made before any work, so that a path that can't be written is
//! known at once, and written while the work goes on: a server can be traced for
//! hours without filling the memory, and what a killed process leaves can still
//! be opened (the format is an array whose end may be missing).
//!
//! Not a profiler: each launch is timed by itself and waits for the one before,
//! and nothing is replayed as a graph. What a whole step takes is told by `kiln bench`.
//!
//! The format: "Trace Event Format", complete events ("X").

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::driver::{Driver, LaunchRecord};

/// How often records go from memory to the file.
const INTERVAL: Duration = Duration::from_millis(250);

/// The flag.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TraceArgs {
    /// Writes every kernel launch with its shapes and its time on the device, for Chrome or Perfetto. Each launch is
    /// then timed by itself, which makes the run slower.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

impl TraceArgs {
    /// The file, made now; none without the flag.
    pub fn create(&self) -> Result<Option<TraceFile>> {
        let Some(path) = &self.trace else { return Ok(None) };
        let mut file = BufWriter::new(File::create(path).with_context(|| writing(path))?);
        file.write_all(b"[").and_then(|()| file.flush()).with_context(|| writing(path))?;
        Ok(Some(TraceFile { path: path.clone(), file }))
    }
}

fn writing(path: &Path) -> String {
    format!("--trace: {} can't be written", path.display())
}

/// An open file without events.
pub struct TraceFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl TraceFile {
    /// Names the device.
    fn begin(&mut self, device: &str) -> io::Result<()> {
        let name = json!({"name": "process_name", "ph": "M", "pid": 0, "args": {"name": device}});
        write!(self.file, "\n{name}")
    }

    fn append(&mut self, records: &[LaunchRecord]) -> io::Result<()> {
        records.iter().try_for_each(|record| write!(self.file, ",\n{}", event(record)))?;
        self.file.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        self.file.write_all(b"\n]\n")?;
        self.file.flush()
    }

    /// Writes the whole file: launches that were recorded before.
    pub fn write(mut self, driver: &dyn Driver, records: &[LaunchRecord]) -> Result<()> {
        let written = self.begin(&driver.device().name).and_then(|()| self.append(records));
        written.and_then(|()| self.end()).with_context(|| writing(&self.path))
    }

    /// Records the launches of `driver` from now on.
    pub fn start(mut self, driver: Arc<dyn Driver>) -> Trace {
        driver.instruments().set_tracing(true);
        let (stop, stopped) = mpsc::channel::<()>();
        let (path, device) = (self.path.clone(), driver.clone());
        let writer = std::thread::spawn(move || -> io::Result<()> {
            self.begin(&device.device().name)?;
            loop {
                let is_over = stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
                self.append(&device.instruments().take_trace())?;
                if is_over {
                    return self.end();
                }
            }
        });
        Trace { path, driver, stop, writer: Some(writer) }
    }
}

/// One launch as an event.
fn event(record: &LaunchRecord) -> serde_json::Value {
    json!({
        "name": record.kernel, "cat": "kernel", "ph": "X", "ts": record.start_us, "dur": record.duration_us,
        "pid": 0, "tid": 0,
        "args": {
            "shape": record.label, "grid": record.grid, "block": record.block, "shared": record.shared,
        },
    })
}

/// A trace that goes on until [`finish`](Self::finish), or until it is dropped.
pub struct Trace {
    path: PathBuf,
    driver: Arc<dyn Driver>,
    stop: Sender<()>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl Trace {
    /// Ends the recording and the file.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        self.driver.instruments().set_tracing(false);
        // The writer is gone if the file could not be written; it says so below.
        let _ = self.stop.send(());
        let written = writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")));
        written.with_context(|| writing(&self.path))
    }
}

impl Drop for Trace {
    /// Work that failed still leaves what was recorded.
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_the_name_the_shape_and_the_times() {
        let record = LaunchRecord {
            kernel: "gemm_sm80_128x128_f16".into(),
            label: "linear 512x1280x320".into(),
            grid: [40, 1, 1],
            block: [128, 1, 1],
            shared: 65536,
            start_us: 12.5,
            duration_us: 3.25,
        };
        let event = event(&record);
        assert_eq!((&event["name"], &event["ph"]), (&json!("gemm_sm80_128x128_f16"), &json!("X")));
        assert_eq!((&event["ts"], &event["dur"]), (&json!(12.5), &json!(3.25)));
        let args = json!({"shape": "linear 512x1280x320", "grid": [40, 1, 1], "block": [128, 1, 1], "shared": 65536});
        assert_eq!(event["args"], args);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_known_at_once() {
        let args = TraceArgs { trace: Some("/no/such/folder/trace.json".into()) };
        let error = format!("{:#}", args.create().err().unwrap());
        assert!(
            error.starts_with("--trace: /no/such/folder/trace.json can't be written: No such file"),
            "{error}"
        );
        assert!(TraceArgs::default().create().unwrap().is_none());
    }
}
