//! The engine from outside, with small nodes.

mod bench;
mod caching;
mod failing;
mod queueing;
mod running;
