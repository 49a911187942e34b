//! What the system's scheduler is told about threads that must answer while others compute.
//!
//! On a machine whose cores are all taken by compute threads, a thread that wakes up waits until
//! the running one has used its time slice, which is noticed at the next clock tick: 4 to 10 ms.
//! Linux (6.12 and later) lets a thread ask for short slices of its own. Its share of the processor
//! stays the same, so compute threads lose nothing, but when it wakes up it comes before every
//! thread with longer slices. Other priorities would not do: a lower one for compute threads lets
//! everything else on the machine starve them, a higher one for these threads takes rights.

/// Asks for short slices for this thread. Where the system knows none, nothing changes.
pub fn answer_promptly() {
    #[cfg(target_os = "linux")]
    ask_for_slice(SHORT_SLICE_NS);
}

/// The shortest slice that Linux grants.
#[cfg(target_os = "linux")]
const SHORT_SLICE_NS: u64 = 100_000;

#[cfg(target_os = "linux")]
fn ask_for_slice(nanoseconds: u64) {
    // SAFETY: getpriority takes plain numbers; 0 is the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let wanted = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: nanoseconds,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of the structure, which outlives the call, and no more.
    let refused = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const wanted, 0) } != 0;
    if refused {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "short time slices are refused: answers may take longer while a job computes");
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The slice of the calling thread in nanoseconds; 0 where the system tells none.
    fn slice() -> u64 {
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::sched_attr>();
        // SAFETY: the kernel writes at most `size` bytes into the structure.
        let failed = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
        if failed == 0 { attr.sched_runtime } else { 0 }
    }

    #[test]
    fn a_thread_gets_the_slice_it_asks_for() {
        std::thread::spawn(|| {
            if slice() == 0 {
                eprintln!("skipped: this system has no time slices of one thread");
                return;
            }
            let niceness = || {
                // SAFETY: as above.
                unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
            };
            let before = (slice(), niceness());
            answer_promptly();
            assert_eq!((slice(), niceness()), (SHORT_SLICE_NS, before.1));
            assert!(before.0 > SHORT_SLICE_NS, "{before:?}");
            let child = std::thread::spawn(slice).join().unwrap();
            eprintln!("slices: {} ns before, {} ns after, {child} ns for its child", before.0, slice());
        })
        .join()
        .unwrap();
    }
}
