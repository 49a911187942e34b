//! A server in this process, on the CPU, for tests that compare pictures.

use std::path::Path;

use kiln::cli::client::Client;
use kiln::cli::device::DeviceArgs;
use kiln::cli::local::LocalServer;
use kiln::cli::setup::RuntimeArgs;

/// On the CPU even where there is a GPU: the bounds are those of f32 and CPU bf16.
pub fn on_cpu(device: DeviceArgs) -> RuntimeArgs {
    RuntimeArgs { device: DeviceArgs { cpu: true, ..device }, ..RuntimeArgs::default() }
}

/// Runs `job` with a client of a server whose input folder is `folder/input`, whatever lies beside these tests.
pub fn with_server<T>(args: &RuntimeArgs, folder: &Path, job: impl AsyncFnOnce(&Client) -> T) -> T {
    let args = RuntimeArgs { base_directory: folder.to_owned(), ..args.clone() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let server = LocalServer::start(&args, folder).await.unwrap();
        let result = job(&Client::new(server.address())).await;
        server.stop().await;
        result
    })
}
