//! Prompt weights: `(text)` and `(text:1.3)`.
//!
//! The grammar, ComfyUI's:
//!
//! - Parentheses around a group multiply its weight by 1.1; nested ones again.
//! - `(text:w)` sets the weight to `w`, whatever surrounds it; parentheses
//!   inside start from `w`. The weight follows the group's last colon, unless
//!   that is the group's first character; if it is no number (as Python reads them)
//!   it is text and the group counts as `(text)`.
//! - `\(` and `\)` are literal. Square brackets mean nothing.
//! - A `)` without its `(` is text, and so is the next `(` after it.
//! - A `(` without its `)` turns the rest of the enclosing text into one
//!   piece. If that piece ends in a `)`, those two parentheses count as a pair
//!   after all; if not, all of it is text, parentheses included.
//!
//! Partners are found once for the whole prompt, and an explicit stack stands
//! for nesting, so that time is linear and a million parentheses cannot
//! exhaust the call stack.

use super::python_float;

/// What a pair of parentheses without a number does to the weight.
const EMPHASIS: f64 = 1.1;
/// "No such place": prompts are far shorter.
const NONE: usize = usize::MAX;

/// A run of text under one weight.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Segment {
    pub text: String,
    pub weight: f64,
}

/// The segments of `prompt`, in order, none of them empty.
pub(super) fn segments(prompt: &str) -> Vec<Segment> {
    Parser::new(prompt).run()
}

/// What a character is to the grammar.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Text,
    Open,
    Close,
}

/// A stretch of the prompt that is still to be cut.
struct Stretch {
    begin: usize,
    end: usize,
    weight: f64,
}

struct Parser {
    chars: Vec<char>,
    roles: Vec<Role>,
    /// The other parenthesis of a pair, `NONE` for everything else.
    partner: Vec<usize>,
    /// At `i`: the last unescaped colon before place `i`.
    colon_before: Vec<usize>,
    /// At `i`: the last parenthesis of any role before place `i`.
    parenthesis_before: Vec<usize>,
    segments: Vec<Segment>,
}

impl Parser {
    /// Unescapes the prompt and pairs its parentheses.
    fn new(prompt: &str) -> Self {
        let mut parser = Parser {
            chars: Vec::with_capacity(prompt.len()),
            roles: Vec::with_capacity(prompt.len()),
            partner: Vec::new(),
            colon_before: vec![NONE],
            parenthesis_before: vec![NONE],
            segments: Vec::new(),
        };
        let mut input = prompt.chars().peekable();
        while let Some(c) = input.next() {
            match (c, input.peek()) {
                ('\\', Some(&literal @ ('(' | ')'))) => {
                    input.next();
                    parser.push(literal, Role::Text);
                }
                ('(', _) => parser.push(c, Role::Open),
                (')', _) => parser.push(c, Role::Close),
                _ => parser.push(c, Role::Text),
            }
        }
        parser.pair();
        parser
    }

    fn push(&mut self, c: char, role: Role) {
        let place = self.chars.len();
        let latest = |list: &[usize], is_here: bool| {
            if is_here { place } else { list.last().copied().unwrap_or(NONE) }
        };
        self.colon_before.push(latest(&self.colon_before, c == ':'));
        self.parenthesis_before.push(latest(&self.parenthesis_before, c == '(' || c == ')'));
        self.chars.push(c);
        self.roles.push(role);
    }

    fn pair(&mut self) {
        self.partner = vec![NONE; self.chars.len()];
        let mut open = Vec::new();
        // Closing parentheses without an opening one; each makes one later "(" text.
        let mut surplus = 0usize;
        for place in 0..self.roles.len() {
            match self.roles[place] {
                Role::Open if surplus > 0 => {
                    surplus -= 1;
                    self.roles[place] = Role::Text;
                }
                Role::Open => open.push(place),
                Role::Close => match open.pop() {
                    Some(begin) => {
                        self.partner[begin] = place;
                        self.partner[place] = begin;
                    }
                    None => {
                        surplus += 1;
                        self.roles[place] = Role::Text;
                    }
                },
                Role::Text => {}
            }
        }
    }

