//! How much memory the machine has left.

/// Bytes that the system could still give; without limit where it doesn't say.
pub fn system_available() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
    kilobytes.map_or(usize::MAX, |kb| kb.saturating_mul(1024))
}
