//! One line a case, counts by file at the end.

use std::collections::BTreeMap;
use std::process::ExitCode;

/// How a case went.
pub enum Outcome {
    /// Compared: largest error, what it may be, in which measure.
    Compared { error: f64, tolerance: f64, measure: &'static str, detail: String },
    /// Something other than a number is wrong.
    Fail(String),
    /// Needs node classes that don't exist yet.
    Later(Vec<String>),
    /// Not a case to run.
    Skip(String),
}

impl Outcome {
    /// The worse of two outcomes.
    pub fn and(self, other: Outcome) -> Outcome {
        match (&self, &other) {
            (
                Outcome::Compared { error: a, tolerance: ta, .. },
                Outcome::Compared { error: b, tolerance: tb, .. },
            ) => {
                let ratio = |e: f64, t: f64| {
                    if e == 0.0 {
                        0.0
                    } else if e.is_nan() {
                        f64::INFINITY
                    } else {
                        e / t
                    }
                };
                if ratio(*b, *tb) > ratio(*a, *ta) { other } else { self }
            }
            (Outcome::Compared { .. }, _) => other,
            _ => self,
        }
    }

    /// The worst of several outcomes.
    pub fn worst(outcomes: impl IntoIterator<Item = Outcome>) -> Option<Outcome> {
        outcomes.into_iter().reduce(Outcome::and)
    }

    /// `None` for cases that didn't run.
    pub fn is_pass(&self) -> Option<bool> {
        match self {
            Outcome::Compared { error, tolerance, .. } => Some(error <= tolerance),
            Outcome::Fail(_) => Some(false),
            Outcome::Later(_) | Outcome::Skip(_) => None,
        }
    }
}

#[derive(Default)]
struct Counts {
    passed: usize,
    failed: usize,
    later: usize,
    skipped: usize,
}

/// Collects and prints.
pub struct Report {
    filter: String,
    files: BTreeMap<String, Counts>,
    failures: Vec<String>,
}

impl Report {
    pub fn new(filter: String) -> Self {
        Self { filter, files: BTreeMap::new(), failures: Vec::new() }
    }

    /// Whether the filter takes this case.
    pub fn wants(&self, file: &str, case: &str) -> bool {
        format!("{file}/{case}").contains(&self.filter)
    }

    /// Prints and counts a case.
    pub fn case(&mut self, file: &str, case: &str, outcome: Outcome) {
        if !self.wants(file, case) {
            return;
        }
        let counts = self.files.entry(file.to_owned()).or_default();
        let name = format!("{file}/{case}");
        let line = match &outcome {
            Outcome::Compared { error, tolerance, measure, detail } => {
                format!("{name}: max error {error:.3e} ({measure}; tolerance {tolerance:.1e}){detail}")
            }
            Outcome::Fail(why) => format!("{name}: {why}"),
            Outcome::Later(nodes) => format!("{name}: needs {}", nodes.join(", ")),
            Outcome::Skip(why) => format!("{name}: {why}"),
        };
        match (outcome.is_pass(), &outcome) {
            (Some(true), _) => {
                counts.passed += 1;
                println!("pass  {line}");
            }
            (Some(false), _) => {
                counts.failed += 1;
                println!("FAIL  {line}");
                self.failures.push(line);
            }
            (None, Outcome::Later(_)) => {
                counts.later += 1;
                println!("later {line}");
            }
            (None, _) => {
                counts.skipped += 1;
                println!("skip  {line}");
            }
        }
    }

    /// A file without cases.
    pub fn skip_file(&mut self, file: &str, why: &str) {
        if self.filter.is_empty() {
            println!("skip  {file}: {why}");
        }
    }

    /// Prints the counts; fails if a case failed.
    pub fn finish(self) -> ExitCode {
        println!();
        println!("{:<22} {:>6} {:>6} {:>6} {:>6}", "file", "passed", "failed", "later", "skip");
        let mut total = Counts::default();
        for (file, c) in &self.files {
            println!("{file:<22} {:>6} {:>6} {:>6} {:>6}", c.passed, c.failed, c.later, c.skipped);
            total.passed += c.passed;
            total.failed += c.failed;
            total.later += c.later;
            total.skipped += c.skipped;
        }
        for failure in &self.failures {
            println!("FAIL  {failure}");
        }
        println!(
            "golden: {} passed, {} failed, {} skipped ({} of them wait for node classes or models)",
            total.passed,
            total.failed,
            total.later + total.skipped,
            total.later
        );
        if total.failed > 0 || total.passed == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}
