use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use super::*;
use crate::weights::WeightsFile;

fn sha256(path: &Path) -> String {
    let (mut hash, mut file) = (Sha256::new(), File::open(path).unwrap());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match io::Read::read(&mut file, &mut buffer).unwrap() {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn written(manifest: &str, dtype: DType, metadata: &[(&str, &str)]) -> (String, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let manifest = Manifest::from_json(manifest).unwrap();
    let metadata: Vec<_> = metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    let report = write(&manifest, &out, dtype, &metadata, |_, _| ()).unwrap();
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!(report.bytes, bytes.len() as u64);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    (sha256(&out), bytes)
}

/// Every naming rule, an explicit scale, a scalar, an empty tensor, and names that JSON must escape.
const MIXED: &str = r#"{"z.weight": [33], "a.bias": [5], "lin.weight": [3, 1050], "tok_embedding.weight": [7, 6],
    "text_projection": [4, 9], "s.alpha": {"shape": [], "scale": 0.0, "shift": 2.0}, "q": {"shape": [3], "scale": 0.3},
    "\u00e9\ud83c\udfa8\"\\\n\u007f.w": [2, 2], "empty": [0, 4], "": [3]}"#;

/// Length and SHA-256 recorded from the NumPy implementation of the same rule.
#[test]
fn files_equal_those_of_the_numpy_implementation() {
    let embedding = BUILT_IN.iter().find(|(name, _)| *name == "sd15-embedding").unwrap().1;
    let clip_l = BUILT_IN.iter().find(|(name, _)| *name == "sd15-embedding-clip_l").unwrap().1;
    let metadata: &[(&str, &str)] = &[("k", "v"), ("a\u{e9}", "tab\t")];
    let cases = [
        (
            embedding,
            DType::F16,
            &[][..],
            4688,
            "d41ee5be4f5b429b7397083c8b61d490afa0e242f1ccb788296ff3095ef580c8",
        ),
        (clip_l, DType::F16, &[], 3152, "9f289898a08c8d1afaabd5cc6cce2d392ed2bc463cbc2c8d651890f9d40eb1e3"),
        (MIXED, DType::F16, &[], 7250, "008b1ffc8c451e1da8b7d25bc6f8788a947015a093fc4d82aaab2a654d408383"),
        (
            MIXED,
            DType::F32,
            metadata,
            13860,
            "98330ce76d67f335b1e8437a6a60b05b55d30294eff8819bdb7135722faddb02",
        ),
        ("{}", DType::F16, &[], 16, "9bbcbf73561f6bc5d0a17ea6a2081feed2d1304e87602d8c502d9a5c4bd85576"),
    ];
    for (manifest, dtype, metadata, len, hash) in cases {
        let (got, bytes) = written(manifest, dtype, metadata);
        assert_eq!((bytes.len(), got.as_str()), (len, hash), "{manifest} {dtype:?}");
        WeightsFile::from_bytes(bytes, "synthetic").unwrap();
    }
}

#[test]
fn blocks_join_without_a_seam() {
    let count = 2 * BLOCK + 12_345;
    let (_, bytes) = written(&format!(r#"{{"x.weight": [1, {count}]}}"#), DType::F32, &[]);
    let file = WeightsFile::from_bytes(bytes, "seam").unwrap();
    let manifest = Manifest::from_json(&format!(r#"{{"x.weight": [1, {count}]}}"#)).unwrap();
    assert_eq!(file.get("x.weight").unwrap().to_f32(), manifest.values("x.weight", 0..count).unwrap());
}

#[test]
fn progress_ends_at_the_length_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("p.safetensors");
    let most = AtomicU64::new(0);
    let manifest = Manifest::from_json(r#"{"x": [3000000]}"#).unwrap();
    let report = write(&manifest, &out, DType::F16, &[], |done, total| {
        assert!(done <= total);
        most.fetch_max(done, Ordering::Relaxed);
    });
    assert_eq!(most.into_inner(), report.unwrap().bytes);
}

#[test]
fn impossible_requests_are_errors() {
    let nowhere = Path::new("/nonexistent-folder/x.safetensors");
    let manifest = |text| Manifest::from_json(text).unwrap();
    let attempt = |m: &Manifest, dtype| write(m, nowhere, dtype, &[], |_, _| ());
    assert!(matches!(
        attempt(&manifest(r#"{"x": [4294967296, 4294967296]}"#), DType::F16),
        Err(SynthError::Overflow { .. })
    ));
    let two_halves = r#"{"x": [9223372036854775807], "y": [9223372036854775807]}"#;
    assert!(matches!(attempt(&manifest(two_halves), DType::F16), Err(SynthError::Overflow { .. })));
    assert!(matches!(attempt(&manifest("{}"), DType::I64), Err(SynthError::DType(DType::I64))));
    assert!(matches!(attempt(&manifest("{}"), DType::F32), Err(SynthError::Io { .. })));
    assert!(matches!(Manifest::from_json("[1]"), Err(SynthError::Manifest(_))));
}

#[test]
fn built_in_manifests_parse() {
    let expected = [
        ("sd15", 1130, 1_066_235_307u64),
        ("sd15-embedding", 1, 2304),
        ("sd15-embedding-clip_l", 1, 1536),
        ("sd15-lora", 792, 2_359_560),
        ("sd15-controlnet", 340, 361_279_120),
        ("esrgan-4x", 72, 577_811),
        ("esrgan-4x-oldkeys", 72, 577_811),
        ("taesd_decoder", 67, 1_222_531),
        ("taesd_encoder", 67, 1_222_532),
        ("sd21-v", 1228, 1_303_597_228),
        ("sdxl-base", 2514, 3_468_837_868),
        ("sdxl-embedding", 2, 4_096),
    ];
    for (name, tensors, parameters) in expected {
        let manifest = Manifest::built_in(name).unwrap();
        let total: u64 = manifest.shapes().map(|(_, shape)| shape.iter().product::<u64>()).sum();
        assert_eq!((manifest.shapes().len(), total), (tensors, parameters), "{name}");
    }
    assert_eq!(Manifest::built_in_names().count(), expected.len());
    assert!(Manifest::built_in("sd16").is_none());
}

/// 2.1 GB of disk and some seconds of all cores: run with `--ignored`.
#[test]
#[ignore = "writes 2.1 GB"]
fn the_sd15_file_is_the_one_the_recorded_results_were_made_with() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("synth-sd15.safetensors");
    let start = std::time::Instant::now();
    let report = write(&Manifest::built_in("sd15").unwrap(), &out, DType::F16, &[], |_, _| ()).unwrap();
    eprintln!("{} bytes in {:.2} s", report.bytes, start.elapsed().as_secs_f64());
    assert_eq!(report.bytes, 2_132_625_150);
    assert_eq!(sha256(&out), "1b31dd391db217ba797cadd80f938be4a4983f8515bb29b0151600f847bf585d");
}
