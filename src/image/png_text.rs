//! Reading the text chunks of a PNG file.
//!
//! Compressed text (`zTXt`, `iTXt`) is a classic bomb: 300 kB can unpack to
//! 64 MiB. Each text is inflated up to a bound and dropped if it is larger.

use std::io::Cursor;

use super::decode::DecodeError;

/// Longest text accepted, in bytes; a workflow is a few hundred kilobytes.
const MAX_TEXT_BYTES: usize = 8 << 20;
/// Most memory the chunks of one file may take.
const MAX_CHUNK_BYTES: usize = 64 << 20;

/// Keyword and text of every text chunk: plain ones first, then compressed
/// and international ones, each in file order.
///
/// Texts over 8 MiB and broken ones are left out.
///
/// # Errors
/// [`DecodeError::Malformed`] if the file is not a PNG or its header is broken.
pub fn read_text_chunks(bytes: &[u8]) -> Result<Vec<(String, String)>, DecodeError> {
    let limits = png::Limits { bytes: MAX_CHUNK_BYTES };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info()?;
    // Chunks may follow the pixels; a cut-off file keeps what came before.
    let _cut_off = reader.finish();
    let info = reader.info();
    let mut texts = Vec::new();
    let mut left = MAX_CHUNK_BYTES;
    let mut keep = |keyword: &str, text: String| {
        if text.len() <= left {
            left -= text.len();
            texts.push((keyword.to_owned(), text));
        }
    };
    for chunk in &info.uncompressed_latin1_text {
        keep(&chunk.keyword, chunk.text.clone());
    }
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        if chunk.decompress_text_with_limit(MAX_TEXT_BYTES).is_ok()
            && let Ok(text) = chunk.get_text()
        {
            keep(&chunk.keyword, text);
        }
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        if chunk.decompress_text_with_limit(MAX_TEXT_BYTES).is_ok()
            && let Ok(text) = chunk.get_text()
        {
            keep(&chunk.keyword, text);
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png_with(texts: impl FnOnce(&mut png::Encoder<'_, &mut Vec<u8>>)) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, 1, 1);
        texts(&mut encoder);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[0]).unwrap();
        writer.finish().unwrap();
        out
    }

    #[test]
    fn reads_every_kind() {
        let bytes = png_with(|e| {
            e.add_text_chunk("prompt".into(), "{\"1\": \"é\"}".into()).unwrap();
            e.add_ztxt_chunk("zipped".into(), "z".repeat(1000)).unwrap();
            e.add_itxt_chunk("wide".into(), "雪".into()).unwrap();
        });
        let texts = read_text_chunks(&bytes).unwrap();
        assert_eq!(texts[0], ("prompt".into(), "{\"1\": \"é\"}".into()));
        assert_eq!(texts[1], ("zipped".into(), "z".repeat(1000)));
        assert_eq!(texts[2], ("wide".into(), "雪".into()));
    }

    #[test]
    fn a_bomb_is_left_out() {
        let bytes = png_with(|e| {
            e.add_ztxt_chunk("bomb".into(), " ".repeat(64 << 20)).unwrap();
            e.add_text_chunk("prompt".into(), "{}".into()).unwrap();
        });
        assert!(bytes.len() < 1 << 20);
        assert_eq!(read_text_chunks(&bytes).unwrap(), [("prompt".to_owned(), "{}".to_owned())]);
    }

    #[test]
    fn not_a_png() {
        assert!(matches!(read_text_chunks(b"GIF89a"), Err(DecodeError::Malformed(_))));
    }
}
