//! Row 14, names that lead out: more than 200 spellings on every route and node that takes a file
//! name; none reads or writes outside, which a canary file and a listing prove. Harmless names with
//! dots stay allowed, links that leave the folder are refused.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::process::Server;
use super::wire::{Answer, get, post, send};

const CANARY: &str = "CANARY-7d1f";

/// Spellings of a file above the folder.
fn spellings(outside: &Path) -> Vec<String> {
    let absolute = outside.join("canary.png").to_string_lossy().into_owned();
    let ups = [
        "..",
        "...",
        ". .",
        ".. ",
        "..%2f",
        "%2e%2e",
        "%252e%252e",
        "..;",
        "..\\",
        "..\u{2215}",
        "\u{ff0e}\u{ff0e}",
        "..\u{0}",
        "..%00",
    ];
    let slashes = ["/", "\\", "//", "\\\\", "/./", "%2f", "%5c", "%252f", "%c0%af", "\u{2044}"];
    let mut all = vec![
        absolute.clone(),
        format!("file://{absolute}"),
        format!("/{absolute}"),
        absolute.replace('/', "\\"),
    ];
    for up in ups {
        for slash in slashes {
            all.push(format!("{up}{slash}canary.png"));
            all.push(format!("sub{slash}{up}{slash}{up}{slash}canary.png"));
        }
    }
    for name in [
        "C:\\canary.png",
        "C:canary.png",
        "\\\\host\\share\\canary.png",
        "//host/share/canary.png",
        "~/canary.png",
        "$HOME/canary.png",
        "..",
        ".",
        "",
        "/",
        "\\",
        "../",
        "canary.png/..",
        "link/canary.png",
        "linked.png",
        "sub/../../canary.png",
        "../output/../canary.png",
        "../temp/../canary.png",
        "canary.png\u{0}.png",
        "CON",
        "NUL.png",
    ] {
        all.push(name.to_owned());
    }
    all
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02x}") })
        .collect()
}

/// Every file below a folder, links not followed, with its size.
fn listing(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        let path = entry.path();
        if kind.is_dir() {
            all.extend(listing(&path));
        } else {
            all.push(format!("{} {}", path.display(), entry.metadata().map_or(0, |m| m.len())));
        }
    }
    all.sort();
    all
}

fn form(fields: &[(&str, &str)], filename: &str) -> Vec<u8> {
    let mut body = String::new();
    for (name, value) in fields {
        body.push_str(&format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"));
    }
    let filename = filename.replace(['"', '\r', '\n', '\0'], "_");
    body.push_str(&format!(
        "--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"{filename}\"\r\n\r\nx\r\n--b--\r\n"
    ));
    body.into_bytes()
}

struct Probe<'a> {
    server: &'a Server,
    tried: usize,
}

impl Probe<'_> {
    fn check(&mut self, what: &str, answer: &Answer) {
        self.tried += 1;
        let leaked = answer.body.windows(CANARY.len()).any(|w| w == CANARY.as_bytes());
        assert!(!leaked, "{what} gave the canary away");
        assert!(answer.status < 500 && answer.status != 0, "{what}: {answer:?}");
    }

    fn get(&mut self, path: &str) {
        let answer = get(self.server, path);
        self.check(path, &answer);
    }

    fn upload(&mut self, route: &str, fields: &[(&str, &str)], filename: &str) {
        let headers = [("Content-Type", "multipart/form-data; boundary=b")];
        let answer = send(self.server, "POST", route, &headers, &form(fields, filename));
        self.check(&format!("{route} {fields:?} {filename:?}"), &answer);
    }

    fn prompt(&mut self, name: &str, graph: Json) {
        let body = json!({"prompt": graph, "wait": 20});
        let answer = post(self.server, "/prompt", &body);
        self.check(&format!("/prompt {name:?}"), &answer);
    }
}

#[test]
fn no_name_leads_outside() {
    let _alone = super::alone();
    let outside = tempfile::tempdir().unwrap();
    let base = outside.path().join("base");
    for folder in ["input/sub", "output/sub", "temp", "user/default", "models/checkpoints"] {
        fs::create_dir_all(base.join(folder)).unwrap();
    }
    for place in [outside.path(), base.as_path()] {
        fs::write(place.join("canary.png"), CANARY).unwrap();
    }
    for folder in ["input", "output"] {
        std::os::unix::fs::symlink(outside.path(), base.join(folder).join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("canary.png"), base.join(folder).join("linked.png"))
            .unwrap();
    }
    let server = Server::start(&base, &[]);
    let inside =
        |path: &Path| ["input", "output", "temp", "user"].iter().any(|f| path.starts_with(base.join(f)));
    let others = || -> Vec<String> {
        listing(outside.path())
            .into_iter()
            .filter(|line| !inside(Path::new(line.rsplit_once(' ').unwrap().0)))
            .collect()
    };
    let before = others();
    let names = spellings(outside.path());
    assert!(names.len() >= 200, "{} names", names.len());
    let mut probe = Probe { server: &server, tried: 0 };
    for name in &names {
        let escaped = escape(name);
        for kind in ["input", "output", "temp"] {
            probe.get(&format!("/view?type={kind}&filename={escaped}"));
            probe.get(&format!("/view?type={kind}&filename=canary.png&subfolder={escaped}"));
        }
        probe.get(&format!("/view?filename={escaped}%20%5binput%5d&preview=webp"));
        probe.get(&format!("/view_metadata/checkpoints?filename={escaped}"));
        probe.get(&format!("/models/{escaped}"));
        probe.get(&format!("/experiment/models/preview/checkpoints/0/{escaped}"));
        probe.get(&format!("/userdata/{escaped}"));
        probe.get(&format!("/userdata?dir={escaped}"));
        probe.get(&format!("/api/v2/assets/{escaped}/content"));
        probe.upload("/upload/image", &[("overwrite", "true")], name);
        probe.upload("/upload/image", &[("overwrite", "true"), ("subfolder", name)], "a.png");
        probe.upload("/upload/image", &[("type", name)], "a.png");
        let reference = json!({"filename": name, "subfolder": name, "type": "input"}).to_string();
        probe.upload("/upload/mask", &[("original_ref", &reference)], "m.png");
    }
    // nodes, several names in one prompt would stop at the first bad one
    for name in names.iter().step_by(3) {
        let picture = json!({"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}});
        probe.prompt(
            name,
            json!({"1": {"class_type": "LoadImage", "inputs": {"image": name}},
                                  "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}),
        );
        probe.prompt(name, json!({"1": {"class_type": "LoadImageMask", "inputs": {"image": format!("{name} [output]"), "channel": "red"}},
                                  "3": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 0]}},
                                  "2": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}}));
        probe.prompt(name, json!({"1": picture, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": name}}}));
        probe.prompt(name, json!({"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
                                  "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
                                  "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
                                  "2": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}}}));
    }
    eprintln!("{} names, {} tries", names.len(), probe.tried);
    assert_eq!(others(), before, "something was written outside");
    // what only looks odd is allowed
    probe.upload("/upload/image", &[], "a..b.png");
    assert_eq!(get(&server, "/view?type=input&filename=a..b.png").status, 200);
}
