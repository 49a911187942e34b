//! How Python prints JSON values.
//!
//! ComfyUI's error messages hold values as Python's `str()` and `repr()` print
//! them, and clients show or match these texts, so we print the same way.

use serde_json::Value as Json;

/// `str(value)`: texts as they are, everything else as [`repr`].
pub fn text(value: &Json) -> String {
    match value {
        Json::String(s) => s.clone(),
        other => repr(other),
    }
}

/// `repr(value)`: `None`, `True`, `1.0`, `'a'`, `['a', 1]`, `{'k': 'v'}`.
pub fn repr(value: &Json) -> String {
    match value {
        Json::Null => "None".to_owned(),
        Json::Bool(true) => "True".to_owned(),
        Json::Bool(false) => "False".to_owned(),
        Json::Number(n) if n.is_f64() => float_repr(n.as_f64().unwrap_or_default()),
        Json::Number(n) => n.to_string(),
        Json::String(s) => string_repr(s),
        Json::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Json::Object(map) => {
            let items: Vec<_> = map.iter().map(|(k, v)| format!("{}: {}", string_repr(k), repr(v))).collect();
            format!("{{{}}}", items.join(", "))
        }
    }
}

/// The Python type name of a JSON value.
pub(super) fn type_name(value: &Json) -> &'static str {
    match value {
        Json::Null => "NoneType",
        Json::Bool(_) => "bool",
        Json::Number(n) if n.is_f64() => "float",
        Json::Number(_) => "int",
        Json::String(_) => "str",
        Json::Array(_) => "list",
        Json::Object(_) => "dict",
    }
}

/// Shortest digits that read back the same; exponents below -4 and from 16 on
/// in scientific form with at least two exponent digits.
fn float_repr(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let plain = format!("{x}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// Single quotes, unless there are single and no double quotes inside.
fn string_repr(s: &str) -> String {
    let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(s.len() + 2);
    out.push(quote);
    for c in s.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => match c as u32 {
                n @ 0..=0xff => out.push_str(&format!("\\x{n:02x}")),
                n @ 0x100..=0xffff => out.push_str(&format!("\\u{n:04x}")),
                n => out.push_str(&format!("\\U{n:08x}")),
            },
        }
    }
    out.push(quote);
    out
}

/// Controls, format characters, private use and spaces other than U+0020 are escaped.
fn is_printable(c: char) -> bool {
    let is_format = matches!(c as u32, 0xad | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f | 0xfeff
        | 0xe000..=0xf8ff | 0xe0000..=0x10ffff);
    c == ' ' || !(c.is_control() || c.is_whitespace() || is_format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_print_as_in_python() {
        for (x, expected) in [
            (0.0, "0.0"),
            (-1.0, "-1.0"),
            (100.0, "100.0"),
            (101.5, "101.5"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (123456789.123, "123456789.123"),
        ] {
            assert_eq!(repr(&json!(x)), expected);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        assert_eq!(
            repr(&json!({"1": {"inputs": {"w": 16, "ok": true, "no": null, "l": ["a", 0]}}})),
            "{'1': {'inputs': {'w': 16, 'ok': True, 'no': None, 'l': ['a', 0]}}}"
        );
        for (s, expected) in [
            ("a", "'a'"),
            ("it's", "\"it's\""),
            ("it's \"x\"", r#"'it\'s "x"'"#),
            ("a\nb\\\u{7}", r"'a\nb\\\x07'"),
            ("ä日\u{a0}\u{200b}", "'ä日\\xa0\\u200b'"),
        ] {
            assert_eq!(repr(&json!(s)), expected);
        }
        assert_eq!(text(&json!("it's")), "it's");
        assert_eq!(text(&json!(["x"])), "['x']");
    }
}
