//! How a product is divided among the threads of the current rayon pool.

use rayon::prelude::*;
use std::ops::Range;

/// Rounds a number of row blocks up so that all threads get as many.
pub(super) fn even_blocks(blocks: usize) -> usize {
    let threads = rayon::current_num_threads();
    if blocks >= 2 * threads { blocks.next_multiple_of(threads) } else { blocks.max(1) }
}

/// Runs `work(block, panels)` for every row block × panel group.
///
/// With enough row blocks each takes all panels; with few, the panels are
/// divided as well, so that each thread reads only its part of the weights.
pub(super) fn run_grid(blocks: usize, panels: usize, work: impl Fn(usize, Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    let groups = if blocks >= 2 * threads { 1 } else { threads.min(panels).max(1) };
    let width = panels.div_ceil(groups);
    let part = |i: usize| {
        let first = (i % groups * width).min(panels);
        work(i / groups, first..(first + width).min(panels));
    };
    run_tasks(blocks * groups, part);
}

/// Runs `work(0..count)`, in parallel if the pool has more threads.
pub(super) fn run_tasks(count: usize, work: impl Fn(usize) + Sync) {
    if rayon::current_num_threads() == 1 || count == 1 {
        (0..count).for_each(&work);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(&work);
    }
}
