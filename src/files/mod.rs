//! The server's folders, and the only place where a client's file name becomes a path.

/// The folders of a server.
#[derive(Debug, Default)]
pub struct Folders {}
