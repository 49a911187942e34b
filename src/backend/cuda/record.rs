//! Recorded work: a forward pass as one CUDA graph, captured once and replayed.
//!
//! A graph holds addresses. Its inputs and its outcome live in buffers of their
//! own, and every call gets a copy of the outcome; its temporaries come from a pool that nothing but recorded work uses,
//! so that no tensor outside a graph can be where a replay writes. Graphs share
//! that pool: they run one after the other on one stream.
//!
//! The first call runs the work plainly (weights are packed and scratch memory
//! grows on the way), the second captures it, all others replay. While launches
//! are traced nothing is recorded: each kernel then runs and is timed by itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pool::Pool;
use super::{CudaError, Element, Gpu};
use crate::driver::{DevicePtr, Graph};
use crate::tensor::{Body, BodyError, DType, Outcome, Shape, Storage, Tensor, TensorError};

/// Recordings kept; the least recently used goes.
const KEPT: usize = 16;

/// What makes two calls the same work.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    work: u64,
    element: Element,
    shapes: Vec<Shape>,
}

/// One piece of recorded work.
struct Recording {
    /// Copies of the inputs at addresses that stay.
    inputs: Vec<Tensor>,
    /// Which loan each copy was made from last.
    sources: Vec<Option<u64>>,
    /// Missing while the work is captured, so that the capture takes the same memory.
    outcome: Option<Outcome>,
    graph: Option<Graph>,
    used: u64,
}

/// All recordings of a device.
pub struct Recorder {
    gpu: Arc<Gpu>,
    /// Temporaries of recorded work.
    pool: Arc<Pool>,
    is_recording: AtomicBool,
    recordings: Mutex<Recordings>,
}

#[derive(Default)]
struct Recordings {
    by_key: HashMap<Key, Recording>,
    clock: u64,
}

/// Resets the flag even if the work fails or panics.
struct Flag<'a>(&'a AtomicBool);

impl<'a> Flag<'a> {
    fn raise(flag: &'a AtomicBool) -> Self {
        flag.store(true, Relaxed);
        Self(flag)
    }
}

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

fn device_buffer(t: &Tensor) -> Result<(DevicePtr, u64), TensorError> {
    match t.storage() {
        Storage::Device(buffer) => Ok((DevicePtr(buffer.address()), buffer.loan())),
        Storage::Host(_) => {
            Err(TensorError::Unsupported { op: "record", what: "a tensor on another device".into() })
        }
    }
}

impl Recorder {
    /// Without recordings; temporaries come from `pool`.
    pub fn new(gpu: Arc<Gpu>, pool: Arc<Pool>) -> Self {
        Self { gpu, pool, is_recording: AtomicBool::new(false), recordings: Mutex::default() }
    }

    /// Whether work is being recorded: activations then come from [`Recorder::pool`].
    pub fn is_recording(&self) -> bool {
        self.is_recording.load(Relaxed)
    }

    /// Temporaries of recorded work.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn recordings(&self) -> MutexGuard<'_, Recordings> {
        self.recordings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets all recordings and their memory go.
    pub fn clear(&self) {
        let all = std::mem::take(&mut self.recordings().by_key);
        for recording in all.into_values() {
            self.destroy(recording);
        }
        self.pool.trim();
    }

    fn destroy(&self, recording: Recording) {
        let driver = self.gpu.driver();
        if let Some(graph) = recording.graph {
            let done = driver.synchronize(self.gpu.stream()).and_then(|()| driver.destroy_graph(graph));
            if let Err(error) = done {
                tracing::warn!(%error, "a CUDA graph was not destroyed");
            }
        }
    }

    /// See [`crate::tensor::Backend::record`]; `alloc` makes a tensor outside the recording.
    pub fn run(
        &self,
        (work, element): (u64, Element),
        inputs: &[&Tensor],
        body: &mut Body<'_>,
        alloc: impl Fn(Shape, DType) -> Result<Tensor, TensorError>,
    ) -> Result<Outcome, BodyError> {
        // One at a time: the flag and the pool are shared. A replay is one launch, so a trace would not see the kernels.
        if self.is_recording() || self.gpu.driver().instruments().is_tracing() {
            return body(inputs);
        }
        let key = Key { work, element, shapes: inputs.iter().map(|t| t.shape()).collect() };
        let known = self.recordings().by_key.remove(&key);
        let recording = match known {
            Some(recording) => match self.again(recording, inputs, body)? {
                Some(recording) => recording,
                None => self.first(inputs, body)?,
            },
            None => self.first(inputs, body)?,
        };
        let made = recording.outcome.as_ref().ok_or("the recorded work has no outcome")?;
        let copied = |made: &Tensor| -> Result<Tensor, BodyError> {
            let out = alloc(made.shape(), made.dtype())?;
            let bytes = made.shape().len() * made.dtype().size();
            let (to, from) = (device_buffer(&out)?.0, device_buffer(made)?.0);
            self.gpu.driver().copy(to, from, bytes, self.gpu.stream())?;
            Ok(out)
        };
        let beside = made.beside.iter().map(|made| made.as_ref().map(copied).transpose());
        let out = Outcome { result: copied(&made.result)?, beside: beside.collect::<Result<_, _>>()? };
        self.keep(key, recording);
        Ok(out)
    }

