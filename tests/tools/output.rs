//! Readers that go away, disks that are full, and exit codes.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::{Said, has_simt, kiln, run};

/// Runs it with a reader that takes one line and goes.
fn first_line(args: &[&str]) -> (String, Said) {
    let mut child = kiln(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    drop(reader);
    (line, child.wait_with_output().unwrap().into())
}

#[test]
fn a_reader_that_goes_ends_the_command_quietly() {
    if !has_simt() {
        return;
    }
    let (line, said) = first_line(&["check", "--device", "simt", "--quick"]);
    assert!(line.starts_with("SIMT layer"), "{line}");
    assert_eq!((said.code, said.err.as_str()), (Some(141), ""), "as if by SIGPIPE");
    let object = first_line(&["info", "--cpu"]).1;
    // The whole text may fit the pipe before the reader is gone.
    assert!(
        matches!(object.code, Some(0 | 141)) && object.err.is_empty(),
        "{:?} {}",
        object.code,
        object.err
    );
}

#[test]
fn a_full_disk_is_an_error_message() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let said: Said = kiln(&["info", "--cpu"]).stdout(full).output().unwrap().into();
    assert_eq!(said.code, Some(1));
    assert!(said.err.starts_with("error: the output can't be written: No space left"), "{}", said.err);
}

#[test]
fn an_error_names_its_cause_once() {
    let said = run(&["info", "/no/such/model.safetensors"]);
    assert_eq!(said.code, Some(1));
    assert_eq!(said.err.matches("No such file").count(), 1, "{}", said.err);
    let said = run(&["check", "--device", "simt", "--kernels-dir", "/no/such/folder"]);
    assert_eq!((said.code, said.err.matches("No such file").count()), (Some(1), 1), "{}", said.err);
}

#[test]
fn checks_end_with_0_or_1() {
    if !has_simt() {
        return;
    }
    let said = run(&["check", "--device", "simt", "--quick", "--filter", "axpby"]);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert!(said.out.contains(" 0 failed"), "{}", said.out);
    let said = run(&["check", "--device", "simt", "--quick", "--filter", "no such kernel"]);
    assert_eq!((said.code, said.err.trim_end()), (Some(1), "error: no case matches"));
    // One that misses: `a_miss_ends_with_1` in folder.rs.
}

#[test]
fn info_names_the_kernels_and_the_gpus() {
    let said = run(&["info", "--cpu"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    match kiln::driver::embedded() {
        Some(build) => {
            assert!(said.out.contains(&format!(
                "CUDA: {} kernel files for {}",
                build.modules.len(),
                build.targets
            )));
            for module in build.modules {
                assert!(said.out.contains(module.name), "no {} in {}", module.name, said.out);
            }
        }
        None => assert!(said.out.contains("CUDA: not built"), "{}", said.out),
    }
    assert!(said.out.contains("GPUs: "), "{}", said.out);
}

#[test]
fn what_cannot_be_measured_is_refused_at_once() {
    for arch in ["esrgan-4x", "sd15-lora", "taesd_decoder", "sd15-controlnet", "sd99"] {
        let said = run(&["bench", "model", "--cpu", "--arch", arch]);
        assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
        let told = format!(
            "--arch {arch}: not a whole model that can be measured; there are sd15, sd21-v, sdxl-base"
        );
        assert_eq!(said.err.trim_end(), format!("error: {told}"));
    }
}
