//! Results.
/// Which results are kept for later prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Those that the newest prompt uses (ComfyUI's default).
    #[default]
    LastPrompt,
    /// Up to so many, those used longest ago go first (`--cache-lru`).
    Lru(usize),
    /// None (`--cache-none`).
    Off,
}
pub(super) struct ResultCache;
impl ResultCache {
    pub fn new(_: CachePolicy) -> Self {
        Self
    }
    pub fn clear(&mut self) {}
}
