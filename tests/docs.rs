//! What the documents name must exist.

use std::path::Path;

/// Every `` `name` `` of a sentence must occur in one of the files the sentence names.
#[test]
fn one_prompt_names_real_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/one-prompt.md")).unwrap();
    let mut checked = 0;
    for step in text.split("\n\n") {
        let quoted: Vec<&str> = step.split('`').skip(1).step_by(2).collect();
        let is_path = |q: &&&str| q.starts_with("src/") || q.starts_with("tests/");
        let mut code = String::new();
        for path in quoted.iter().filter(is_path) {
            let full = root.join(path);
            assert!(full.exists(), "docs/one-prompt.md names {path}, which does not exist");
            if full.is_file() {
                code += &std::fs::read_to_string(&full).unwrap();
            }
        }
        for name in quoted.iter().filter(|q| !is_path(q)) {
            let is_route = name.contains(' ') || name.starts_with('/');
            let last = name.rsplit("::").next().unwrap_or(name);
            if !code.is_empty() && !is_route {
                assert!(
                    code.contains(last),
                    "docs/one-prompt.md names `{name}`, which none of its files has"
                );
                checked += 1;
            }
        }
    }
    assert!(checked >= 15, "only {checked} names found");
}

/// The sections that a newcomer looks for are there, with something in them.
#[test]
fn the_readme_has_its_sections() {
    let readme = include_str!("../README.md");
    for section in ["Quick start", "Moving from ComfyUI", "API", "SDK", "Embedding"] {
        let body =
            readme.split_once(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no '{section}'")).1;
        let body = body.split("\n## ").next().unwrap_or_default();
        assert!(body.contains("```") || body.contains('`'), "'{section}' shows nothing: {body}");
        assert!(body.len() > 300, "'{section}' says little: {body}");
    }
}

/// The README's commands are those that CI runs.
#[test]
fn the_readme_opens_with_the_two_commands() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let block = readme.split("```").nth(1).unwrap_or_default();
    assert!(block.contains("cargo run --release -- demo"), "{block}");
    assert!(block.contains("cargo test --release"), "{block}");
    let ci = std::fs::read_to_string(root.join(".ci/run")).unwrap();
    assert!(ci.lines().any(|l| l.trim() == "cargo test --release"));
}
