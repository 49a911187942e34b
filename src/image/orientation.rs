//! EXIF orientation: reading the tag and turning the pixels.
//!
//! Tag 0x0112 of the EXIF specification (CIPA DC-008): 1 is upright, 2–4 are
//! mirrored or upside down, 5–8 swap the axes.

/// The orientation, 1 to 8, in a raw EXIF block; 1 if it cannot be read.
pub(super) fn read(exif: &[u8]) -> u32 {
    let tiff = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif).to_vec();
    let Ok(parsed) = exif::Reader::new().read_raw(tiff) else { return 1 };
    parsed
        .get_field(exif::Tag::Orientation, exif::In::PRIMARY)
        .and_then(|field| field.value.get_uint(0))
        .filter(|code| (1..=8).contains(code))
        .unwrap_or(1)
}

/// Turns RGBA pixels upright; returns the new width, height and pixels.
pub(super) fn apply(code: u32, width: u32, height: u32, rgba: Vec<u8>) -> (u32, u32, Vec<u8>) {
    if !(2..=8).contains(&code) {
        return (width, height, rgba);
    }
    let (w, h) = (width as usize, height as usize);
    let (new_w, new_h) = if code >= 5 { (h, w) } else { (w, h) };
    let mut out = Vec::with_capacity(rgba.len());
    for y in 0..new_h {
        for x in 0..new_w {
            let (sx, sy) = match code {
                2 => (w - 1 - x, y),
                3 => (w - 1 - x, h - 1 - y),
                4 => (x, h - 1 - y),
                5 => (y, x),
                6 => (y, h - 1 - x),
                7 => (w - 1 - y, h - 1 - x),
                _ => (w - 1 - y, x),
            };
            out.extend_from_slice(&rgba[(sy * w + sx) * 4..][..4]);
        }
    }
    (new_w as u32, new_h as u32, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_eight_codes() {
        // 3 wide, 2 high: a b c / d e f. Expected upright pictures by code.
        let picture: Vec<u8> = b"abcdef".iter().flat_map(|&v| [v; 4]).collect();
        let expected = ["abcdef", "cbafed", "fedcba", "defabc", "adbecf", "daebfc", "fcebda", "cfbead"];
        for (code, want) in (1..).zip(expected) {
            let (w, h, out) = apply(code, 3, 2, picture.clone());
            assert_eq!((w, h), if code >= 5 { (2, 3) } else { (3, 2) });
            let got: String = out.chunks(4).map(|p| p[0] as char).collect();
            assert_eq!(got, want, "orientation {code}");
        }
    }

    #[test]
    fn unreadable_blocks_are_upright() {
        for block in [&b""[..], b"Exif\0\0", b"II*\0\xff\xff\xff\xff", b"garbage"] {
            assert_eq!(read(block), 1);
        }
        // Little-endian TIFF with one entry: tag 0x0112, SHORT, 1 value, 6.
        let block = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        assert_eq!(read(block), 6);
        assert_eq!(read(&[&b"Exif\0\0"[..], block].concat()), 6);
    }
}
