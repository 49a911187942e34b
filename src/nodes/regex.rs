//! Regular expressions on texts, in Python's dialect.
//!
//! Patterns run on `fancy-regex` (look-around and back references like Python's
//! `re`) after [`translated`] has rewritten what the two dialects spell
//! differently. Its limit on backtracking ends patterns that would run for ages.

use fancy_regex::{Regex, RegexBuilder};

use super::pure::PureNode;
use super::shapes::unknown;
use super::string::{choice, lines, schema, value};
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::graph::Input;

/// The groups of one match.
type Captures<'t> = fancy_regex::Captures<'t, str>;

/// Steps back that one search may take.
const BACKTRACK_LIMIT: usize = 2_000_000;

/// The nodes for regular expressions.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(match_schema, matches),
        PureNode::boxed(extract_schema, extract),
        PureNode::boxed(replace_schema, replace),
    ]
}

fn flag(name: &'static str, default: bool) -> Input {
    Input::boolean(name).opt("default", default)
}

fn match_schema() -> Schema {
    schema("RegexMatch", "Regex Match", "Whether a regular expression matches somewhere in a text.")
        .input(lines("string"))
        .input(lines("regex_pattern"))
        .input(flag("case_insensitive", true))
        .input(flag("multiline", false))
        .input(flag("dotall", false))
        .named_output("BOOLEAN", "matches")
}

fn extract_schema() -> Schema {
    let modes = ["First Match", "All Matches", "First Group", "All Groups"];
    schema("RegexExtract", "Regex Extract", "The matches of a regular expression or one of its groups.")
        .input(lines("string"))
        .input(lines("regex_pattern"))
        .input(choice("mode", &modes))
        .input(flag("case_insensitive", true))
        .input(flag("multiline", false))
        .input(flag("dotall", false))
        .input(Input::int("group_index", 1, 0, 100))
        .output("STRING")
}

fn replace_schema() -> Schema {
    schema(
        "RegexReplace",
        "Regex Replace",
        "Replaces the matches of a regular expression; count 0 means all.",
    )
    .input(lines("string"))
    .input(lines("regex_pattern"))
    .input(lines("replace"))
    .input(flag("case_insensitive", true).optional())
    .input(flag("multiline", false).optional())
    .input(flag("dotall", false).optional())
    .input(Input::int("count", 0, 0, 100).optional())
    .output("STRING")
}

/// A pattern in the dialect of `fancy-regex`: `$` also matches before a last
/// newline, `\Z` is the very end, and brackets inside a class are plain.
fn translated(pattern: &str, is_multiline: bool) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut chars = pattern.chars().peekable();
    let mut class_length = None::<usize>;
    while let Some(c) = chars.next() {
        match (c, class_length) {
            ('\\', _) => match chars.next() {
                Some('Z') if class_length.is_none() => out.push_str(r"\z"),
                Some(next) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            ('[', None) => {
                out.push('[');
                if chars.next_if_eq(&'^').is_some() {
                    out.push('^');
                }
                class_length = Some(0);
                continue;
            }
            // A bracket in first place is a member.
            (']', Some(0)) => out.push_str(r"\]"),
            (']', Some(_)) => {
                out.push(']');
                class_length = None;
                continue;
            }
            ('[' | '&' | '~', Some(_)) => out.extend(['\\', c]),
            ('$', None) if !is_multiline => out.push_str(r"(?=\n?\z)"),
            _ => out.push(c),
        }
        class_length = class_length.map(|n| n + 1);
    }
    out
}

/// The expression of the inputs.
fn compiled(inputs: &Inputs) -> Result<Regex, NodeError> {
    let flag = |name, default| match inputs.get(name) {
        Some(_) => inputs.boolean(name),
        None => Ok(default),
    };
    let is_multiline = flag("multiline", false)?;
    RegexBuilder::new(&translated(inputs.string("regex_pattern")?, is_multiline))
        .case_insensitive(flag("case_insensitive", true)?)
        .multi_line(is_multiline)
        .dot_matches_new_line(flag("dotall", false)?)
        .backtrack_limit(BACKTRACK_LIMIT)
        .build()
        .map_err(|e| NodeError::input("regex_pattern", &format!("is no regular expression: {e}")))
}

fn too_hard(error: impl std::fmt::Display) -> NodeError {
    NodeError::input("regex_pattern", &format!("can't be searched for: {error}; simplify it"))
}

