//! (draft)
use crate::server::http::{Call, Failure, Response};
/// x
pub(in crate::server) async fn image(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
/// x
pub(in crate::server) async fn mask(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