    fn keep(&self, key: Key, mut recording: Recording) {
        let mut recordings = self.recordings();
        recordings.clock += 1;
        recording.used = recordings.clock;
        let replaced = recordings.by_key.insert(key, recording);
        let oldest = match recordings.by_key.len() > KEPT {
            true => recordings.by_key.iter().min_by_key(|(_, r)| r.used).map(|(key, _)| key.clone()),
            false => None,
        };
        let evicted = oldest.and_then(|key| recordings.by_key.remove(&key));
        drop(recordings);
        replaced.into_iter().chain(evicted).for_each(|recording| self.destroy(recording));
    }

    /// Runs the work plainly, in the memory that a capture will use.
    fn first(&self, inputs: &[&Tensor], body: &mut Body<'_>) -> Result<Recording, BodyError> {
        let mut copies = Vec::with_capacity(inputs.len());
        for input in inputs {
            let bytes = input.shape().len() * input.dtype().size();
            let buffer = self.pool.lend(bytes)?;
            copies.push(Tensor::new(input.shape(), input.dtype(), Storage::Device(buffer)));
        }
        let mut sources = vec![None; inputs.len()];
        self.refresh(&copies, &mut sources, inputs)?;
        let _flag = Flag::raise(&self.is_recording);
        let outcome = body(&copies.iter().collect::<Vec<_>>())?;
        Ok(Recording { inputs: copies, sources, outcome: Some(outcome), graph: None, used: 0 })
    }

    /// Captures the work if that has not happened, and replays it.
    ///
    /// `None` if it can't be captured: other recordings have taken memory that the
    /// capture needs (an allocation would become part of the graph), or the work
    /// failed, which it may not do when it runs plainly.
    fn again(
        &self,
        mut recording: Recording,
        inputs: &[&Tensor],
        body: &mut Body<'_>,
    ) -> Result<Option<Recording>, BodyError> {
        self.refresh(&recording.inputs, &mut recording.sources, inputs)?;
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let graph = match recording.graph {
            Some(graph) => graph,
            None => {
                recording.outcome = None;
                let _flag = Flag::raise(&self.is_recording);
                self.gpu.begin_capture()?;
                self.pool.freeze(true);
                let copies: Vec<&Tensor> = recording.inputs.iter().collect();
                let outcome = body(&copies);
                // The capture must end even if the work failed, or the stream stays unusable.
                let graph = self.gpu.end_capture();
                let is_short = self.pool.freeze(false);
                match (outcome, graph) {
                    (Ok(outcome), Ok(graph)) if !is_short => {
                        recording.outcome = Some(outcome);
                        recording.graph = Some(graph);
                        graph
                    }
                    (outcome, graph) => {
                        let error = outcome.err().filter(|_| !is_short);
                        if let Some(error) = error {
                            tracing::warn!(%error, "work was not captured; it runs plainly");
                        }
                        driver.destroy_graph(graph?)?;
                        return Ok(None);
                    }
                }
            }
        };
        driver.launch_graph(graph, stream)?;
        Ok(Some(recording))
    }

    /// Copies the inputs that changed since the last call.
    fn refresh(
        &self,
        copies: &[Tensor],
        sources: &mut [Option<u64>],
        inputs: &[&Tensor],
    ) -> Result<(), CudaError> {
        for ((copy, source), input) in copies.iter().zip(sources).zip(inputs) {
            let unsupported =
                |error: TensorError| CudaError::Unsupported { op: "record", reason: error.to_string() };
            let (from, loan) = device_buffer(input).map_err(unsupported)?;
            if *source == Some(loan) {
                continue;
            }
            let bytes = input.shape().len() * input.dtype().size();
            let to = device_buffer(copy).map_err(unsupported)?.0;
            self.gpu.driver().copy(to, from, bytes, self.gpu.stream())?;
            *source = Some(loan);
        }
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.clear();
    }
}
