//! (to be written)

pub mod detect;
