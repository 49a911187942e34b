//! The Python scripts that compare with PyTorch: their own tests, which need nothing but Python.

use std::path::Path;
use std::process::Command;

#[test]
fn the_scripts_pass_their_tests() {
    let benches = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches");
    let tests = Command::new("python3")
        .args(["-B", "-m", "unittest", "-v", "test_scripts"])
        .current_dir(benches)
        .output();
    let done = match tests {
        Ok(done) => done,
        Err(error) => {
            assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "no python3: {error}");
            eprintln!("skipped: no python3");
            return;
        }
    };
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let count = said.lines().filter(|line| line.ends_with(" ... ok")).count();
    assert!(count >= 8, "only {count} tests ran:\n{said}");
}
