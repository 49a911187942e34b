//! Host to device through two page-locked buffers: one is filled while the other is copied.

use std::sync::{Mutex, PoisonError};

use super::{CudaError, Gpu};
use crate::driver::{DevicePtr, Event, PinnedBuffer, Stream};

/// Bytes of a page-locked buffer.
const CHUNK: usize = 4 << 20;

/// Copies host memory to the device without making the device wait for the host, or the host for the device.
pub struct Uploader {
    state: Mutex<Option<State>>,
}

struct State {
    stream: Stream,
    slots: [Slot; 2],
    next: usize,
    /// Marks the compute stream, so that copies wait for the memory they write.
    ready: Event,
}

struct Slot {
    buffer: PinnedBuffer,
    copied: Event,
    is_busy: bool,
}

impl Default for Uploader {
    fn default() -> Self {
        Self::new()
    }
}

impl Uploader {
    /// Takes no memory until first used.
    pub fn new() -> Self {
        Self { state: Mutex::new(None) }
    }

    /// Queues the copy of `bytes` to `dst`, before anything that is queued on
    /// the compute stream later. `bytes` may change once this returns.
    pub fn upload(&self, gpu: &Gpu, dst: DevicePtr, bytes: &[u8]) -> Result<(), CudaError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = match state.as_mut() {
            Some(state) => state,
            None => state.insert(State::new(gpu)?),
        };
        let driver = gpu.driver();
        driver.record(state.ready, gpu.stream())?;
        driver.wait(state.stream, state.ready)?;
        let mut last = None;
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let slot = &mut state.slots[state.next];
            state.next = 1 - state.next;
            if slot.is_busy && !driver.is_done(slot.copied)? {
                driver.synchronize_event(slot.copied)?;
            }
            slot.buffer.bytes_mut()[..chunk.len()].copy_from_slice(chunk);
            driver.upload_pinned(dst.offset(i * CHUNK), &slot.buffer, chunk.len(), state.stream)?;
            driver.record(slot.copied, state.stream)?;
            slot.is_busy = true;
            last = Some(slot.copied);
        }
        match last {
            Some(event) => Ok(driver.wait(gpu.stream(), event)?),
            None => Ok(()),
        }
    }

    /// Gives the page-locked memory back.
    pub fn release(&self, gpu: &Gpu) -> Result<(), CudaError> {
        let Some(state) = self.state.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        gpu.driver().synchronize(state.stream)?;
        for event in state.slots.iter().map(|s| s.copied).chain([state.ready]) {
            gpu.driver().destroy_event(event)?;
        }
        Ok(())
    }
}

impl State {
    fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let driver = gpu.driver();
        let slot = || -> Result<Slot, CudaError> {
            Ok(Slot { buffer: driver.pinned(CHUNK)?, copied: driver.create_event(false)?, is_busy: false })
        };
        let slots = [slot()?, slot()?];
        Ok(Self { stream: driver.create_stream()?, slots, next: 0, ready: driver.create_event(false)? })
    }
}
