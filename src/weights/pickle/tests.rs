//! Files that PyTorch wrote (`tests/data/pytorch/make.py`), pickles by hand, and damaged ones.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::PickleFault;
use crate::tensor::DType;
use crate::weights::{OpenOptions, WeightsError, WeightsFile};

fn bytes_of(name: &str) -> Vec<u8> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pytorch"));
    std::fs::read(folder.join(name)).unwrap()
}

fn open(name: &str) -> Arc<WeightsFile> {
    WeightsFile::from_bytes(bytes_of(name), name).unwrap()
}

fn fault(bytes: Vec<u8>) -> PickleFault {
    match WeightsFile::from_bytes(bytes, "bad.pt") {
        Err(WeightsError::Pickle { fault, .. }) => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn both_forms_of_a_checkpoint_hold_the_same() {
    let expected: [(&str, DType, &[usize], &[f32]); 12] = [
        ("whole", DType::F32, &[3, 4], &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]),
        ("turned", DType::F32, &[4, 3], &[0., 4., 8., 1., 5., 9., 2., 6., 10., 3., 7., 11.]),
        ("part", DType::F32, &[4], &[4., 5., 6., 7.]),
        ("columns", DType::F32, &[3, 2], &[1., 2., 5., 6., 9., 10.]),
        ("half", DType::F16, &[2], &[0.5, -2.0]),
        ("brain", DType::BF16, &[2], &[1.5, -3.0]),
        ("double", DType::F64, &[1], &[0.1]),
        ("ids", DType::I64, &[1, 3], &[0., 1., 2.]),
        ("flags", DType::Bool, &[2], &[1., 0.]),
        ("scalar", DType::F32, &[], &[7.]),
        ("empty", DType::F32, &[0, 3], &[]),
        ("learned", DType::F32, &[2], &[1., 2.]),
    ];
    for name in ["checkpoint.ckpt", "checkpoint-old.ckpt"] {
        let file = open(name);
        assert_eq!(file.names().collect::<Vec<_>>(), expected.map(|(name, ..)| name), "{name}");
        for (tensor, dtype, shape, values) in expected {
            let raw = file.get(tensor).unwrap();
            assert_eq!((raw.dtype, raw.shape), (dtype, shape), "{name}: {tensor}");
            assert_eq!(raw.to_f32(), values, "{name}: {tensor}");
            assert_eq!(file.info(tensor).unwrap().numel(), values.len(), "{name}: {tensor}");
        }
        let texts: Vec<_> = file.metadata().iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(texts, [("epoch", "3"), ("global_step", "1000000000000"), ("lr", "0.25")], "{name}");
    }
}

#[test]
fn tensors_in_one_piece_are_views_of_the_file() {
    let bytes: &'static [u8] = bytes_of("checkpoint.ckpt").leak();
    let file = WeightsFile::from_static(bytes, "checkpoint.ckpt").unwrap();
    let is_inside = |name: &str| {
        let raw = file.get(name).unwrap();
        bytes.as_ptr_range().contains(&raw.bytes.as_ptr())
    };
    assert!(is_inside("whole") && is_inside("part") && is_inside("learned"));
    assert!(!is_inside("turned") && !is_inside("columns"));
    // The part lies inside the whole: four elements further.
    let address = |name: &str| file.get(name).unwrap().bytes.as_ptr() as usize;
    assert_eq!(address("part"), address("whole") + 16);
}

#[test]
fn mapped_and_read_files_hold_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ckpt");
    std::fs::write(&path, bytes_of("checkpoint.ckpt")).unwrap();
    let [mapped, read] =
        [true, false].map(|mmap| WeightsFile::open_with(&path, OpenOptions { mmap }).unwrap());
    for info in mapped.infos() {
        assert_eq!(mapped.get(info.name).unwrap().bytes, read.get(info.name).unwrap().bytes);
        mapped.release_pages(info.name);
        assert_eq!(mapped.get(info.name).unwrap().bytes, read.get(info.name).unwrap().bytes);
    }
}

#[test]
fn wrappers_are_taken_off_and_nested_names_joined() {
    let names = |file: &str| open(file).names().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(names("word.pt"), ["string_to_param.*"]);
    assert_eq!(names("word-old.pt"), ["string_to_param.*"]);
    assert_eq!(names("word.bin"), ["<word>"]);
    assert_eq!(open("word.pt").get("string_to_param.*").unwrap().shape, [2, 32]);
    assert_eq!(names("esrgan.pth")[..2], ["conv_first.weight", "conv_first.bias"]);
    let module = [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ];
    assert_eq!(names("module.pt"), module);
    assert_eq!(open("module.pt").get("0.weight").unwrap().to_f32(), [1.0, 2.0]);
    let hyper = open("hypernetwork.pt");
    assert_eq!(hyper.names().filter(|name| name.starts_with("32.1.")).count(), 8);
    assert_eq!(hyper.metadata()["activation_func"], "relu");
    assert_eq!(hyper.metadata()["is_layer_norm"], "true");
    assert_eq!(open("float8.pt").get("a").unwrap().to_f32(), [1.0, -2.0]);
}

#[test]
fn what_is_not_read_is_named() {
    let message = |name: &str| fault(bytes_of(name)).to_string();
    assert!(message("complex.pt").contains("ComplexFloatStorage"));
    assert!(message("expanded.pt").contains("share memory"));
    let sparse = message("sparse.pt");
    assert!(sparse.contains("torch._utils._rebuild_sparse_tensor") && sparse.contains("\"a\""), "{sparse}");
    assert!(message("empty.pt").contains("no tensors"));
}