    fn run(mut self) -> Vec<Segment> {
        let mut pending = vec![Stretch { begin: 0, end: self.chars.len(), weight: 1.0 }];
        while let Some(stretch) = pending.pop() {
            let Stretch { begin, end, weight } = stretch;
            let Some(open) = (begin..end).find(|&i| self.roles[i] == Role::Open) else {
                self.emit(begin, end, weight);
                continue;
            };
            self.emit(begin, open, weight);
            let close = self.partner[open];
            if close < end {
                pending.push(Stretch { begin: close + 1, end, weight });
                pending.push(self.group(open + 1, close, weight));
            } else if self.roles[end - 1] == Role::Close {
                // The last ")" now belongs to this "(", so its own partner has lost it.
                let bereft = self.partner[end - 1];
                self.partner[bereft] = NONE;
                pending.push(self.group(open + 1, end - 1, weight));
            } else {
                self.emit(open, end, weight);
            }
        }
        self.segments
    }

    /// The inside `begin..end` of a group, with the weight it sets.
    fn group(&self, begin: usize, end: usize, outer: f64) -> Stretch {
        let colon = self.colon_before[end];
        let parenthesis = self.parenthesis_before[end];
        // A number holds no parenthesis; looking only behind the last one keeps nested groups linear.
        let is_free = colon != NONE && colon > begin && (parenthesis == NONE || parenthesis < colon);
        if is_free && let Some(weight) = python_float::parse(&self.chars[colon + 1..end]) {
            return Stretch { begin, end: colon, weight };
        }
        Stretch { begin, end, weight: outer * EMPHASIS }
    }

    fn emit(&mut self, begin: usize, end: usize, weight: f64) {
        if begin < end {
            let text = self.chars[begin..end].iter().collect();
            self.segments.push(Segment { text, weight });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(prompt: &str) -> Vec<(String, f64)> {
        segments(prompt).into_iter().map(|s| (s.text, s.weight)).collect()
    }

    #[test]
    fn groups_cut_and_weigh() {
        let up = 1.1f64;
        let cases: &[(&str, &[(&str, f64)])] = &[
            ("", &[]),
            ("()", &[]),
            ("plain [text]", &[("plain [text]", 1.0)]),
            ("a (b) c", &[("a ", 1.0), ("b", up), (" c", 1.0)]),
            ("((b))", &[("b", up * up)]),
            ("(a (b:1.5) c:0.8)", &[("a ", 0.8), ("b", 1.5), (" c", 0.8)]),
            ("((x) y:2)", &[("x", 2.0 * up), (" y", 2.0)]),
            (r"\(a\) (b\):2)", &[("(a) ", 1.0), ("b)", 2.0)]),
            (r"\\(a", &[(r"\(a", 1.0)]),
            ("(:1.2)", &[(":1.2", up)]),
            ("(a:b)", &[("a:b", up)]),
            ("(a:1:2)", &[("a:1", 2.0)]),
            (r"(a:1\))", &[("a:1)", up)]),
            ("(a:2", &[("(a:2", 1.0)]),
            ("a) b (c)", &[("a) b (c)", 1.0)]),
            ("a) b (c (d:2)", &[("a) b (c ", 1.0), ("d", 2.0)]),
            // An opening parenthesis too many, at the end of text and not.
            ("((a) b", &[("((a) b", 1.0)]),
            ("x ((a)", &[("x ", 1.0), ("(a", up)]),
            ("((a:2)", &[("(a", 2.0)]),
            ("(((a))", &[("(a", up * up)]),
            ("(a (b) (c)", &[("a ", up), ("b", up * up), (" ", up), ("(c", up)]),
        ];
        for (prompt, expected) in cases {
            let expected: Vec<_> = expected.iter().map(|&(t, w)| (t.to_owned(), w)).collect();
            assert_eq!(cut(prompt), expected, "{prompt:?}");
        }
    }

    #[test]
    fn deep_nesting_takes_linear_time() {
        let deep = 300_000;
        let start = std::time::Instant::now();
        let text = format!("{}a:{}{}", "(".repeat(deep), "1".repeat(1000), ")".repeat(deep));
        assert_eq!(cut(&text), [("a".to_owned(), f64::INFINITY)]);
        assert_eq!(cut(&"(".repeat(deep)).len(), 1);
        assert_eq!(cut(&"(a".repeat(deep)).len(), 1);
        assert_eq!(cut(&format!("{})", "(".repeat(deep))).len(), 1);
        assert_eq!(cut(&")(".repeat(deep)).len(), 1);
        assert_eq!(cut(&"(a)".repeat(deep)).len(), deep);
        let half_open = format!("{}{}", "(".repeat(2 * deep), ")".repeat(deep));
        assert_eq!(cut(&half_open).len(), 1);
        // Milliseconds; a quadratic pass over this would take minutes.
        assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    }
}
