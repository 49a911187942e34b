//! Uploads from ordinary memory, through a ring of page-locked pieces.
//!
//! The driver's own copy from pageable memory may wait for the stream ("API
//! synchronization behavior" of the driver API), and a copy from memory that
//! happens to be page-locked does not take the bytes before it returns. Through
//! our own ring both are certain: the source is free to change when the call
//! returns, and the host waits only when the ring has gone round once.

use cudarc::driver::sys::{CUevent, CUresult, CUstream, cuEventQuery};

use super::ffi::cu;
use super::{DevicePtr, DriverError, Instruments, PinnedBuffer};

/// Bytes of one piece: small uploads, of which a denoise step has a few, take one each.
const PIECE: usize = 256 << 10;
const PIECES: usize = 32;

/// The ring; made at the first upload.
#[derive(Default)]
pub(super) struct Staging {
    pieces: Vec<Piece>,
    next: usize,
}

struct Piece {
    memory: PinnedBuffer,
    /// `CUevent` behind the last copy out of `memory`.
    event: usize,
    in_flight: bool,
}

impl Staging {
    /// Queues the copy of `src` to `dst` on a stream of the current context.
    pub(super) fn upload(
        &mut self,
        dst: DevicePtr,
        src: &[u8],
        stream: CUstream,
        instruments: &Instruments,
        pinned: impl Fn(usize) -> Result<PinnedBuffer, DriverError>,
    ) -> Result<(), DriverError> {
        for (i, bytes) in src.chunks(PIECE).enumerate() {
            if self.pieces.len() < PIECES {
                self.pieces.push(Piece { memory: pinned(PIECE)?, event: new_event()?, in_flight: false });
                self.next = self.pieces.len() - 1;
            }
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % PIECES;
            piece.wait(instruments)?;
            piece.memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            let (to, from) = (dst.offset(i * PIECE).0, piece.memory.bytes().as_ptr().cast());
            // SAFETY: the piece stays as it is until its event has passed; the caller checked the device range.
            unsafe { cu!(cuMemcpyHtoDAsync_v2(to, from, bytes.len(), stream)) }?;
            piece.in_flight = true;
            // SAFETY: event and stream are alive.
            unsafe { cu!(cuEventRecord(piece.event as CUevent, stream)) }?;
        }
        Ok(())
    }

    /// Destroys the ring; no copy may be under way.
    pub(super) fn destroy(&mut self) {
        for piece in self.pieces.drain(..) {
            // SAFETY: made in `upload`, destroyed once.
            let _ = unsafe { cu!(cuEventDestroy_v2(piece.event as CUevent)) };
        }
    }
}

impl Piece {
    fn wait(&mut self, instruments: &Instruments) -> Result<(), DriverError> {
        if !self.in_flight {
            return Ok(());
        }
        let event = self.event as CUevent;
        // SAFETY: the event is alive.
        if unsafe { cuEventQuery(event) } == CUresult::CUDA_ERROR_NOT_READY {
            instruments.synced();
        }
        // SAFETY: as above.
        unsafe { cu!(cuEventSynchronize(event)) }?;
        self.in_flight = false;
        Ok(())
    }
}

fn new_event() -> Result<usize, DriverError> {
    let mut event: CUevent = std::ptr::null_mut();
    let flags = cudarc::driver::sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: `event` is written.
    unsafe { cu!(cuEventCreate(&mut event, flags)) }?;
    Ok(event as usize)
}