/// The zip with one of its stored members changed. Checksums are not read.
fn changed(from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes_of("checkpoint.ckpt");
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn the_other_byte_order_is_refused() {
    assert_eq!(fault(changed(b"little", b"big   ")), PickleFault::BigEndian);
    let mut bytes = bytes_of("checkpoint-old.ckpt");
    let at = bytes.windows(13).position(|window| window == b"little_endian").unwrap();
    let value = at + bytes[at..].iter().position(|b| *b == 0x88).unwrap();
    bytes[value] = 0x89;
    assert_eq!(fault(bytes), PickleFault::BigEndian);
}

#[test]
fn tensors_outside_of_their_storage_are_refused() {
    // `part`: offset 4, shape (4,), strides (1,): K 4, K 4 TUPLE1 memo, K 1 TUPLE1.
    let mut bytes = bytes_of("checkpoint.ckpt");
    let name = bytes.windows(4).position(|window| window == b"part").unwrap();
    let at = name + bytes[name..].windows(3).position(|window| window == b"QK\x04").unwrap();
    bytes[at + 2] = 9;
    assert!(matches!(fault(bytes), PickleFault::Beyond { offset: 9, elements: 12, .. }));
}

/// A zip of stored members, for pickles by hand.
fn zipped(members: &[(&str, &[u8])]) -> Vec<u8> {
    use std::io::Write;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in members {
        zip.start_file(*name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn pickled(program: &[u8]) -> Vec<u8> {
    zipped(&[("x/data.pkl", program), ("x/data/0", &[0; 16])])
}

/// `{"a": tensor of four floats}` with `more` before the dictionary ends.
fn with(more: &[u8]) -> Vec<u8> {
    let tensor: &[u8] =
        b"\x80\x02}(U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n\
        U\x010U\x03cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89}tR";
    pickled(&[tensor, more, b"u."].concat())
}

#[test]
fn nothing_is_called() {
    let file = WeightsFile::from_bytes(with(b"U\x01bcos\nsystem\n(U\x09echo boomtR"), "evil.pt").unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a"]);
    assert_eq!(file.get("a").unwrap().to_f32(), [0.0; 4]);
    let nothing = fault(pickled(b"\x80\x02cos\nsystem\n(U\x04echotR.")).to_string();
    assert!(nothing.contains("os.system"), "{nothing}");
}

#[test]
fn endless_and_huge_pickles_are_refused() {
    // A list that holds itself.
    let own = with(b"U\x01b]q\x01h\x01a");
    assert!(matches!(fault(own), PickleFault::Limit { .. }));
    // Lists of twice the list before: 2^24 paths to the first one.
    let mut program = b"U\x01b(]q\x00".to_vec();
    for i in 0..24u8 {
        program.extend([b']', b'q', i + 1, b'(', b'h', i, b'h', i, b'e']);
    }
    program.push(b't');
    assert!(matches!(fault(with(&program)), PickleFault::Limit { what: "values", .. }));
    let deep = [&b"\x80\x02"[..], &[b']'; 2_000_000], b"."].concat();
    assert!(matches!(fault(pickled(&deep)), PickleFault::Limit { what: "values on its stack", .. }));
}

#[test]
fn other_archives_and_pickles_are_named() {
    assert_eq!(fault(zipped(&[("readme.txt", b"hello")])), PickleFault::NotTorch);
    let script = zipped(&[("x/data.pkl", b"\x80\x02}."), ("x/constants.pkl", b"\x80\x02).")]);
    assert_eq!(fault(script), PickleFault::Script);
    assert!(matches!(fault(b"\x80\x02}q\x00.".to_vec()), PickleFault::NotSaved { .. }));
    assert!(matches!(fault(pickled(b"\x80\x02\xff.")), PickleFault::Opcode { opcode: 0xff, at: 2 }));
    assert!(matches!(fault(pickled(b"\x80\x02R.")), PickleFault::Broken { .. }));
    let gone = zipped(&[("x/data.pkl", &with(b"")[..0])]);
    assert!(matches!(fault(gone), PickleFault::Short { .. }));
}

/// Opens without panic; if it opens, every tensor can be read in full.
fn open_is_sound(bytes: Vec<u8>) {
    if let Ok(file) = WeightsFile::from_bytes(bytes, "mutated.pt") {
        for info in file.infos() {
            let raw = file.get(info.name).unwrap();
            assert_eq!(raw.bytes.len(), info.bytes);
            assert_eq!(info.shape.iter().product::<usize>() * info.dtype.size(), info.bytes);
        }
    }
}

#[test]
fn files_cut_anywhere_are_errors() {
    for name in ["checkpoint.ckpt", "checkpoint-old.ckpt"] {
        let bytes = bytes_of(name);
        for end in 0..bytes.len() {
            assert!(WeightsFile::from_bytes(bytes[..end].to_vec(), name).is_err(), "{name} cut at {end}");
        }
    }
}

#[test]
fn every_byte_may_be_wrong() {
    for name in ["checkpoint.ckpt", "checkpoint-old.ckpt", "module.pt"] {
        let bytes = bytes_of(name);
        for at in 0..bytes.len() {
            for change in [0x00, 0xff, bytes[at] ^ 1, bytes[at].wrapping_add(0x80)] {
                let mut mutated = bytes.clone();
                mutated[at] = change;
                open_is_sound(mutated);
            }
        }
    }
}

proptest! {
    #[test]
    fn mutated_files_are_sound(
        which in 0usize..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut bytes = bytes_of(["checkpoint.ckpt", "checkpoint-old.ckpt", "word-old.pt"][which]);
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        open_is_sound(bytes);
    }

    #[test]
    fn random_programs_are_sound(program in prop::collection::vec(any::<u8>(), 0..200)) {
        open_is_sound(pickled(&[b"\x80\x02", &program[..], b"."].concat()));
    }
}
