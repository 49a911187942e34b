//! (draft)
use crate::server::http::{Call, Failure, Response};
/// x
pub(in crate::server) async fn view(_call: Call) -> Result<Response, Failure> { Err(Failure::NOT_FOUND) }
