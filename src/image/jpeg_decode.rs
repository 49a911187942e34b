//! JPEG → RGBA, bit for bit what Pillow decodes.
//!
//! ITU-T T.81 leaves the rounding of the inverse DCT open and says nothing
//! about how subsampled chroma is enlarged, so two correct decoders differ by
//! some units. Pillow uses libjpeg-turbo with its defaults (the accurate
//! integer DCT, triangle-filtered chroma, smoothed blocks where a progressive
//! file leaves coefficients open); MozJPEG, the same C library with another
//! encoder, computes the same bits. It is built without assembly: the C code
//! gives the same result on every processor and needs only a C compiler. Only
//! coefficients far out of range, as in damaged files, tell them apart: there
//! libjpeg-turbo's assembly saturates and its C code wraps.
//!
//! libjpeg reports an error by unwinding, which [`decode`] catches; the crate
//! must therefore not be built with `panic = "abort"`. What libjpeg only warns
//! about (wrong entropy codes, missing blocks) is no error, as in Pillow. The
//! exception is a file that stops before its end marker: libjpeg would invent
//! one and leave the rest grey, Pillow refuses, and so does [`WholeFile`].

use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mozjpeg::{ColorSpace, Decompress, Marker};

use super::decode::{DecodeError, DecodedImage, Limits};
use super::orientation;

/// Most scans in a file. Encoders write about ten; a hostile progressive file
/// can make the decoder pass over all blocks once every dozen bytes.
const MAX_SCANS: usize = 500;

/// Start of the APP1 segment that holds EXIF.
const EXIF_PREFIX: &[u8] = b"Exif\0\0";

/// Decodes a JPEG file.
pub(super) fn decode(bytes: &[u8], limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let scans = count_scans(bytes);
    if scans > MAX_SCANS {
        return Err(DecodeError::Malformed(format!(
            "the JPEG has {scans} scans, at most {MAX_SCANS} are accepted; save it again as baseline"
        )));
    }
    let ended = Cell::new(false);
    let source = WholeFile { rest: bytes, ended: &ended };
    match catch_unwind(AssertUnwindSafe(|| decode_or_unwind(source, limits))) {
        Ok(Err(DecodeError::Malformed(_))) | Err(_) if ended.get() => Err(DecodeError::Malformed(format!(
            "the JPEG stops after {} bytes, before its end marker; upload the whole file",
            bytes.len()
        ))),
        Ok(result) => result,
        Err(payload) => {
            let said = payload.downcast_ref::<String>().map_or("unknown JPEG error", String::as_str);
            let said = said.strip_prefix("libjpeg fatal error: ").unwrap_or(said);
            Err(DecodeError::Malformed(said.to_owned()))
        }
    }
}

fn decode_or_unwind(source: WholeFile<'_>, limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let header = Decompress::with_markers(&[Marker::APP(1)]).from_reader(source).map_err(malformed)?;
    let side = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (width, height) = (side(header.width()), side(header.height()));
    limits.check(width, height)?;
    // Pillow joins the EXIF of several segments.
    let exif: Vec<u8> =
        header.markers().filter_map(|m| m.data.strip_prefix(EXIF_PREFIX)).collect::<Vec<_>>().concat();
    let code = orientation::read(&exif);
    let four_inks = matches!(header.color_space(), ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK);
    let output = if four_inks { ColorSpace::JCS_CMYK } else { ColorSpace::JCS_EXT_RGBA };
    let mut picture = header.to_colorspace(output).map_err(malformed)?;
    let mut pixels: Vec<u8> = picture.read_scanlines().map_err(malformed)?;
    picture.finish().map_err(malformed)?;
    if four_inks {
        inverted_cmyk_to_rgba(&mut pixels);
    }
    let (width, height, rgba) = orientation::apply(code, width, height, pixels);
    Ok(DecodedImage { width, height, frames: vec![rgba], has_alpha: false })
}

fn malformed(error: io::Error) -> DecodeError {
    DecodeError::Malformed(error.to_string())
}

/// Scan headers (T.81 B.2.3: marker, length 6 + 2·n, n = 1 to 4 components)
/// anywhere in the file: no scan can be hidden from this count, and other data
/// hardly ever looks like one.
fn count_scans(bytes: &[u8]) -> usize {
    let is_scan = |w: &[u8]| matches!(w, [0xff, 0xda, 0, l, n @ 1..=4] if *l == 6 + 2 * n);
    bytes.windows(5).filter(|w| is_scan(w)).count()
}

