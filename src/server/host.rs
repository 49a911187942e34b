//! What the operating system says about memory.
//!
//! Linux: `/proc/meminfo`, bounded by the control group's limit if there is
//! one, since that is what a container may really use. Elsewhere the numbers
//! are unknown and reported as zero.

use std::fs;
use std::path::Path;

/// Main memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// What this process may use at most.
    pub(super) total: u64,
    /// What of it can be had right now.
    pub(super) free: u64,
}

fn meminfo_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn from_meminfo(text: &str) -> Option<Memory> {
    Some(Memory { total: meminfo_field(text, "MemTotal")?, free: meminfo_field(text, "MemAvailable")? })
}

/// Lowers the numbers to the limit of a version 2 control group.
fn bounded_by_group(memory: Memory, group: &Path) -> Memory {
    let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let Some(limit) = number("memory.max").filter(|limit| *limit < memory.total) else { return memory };
    let cached = fs::read_to_string(group.join("memory.stat"))
        .ok()
        .and_then(|stat| stat.lines().find_map(|l| l.strip_prefix("inactive_file ")?.parse::<u64>().ok()))
        .unwrap_or(0);
    let used = number("memory.current").unwrap_or(0).saturating_sub(cached);
    Memory { total: limit, free: memory.free.min(limit.saturating_sub(used)) }
}

/// The memory of this machine or container.
pub(super) fn memory() -> Memory {
    let Some(memory) = fs::read_to_string("/proc/meminfo").ok().and_then(|text| from_meminfo(&text)) else {
        return Memory::default();
    };
    let group = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|text| text.lines().find_map(|l| Some(l.strip_prefix("0::/")?.to_owned())))
        .unwrap_or_default();
    bounded_by_group(memory, &Path::new("/sys/fs/cgroup").join(group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   1000 kB\n";
        assert_eq!(from_meminfo(text), Some(Memory { total: 24_576_000_000, free: 1_024_000 }));
        assert_eq!(from_meminfo("MemTotal: x kB"), None);
    }

    #[test]
    fn a_control_group_bounds_it() {
        let group = tempfile::tempdir().unwrap();
        let host = Memory { total: 1000, free: 900 };
        assert_eq!(bounded_by_group(host, group.path()), host, "no group");
        fs::write(group.path().join("memory.max"), "max\n").unwrap();
        assert_eq!(bounded_by_group(host, group.path()), host, "no limit");
        fs::write(group.path().join("memory.max"), "400\n").unwrap();
        fs::write(group.path().join("memory.current"), "300\n").unwrap();
        fs::write(group.path().join("memory.stat"), "anon 100\ninactive_file 120\n").unwrap();
        assert_eq!(bounded_by_group(host, group.path()), Memory { total: 400, free: 220 });
    }

    #[test]
    fn this_machine() {
        let now = memory();
        if Path::new("/proc/meminfo").exists() {
            assert!(0 < now.free && now.free <= now.total, "{now:?}");
        }
    }
}
