"""The package's version: the one of the kiln crate (a test compares them)."""

__version__ = "0.1.0"