/// CMYK as Adobe stores it in JPEGs (255 is no ink) → RGBA in place. Pillow
/// takes every four-component JPEG for inverted, with or without Adobe's
/// marker. Each colour is (255 − K)·(255 − ink)/255, which Pillow evaluates as
/// (255 − K) less the rounded product of (255 − K) and the ink.
fn inverted_cmyk_to_rgba(pixels: &mut [u8]) {
    for pixel in pixels.chunks_exact_mut(4) {
        let white = u32::from(pixel[3]);
        for sample in &mut pixel[..3] {
            let product = (255 - u32::from(*sample)) * white + 128;
            *sample = (white - ((product + (product >> 8)) >> 8)) as u8;
        }
        pixel[3] = 255;
    }
}

/// A file in memory whose end is an error, and is remembered: libjpeg asks for
/// more only when the end marker is still missing.
struct WholeFile<'a> {
    rest: &'a [u8],
    ended: &'a Cell<bool>,
}

impl Read for WholeFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for WholeFile<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.rest.is_empty() {
            self.ended.set(true);
            return Err(io::Error::other("the file ends early"));
        }
        Ok(self.rest)
    }

    fn consume(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use sha2::{Digest, Sha256};

    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        file: String,
        width: u32,
        height: u32,
        rgb_sha256: String,
    }

    fn data(file: &str) -> Vec<u8> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/image/jpeg");
        std::fs::read(folder.join(file)).unwrap()
    }

    fn cases() -> Vec<Case> {
        serde_json::from_slice(&data("pillow.json")).unwrap()
    }

    /// SHA-256 of the RGB bytes that Pillow 13.0 (libjpeg-turbo 3.2) decodes.
    #[test]
    fn every_coding_and_sampling_equals_pillow() {
        let cases = cases();
        assert!(cases.len() >= 20, "{}", cases.len());
        for case in cases {
            let picture = decode(&data(&case.file), &Limits::default()).unwrap();
            assert_eq!((picture.width, picture.height), (case.width, case.height), "{}", case.file);
            assert!(!picture.has_alpha);
            let mut rgb = Vec::new();
            for pixel in picture.frames[0].chunks_exact(4) {
                assert_eq!(pixel[3], 255, "{}", case.file);
                rgb.extend_from_slice(&pixel[..3]);
            }
            let hash: String = Sha256::digest(&rgb).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hash, case.rgb_sha256, "{}", case.file);
        }
    }

    #[test]
    fn files_without_their_end_are_refused() {
        for case in cases() {
            let whole = data(&case.file);
            for keep in [whole.len() - 1, whole.len() - 2, whole.len() / 2, 3] {
                match decode(&whole[..keep], &Limits::default()) {
                    Err(DecodeError::Malformed(said)) => {
                        assert!(said.contains(&format!("stops after {keep} bytes")), "{}: {said}", case.file);
                    }
                    other => panic!("{} cut to {keep}: {other:?}", case.file),
                }
            }
            // What follows the end marker does not matter.
            let longer = [&whole[..], b"trailing data"].concat();
            assert!(decode(&longer, &Limits::default()).is_ok(), "{}", case.file);
        }
    }

    #[test]
    fn sides_and_scans_are_limited() {
        let file = data("progressive_420.jpg");
        let small = Limits { max_side: 32, ..Limits::default() };
        assert!(matches!(decode(&file, &small), Err(DecodeError::TooLarge { width: 33, height: 47, .. })));
        let few = Limits { max_pixels: 33 * 47 - 1, ..Limits::default() };
        assert!(matches!(decode(&file, &few), Err(DecodeError::TooLarge { .. })));
        assert_eq!(count_scans(&file), 10);
        // The first scan header again and again, with nothing in it.
        let at = file.windows(2).position(|w| w == [0xff, 0xda]).unwrap();
        let header = file[at..at + 2 + usize::from(file[at + 3])].to_vec();
        let bomb = |scans: usize| [&file[..at], &header.repeat(scans), b"\xff\xd9"].concat();
        assert!(decode(&bomb(MAX_SCANS), &Limits::default()).is_ok());
        match decode(&bomb(MAX_SCANS + 1), &Limits::default()) {
            Err(DecodeError::Malformed(said)) => assert!(said.contains("501 scans"), "{said}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn libjpeg_errors_are_typed() {
        let mut twelve_bits = data("baseline_444.jpg");
        let frame = twelve_bits.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        // Precision 12 in a frame that must have 8.
        twelve_bits[frame + 4] = 12;
        match decode(&twelve_bits, &Limits::default()) {
            Err(DecodeError::Malformed(said)) => assert!(said.contains("precision 12"), "{said}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn inks_round_as_in_pillow() {
        // Full white, full black, and rounded values: C 100, K 55.
        let mut pixels = [255, 255, 255, 255, 9, 9, 9, 0, 155, 255, 0, 200];
        inverted_cmyk_to_rgba(&mut pixels);
        assert_eq!(pixels, [255, 255, 255, 255, 0, 0, 0, 255, 122, 200, 0, 255]);
    }
}
