//! ComfyUI's flags that steer PyTorch, its GPU code or its package manager.
//!
//! Start scripts written for ComfyUI contain them. They are accepted, named in
//! one log line, and have no effect. Those that would store weights in eight bits
//! save memory at the price of another picture; here the picture stays.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// Flags without a value.
const SWITCHES: &[&str] = &[
    "auto-launch",
    "async-offload",
    "cache-classic",
    "cache-none",
    "cuda-malloc",
    "deterministic",
    "disable-all-custom-nodes",
    "disable-api-nodes",
    "disable-auto-launch",
    "disable-cuda-malloc",
    "disable-ipex-optimize",
    "disable-smart-memory",
    "disable-xformers",
    "dont-print-server",
    "dont-upcast-attention",
    "force-channels-last",
    "force-non-blocking",
    "force-upcast-attention",
    "fp8_e4m3fn-text-enc",
    "fp8_e4m3fn-unet",
    "fp8_e5m2-text-enc",
    "fp8_e5m2-unet",
    "fp8_e8m0fnu-unet",
    "gpu-only",
    "highvram",
    "log-stdout",
    "lowvram",
    "mmap-torch-files",
    "normalvram",
    "novram",
    "supports-fp8-compute",
    "use-flash-attention",
    "use-pytorch-cross-attention",
    "use-quad-cross-attention",
    "use-sage-attention",
    "use-split-cross-attention",
    "windows-standalone-build",
];
/// Flags with one value.
const WITH_VALUE: &[&str] =
    &["cache-lru", "default-hashing-function", "front-end-version", "oneapi-device-selector", "reserve-vram"];
/// Flags with any number of values.
const WITH_VALUES: &[&str] = &["directml", "fast", "whitelist-custom-nodes"];

/// The ignored flags that were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IgnoredFlags {
    /// Their names.
    pub given: Vec<&'static str>,
}

fn all() -> impl Iterator<Item = &'static str> {
    SWITCHES.iter().chain(WITH_VALUE).chain(WITH_VALUES).copied()
}

impl FromArgMatches for IgnoredFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_given = |name: &&str| {
            matches.value_source(name).is_some_and(|source| source == clap::parser::ValueSource::CommandLine)
        };
        Ok(Self { given: all().filter(is_given).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for IgnoredFlags {
    fn augment_args(mut command: Command) -> Command {
        let flag = |name: &'static str| Arg::new(name).long(name).hide(true);
        for name in SWITCHES {
            command = command.arg(flag(name).action(ArgAction::SetTrue));
        }
        for name in WITH_VALUE {
            command = command.arg(flag(name).num_args(1));
        }
        for name in WITH_VALUES {
            command = command.arg(flag(name).num_args(0..));
        }
        let names: Vec<String> = all().map(|name| format!("--{name}")).collect();
        command.after_long_help(format!(
            "Accepted for ComfyUI's start scripts, without effect (they steer PyTorch and its GPU code):\n  {}",
            names.join(", ")
        ))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
