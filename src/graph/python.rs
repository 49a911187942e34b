//! Python text.
