use proptest::prelude::*;

use super::*;

/// A file of `header` and `data` bytes of zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn fault_of(bytes: Vec<u8>) -> String {
    match WeightsFile::from_bytes(bytes, "bad.safetensors") {
        Ok(_) => "accepted".into(),
        Err(error) => error.to_string(),
    }
}

/// One F32 tensor `a` of four bytes with `extra` after its entry.
fn with_extra(extra: &str) -> String {
    format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}{extra}}}"#)
}

/// A case's name, its file, and what the message must say.
type Malformed = (&'static str, Vec<u8>, &'static str);

/// A sound file, to be damaged.
fn good() -> Vec<u8> {
    file(&with_extra(""), 4)
}

/// A file whose only tensor has this entry.
fn entry(json: &str) -> Vec<u8> {
    file(&format!(r#"{{"a":{json}}}"#), 4)
}

/// Files whose header cannot be found or is not text.
fn framing_faults() -> Vec<Malformed> {
    let length = |n: u64| [&n.to_le_bytes()[..], &good()[8..]].concat();
    vec![
        ("empty file", vec![], "0 bytes"),
        ("one byte", vec![1], "1 bytes, fewer than the 8"),
        ("seven bytes", vec![0; 7], "7 bytes, fewer than the 8"),
        ("eight zeros: empty header", vec![0; 8], "does not begin with {"),
        ("header length of all ones", length(u64::MAX), "claims 18446744073709551615 bytes"),
        ("header length one over the cap", length(100_000_001), "more than the 100000000"),
        ("header length beyond the end", length(1000), "are missing"),
        ("header cut short", good()[..20].to_vec(), "are missing"),
        ("header not UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff}"].concat(), "byte 10 of the file"),
        ("header begins with a blank", file(" {}", 0), "does not begin with {"),
    ]
}

/// Headers whose JSON is not the object it should be.
fn structure_faults() -> Vec<Malformed> {
    vec![
        ("header is an array", file("[]", 0), "does not begin with {"),
        ("header is cut JSON", file(r#"{"a":{"dtype":"F32""#, 0), "EOF"),
        ("text after the object", file("{} x", 0), "trailing characters"),
        (
            "header nested beyond any stack",
            file(&format!("{{\"a\":{}", "[".repeat(500_000)), 0),
            "tensor \"a\"",
        ),
        (
            "tensor named twice",
            file(&with_extra(r#","a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 4),
            "\"a\" twice",
        ),
        (
            "name twice by escape",
            file(&with_extra(r#","\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8),
            "\"a\" twice",
        ),
        ("metadata twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "\"__metadata__\" twice"),
        ("metadata key twice", file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0), "\"k\" twice"),
        ("metadata is a number", file(r#"{"__metadata__":3}"#, 0), "__metadata__ must map strings"),
        (
            "metadata value is a number",
            file(r#"{"__metadata__":{"k":3}}"#, 0),
            "__metadata__ must map strings",
        ),
        (
            "metadata value is an object",
            file(r#"{"__metadata__":{"k":{}}}"#, 0),
            "__metadata__ must map strings",
        ),
    ]
}

/// Entries with a missing, doubled or mistyped field.
fn field_faults() -> Vec<Malformed> {
    vec![
        ("entry is null", entry("null"), "entry of tensor \"a\""),
        ("entry is a list of offsets", entry("[0,4]"), "entry of tensor \"a\""),
        ("no dtype", entry(r#"{"shape":[1],"data_offsets":[0,4]}"#), "missing field `dtype`"),
        ("no shape", entry(r#"{"dtype":"F32","data_offsets":[0,4]}"#), "missing field `shape`"),
        ("no offsets", entry(r#"{"dtype":"F32","shape":[1]}"#), "missing field `data_offsets`"),
        (
            "dtype twice",
            entry(r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
            "duplicate field",
        ),
        ("dtype is a number", entry(r#"{"dtype":3,"shape":[1],"data_offsets":[0,4]}"#), "expected a string"),
        (
            "dtype unknown",
            entry(r#"{"dtype":"F33","shape":[1],"data_offsets":[0,4]}"#),
            "\"F33\", which is not supported",
        ),
        (
            "dtype of packed bits",
            entry(r#"{"dtype":"F4","shape":[8],"data_offsets":[0,4]}"#),
            "\"F4\", which is not supported",
        ),
        (
            "dtype in lower case",
            entry(r#"{"dtype":"f32","shape":[1],"data_offsets":[0,4]}"#),
            "\"f32\", which is not supported",
        ),
    ]
}

/// Entries whose numbers are impossible in themselves.
fn shape_faults() -> Vec<Malformed> {
    vec![
        ("negative extent", entry(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), "integer `-1`"),
        (
            "fractional extent",
            entry(r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#),
            "floating point",
        ),
        (
            "extent beyond 64 bits",
            entry(r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}"#),
            "tensor \"a\"",
        ),
        (
            "extent is a string",
            entry(r#"{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}"#),
            "tensor \"a\"",
        ),
        (
            "nine dimensions",
            entry(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#),
            "9 dimensions",
        ),
        (
            "product of extents wraps to four bytes",
            entry(r#"{"dtype":"F32","shape":[4611686018427387904,4,1],"data_offsets":[0,4]}"#),
            "overflows",
        ),
        (
            "bytes of the tensor wrap",
            entry(r#"{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}"#),
            "overflows",
        ),
        ("one offset", entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#), "entry of tensor \"a\""),
        (
            "three offsets",
            entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#),
            "entry of tensor \"a\"",
        ),
        ("negative offset", entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}"#), "integer `-4`"),
        (
            "offsets run backwards",
            entry(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#),
            "ends at byte 0 of the data, before its begin at 4",
        ),
        (
            "offsets span too little",
            entry(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#),
            "needs 8 bytes but its offsets span 4",
        ),
        (
            "offsets span too much",
            entry(r#"{"dtype":"F16","shape":[1],"data_offsets":[0,4]}"#),
            "needs 2 bytes but its offsets span 4",
        ),
        (
            "scalar with no bytes",
            entry(r#"{"dtype":"F32","shape":[],"data_offsets":[0,0]}"#),
            "needs 4 bytes but its offsets span 0",
        ),
    ]
}

/// Tensors that do not cover the data exactly.
fn cover_faults() -> Vec<Malformed> {
    let cut = |n: usize| good()[..good().len() - n].to_vec();
    vec![
        (
            "first tensor not at the start",
            entry(r#"{"dtype":"F16","shape":[1],"data_offsets":[2,4]}"#),
            "2 bytes of the data before tensor \"a\"",
        ),
        (
            "hole between tensors",
            file(&with_extra(r#","b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}"#), 12),
            "4 bytes of the data before tensor \"b\" (from byte 4)",
        ),
        (
            "tensors share all bytes",
            file(&with_extra(r#","b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 4),
            "\"a\" and \"b\" overlap from byte 0",
        ),
        (
            "tensors share some bytes",
            file(&with_extra(r#","b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}"#), 6),
            "overlap from byte 2",
        ),
        (
            "offsets at the end of 64 bits",
            file(
                &with_extra(
                    r#","b":{"dtype":"U8","shape":[18446744073709551611],"data_offsets":[4,18446744073709551615]}"#,
                ),
                4,
            ),
            "are missing",
        ),
        ("data cut by one byte", cut(1), "1 are missing"),
        ("no data", cut(4), "4 are missing"),
        ("a byte after the data", [&good()[..], b"\0"].concat(), "1 bytes follow the data"),
        ("data without tensors", file("{}", 9), "9 bytes follow the data"),
    ]
}

/// Other formats under the wrong name.
fn other_formats() -> Vec<Malformed> {
    vec![
        (
            "zip archive without an end",
            [b"PK\x03\x04\x00\x00\x08\x08", &[0; 64][..]].concat(),
            "zip archive cannot be read",
        ),
        ("pickle", [b"\x80\x02}q\x00(X\x05\x00", &[0; 64][..]].concat(), "instruction 0x00 at byte 16"),
        (
            "pickle whose head is a legal header length",
            [b"\x80\x02\0\0\0\0\0\0", &[b'x'; 640][..]].concat(),
            "instruction 0x00 at byte 2",
        ),
        ("GGUF", b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "GGUF file"),
        (
            "Git LFS pointer",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(),
            "git lfs pull",
        ),
        ("web page", b"<!DOCTYPE html><html>login</html>".to_vec(), "a web page"),
        ("bare JSON", b"{\"error\": \"not found\"}".to_vec(), "a JSON document"),
    ]
}

fn malformed() -> Vec<Malformed> {
    let groups = [
        framing_faults(),
        structure_faults(),
        field_faults(),
        shape_faults(),
        cover_faults(),
        other_formats(),
    ];
    groups.into_iter().flatten().collect()
}

#[test]
fn malformed_files_are_refused_with_the_reason() {
    let cases = malformed();
    assert_eq!(cases.len(), 61);
    for (case, bytes, reason) in cases {
        let message = fault_of(bytes);
        assert!(message.contains(reason), "{case}: expected …{reason}…, got: {message}");
        assert!(message.starts_with("bad.safetensors"), "{case}: the file is not named: {message}");
        assert!(message.contains("; "), "{case}: no advice: {message}");
    }
}

#[test]
fn the_same_files_are_refused_from_disk_mapped_and_read() {
    let folder = tempfile::tempdir().unwrap();
    for (case, bytes, reason) in malformed() {
        let path = folder.path().join("bad.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        for mmap in [true, false] {
            let message = WeightsFile::open_with(&path, OpenOptions { mmap }).unwrap_err().to_string();
            assert!(message.contains(reason), "{case}, mmap {mmap}: {message}");
        }
    }
}

#[test]
fn paths_that_are_not_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let missing = WeightsFile::open(&folder.path().join("none.safetensors")).unwrap_err();
    assert!(matches!(missing, WeightsError::Io { action: "open", .. }), "{missing}");
    let is_folder = WeightsFile::open(folder.path()).unwrap_err();
    assert!(matches!(is_folder, WeightsError::NotAFile { .. }), "{is_folder}");
}

/// Odd but legal: unsorted, unaligned, empty and scalar tensors, unknown fields, null metadata.
const LEGAL: &str = concat!(
    r#"{"late":{"dtype":"F32","shape":[2],"data_offsets":[1,9],"note":1},"first":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"#,
    r#""none":{"dtype":"F64","shape":[3,0],"data_offsets":[9,9]},"#,
    r#""scalar":{"dtype":"F16","shape":[],"data_offsets":[9,11]},"__metadata__":{"b":"2","a":"1"}}  "#
);

fn legal_bytes() -> Vec<u8> {
    let mut bytes = file(LEGAL, 0);
    bytes.push(7);
    bytes.extend(1.5f32.to_le_bytes());
    bytes.extend((-2.0f32).to_le_bytes());
    bytes.extend(half::f16::from_f32(0.25).to_le_bytes());
    bytes
}

#[test]
fn odd_but_legal_files_open() {
    let bytes = legal_bytes();
    let len = bytes.len() as u64;
    let file = WeightsFile::from_bytes(bytes, "odd.safetensors").unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["first", "late", "none", "scalar"]);
    assert_eq!(file.get("late").unwrap().to_f32(), [1.5, -2.0]);
    assert_eq!(file.get("first").unwrap().to_f32(), [7.0]);
    assert_eq!(file.get("scalar").unwrap().to_f32(), [0.25]);
    assert_eq!(file.get("none").unwrap().to_f32(), [0.0f32; 0]);
    assert!(file.get("absent").is_none());
    assert_eq!(
        file.info("none").unwrap(),
        TensorInfo { name: "none", dtype: DType::F64, shape: &[3, 0], bytes: 0 }
    );
    assert_eq!((file.parameters(), file.len_bytes(), file.len()), (4, len, 4));
    assert_eq!(file.metadata().iter().map(|(k, v)| format!("{k}{v}")).collect::<String>(), "a1b2");
    assert!(WeightsFile::from_bytes(super::tests::file(r#"{"__metadata__":null}"#, 0), "null").is_ok());
    assert!(WeightsFile::from_static(b"\x02\0\0\0\0\0\0\0{}", "static").unwrap().is_empty());
}

#[test]
fn mapped_and_read_files_hold_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    std::fs::write(&path, legal_bytes()).unwrap();
    let mapped = WeightsFile::open(&path).unwrap();
    let read = WeightsFile::open_with(&path, OpenOptions { mmap: false }).unwrap();
    for name in mapped.names() {
        assert_eq!(mapped.get(name).unwrap().bytes, read.get(name).unwrap().bytes, "{name}");
    }
    mapped.verify_unchanged().unwrap();

    let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.set_len(20).unwrap();
    let error = mapped.verify_unchanged().unwrap_err().to_string();
    assert!(error.contains(&format!("bytes: {} when opened, 20 now", legal_bytes().len())), "{error}");
    read.verify_unchanged().unwrap();
    assert_eq!(read.get("late").unwrap().to_f32(), [1.5, -2.0]);
}

#[test]
fn a_rewritten_file_is_noticed_and_a_replaced_one_is_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    std::fs::write(&path, legal_bytes()).unwrap();
    let mapped = WeightsFile::open(&path).unwrap();
    let other = folder.path().join("other");
    std::fs::write(&other, b"new").unwrap();
    std::fs::rename(&other, &path).unwrap();
    mapped.verify_unchanged().unwrap();
    assert_eq!(mapped.get("late").unwrap().to_f32(), [1.5, -2.0]);

    std::fs::write(&path, legal_bytes()).unwrap();
    let mapped = WeightsFile::open(&path).unwrap();
    let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    writer.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1)).unwrap();
    assert!(matches!(mapped.verify_unchanged(), Err(WeightsError::Changed { what: "modified", .. })));
}

/// Resident kilobytes of the mapping that holds `address`.
#[cfg(target_os = "linux")]
fn resident_kb(address: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in maps.lines() {
        let head = line.split_whitespace().next().unwrap_or("");
        if let Some((low, high)) = head.split_once('-')
            && let (Ok(low), Ok(high)) = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16))
        {
            inside = (low..high).contains(&address);
        }
        if inside && head == "Rss:" {
            return line.split_whitespace().nth(1).unwrap().parse().unwrap();
        }
    }
    panic!("no mapping holds {address:#x}");
}

#[cfg(target_os = "linux")]
#[test]
fn released_pages_leave_memory_and_come_back_when_read() {
    const COUNT: usize = 4 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.safetensors");
    let manifest = format!(r#"{{"a.weight": [1, {COUNT}], "b.weight": [1, {COUNT}]}}"#);
    let manifest = crate::weights::synth::Manifest::from_json(&manifest).unwrap();
    crate::weights::synth::write(&manifest, &path, DType::F16, &[], |_, _| ()).unwrap();

    let weights = WeightsFile::open(&path).unwrap();
    let address = weights.get("a.weight").unwrap().bytes.as_ptr() as usize;
    let opened = resident_kb(address);
    assert!(opened < 1024, "opening made {opened} kB resident");
    let before = (weights.get("a.weight").unwrap().to_f32(), weights.get("b.weight").unwrap().to_f32());
    let read = resident_kb(address);
    assert!(read >= 16384, "{read} kB resident after reading 16 MiB");
    weights.release_pages("a.weight");
    let half = resident_kb(address);
    assert!((8100..8400).contains(&half), "{half} kB resident with one of two tensors released");
    weights.release_all();
    let none = resident_kb(address);
    assert!(none <= 8, "{none} kB resident after all was released");
    assert!(weights.get("a.weight").unwrap().to_f32() == before.0, "released data come back changed");
    assert!(weights.get("b.weight").unwrap().to_f32() == before.1, "released data come back changed");
}

/// Opens anything: no panic, and whatever opens is consistent and also accepted by the `safetensors` crate.
fn open_is_sound(bytes: &[u8]) {
    let Ok(file) = WeightsFile::from_bytes(bytes.to_vec(), "fuzz") else { return };
    safetensors::SafeTensors::deserialize(bytes).expect("opened, but the safetensors crate refuses it");
    let mut data = 0;
    for info in file.infos() {
        let raw = file.get(info.name).expect("listed");
        assert_eq!(raw.bytes.len(), info.bytes);
        assert_eq!(raw.numel() * raw.dtype.size(), info.bytes);
        assert_eq!(raw.to_f32().len(), raw.numel());
        file.release_pages(info.name);
        data += info.bytes;
    }
    assert!(data as u64 <= file.len_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        open_is_sound(&bytes);
    }

    #[test]
    fn mutated_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in 0usize..40) {
        let mut bytes = legal_bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(bytes.len() - cut.saturating_sub(30));
        open_is_sound(&bytes);
    }

    #[test]
    fn random_entries_never_panic(
        entries in prop::collection::vec(("[a-c]", 0usize..5, prop::collection::vec(0u64..4, 0..3), 0u64..9, 0u64..9), 0..4),
        data in 0usize..24,
    ) {
        let dtypes = ["F32", "F16", "U8", "BOOL", "F9"];
        let entries: Vec<_> = entries
            .iter()
            .map(|(name, dtype, shape, begin, end)| {
                format!(r#""{name}":{{"dtype":"{}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#, dtypes[*dtype])
            })
            .collect();
        open_is_sound(&file(&format!("{{{}}}", entries.join(",")), data));
    }
}
