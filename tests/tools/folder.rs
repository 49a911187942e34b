//! `--kernels-dir`: a folder with one edited kernel over those of the binary.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::{empty, has_simt, run, text};

/// A folder with the elementwise kernels alone, edited.
fn edited(name: &str, from: &str, to: &str) -> PathBuf {
    let folder = empty(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/elementwise/elementwise.cu");
    let source = std::fs::read_to_string(source).unwrap();
    assert!(source.contains(from), "{source}");
    std::fs::create_dir(folder.join("elementwise")).unwrap();
    std::fs::write(folder.join("elementwise/elementwise.cu"), source.replace(from, to)).unwrap();
    folder
}

#[test]
fn a_miss_ends_with_1() {
    if !has_simt() {
        return;
    }
    let folder = edited("kernels-wrong", "args.a * ", "-args.a * ");
    let check = |filter: &str| {
        run(&["check", "--device", "simt", "--quick", "--kernels-dir", text(&folder), "--filter", filter])
    };
    let said = check("axpby");
    assert_eq!(said.code, Some(1), "{}{}", said.out, said.err);
    assert!(said.out.contains("FAIL axpby"), "{}", said.out);
    assert!(said.err.contains("kernel checks failed"), "{}", said.err);
    // What the folder lacks comes from the binary.
    let said = check("layernorm");
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
}

#[test]
fn a_syntax_error_is_told_in_the_compilers_words_and_soon() {
    if !has_simt() {
        return;
    }
    let folder = edited("kernels-syntax", "begin_kernel();", "begin_kernel(;");
    for args in [
        &["check", "--device", "simt", "--quick"][..],
        &["bench", "model", "--device", "simt", "--size", "64"],
        &["demo", "--device", "simt"],
    ] {
        let began = Instant::now();
        let said = run(&[args, &["--kernels-dir", text(&folder)]].concat());
        assert_eq!((said.code, said.out.as_str()), (Some(1), ""), "{args:?}: {}", said.err);
        assert!(said.err.contains("elementwise.cu does not compile"), "{args:?}: {}", said.err);
        assert!(said.err.contains("error: expected"), "{args:?}: {}", said.err);
        assert!(began.elapsed().as_secs() < 60, "all other kernels were compiled first");
    }
}

#[test]
fn a_folder_without_kernels_is_refused() {
    let folder = empty("kernels-none");
    let said = run(&["check", "--device", "simt", "--kernels-dir", text(&folder)]);
    assert_eq!(said.code, Some(1));
    assert!(said.err.contains("holds no kernel; it must be laid out as kernels/"), "{}", said.err);
}
