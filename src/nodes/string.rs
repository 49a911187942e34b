//! Texts: joining, cutting, searching, with the semantics of Python's `str`.

use serde_json::Value as Json;

use super::pure::PureNode;
use super::shapes::{newer, unknown};
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::graph::Input;

const MODULE: &str = "comfy_extras.nodes_string";

/// The text nodes without regular expressions.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(concatenate_schema, concatenate),
        PureNode::boxed(substring_schema, substring),
        PureNode::boxed(length_schema, |inputs| value(inputs.string("string")?.chars().count())),
        PureNode::boxed(case_schema, convert_case),
        PureNode::boxed(trim_schema, trim),
        PureNode::boxed(replace_schema, replace),
        PureNode::boxed(contains_schema, contains),
        PureNode::boxed(compare_schema, compare),
    ]
}

/// A text input of several lines.
pub(super) fn lines(name: &'static str) -> Input {
    Input::string(name).opt("multiline", true)
}

/// A choice in the form of the newer nodes.
pub(super) fn choice(name: &'static str, options: &[&'static str]) -> Input {
    Input::combo(name, options).opt("multiselect", false)
}

/// The schema that all text nodes begin with.
pub(super) fn schema(class: &'static str, name: &'static str, about: &'static str) -> Schema {
    newer(Schema::new(class, "utils/string").display(name).module(MODULE).describe(about), false)
}

/// One literal as the output.
pub(super) fn value(value: impl Into<Json>) -> Result<Vec<Value>, NodeError> {
    Ok(vec![Value::Json(value.into())])
}

fn case_sensitive() -> Input {
    Input::boolean("case_sensitive").opt("default", true)
}

fn concatenate_schema() -> Schema {
    schema("StringConcatenate", "Concatenate", "Joins two texts with a delimiter between them.")
        .input(lines("string_a"))
        .input(lines("string_b"))
        .input(Input::string("delimiter").opt("default", "").opt("multiline", false))
        .output("STRING")
}

fn concatenate(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    value([inputs.string("string_a")?, inputs.string("string_b")?].join(inputs.string("delimiter")?))
}

fn substring_schema() -> Schema {
    schema("StringSubstring", "Substring", "The characters from start up to, not including, end.")
        .input(lines("string"))
        .input(Input::open_int("start"))
        .input(Input::open_int("end"))
        .output("STRING")
}

/// Negative places count from the end, as in a slice of Python.
fn substring(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let text = inputs.string("string")?;
    let length = text.chars().count() as i64;
    let place = |name| {
        let at = inputs.int(name)?;
        let at = if at < 0 { at.saturating_add(length) } else { at };
        Ok::<_, NodeError>(at.clamp(0, length) as usize)
    };
    let (start, end) = (place("start")?, place("end")?);
    value(text.chars().skip(start).take(end.saturating_sub(start)).collect::<String>())
}

fn length_schema() -> Schema {
    schema("StringLength", "Length", "The number of characters.")
        .input(lines("string"))
        .named_output("INT", "length")
}

fn case_schema() -> Schema {
    schema("CaseConverter", "Case Converter", "Changes a text to upper, lower, capitalised or title case.")
        .input(lines("string"))
        .input(choice("mode", &["UPPERCASE", "lowercase", "Capitalize", "Title Case"]))
        .output("STRING")
}

fn convert_case(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let text = inputs.string("string")?;
    match inputs.string("mode")? {
        "UPPERCASE" => value(text.to_uppercase()),
        "lowercase" => value(text.to_lowercase()),
        "Capitalize" => {
            let mut rest = text.chars();
            let first: String = rest.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
            value(first + &rest.as_str().to_lowercase())
        }
        "Title Case" => value(title_case(text)),
        mode => Err(unknown("mode", mode)),
    }
}

/// A letter after a letter is small, any other large; digits and apostrophes end a word.
fn title_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut is_in_word = false;
    for c in text.chars() {
        if is_in_word {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        is_in_word = c.is_uppercase() || c.is_lowercase();
    }
    out
}

fn trim_schema() -> Schema {
    schema("StringTrim", "Trim", "Removes white space at the ends.")
        .input(lines("string"))
        .input(choice("mode", &["Both", "Left", "Right"]))
        .output("STRING")
}

