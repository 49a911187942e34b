//! Row 15, files of users as web pages: of 25 types only those that can't carry script are shown, on
//! each of the routes that give files away; everything is sandboxed and not sniffed.

use std::fs;

use serde_json::json;

use super::process::Server;
use super::wire::{get, post, send};

/// Ending, and whether a browser may show it.
const TYPES: &[(&str, bool)] = &[
    ("png", true),
    ("jpg", true),
    ("jpeg", true),
    ("webp", true),
    ("gif", true),
    ("mp4", true),
    ("webm", true),
    ("wav", true),
    ("mp3", true),
    ("json", true),
    ("html", false),
    ("htm", false),
    ("xhtml", false),
    ("svg", false),
    ("xml", false),
    ("js", false),
    ("mjs", false),
    ("css", false),
    ("pdf", false),
    ("txt", false),
    ("md", false),
    ("swf", false),
    ("shtml", false),
    ("xsl", false),
    ("hta", false),
    ("bin", false),
];

#[test]
fn users_files_never_run() {
    let _alone = super::alone();
    let base = tempfile::tempdir().unwrap();
    let server = Server::start(base.path(), &[]);
    assert!(TYPES.len() >= 25);
    let script = "<script>alert(1)</script>";
    let mut checked = 0;
    for (ending, is_shown) in TYPES {
        let name = format!("x.{ending}");
        for folder in ["input", "output", "temp"] {
            fs::write(base.path().join(folder).join(&name), format!("{script}{ending}")).unwrap();
        }
        let asset = send(
            &server,
            "POST",
            "/api/v2/assets",
            &[("Content-Type", "multipart/form-data; boundary=b")],
            format!(
                "--b\r\nContent-Disposition: form-data; name=\"content_type\"\r\n\r\ntext/html\r\n\
                 --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{script}{ending}\r\n--b--\r\n"
            )
            .as_bytes(),
        );
        let id = asset.json()["id"].as_str().unwrap().to_owned();
        let mut paths: Vec<String> = ["input", "output", "temp"]
            .iter()
            .map(|kind| format!("/view?type={kind}&filename={name}"))
            .collect();
        paths.push(format!("/api/v2/assets/{id}/content"));
        paths.push(format!("/api/assets/{id}/content?disposition=inline"));
        for path in paths {
            let answer = get(&server, &path);
            assert_eq!(answer.status, 200, "{path}");
            let kind = answer.header("content-type").unwrap_or_default();
            let disposition = answer.header("content-disposition").unwrap_or_default();
            if !is_shown {
                assert_eq!(kind, "application/octet-stream", "{path}");
                assert!(disposition.starts_with("attachment"), "{path}: {disposition}");
            }
            let risky = ["html", "xml", "javascript", "svg", "pdf", "css"];
            assert!(!risky.iter().any(|word| kind.contains(word)), "{path}: {kind}");
            assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
            let policy = answer.header("content-security-policy").unwrap_or_default();
            assert!(policy.contains("sandbox"), "{path}: {policy}");
            checked += 1;
        }
    }
    let svg = send(&server, "GET", "/view?type=input&filename=x.svg", &[("Sec-Fetch-Dest", "image")], b"");
    assert_eq!(
        (svg.header("content-type"), svg.header("vary")),
        (Some("image/svg+xml"), Some("sec-fetch-dest"))
    );
    eprintln!("{checked} answers");
    assert!(checked >= 100);
    // a result whose name a prompt chose
    let graph = json!({"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
                       "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a.html"}}});
    let job = post(&server, "/prompt", &json!({"prompt": graph, "wait": 60})).json();
    let path = job["files"][0]["url"].as_str().unwrap().splitn(4, '/').nth(3).unwrap().to_owned();
    assert_eq!(get(&server, &format!("/{path}")).header("content-type"), Some("image/png"));
}
