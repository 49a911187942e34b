//! Numbers as Python's `float(text)` reads them.
//!
//! Prompt weights are read that way in ComfyUI, so `1_0`, ` .5 `, `1e-1`, `-inf`
//! and full-width digits are weights here too. On top of what Rust's parser
//! takes that is: blanks around the number, single underscores between digits,
//! and the decimal digits of every script.

/// Zeros of the scripts' decimal digits (Unicode 14, category Nd); the other nine follow each.
const ZEROS: [u32; 65] = [
    0x660, 0x6F0, 0x7C0, 0x966, 0x9E6, 0xA66, 0xAE6, 0xB66, 0xBE6, 0xC66, 0xCE6, 0xD66, 0xDE6, 0xE50, 0xED0,
    0xF20, 0x1040, 0x1090, 0x17E0, 0x1810, 0x1946, 0x19D0, 0x1A80, 0x1A90, 0x1B50, 0x1BB0, 0x1C40, 0x1C50,
    0xA620, 0xA8D0, 0xA900, 0xA9D0, 0xA9F0, 0xAA50, 0xABF0, 0xFF10, 0x104A0, 0x10D30, 0x11066, 0x110F0,
    0x11136, 0x111D0, 0x112F0, 0x11450, 0x114D0, 0x11650, 0x116C0, 0x11730, 0x118E0, 0x11950, 0x11C50,
    0x11D50, 0x11DA0, 0x16A60, 0x16AC0, 0x16B50, 0x1D7CE, 0x1D7D8, 0x1D7E2, 0x1D7EC, 0x1D7F6, 0x1E140,
    0x1E2F0, 0x1E950, 0x1FBF0,
];

/// The value of `text`, or `None` where Python raises ValueError.
pub(super) fn parse(text: &[char]) -> Option<f64> {
    let begin = text.iter().position(|&c| !c.is_whitespace())?;
    let end = text.iter().rposition(|&c| !c.is_whitespace())? + 1;
    let ascii: Vec<char> = text.get(begin..end)?.iter().map(|&c| ascii_digit(c)).collect();
    let is_digit_at = |i: Option<usize>| i.and_then(|i| ascii.get(i)).is_some_and(char::is_ascii_digit);
    let mut number = String::with_capacity(ascii.len());
    for (i, &c) in ascii.iter().enumerate() {
        if c != '_' {
            number.push(c);
        } else if !is_digit_at(i.checked_sub(1)) || !is_digit_at(i.checked_add(1)) {
            return None;
        }
    }
    number.parse().ok()
}

/// The ASCII digit for a decimal digit of any script; other characters stay.
fn ascii_digit(c: char) -> char {
    let code = u32::from(c);
    let zero = ZEROS.iter().find(|&&zero| (zero..zero + 10).contains(&code));
    zero.and_then(|zero| char::from_digit(code - zero, 10)).unwrap_or(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Option<f64> {
        parse(&text.chars().collect::<Vec<_>>())
    }

    /// Expected values from CPython 3.
    #[test]
    fn numbers_read_as_python_reads_them() {
        let cases: &[(&str, f64)] = &[
            ("1.3", 1.3),
            (" 1.2 ", 1.2),
            ("-1", -1.0),
            ("+0.5", 0.5),
            ("1e-1", 0.1),
            ("1E+2", 100.0),
            (".5", 0.5),
            ("5.", 5.0),
            ("0", 0.0),
            ("1_0", 10.0),
            ("1_0.2_5e0_1", 102.5),
            ("inf", f64::INFINITY),
            ("-Infinity", f64::NEG_INFINITY),
            ("1e999", f64::INFINITY),
            ("1e-999", 0.0),
            ("007", 7.0),
            ("１.５", 1.5),
            ("٣", 3.0),
            ("\u{1d7d9}", 1.0),
            ("\u{3000}2\u{85}", 2.0),
            ("\t3\n", 3.0),
        ];
        for &(text, expected) in cases {
            assert_eq!(value(text), Some(expected), "{text:?}");
        }
        for nan in ["nan", "NaN", "-nan", "+NAN"] {
            assert!(value(nan).is_some_and(f64::is_nan), "{nan}");
        }
        for bad in [
            "",
            " ",
            "_1",
            "1_",
            "1__0",
            "1_.5",
            "1e_5",
            "na_n",
            "x",
            "1 2",
            "0x10",
            "1,5",
            ".",
            "e5",
            "1e",
            "--1",
            "1.2.3",
            "infi",
            "1\x1c",
            "½",
            "²",
            "１．５",
        ] {
            assert_eq!(value(bad), None, "{bad:?}");
        }
    }
}
