//! What this process has used so far (Linux; zeros elsewhere).

use std::fs;

/// CPU seconds (user and system) of all threads alive.
pub fn cpu_seconds() -> f64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds: u64 = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    nanoseconds as f64 / 1e9
}

fn status_bytes(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(field));
    let kilobytes = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

/// Highest resident memory so far, in bytes.
pub fn peak_resident_bytes() -> u64 {
    status_bytes("VmHWM:")
}

/// Page faults so far that needed no disk.
pub fn minor_faults() -> u64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command name may hold blanks; the fields behind it don't. `minflt` is field 10.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().nth(7).and_then(|n| n.parse().ok()).unwrap_or(0)
}
