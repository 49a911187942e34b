//! Decoding against Pillow 13.0: `tests/data/image/pillow.json` holds what
//! Pillow's `exif_transpose` and `convert` yield for each file next to it.

use std::path::PathBuf;

use super::decode::{Channel, DecodeError, Limits, decode};

#[derive(serde::Deserialize)]
struct Case {
    file: String,
    width: u32,
    height: u32,
    frames: usize,
    has_alpha: bool,
    rgb: String,
    alpha: String,
    #[serde(default)]
    key_alpha: Option<String>,
}

fn data(file: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/image");
    std::fs::read(folder.join(file)).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |b: u8| (b as char).to_digit(16).unwrap() as u8;
    text.as_bytes().chunks(2).map(|p| digit(p[0]) * 16 + digit(p[1])).collect()
}

fn max_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x.abs_diff(*y)).max().unwrap_or(0)
}

/// Largest difference to Pillow, in 1/255. Everything is exact but animated
/// WebPs, whose frames are blended with other rounding.
fn tolerance(file: &str) -> u8 {
    if file == "anim.webp" { 1 } else { 0 }
}

#[test]
fn every_kind_of_file_equals_pillow() {
    let cases: Vec<Case> = serde_json::from_slice(&data("pillow.json")).unwrap();
    assert!(cases.len() >= 39);
    let mut failures = Vec::new();
    for case in cases {
        let picture = decode(&data(&case.file), &Limits::default()).unwrap();
        assert_eq!((picture.width, picture.height), (case.width, case.height), "{}", case.file);
        assert_eq!(picture.frames.len(), case.frames, "{}", case.file);
        assert_eq!(picture.has_alpha, case.has_alpha, "{}", case.file);
        let pixels = || picture.frames.iter().flat_map(|f| f.chunks_exact(4));
        let rgb: Vec<u8> = pixels().flat_map(|p| [p[0], p[1], p[2]]).collect();
        let difference = max_difference(&rgb, &unhex(&case.rgb));
        if difference > tolerance(&case.file) {
            failures.push(format!("{}: colours differ by {difference}", case.file));
        }
        let alpha: Vec<u8> = pixels().map(|p| p[3]).collect();
        let want = match &case.key_alpha {
            Some(key) => unhex(key),
            None if case.has_alpha => unhex(&case.alpha),
            None => vec![255; alpha.len()],
        };
        if max_difference(&alpha, &want) > 0 {
            failures.push(format!("{}: alpha differs by {}", case.file, max_difference(&alpha, &want)));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn tensors_of_a_picture() {
    let picture = decode(&data("rgba.png"), &Limits::default()).unwrap();
    let images = picture.images();
    assert_eq!(images.shape(), [1, 14, 21, 3]);
    assert_eq!(images.data()[5 * 3], 60.0 / 255.0);
    let masks = picture.masks();
    assert_eq!(masks.shape(), [1, 14, 21]);
    assert_eq!((masks.data()[0], masks.data()[21]), (0.0, 1.0));
    assert_eq!(picture.channel(Channel::Alpha), masks);
    assert_eq!(picture.channel(Channel::Red).data()[5], 60.0 / 255.0);
    let opaque = decode(&data("anim.gif"), &Limits::default()).unwrap();
    assert_eq!(opaque.images().shape(), [3, 14, 21, 3]);
    assert_eq!(opaque.masks().shape(), [3, 64, 64]);
    assert!(opaque.masks().is_zero());
    // A transparent colour is a mask only for those who ask for the channel.
    let key = decode(&data("rgb_key.png"), &Limits::default()).unwrap();
    assert!(key.masks().is_zero());
    assert_eq!(key.channel(Channel::Alpha).data()[5 * 21 + 5], 1.0);
}

/// A PNG header that announces `width` × `height`, and nothing behind it.
fn hollow_png(width: u32, height: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    drop(encoder.write_header().unwrap());
    out
}

#[test]
fn bombs_are_refused_before_allocation() {
    let limits = Limits::default();
    let started = std::time::Instant::now();
    for (w, h) in [(100_000, 100_000), (1, 100_000), (20_000, 20_000)] {
        assert!(matches!(decode(&hollow_png(w, h), &limits), Err(DecodeError::TooLarge { .. })));
    }
    // GIF, BMP, TIFF and WebP headers with sides of 65,535 or 16,384.
    let gif = [b"GIF89a\xff\xff\xff\xff\0\0\0".to_vec(), vec![0; 20]].concat();
    assert!(decode(&gif, &limits).is_err());
    let mut bmp = data("rgb.bmp");
    bmp[18..22].copy_from_slice(&60_000u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&60_000u32.to_le_bytes());
    assert!(decode(&bmp, &limits).is_err());
    let mut jpeg = data("q90_444.jpg");
    let sof = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    jpeg[sof + 5..sof + 9].fill(0xf0);
    assert!(matches!(
        decode(&jpeg, &limits),
        Err(DecodeError::TooLarge { width: 0xf0f0, height: 0xf0f0, .. })
    ));
    // Over libjpeg's own bound of 65,500 a side.
    jpeg[sof + 5..sof + 9].fill(0xff);
    assert!(matches!(decode(&jpeg, &limits), Err(DecodeError::Malformed(_))));
    let few = Limits { max_frames: 2, ..limits };
    for file in ["anim.gif", "anim.png", "anim.webp"] {
        assert!(matches!(decode(&data(file), &few), Err(DecodeError::TooManyFrames { .. })), "{file}");
    }
    assert!(started.elapsed().as_millis() < 500, "{:?}", started.elapsed());
}

#[test]
fn damaged_files_are_errors_not_panics() {
    assert!(matches!(decode(b"", &Limits::default()), Err(DecodeError::UnknownFormat)));
    assert!(matches!(decode(b"<svg></svg>", &Limits::default()), Err(DecodeError::UnknownFormat)));
    let cases: Vec<Case> = serde_json::from_slice(&data("pillow.json")).unwrap();
    let mut refused = 0;
    for case in &cases {
        let whole = data(&case.file);
        for keep in (0..whole.len()).step_by(whole.len() / 40 + 1) {
            refused += u32::from(decode(&whole[..keep], &Limits::default()).is_err());
        }
        // Flipped bytes: any outcome but a panic.
        for at in (0..whole.len()).step_by(whole.len() / 60 + 1) {
            let mut broken = whole.clone();
            broken[at] ^= 0x5a;
            let _any = decode(&broken, &Limits::default());
        }
    }
    assert!(refused > 500, "{refused}");
}
