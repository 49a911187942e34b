//! The command line: one file a sub-command.

mod bench;
mod bench_device;
mod bench_kernels;
mod check;
pub mod client;
mod convert;
mod demo;
pub mod device;
mod gpu;
mod info;
pub mod local;
pub mod output;
mod process;
mod progress;
mod run;
pub mod serve;
pub mod setup;
mod synth;
pub mod trace;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// ComfyUI's whole API in one binary, no Python.
#[derive(Parser, Debug)]
#[command(name = "kiln", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Serve ComfyUI's API over HTTP and WebSocket.
    Serve(Box<serve::ServeArgs>),
    /// Draw a picture with the model inside the binary, over real HTTP.
    Demo(demo::DemoArgs),
    /// Run a workflow file (API format) without a server.
    Run(run::RunArgs),
    /// Convert a workflow saved by the web page to API format.
    Convert(convert::ConvertArgs),
    /// Show what a model file holds, or what this build and machine are.
    Info(info::InfoArgs),
    /// Write a synthetic checkpoint of real size.
    Synth(synth::SynthArgs),
    /// Measure speed against a ceiling in the same run.
    Bench(bench::BenchArgs),
    /// Compare every CUDA kernel with its reference, on the GPU or on the SIMT layer.
    Check(check::CheckArgs),
}

/// Entry point of the binary.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(args) => serve::run(&args),
        command => {
            log_to_stderr();
            match command {
                Command::Demo(args) => demo::run(args),
                Command::Run(args) => run::run(args),
                Command::Convert(args) => convert::run(&args),
                Command::Info(args) => info::run(args),
                Command::Synth(args) => synth::run(args),
                Command::Bench(args) => bench::run(args),
                Command::Check(args) => check::run(args),
                Command::Serve(_) => Ok(()),
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::from(output::CLOSED),
        Err(error) => {
            // Where nobody can be told there is still the exit code.
            let _ = writeln!(std::io::stderr(), "error: {}", output::describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// Warnings and errors on the terminal; `RUST_LOG` asks for more.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
