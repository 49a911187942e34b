//! The conformance kit against the real binary: scenarios recorded from ComfyUI.
//!
//! The kit is a folder beside the repository, `$KILN_CONFORMANCE` or
//! `../shared/conformance`; it needs Python 3 with requests, websocket-client
//! and Pillow (`$KILN_PYTHON` names an interpreter that has them). Where one of
//! them is missing the test says so and passes, unless `KILN_REQUIRE_TOOLS` is set.
//!
//! `$KILN_CONFORMANCE_CKPT` names an SD1.x checkpoint; without it the built-in
//! demo model is used, which is quick, and for the one scenario that needs a
//! network of SD1.5's size a synthetic one is written. `$KILN_CONFORMANCE_ONLY`
//! runs a part.
//! A scenario may fail only for a node class that kiln doesn't have yet: such
//! failures are counted apart, by class.

mod process;

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::tensor::DType;
use kiln::weights::synth::{self, Manifest};
use process::Server;

/// A profile of the kit and the flags it expects.
const PROFILES: &[(&str, &[&str])] = &[
    ("default", &[]),
    ("preview", &["--preview-method", "latent2rgb"]),
    ("cors", &["--enable-cors-header"]),
    ("gzip", &["--enable-compress-response-body"]),
    ("smallupload", &["--max-upload-size", "1"]),
    ("nometadata", &["--disable-metadata"]),
    ("multiuser", &["--multi-user"]),
];

/// The kit brings a LoRA for it.
const NEEDS_SD15: &str = "workflows/lora-changes-the-picture";

/// Whether all that the kit says of a scenario is that classes are missing. It cuts long lines.
fn lacks_classes(line: &str) -> bool {
    let differences: Vec<&str> = line.split("; ").collect();
    let is_unknown = |text: &&str| text.contains("unknown class");
    line.contains("Cannot execute because node ")
        || (is_unknown(&differences[0]) && differences.iter().rev().skip(1).all(is_unknown))
}

fn kit() -> Option<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/conformance");
    let folder = std::env::var_os("KILN_CONFORMANCE").map_or_else(default, PathBuf::from);
    folder.join("run.py").is_file().then_some(folder)
}

/// An interpreter that has the kit's packages.
fn python() -> Option<String> {
    let name = std::env::var("KILN_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&name).args(["-c", "import requests, websocket, PIL"]).output();
    probe.is_ok_and(|output| output.status.success()).then_some(name)
}

/// The lines that the kit prints.
fn run(python: &str, kit: &Path, arguments: &[&str]) -> Vec<String> {
    let output = Command::new(python).current_dir(kit).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.trim().is_empty(), "{arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn the_kit_passes_in_every_profile() {
    let (Some(kit), Some(python)) = (kit(), python()) else {
        assert!(
            std::env::var_os("KILN_REQUIRE_TOOLS").is_none() || kit().is_none(),
            "the kit's packages are missing"
        );
        eprintln!(
            "skipped: no conformance kit (KILN_CONFORMANCE), or no Python with its packages (KILN_PYTHON)"
        );
        return;
    };
    let base = tempfile::tempdir().unwrap();
    let models = base.path().join("models");
    std::fs::create_dir_all(models.join("checkpoints")).unwrap();
    let checkpoint = match std::env::var_os("KILN_CONFORMANCE_CKPT") {
        None => kiln::files::DEMO_CHECKPOINT.to_owned(),
        Some(file) => {
            let name = Path::new(&file).file_name().unwrap().to_str().unwrap().to_owned();
            std::os::unix::fs::symlink(&file, models.join("checkpoints").join(&name)).unwrap();
            name
        }
    };
    let only = std::env::var("KILN_CONFORMANCE_ONLY").unwrap_or_default();
    run(&python, &kit, &["make_fixtures.py", "--models", models.to_str().unwrap()]);
    let (mut passed, mut wrong, mut missing) = (0, Vec::new(), Vec::new());
    for (profile, flags) in PROFILES {
        let server = Server::start(base.path(), flags);
        let arguments =
            ["run.py", "--url", &server.url(), "--ckpt", &checkpoint, "--profile", profile, "--only", &only];
        let lines = run(&python, &kit, &arguments);
        eprintln!("{profile}: {}", lines.last().map_or("", String::as_str));
        passed += lines.iter().filter(|line| line.starts_with("PASS ")).count();
        let is_demo = checkpoint == kiln::files::DEMO_CHECKPOINT;
        let failures = lines.into_iter().filter(|line| line.starts_with("FAIL "));
        for line in failures.filter(|line| !(is_demo && line.contains(NEEDS_SD15))) {
            if lacks_classes(&line) { &mut missing } else { &mut wrong }.push(line);
        }
    }
    if checkpoint == kiln::files::DEMO_CHECKPOINT && only.is_empty() {
        let file = models.join("checkpoints/synth-sd15.safetensors");
        synth::write(&Manifest::built_in("sd15").unwrap(), &file, DType::F16, &[], |_, _| {}).unwrap();
        let server = Server::start(base.path(), &[]);
        let arguments =
            ["run.py", "--url", &server.url(), "--ckpt", "synth-sd15.safetensors", "--only", NEEDS_SD15];
        let lines = run(&python, &kit, &arguments);
        eprintln!("SD1.5: {}", lines.last().map_or("", String::as_str));
        passed += lines.iter().filter(|line| line.starts_with("PASS ")).count();
        wrong.extend(lines.into_iter().filter(|line| line.starts_with("FAIL ")));
    }
    eprintln!("{passed} passed, {} failed, {} lack a node class", wrong.len(), missing.len());
    missing.iter().for_each(|line| eprintln!("  {line}"));
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(passed > 0, "nothing ran");
}
