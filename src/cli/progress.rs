//! A progress bar on the terminal; silent when the output is not one.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that counts steps.
pub struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Bar {
    /// An empty bar.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("  [{bar:40}] {pos}/{len} {per_sec} {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// A bar that counts bytes.
    pub fn bytes() -> Self {
        let bar = Self::new();
        let style = ProgressStyle::with_template("  [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec}");
        bar.0.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        bar
    }

    /// `value` of `max` is done.
    pub fn set(&self, value: u64, max: u64) {
        self.0.set_length(max);
        self.0.set_position(value);
    }

    /// Removes the bar.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}
