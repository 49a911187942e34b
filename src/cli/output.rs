//! What a command prints, with the errors of writing it: `println!` would panic.
//!
//! A reader that has seen enough (`kiln check | head`) ends the command quietly,
//! with the exit code that a shell gives for it; a full disk is an error message.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Exit code of a command whose reader is gone: that of SIGPIPE in a shell.
pub const CLOSED: u8 = 141;

/// The standard output took no more.
#[derive(Debug, thiserror::Error)]
#[error("the output can't be written: {0}")]
pub struct OutputError(io::Error);

/// Writes one line to the standard output.
pub fn line(text: Arguments<'_>) -> Result<(), OutputError> {
    writeln!(io::stdout().lock(), "{text}").map_err(OutputError)
}

/// Whether a command ended because nobody reads its output any more.
pub fn is_closed(error: &anyhow::Error) -> bool {
    let found = error.downcast_ref::<OutputError>();
    found.is_some_and(|OutputError(error)| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error with its causes in one line. Many messages hold their cause already: it is not said twice.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// `println!` that gives the error of writing to the caller.
macro_rules! say {
    () => { crate::cli::output::line(format_args!(""))? };
    ($($text:tt)+) => { crate::cli::output::line(format_args!($($text)+))? };
}
pub(crate) use say;

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_cause_is_not_said_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open a.safetensors: {source}")]
        struct Whole {
            source: io::Error,
        }
        let whole = Whole { source: io::Error::other("no such file") };
        let error = Err::<(), _>(whole).context("starting").unwrap_err();
        assert_eq!(describe(&error), "starting: cannot open a.safetensors: no such file");
        let error = Err::<(), _>(io::Error::other("no such file")).context("reading a").unwrap_err();
        assert_eq!(describe(&error), "reading a: no such file");
    }

    #[test]
    fn only_a_closed_output_is_quiet() {
        let error = |kind: io::ErrorKind| anyhow::Error::from(OutputError(kind.into()));
        assert!(is_closed(&error(io::ErrorKind::BrokenPipe)));
        assert!(!is_closed(&error(io::ErrorKind::StorageFull)));
        assert!(!is_closed(&anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe))), "of a socket");
    }
}
