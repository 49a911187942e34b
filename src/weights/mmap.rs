//! Where the bytes of a weight file are: a memory map, a buffer, or the program itself.
//!
//! The only unsafe code of `weights`. A map is unsafe in Rust because another
//! process may change the file under it. What that can do here: a *write* into
//! the file changes weight values (wrong numbers, never memory unsafety, since
//! every byte pattern is a valid `u8` and offsets are copied out of the header
//! at open); a *truncation* makes later reads fault (SIGBUS). Callers therefore
//! ask [`WeightsFile::verify_unchanged`](super::WeightsFile::verify_unchanged) before a long read, and files on
//! storage that may change under the server are read into memory instead
//! (`OpenOptions { mmap: false }`).

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

use memmap2::Mmap;

/// The bytes of a file, wherever they are.
#[derive(Debug)]
pub(super) enum Storage {
    /// Pages of the file, loaded when touched.
    Mapped(Mmap),
    /// A copy in memory.
    Owned(Vec<u8>),
    /// Bytes that are there for as long as the program runs.
    Static {
        bytes: &'static [u8],
        /// Whether they are in the program's file, so that their pages can be had again.
        is_program: bool,
    },
}

impl Storage {
    /// Maps the whole of `file`, which must not be empty.
    pub(super) fn map(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only and lives in this value, so no Rust reference outlives
        // it; changes by other processes are dealt with as the module head says.
        let map = unsafe { Mmap::map(file)? };
        Ok(Storage::Mapped(map))
    }

    /// Reads the whole of `file`, expected to be `len` bytes.
    pub(super) fn read(file: &mut File, len: u64) -> io::Result<Self> {
        let mut bytes = Vec::new();
        let capacity = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.try_reserve_exact(capacity).map_err(|_| io::ErrorKind::OutOfMemory)?;
        file.read_to_end(&mut bytes)?;
        Ok(Storage::Owned(bytes))
    }

    /// Bytes that stay: inside the program, or leaked.
    pub(super) fn fixed(bytes: &'static [u8]) -> Self {
        Storage::Static { bytes, is_program: is_in_program(bytes) }
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Storage::Mapped(map) => map,
            Storage::Owned(bytes) => bytes,
            Storage::Static { bytes, .. } => bytes,
        }
    }

    /// Lets the system take back the physical pages that lie wholly inside
    /// `range`; reading them again loads them from the file. Pages shared with
    /// bytes outside of `range` stay. A hint: nothing happens for copies in
    /// memory, and failure is only lost savings.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Storage::Mapped(map) = self {
            let page = page_bytes();
            let begin = range.start.next_multiple_of(page);
            // The last page of the map belongs to the file's tail even where it is not full.
            let end = if range.end == map.len() { map.len() } else { range.end - range.end % page };
            if begin < end {
                // SAFETY: the map is backed by a file and read-only, so a dropped page is
                // read back from the file with the same content; the range is inside the map.
                let dropped = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, end - begin)
                };
                if let Err(error) = dropped {
                    tracing::debug!(%error, begin, end, "pages of a weight file were not released");
                }
            }
        }
        #[cfg(target_os = "linux")]
        if let Storage::Static { bytes, is_program: true } = self {
            release_program_pages(&bytes[range.clone()]);
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Whether bytes are inside the program's file.
///
/// A `'static` slice may also be leaked heap memory, whose pages must stay:
/// only a read-only mapping of a file, as the system lists it, qualifies.
#[cfg(target_os = "linux")]
fn is_in_program(bytes: &[u8]) -> bool {
    let start = bytes.as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let path = fields.nth(3).unwrap_or_default();
        let Some((from, to)) = range.split_once('-') else { return false };
        let parse = |text| usize::from_str_radix(text, 16);
        let (Ok(from), Ok(to)) = (parse(from), parse(to)) else { return false };
        mode == "r--p" && path.starts_with('/') && from <= start && start + bytes.len() <= to
    })
}

#[cfg(not(target_os = "linux"))]
fn is_in_program(_: &[u8]) -> bool {
    false
}

/// As [`Storage::release`] for bytes inside the program's file. Pages wholly inside a slice
/// of plain bytes hold no relocated pointers, so they equal the file.
#[cfg(target_os = "linux")]
fn release_program_pages(bytes: &[u8]) {
    let page = page_bytes();
    let start = (bytes.as_ptr() as usize).next_multiple_of(page);
    let end = (bytes.as_ptr() as usize + bytes.len()) / page * page;
    if start < end {
        // SAFETY: the pages belong to a private, read-only mapping of the program's
        // file and were never written, so a dropped page is read back with the same content.
        let failed = unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        if failed != 0 {
            tracing::debug!("pages of the built-in model were not released");
        }
    }
}

/// Size of a memory page.
#[cfg(unix)]
fn page_bytes() -> usize {
    // SAFETY: sysconf reads a constant of the system; it has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(1 << 16)
}