/// All matches as Python finds them: an empty one may follow right after another match.
fn all<'t>(regex: &Regex, text: &'t str) -> Result<Vec<Captures<'t>>, NodeError> {
    let mut found: Vec<Captures<'t>> = Vec::new();
    let mut from = 0;
    let mut last_empty = None;
    while from <= text.len() {
        let Some(captures) = regex.captures_from_pos(text, from).map_err(too_hard)? else { break };
        let Some(whole) = captures.get(0) else { break };
        let (start, end) = (whole.start(), whole.end());
        if start == end && last_empty == Some(start) {
            // Nothing but the same empty match here: one character on.
            match text.get(start..).and_then(|rest| rest.chars().next()) {
                Some(c) => from = start + c.len_utf8(),
                None => break,
            }
            last_empty = None;
            continue;
        }
        last_empty = (start == end).then_some(start);
        from = end;
        found.push(captures);
    }
    Ok(found)
}

/// An expression that can't be read matches nothing.
fn matches(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let text = inputs.string("string")?;
    match compiled(inputs) {
        Ok(regex) => value(regex.is_match(text).map_err(too_hard)?),
        Err(_) => value(false),
    }
}

fn extract(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (text, group) = (inputs.string("string")?, inputs.size("group_index")?);
    let Ok(regex) = compiled(inputs) else { return value("") };
    let groups = regex.captures_len() - 1;
    let part = |captures: &Captures<'_>, i: usize| captures.get(i).map_or("", |m| m.as_str()).to_owned();
    let join = |i: usize| {
        let found = all(&regex, text)?;
        Ok::<_, NodeError>(found.iter().map(|c| part(c, i)).collect::<Vec<_>>().join("\n"))
    };
    let first = |i: usize| {
        let found = regex.captures(text).map_err(too_hard)?;
        Ok::<_, NodeError>(found.map(|c| part(&c, i)).unwrap_or_default())
    };
    match inputs.string("mode")? {
        "First Match" => value(first(0)?),
        // Of a pattern with groups Python lists the groups; the first one counts.
        "All Matches" => value(join(usize::from(groups > 0))?),
        "First Group" | "All Groups" if group > groups => value(""),
        "First Group" => value(first(group)?),
        "All Groups" if groups == 0 => value(""),
        "All Groups" => value(join(group)?),
        mode => Err(unknown("mode", mode)),
    }
}

fn replace(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let text = inputs.string("string")?;
    let regex = compiled(inputs)?;
    let template = Template::parse(inputs.string("replace")?, &regex)?;
    let count = if inputs.get("count").is_some() { inputs.size("count")? } else { 0 };
    let limit = if count == 0 { usize::MAX } else { count };
    let mut out = String::new();
    let mut done = 0;
    for captures in all(&regex, text)?.iter().take(limit) {
        let Some(whole) = captures.get(0) else { continue };
        out.push_str(text.get(done..whole.start()).unwrap_or_default());
        template.expand(captures, &mut out);
        done = whole.end();
    }
    out.push_str(text.get(done..).unwrap_or_default());
    value(out)
}

/// What matches are replaced by, in Python's form (`\1`, `\g<name>`, `\n`).
struct Template(Vec<Piece>);

enum Piece {
    Text(char),
    Group(usize),
}

impl Template {
    fn parse(template: &str, regex: &Regex) -> Result<Self, NodeError> {
        let bad = |what: String| NodeError::input("replace", &what);
        let group = |i: usize| {
            let count = regex.captures_len() - 1;
            let message = format!("names group {i}; the pattern has {count}");
            if i <= count { Ok(Piece::Group(i)) } else { Err(bad(message)) }
        };
        let mut pieces = Vec::new();
        let mut chars = template.chars().peekable();
        while let Some(c) = chars.next() {
            if c != '\\' {
                pieces.push(Piece::Text(c));
                continue;
            }
            match chars.next() {
                Some('g') => {
                    let name: String =
                        chars.by_ref().skip_while(|c| *c == '<').take_while(|c| *c != '>').collect();
                    let index = name.parse().ok();
                    let named = || regex.capture_names().position(|n| n == Some(name.as_str()));
                    let index = index.or_else(named).ok_or_else(|| bad(format!("names no group: {name}")))?;
                    pieces.push(group(index)?);
                }
                Some('0') => pieces.push(Piece::Text('\0')),
                Some(digit @ '1'..='9') => {
                    let mut number = String::from(digit);
                    number.extend(chars.next_if(char::is_ascii_digit));
                    pieces.push(group(number.parse().unwrap_or(usize::MAX))?);
                }
                Some('\\') => pieces.push(Piece::Text('\\')),
                Some(letter) if letter.is_ascii_alphabetic() => {
                    let control = "n\nr\rt\ta\x07b\x08f\x0cv\x0b".as_bytes().chunks_exact(2);
                    let found = control
                        .filter(|pair| char::from(pair[0]) == letter)
                        .map(|pair| char::from(pair[1]))
                        .next();
                    pieces.push(Piece::Text(
                        found.ok_or_else(|| bad(format!("has a bad escape: \\{letter}")))?,
                    ));
                }
                Some(other) => pieces.extend(['\\', other].map(Piece::Text)),
                None => return Err(bad("ends with a backslash".to_owned())),
            }
        }
        Ok(Self(pieces))
    }

