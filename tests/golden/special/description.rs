//! Reading what a case does from its `desc`: terms, words and settings in running text.

use serde_json::Value as Json;

/// A number, a name, or a node with arguments.
#[derive(Debug)]
pub enum Term {
    Number(f64),
    Name(String),
    Call(Call),
}

/// `Name(term, term; anything else)`.
#[derive(Debug)]
pub struct Call {
    pub name: String,
    pub terms: Vec<Term>,
    /// All numbers after the semicolon, in order.
    pub numbers: Vec<f64>,
    /// Everything between the parentheses.
    text: String,
}

impl Term {
    pub fn number(&self) -> Option<f64> {
        match self {
            Term::Number(n) => Some(*n),
            _ => None,
        }
    }

    /// Reads a term at the begin of `text`.
    fn read(text: &str) -> Option<Self> {
        let text = text.trim_start();
        // An argument may be named: `to=1`.
        let text = match text.split_once('=') {
            Some((key, rest)) if !key.is_empty() && key.chars().all(char::is_alphabetic) => rest.trim_start(),
            _ => text,
        };
        let end = text.find(|c: char| !(c.is_alphanumeric() || "._-+".contains(c))).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        let word = word.trim_end_matches('.');
        if let Ok(number) = word.parse() {
            return Some(Term::Number(number));
        }
        match enclosed(rest) {
            _ if word.is_empty() => None,
            Some(inner) => Some(Term::Call(Call::read(word, inner))),
            None => Some(Term::Name(word.to_owned())),
        }
    }
}

impl Call {
    fn read(name: &str, inner: &str) -> Self {
        let cut = top_level(inner, ';').next().map_or(0, str::len);
        let (terms, settings) = inner.split_at(cut);
        Self {
            name: name.to_owned(),
            terms: top_level(terms, ',').filter_map(Term::read).collect(),
            numbers: numbers(settings),
            text: inner.to_owned(),
        }
    }

    /// The number that follows a word.
    pub fn value_after(&self, word: &str) -> Option<f64> {
        Description(&self.text).term_after(word)?.number()
    }

    /// The first word after the semicolon.
    pub fn first_word(&self) -> Option<&str> {
        self.text.split_once(';')?.1.split_whitespace().next()
    }

    pub fn says(&self, words: &str) -> bool {
        self.text.contains(words)
    }
}

/// What stands between the parenthesis that `text` begins with and its partner.
fn enclosed(text: &str) -> Option<&str> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return Some(&text[1..at]),
            ')' => depth -= 1,
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The parts of `text` between separators that stand in no parentheses.
fn top_level(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    text.split(move |c: char| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        c == separator && depth == 0
    })
}

/// All numbers in `text`; two dots are a range.
fn numbers(text: &str) -> Vec<f64> {
    let text = text.replace("..", " ");
    text.split(|c: char| !(c.is_alphanumeric() || ".-+_".contains(c)))
        .filter_map(|w| w.parse().ok())
        .collect()
}

/// A `desc`.
#[derive(Clone, Copy)]
pub struct Description<'a>(&'a str);

impl<'a> Description<'a> {
    pub fn new(text: &'a str) -> Self {
        Self(text)
    }

    pub fn says(&self, words: &str) -> bool {
        self.0.contains(words)
    }

    /// What follows a whole word, an equals sign and "only" left out.
    fn after(&self, word: &str) -> Option<&'a str> {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        let found = self.0.match_indices(word).find(|(at, _)| {
            !self.0[..*at].ends_with(is_part) && !self.0[at + word.len()..].starts_with(is_part)
        });
        let rest = self.0[found?.0 + word.len()..].trim_start();
        let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
        Some(rest.strip_prefix("only ").unwrap_or(rest))
    }

    /// The number or node with arguments that follows a word.
    pub fn term_after(&self, word: &str) -> Option<Term> {
        Term::read(self.after(word)?).filter(|term| !matches!(term, Term::Name(_)))
    }

    /// The word that follows a word.
    pub fn word_after(&self, word: &str) -> Option<&'a str> {
        self.after(word)?.split([' ', ',', ';']).next()
    }

    /// The node with arguments that the text begins with.
    pub fn leading_call(&self) -> Option<Call> {
        match Term::read(self.0)? {
            Term::Call(call) => Some(call),
            _ => None,
        }
    }

    /// A node whose settings are a Python dictionary: `Name({'a': 1})`.
    pub fn node_with_settings(&self) -> Result<Option<(String, Json)>, String> {
        let Some((name, rest)) = self.0.split_once("({") else { return Ok(None) };
        let (settings, _) = rest.split_once("})").ok_or("the settings have no end")?;
        let json =
            format!("{{{settings}}}").replace('\'', "\"").replace("True", "true").replace("False", "false");
        let settings = serde_json::from_str(&json).map_err(|e| format!("settings {json}: {e}"))?;
        Ok(Some((name.trim().to_owned(), settings)))
    }
}
