//! Conversion of literal inputs to their type, with Python's rules and messages:
//! clients send `"24"`, `16.9` or `true` for a whole number and get `24`, `16`, `1`.

use std::cmp::Ordering;

use serde_json::{Number, Value as Json};

use super::InputKind;
use super::python::{repr, text, type_name};

/// The literal as a value of this type; types without literals are left alone.
pub(super) fn convert(kind: &InputKind, value: &Json) -> Result<Json, String> {
    match kind {
        InputKind::Int => to_int(value),
        InputKind::Float => to_float(value),
        InputKind::String => Ok(Json::String(text(value))),
        InputKind::Boolean => Ok(Json::Bool(is_truthy(value))),
        InputKind::Combo(_) | InputKind::Link(_) => Ok(value.clone()),
    }
}

/// Compares numbers without losing digits of whole ones; `None` for other values.
pub(super) fn compare(a: &Json, b: &Json) -> Option<Ordering> {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => match (whole(a), whole(b)) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
        },
        _ => None,
    }
}

/// Python's `==` of a literal and a list option: numbers by value, `true` is 1.
pub(super) fn is_equal(a: &Json, b: &Json) -> bool {
    let number = |v: &Json| match v {
        Json::Bool(b) => Json::from(u8::from(*b)),
        other => other.clone(),
    };
    a == b || compare(&number(a), &number(b)) == Some(Ordering::Equal)
}

fn whole(n: &Number) -> Option<i128> {
    n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from))
}

/// A whole number as JSON; as a float when it needs more than 64 bits.
fn whole_json(n: i128) -> Json {
    match (i64::try_from(n), u64::try_from(n)) {
        (Ok(n), _) => n.into(),
        (_, Ok(n)) => n.into(),
        _ => (n as f64).into(),
    }
}

fn to_int(value: &Json) -> Result<Json, String> {
    match value {
        Json::Bool(b) => Ok(Json::from(u8::from(*b))),
        Json::Number(n) => match (whole(n), n.as_f64()) {
            (Some(n), _) => Ok(whole_json(n)),
            (None, Some(x)) if x.abs() < 1e38 => Ok(whole_json(x.trunc() as i128)),
            _ => Ok(value.clone()),
        },
        Json::String(s) => {
            parse_int(s).ok_or_else(|| format!("invalid literal for int() with base 10: {}", repr(value)))
        }
        other => Err(format!(
            "int() argument must be a string, a bytes-like object or a real number, not '{}'",
            type_name(other)
        )),
    }
}

/// Python's number texts may have blanks around them and single underscores between digits.
fn without_underscores(s: &str) -> Option<String> {
    let s = s.trim();
    let is_digit = |i: Option<usize>| i.and_then(|i| s.as_bytes().get(i)).is_some_and(u8::is_ascii_digit);
    let is_between_digits = |i: usize| is_digit(i.checked_sub(1)) && is_digit(i.checked_add(1));
    s.match_indices('_').all(|(i, _)| is_between_digits(i)).then(|| s.replace('_', ""))
}

fn parse_int(s: &str) -> Option<Json> {
    let s = without_underscores(s)?;
    let unsigned = s.strip_prefix(['+', '-']).unwrap_or(&s);
    if unsigned.is_empty() || !unsigned.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    match s.parse::<i128>() {
        Ok(n) => Some(whole_json(n)),
        Err(_) => s.parse::<f64>().ok().filter(|x| x.is_finite()).map(Json::from),
    }
}

fn to_float(value: &Json) -> Result<Json, String> {
    match value {
        Json::Bool(b) => Ok(Json::from(f64::from(u8::from(*b)))),
        Json::Number(n) => Ok(n.as_f64().map_or_else(|| value.clone(), Json::from)),
        Json::String(s) => {
            parse_float(s).ok_or_else(|| format!("could not convert string to float: {}", repr(value)))
        }
        other => {
            Err(format!("float() argument must be a string or a real number, not '{}'", type_name(other)))
        }
    }
}

/// Decimal numbers only: JSON has neither infinity nor NaN.
fn parse_float(s: &str) -> Option<Json> {
    let s = without_underscores(s)?;
    let is_decimal = s.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    let number = if is_decimal { s.parse::<f64>().ok()? } else { return None };
    number.is_finite().then(|| Json::from(number))
}

/// Python's truth: zero, nothing and empty things are false.
fn is_truthy(value: &Json) -> bool {
    match value {
        Json::Null => false,
        Json::Bool(b) => *b,
        Json::Number(n) => n.as_f64() != Some(0.0),
        Json::String(s) => !s.is_empty(),
        Json::Array(items) => !items.is_empty(),
        Json::Object(map) => !map.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn int(value: Json) -> Result<Json, String> {
        convert(&InputKind::Int, &value)
    }

    fn float(value: Json) -> Result<Json, String> {
        convert(&InputKind::Float, &value)
    }

    #[test]
    fn whole_numbers() {
        for (value, expected) in [
            (json!("24"), json!(24)),
            (json!(" -1_000 "), json!(-1000)),
            (json!("007"), json!(7)),
            (json!(16.9), json!(16)),
            (json!(-16.9), json!(-16)),
            (json!(true), json!(1)),
            (json!(u64::MAX), json!(u64::MAX)),
            (json!("18446744073709551615"), json!(u64::MAX)),
            (json!("18446744073709551616"), json!(18446744073709551616.0)),
        ] {
            assert_eq!(int(value.clone()), Ok(expected), "{value}");
        }
        for text in ["abc", "16.9", "", "1__0", "_1", "1_", "+-1", "0x10"] {
            let expected = format!("invalid literal for int() with base 10: '{text}'");
            assert_eq!(int(json!(text)), Err(expected));
        }
        assert_eq!(
            int(json!(null)).unwrap_err(),
            "int() argument must be a string, a bytes-like object or a real number, not 'NoneType'"
        );
    }

    #[test]
    fn floats_texts_and_truth() {
        for (value, expected) in [
            (json!(7), json!(7.0)),
            (json!("1.5e1"), json!(15.0)),
            (json!("1_0.2_5"), json!(10.25)),
            (json!(true), json!(1.0)),
        ] {
            assert_eq!(float(value.clone()), Ok(expected), "{value}");
        }
        for text in ["abc", "nan", "inf", "1_", "_1", "1__0", "1_.5", ""] {
            assert_eq!(float(json!(text)), Err(format!("could not convert string to float: '{text}'")));
        }
        assert_eq!(
            float(json!({})).unwrap_err(),
            "float() argument must be a string or a real number, not 'dict'"
        );
        assert_eq!(convert(&InputKind::String, &json!(1.0)), Ok(json!("1.0")));
        assert_eq!(convert(&InputKind::String, &json!(null)), Ok(json!("None")));
        for (value, expected) in [
            (json!("false"), true),
            (json!(""), false),
            (json!(0), false),
            (json!(0.5), true),
            (json!(null), false),
        ] {
            assert_eq!(convert(&InputKind::Boolean, &value), Ok(json!(expected)));
        }
    }

    #[test]
    fn comparisons_keep_all_digits() {
        assert_eq!(compare(&json!(u64::MAX), &json!(u64::MAX - 1)), Some(Ordering::Greater));
        assert_eq!(compare(&json!(0), &json!(0.0)), Some(Ordering::Equal));
        assert_eq!(compare(&json!("1"), &json!(1)), None);
        assert!(is_equal(&json!(1), &json!(1.0)) && is_equal(&json!(true), &json!(1)));
        assert!(!is_equal(&json!("1"), &json!(1)));
    }
}