    fn expand(&self, captures: &Captures<'_>, out: &mut String) {
        for piece in &self.0 {
            match piece {
                Piece::Text(c) => out.push(*c),
                Piece::Group(i) => out.push_str(captures.get(*i).map_or("", |m| m.as_str())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value as Json, json};

    use super::*;

    fn run(node: fn(&Inputs) -> Result<Vec<Value>, NodeError>, inputs: Json) -> Result<Json, NodeError> {
        let mut values = Inputs::default();
        let map: Map<String, Json> = inputs.as_object().unwrap().clone();
        map.into_iter().for_each(|(k, v)| values.insert(k, Value::Json(v)));
        node(&values).map(|out| out[0].json().unwrap().clone())
    }

    /// Expected values from CPython 3.
    #[test]
    fn replaces_as_python_does() {
        let sub = |pattern: &str, with: &str, text: &str| {
            run(replace, json!({"string": text, "regex_pattern": pattern, "replace": with}))
        };
        for (pattern, with, text, want) in [
            ("x*", "-", "abxd", "-a-b--d-"),
            (r"(\w+) (\w+)", r"\2 \g<1>", "hello world", "world hello"),
            (r"(?P<a>b)", r"<\g<a>>", "aBc", "a<B>c"),
            (r"a$", "z", "a\n", "z\n"),
            (r"a\Z", "z", "a\n", "a\n"),
            (r"[[]x[]]", "!", "[x]", "!"),
            (r"(?<=a)b", "c", "ab bb", "ac bb"),
            (r"(a)\1", r"\n\.", "aa", "\n\\."),
        ] {
            assert_eq!(sub(pattern, with, text).unwrap(), want, "{pattern}");
        }
        assert!(sub("(", "", "a").is_err());
        assert!(sub("a", r"\2", "a").is_err());
        let limited = json!({"string": "aaa", "regex_pattern": "A", "replace": "b", "count": 2});
        assert_eq!(run(replace, limited).unwrap(), "bba");
        let exact = json!({"string": "aaa", "regex_pattern": "A", "replace": "b", "case_insensitive": false});
        assert_eq!(run(replace, exact).unwrap(), "aaa");
    }

    #[test]
    fn extracts_as_python_does() {
        let get = |pattern: &str, mode: &str, group: i64| {
            let text = "k1=v1; k2=v2";
            let inputs =
                json!({"string": text, "regex_pattern": pattern, "mode": mode, "group_index": group});
            run(extract, inputs).unwrap()
        };
        assert_eq!(get(r"k\d", "First Match", 1), "k1");
        assert_eq!(get(r"k\d", "All Matches", 1), "k1\nk2");
        assert_eq!(get(r"(k\d)=(v\d)", "All Matches", 2), "k1\nk2");
        assert_eq!(get(r"(k\d)=(v\d)", "First Group", 2), "v1");
        assert_eq!(get(r"(k\d)=(v\d)", "All Groups", 2), "v1\nv2");
        assert_eq!(get(r"(k\d)=(v\d)", "All Groups", 3), "");
        assert_eq!(get(r"k\d", "All Groups", 0), "");
        assert_eq!(get(r"k\d", "First Group", 0), "k1");
        assert_eq!(get(r"(", "First Match", 0), "");
    }

    /// A pattern that backtracks without end is an error, not a hang.
    #[test]
    fn hard_patterns_end() {
        let text = "a".repeat(40) + "b";
        let inputs = json!({"string": text, "regex_pattern": r"(?=(a+)+$)\1x"});
        let started = std::time::Instant::now();
        let result = run(matches, inputs);
        assert!(started.elapsed().as_secs() < 20, "{result:?}");
    }
}
