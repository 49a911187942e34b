//! JSON from the network: bounded, strict, with the place of the fault.
//!
//! Python's parser takes `NaN`, `Infinity`, `1e400` and lone surrogates; this
//! one refuses them (no node input can mean them, and RFC 8259 forbids them),
//! as it does nesting deeper than 127. A structural count bounds the memory of
//! the parsed tree before it is built: `[[],[],…` takes 3 bytes of text but
//! some 30 bytes of memory an element.

use serde_json::Value as Json;

/// Most values in one document.
const MAX_VALUES: usize = 500_000;
/// Documents larger than this are parsed off the async threads.
const OFFLOAD_BYTES: usize = 256 * 1024;

/// Why a document was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JsonError {
    /// Not JSON, or JSON that is not accepted; holds what and where.
    #[error("the request body is not acceptable JSON: {0}")]
    Syntax(String),
    /// More values than [`MAX_VALUES`].
    #[error("the request body holds more than {MAX_VALUES} JSON values")]
    TooManyValues,
}

/// An upper bound of the number of values: separators and brackets outside of strings.
fn count_values(text: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (1, false, false);
    for &byte in text {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => in_string = true,
                b',' | b'[' | b'{' => count += 1,
                _ => {}
            }
        }
    }
    count
}

/// Parses one document.
pub(super) fn parse(text: &[u8]) -> Result<Json, JsonError> {
    if count_values(text) > MAX_VALUES {
        return Err(JsonError::TooManyValues);
    }
    serde_json::from_slice(text).map_err(|error| JsonError::Syntax(error.to_string()))
}

/// Parses one document; a large one on a blocking thread.
pub(super) async fn parse_off_thread(text: Vec<u8>) -> Result<Json, JsonError> {
    if text.len() < OFFLOAD_BYTES {
        return parse(&text);
    }
    tokio::task::spawn_blocking(move || parse(&text))
        .await
        .unwrap_or_else(|stopped| Err(JsonError::Syntax(format!("parsing stopped: {stopped}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_only_python_takes() {
        for text in [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
            "-1e400",
            r#""\ud800""#,
            r#"{"a": "\udc00x"}"#,
            "{'a': 1}",
            "[1,]",
            "",
            "{bad",
            "\u{feff}{}",
        ] {
            let refused = parse(text.as_bytes());
            assert!(matches!(refused, Err(JsonError::Syntax(_))), "{text}: {refused:?}");
        }
        assert!(parse(b"\"\xff\"").is_err(), "bytes that are not UTF-8");
    }

    #[test]
    fn keeps_order_and_all_64_bits() {
        let value = parse(br#"{"z": 18446744073709551615, "a": -9223372036854775808, "m": 8.0}"#).unwrap();
        assert_eq!(value.to_string(), r#"{"z":18446744073709551615,"a":-9223372036854775808,"m":8.0}"#);
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(parse(nested(127).as_bytes()).is_ok());
        assert!(parse(nested(128).as_bytes()).is_err());
        assert!(parse(nested(10_000).as_bytes()).is_err());
    }

    #[test]
    fn values_are_counted_outside_of_strings() {
        assert_eq!(count_values(br#"{"a": "[,,\"[{", "b": [1, 2]}"#), 5);
        let bomb = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert_eq!(parse(bomb.as_bytes()), Err(JsonError::TooManyValues));
        let keys: Vec<String> = (0..1_000_000).map(|i| format!("\"{i}\":0")).collect();
        assert_eq!(parse(format!("{{{}}}", keys.join(",")).as_bytes()), Err(JsonError::TooManyValues));
    }
}