fn trim(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let text = inputs.string("string")?;
    // Python also counts the four separators of ASCII as white space.
    let is_blank = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    match inputs.string("mode")? {
        "Both" => value(text.trim_matches(is_blank)),
        "Left" => value(text.trim_start_matches(is_blank)),
        "Right" => value(text.trim_end_matches(is_blank)),
        mode => Err(unknown("mode", mode)),
    }
}

fn replace_schema() -> Schema {
    schema("StringReplace", "Replace", "Replaces every place of a text in a text.")
        .input(lines("string"))
        .input(lines("find"))
        .input(lines("replace"))
        .output("STRING")
}

fn replace(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    value(inputs.string("string")?.replace(inputs.string("find")?, inputs.string("replace")?))
}

fn contains_schema() -> Schema {
    schema("StringContains", "Contains", "Whether a text is part of another.")
        .input(lines("string"))
        .input(lines("substring"))
        .input(case_sensitive())
        .named_output("BOOLEAN", "contains")
}

/// Two text inputs, small letters only unless case counts.
fn pair(inputs: &Inputs, first: &str, second: &str) -> Result<(String, String), NodeError> {
    let (a, b) = (inputs.string(first)?, inputs.string(second)?);
    let is_exact = inputs.boolean("case_sensitive")?;
    let form = |s: &str| if is_exact { s.to_owned() } else { s.to_lowercase() };
    Ok((form(a), form(b)))
}

fn contains(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (text, part) = pair(inputs, "string", "substring")?;
    value(text.contains(&part))
}

fn compare_schema() -> Schema {
    schema("StringCompare", "Compare", "Whether a text begins or ends with another, or equals it.")
        .input(lines("string_a"))
        .input(lines("string_b"))
        .input(choice("mode", &["Starts With", "Ends With", "Equal"]))
        .input(case_sensitive())
        .output("BOOLEAN")
}

fn compare(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (a, b) = pair(inputs, "string_a", "string_b")?;
    match inputs.string("mode")? {
        "Starts With" => value(a.starts_with(&b)),
        "Ends With" => value(a.ends_with(&b)),
        "Equal" => value(a == b),
        mode => Err(unknown("mode", mode)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn run(node: fn(&Inputs) -> Result<Vec<Value>, NodeError>, inputs: Json) -> Json {
        let mut values = Inputs::default();
        let map: Map<String, Json> = inputs.as_object().unwrap().clone();
        map.into_iter().for_each(|(k, v)| values.insert(k, Value::Json(v)));
        node(&values).unwrap()[0].json().unwrap().clone()
    }

    /// Expected values from CPython 3.
    #[test]
    fn texts_change_as_in_python() {
        let case = |mode, s| run(convert_case, json!({"string": s, "mode": mode}));
        assert_eq!(case("Title Case", "they're bill's 3rd FRIEND"), "They'Re Bill'S 3Rd Friend");
        assert_eq!(case("Capitalize", "éTÉ à PARIS"), "Été à paris");
        assert_eq!(case("UPPERCASE", "straße"), "STRASSE");
        let cut = |start, end| run(substring, json!({"string": "héllo", "start": start, "end": end}));
        assert_eq!(cut(1, 3), "él");
        assert_eq!(cut(-3, -1), "ll");
        assert_eq!(cut(-99, 99), "héllo");
        assert_eq!(cut(3, 1), "");
        assert_eq!(run(replace, json!({"string": "abc", "find": "", "replace": "-"})), "-a-b-c-");
        assert_eq!(run(trim, json!({"string": "\u{1f}\t x \u{a0}", "mode": "Both"})), "x");
        assert_eq!(run(concatenate, json!({"string_a": "a", "string_b": "b", "delimiter": ", "})), "a, b");
        let compared = |mode, sensitive| {
            let texts =
                json!({"string_a": "ABc", "string_b": "ab", "mode": mode, "case_sensitive": sensitive});
            run(compare, texts)
        };
        assert_eq!(compared("Starts With", false), true);
        assert_eq!(compared("Starts With", true), false);
        assert_eq!(compared("Equal", false), false);
    }
}
