//! (draft)
use crate::server::http::{Call, Failure, Response};
/// x
pub(in crate::server) async fn folders(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
/// x
pub(in crate::server) async fn files(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
/// x
pub(in crate::server) async fn metadata(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
/// x
pub(in crate::server) async fn embeddings(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
