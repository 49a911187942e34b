//! The command line: one file a sub-command.

pub mod serve;

use clap::{Parser, Subcommand};

/// ComfyUI's API on a hand-written runtime.
#[derive(Parser)]
#[command(name = "kiln", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve ComfyUI's API
    Serve(Box<serve::ServeArgs>),
}

/// Entry point of the binary.
pub fn main() -> std::process::ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kiln: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
