//! What tests and tools see of a driver: counters, planned allocation failures, a trace of launches.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::Launch;

/// How often things happened since the driver was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernel launches, those inside graphs at capture time included.
    pub launches: u64,
    /// Graph launches.
    pub graph_launches: u64,
    /// Device allocations.
    pub allocations: u64,
    /// Device memory given back.
    pub frees: u64,
    /// Host waits: for a stream, an event or a download.
    pub syncs: u64,
    /// Bytes copied to the device.
    pub uploaded: u64,
    /// Bytes copied from the device.
    pub downloaded: u64,
    /// Device bytes allocated now.
    pub bytes_in_use: u64,
}

/// One launch of a trace.
#[derive(Clone, Debug)]
pub struct LaunchRecord {
    /// Kernel.
    pub kernel: String,
    /// What the caller said of the shapes.
    pub label: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// Start, microseconds since the driver was opened.
    pub start_us: f64,
    /// Duration in microseconds on the device.
    pub duration_us: f64,
}

/// Counters, planned failures and trace of one driver.
pub struct Instruments {
    launches: AtomicU64,
    graph_launches: AtomicU64,
    allocations: AtomicU64,
    frees: AtomicU64,
    syncs: AtomicU64,
    uploaded: AtomicU64,
    downloaded: AtomicU64,
    bytes_in_use: AtomicU64,
    planned: Mutex<Option<Failures>>,
    tracing: AtomicBool,
    label: Mutex<String>,
    trace: Mutex<Vec<LaunchRecord>>,
    opened: Instant,
}

/// Allocations that are to fail.
#[derive(Clone, Copy)]
enum Failures {
    /// After so many that do not, so many in a row.
    Row(u32, u32),
    /// Every one when it is asked for first; whether the next is asked for again.
    First(bool),
}

impl Default for Instruments {
    fn default() -> Self {
        Self {
            launches: AtomicU64::new(0),
            graph_launches: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            frees: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            uploaded: AtomicU64::new(0),
            downloaded: AtomicU64::new(0),
            bytes_in_use: AtomicU64::new(0),
            planned: Mutex::default(),
            tracing: AtomicBool::new(false),
            label: Mutex::new(String::new()),
            trace: Mutex::new(Vec::new()),
            opened: Instant::now(),
        }
    }
}

impl Instruments {
    /// The counters now.
    pub fn counts(&self) -> Counts {
        Counts {
            launches: self.launches.load(Relaxed),
            graph_launches: self.graph_launches.load(Relaxed),
            allocations: self.allocations.load(Relaxed),
            frees: self.frees.load(Relaxed),
            syncs: self.syncs.load(Relaxed),
            uploaded: self.uploaded.load(Relaxed),
            downloaded: self.downloaded.load(Relaxed),
            bytes_in_use: self.bytes_in_use.load(Relaxed),
        }
    }

    /// The `n`-th allocation from now (0: the next) and `count - 1` after it fail as if the device were full.
    pub fn fail_allocations(&self, n: u32, count: u32) {
        let planned = (count > 0).then_some(Failures::Row(n, count));
        *self.planned.lock().unwrap_or_else(PoisonError::into_inner) = planned;
    }

    /// Every allocation from now on fails, and does not when it is asked for again.
    pub fn fail_first_tries(&self) {
        *self.planned.lock().unwrap_or_else(PoisonError::into_inner) = Some(Failures::First(false));
    }

    /// No allocation is to fail any more. Returns whether all that were planned did.
    pub fn cancel_failures(&self) -> bool {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).take().is_none()
    }

    /// Whether this allocation is one that was planned to fail.
    pub(super) fn is_failing(&self) -> bool {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        match *planned {
            None => false,
            Some(Failures::First(is_retry)) => {
                *planned = Some(Failures::First(!is_retry));
                !is_retry
            }
            Some(Failures::Row(0, count)) => {
                *planned = (count > 1).then(|| Failures::Row(0, count - 1));
                true
            }
            Some(Failures::Row(n, count)) => {
                *planned = Some(Failures::Row(n - 1, count));
                false
            }
        }
    }

    pub(super) fn allocated(&self, bytes: usize) {
        self.allocations.fetch_add(1, Relaxed);
        self.bytes_in_use.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn freed(&self, bytes: usize) {
        self.frees.fetch_add(1, Relaxed);
        self.bytes_in_use.fetch_sub(bytes as u64, Relaxed);
    }

    pub(super) fn synced(&self) {
        self.syncs.fetch_add(1, Relaxed);
    }

    pub(super) fn copied_up(&self, bytes: usize) {
        self.uploaded.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn copied_down(&self, bytes: usize) {
        self.downloaded.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn graph_launched(&self) {
        self.graph_launches.fetch_add(1, Relaxed);
    }

    /// Starts or stops recording launches.
    pub fn set_tracing(&self, on: bool) {
        self.tracing.store(on, Relaxed);
    }

    /// Whether launches are recorded: then labels are worth making.
    pub fn is_tracing(&self) -> bool {
        self.tracing.load(Relaxed)
    }

    /// Runs `work` unrecorded: it is timed as a whole, and a recording waits for every launch.
    pub fn untraced<T>(&self, work: impl FnOnce() -> T) -> T {
        let was_on = self.tracing.swap(false, Relaxed);
        let result = work();
        self.tracing.store(was_on, Relaxed);
        result
    }

    /// Names what the next launches work on.
    pub fn set_label(&self, label: String) {
        *self.label.lock().unwrap_or_else(PoisonError::into_inner) = label;
    }

    /// The recorded launches so far; the record starts anew.
    pub fn take_trace(&self) -> Vec<LaunchRecord> {
        std::mem::take(&mut *self.trace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts a launch, and records it with its time if tracing is on. `run` returns the
    /// microseconds on the device; none if it only went into a graph, which is no launch yet.
    pub(super) fn launched<T, E>(
        &self,
        kernel: &str,
        launch: &Launch,
        run: impl FnOnce() -> Result<(T, Option<f64>), E>,
    ) -> Result<T, E> {
        self.launches.fetch_add(1, Relaxed);
        if !self.is_tracing() {
            return run().map(|(result, _)| result);
        }
        let start = Instant::now();
        let (result, device_us) = run()?;
        let Some(duration_us) = device_us else { return Ok(result) };
        let label = self.label.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.trace.lock().unwrap_or_else(PoisonError::into_inner).push(LaunchRecord {
            kernel: kernel.to_owned(),
            label,
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            start_us: start.duration_since(self.opened).as_secs_f64() * 1e6,
            duration_us,
        });
        Ok(result)
    }
}
