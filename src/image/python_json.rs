//! JSON text spelled the way Python's `json.dumps` does by default.
//!
//! ComfyUI writes prompt and workflow into each picture with it, and tools
//! compare or hash those texts. Differences to `serde_json`: `", "` and `": "`
//! as separators, everything outside printable ASCII escaped (with surrogate
//! pairs), and floats in Python's `repr` form (`1e-05`, `1.0`, `1e+16`).

use std::fmt::Write;

use serde_json::Value;

/// `value` as Python's `json.dumps(value)` would write it.
pub fn python_json(value: &Value) -> String {
    let mut out = String::new();
    write_value(value, &mut out);
    out
}

fn write_value(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(number, out),
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_value(item, out);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_string(key, out);
                out.push_str(": ");
                write_value(item, out);
            }
            out.push('}');
        }
    }
}

fn write_number(number: &serde_json::Number, out: &mut String) {
    match number.as_f64() {
        Some(float) if number.is_f64() => write_float(float, out),
        _ => out.push_str(&number.to_string()),
    }
}

/// Shortest digits that read back the same; an exponent from 1e16 upwards and
/// below 1e-4, with a sign and at least two digits.
fn write_float(value: f64, out: &mut String) {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        out.push_str(digits);
        // Writing to a String cannot fail.
        let _ = write!(out, "e{sign}{:02}", exponent.abs());
        return;
    }
    let plain = value.to_string();
    out.push_str(&plain);
    if !plain.contains('.') {
        out.push_str(".0");
    }
}

fn write_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right column: printed by Python 3.11 `json.dumps(json.loads(left))`.
    const CASES: &[(&str, &str)] = &[
        ("0.00001", "1e-05"),
        ("1.0", "1.0"),
        ("-0.0", "-0.0"),
        ("0.0001", "0.0001"),
        ("1e15", "1000000000000000.0"),
        ("123456789012345680.0", "1.2345678901234568e+17"),
        ("1e16", "1e+16"),
        ("1e22", "1e+22"),
        ("1.5e300", "1.5e+300"),
        ("2.5e-7", "2.5e-07"),
        ("5e-324", "5e-324"),
        ("0.1", "0.1"),
        ("7.5", "7.5"),
        ("3.141592653589793", "3.141592653589793"),
        ("18446744073709551615", "18446744073709551615"),
        ("-9223372036854775808", "-9223372036854775808"),
        (
            "{\"b\":1,\"a\":[true,false,null,{}],\"c\":[]}",
            "{\"b\": 1, \"a\": [true, false, null, {}], \"c\": []}",
        ),
        ("\"\\u00fc\\ud83d\\ude00\\u007f\\u0000\"", "\"\\u00fc\\ud83d\\ude00\\u007f\\u0000\""),
        ("\"a\\\"b\\\\c/\\n\\r\\t\\b\\f\"", "\"a\\\"b\\\\c/\\n\\r\\t\\b\\f\""),
    ];

    #[test]
    fn equals_python() {
        for (input, want) in CASES {
            let value: Value = serde_json::from_str(input).unwrap();
            assert_eq!(python_json(&value), *want, "{input}");
        }
    }

    #[test]
    fn reads_back_the_same() {
        for bits in (0..20_000u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
            let float = f64::from_bits(bits);
            if !float.is_finite() {
                continue;
            }
            let mut text = String::new();
            write_float(float, &mut text);
            assert_eq!(text.parse::<f64>().unwrap().to_bits(), bits, "{text}");
        }
    }
}
