//! What the viewing and mask routes make of a picture file: bytes → bytes.

use thiserror::Error;

use super::decode::{DecodeError, DecodedImage, Limits, decode};
use super::encode::{Bitmap, EncodeError, PngCompression, WebpOptions, encode_jpeg, encode_png, encode_webp};
use super::png_text::read_text_chunks;

/// Quality of a preview whose request names none.
const DEFAULT_QUALITY: u8 = 90;

/// Why a picture file cannot be shown in another form.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The file cannot be decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The new file cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Picture and mask have different sizes.
    #[error("the mask is {}x{} but the picture {}x{}: both must have one size", mask.0, mask.1, picture.0, picture.1)]
    MaskSize {
        /// Width and height of the picture.
        picture: (u32, u32),
        /// Width and height of the mask.
        mask: (u32, u32),
    },
}

/// File format of a preview.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreviewFormat {
    /// Lossy WebP; keeps alpha.
    Webp,
    /// Baseline JPEG; never has alpha.
    Jpeg,
}

impl PreviewFormat {
    /// The media type for the `Content-Type` header.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Webp => "image/webp",
            Self::Jpeg => "image/jpeg",
        }
    }
}

/// A request for a preview, as in `/view?preview=webp;90`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preview {
    /// File format.
    pub format: PreviewFormat,
    /// 1 to 100.
    pub quality: u8,
    /// Whether alpha is dropped (`channel=rgb`).
    pub rgb: bool,
}

impl Preview {
    /// Reads `format;quality` and the request's `channel`.
    ///
    /// An unknown format, and every request for alpha, means WebP; a missing
    /// or unreadable quality means 90.
    pub fn parse(request: &str, channel: &str) -> Self {
        let (format, last) = (request.split(';').next(), request.split(';').next_back());
        // "rgba" and "a" both ask for alpha, which JPEG does not have.
        let format = if format == Some("jpeg") && !channel.contains('a') {
            PreviewFormat::Jpeg
        } else {
            PreviewFormat::Webp
        };
        let digits = last.filter(|q| !q.is_empty() && q.bytes().all(|b| b.is_ascii_digit()));
        let quality = digits.map_or(DEFAULT_QUALITY, |q| q.parse().unwrap_or(100).clamp(1, 100));
        Self { format, quality, rgb: channel == "rgb" }
    }
}

/// The file as a smaller file of another format, first frame only.
///
/// # Errors
/// [`ViewError`] if the file is no readable picture or too large for the format.
pub fn preview(bytes: &[u8], request: &Preview) -> Result<Vec<u8>, ViewError> {
    let picture = first_frame(bytes, !request.rgb)?;
    Ok(match request.format {
        PreviewFormat::Jpeg => encode_jpeg(&picture, request.quality)?,
        PreviewFormat::Webp => encode_webp(&picture, WebpOptions::lossy(f32::from(request.quality)))?,
    })
}

/// The file as an RGB PNG without alpha.
///
/// # Errors
/// [`ViewError`] if the file is no readable picture.
pub fn channel_rgb(bytes: &[u8]) -> Result<Vec<u8>, ViewError> {
    Ok(encode_png(&first_frame(bytes, false)?, PngCompression::Fast, &[])?)
}

/// The file's alpha as a black RGBA PNG; opaque if there is none.
///
/// # Errors
/// [`ViewError`] if the file is no readable picture.
pub fn channel_alpha(bytes: &[u8]) -> Result<Vec<u8>, ViewError> {
    let mut picture = rgba(&decode(bytes, &Limits::default())?);
    for pixel in picture.samples.chunks_exact_mut(4) {
        pixel[..3].fill(0);
    }
    Ok(encode_png(&picture, PngCompression::Fast, &[])?)
}

/// `original` with the alpha channel of `mask`, as a PNG that keeps the
/// original's text chunks.
///
/// # Errors
/// [`ViewError`] if a file is no readable picture or the sizes differ.
pub fn replace_alpha(original: &[u8], mask: &[u8]) -> Result<Vec<u8>, ViewError> {
    let mut picture = rgba(&decode(original, &Limits::default())?);
    let mask = decode(mask, &Limits::default())?;
    if (picture.width, picture.height) != (mask.width, mask.height) {
        return Err(ViewError::MaskSize {
            picture: (picture.width, picture.height),
            mask: (mask.width, mask.height),
        });
    }
    let alpha = mask.frames.iter().take(1).flat_map(|frame| frame.chunks_exact(4));
    for (pixel, m) in picture.samples.chunks_exact_mut(4).zip(alpha) {
        pixel[3] = m[3];
    }
    // A file that is no PNG has no texts to keep.
    let texts = read_text_chunks(original).unwrap_or_default();
    Ok(encode_png(&picture, PngCompression::Fast, &texts)?)
}

fn first_frame(bytes: &[u8], keep_alpha: bool) -> Result<Bitmap, ViewError> {
    let decoded = decode(bytes, &Limits::default())?;
    let picture = rgba(&decoded);
    if keep_alpha && decoded.has_alpha {
        return Ok(picture);
    }
    let samples = picture.to_rgb().into_owned();
    Ok(Bitmap { channels: 3, samples, ..picture })
}

/// The first frame; opaque without an alpha channel, whatever a transparent
/// colour says.
fn rgba(decoded: &DecodedImage) -> Bitmap {
    let mut samples = decoded.frames.first().cloned().unwrap_or_default();
    if !decoded.has_alpha {
        samples.chunks_exact_mut(4).for_each(|p| p[3] = 255);
    }
    Bitmap { width: decoded.width, height: decoded.height, channels: 4, samples }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn png(channels: u8, pixel: &[u8], texts: &[(String, String)]) -> Vec<u8> {
        let samples = pixel.repeat(12 * 8);
        let bitmap = Bitmap { width: 12, height: 8, channels, samples };
        encode_png(&bitmap, PngCompression::Fast, texts).unwrap()
    }

    fn first_pixel(file: &[u8]) -> (bool, Vec<u8>) {
        let picture = decode(file, &Limits::default()).unwrap();
        assert_eq!((picture.width, picture.height), (12, 8));
        (picture.has_alpha, picture.frames[0][..4].to_vec())
    }

    #[test]
    fn requests_are_read_as_comfyui_reads_them() {
        use PreviewFormat::{Jpeg, Webp};
        for (request, channel, format, quality) in [
            ("webp;90", "", Webp, 90),
            ("jpeg;50", "", Jpeg, 50),
            ("jpeg", "rgb", Jpeg, 90),
            ("jpeg;50", "rgba", Webp, 50),
            ("png;80", "", Webp, 80),
            ("webp;x", "", Webp, 90),
            ("webp;0", "", Webp, 1),
            ("webp;99999999999", "", Webp, 100),
            ("", "", Webp, 90),
            ("90", "", Webp, 90),
        ] {
            let preview = Preview::parse(request, channel);
            assert_eq!((preview.format, preview.quality), (format, quality), "{request:?} {channel:?}");
            assert_eq!(preview.rgb, channel == "rgb");
        }
        assert_eq!((Webp.media_type(), Jpeg.media_type()), ("image/webp", "image/jpeg"));
    }

    #[test]
    fn channels_of_a_picture() {
        let rgba = png(4, &[10, 20, 30, 40], &[]);
        assert_eq!(first_pixel(&channel_rgb(&rgba).unwrap()), (false, vec![10, 20, 30, 255]));
        assert_eq!(first_pixel(&channel_alpha(&rgba).unwrap()), (true, vec![0, 0, 0, 40]));
        let rgb = png(3, &[1, 2, 3], &[]);
        assert_eq!(first_pixel(&channel_alpha(&rgb).unwrap()), (true, vec![0, 0, 0, 255]));
    }

    #[test]
    fn previews_keep_alpha_where_the_format_can() {
        let rgba = png(4, &[10, 20, 30, 40], &[]);
        let kind = |request, channel| {
            let file = preview(&rgba, &Preview::parse(request, channel)).unwrap();
            (image::guess_format(&file).unwrap(), first_pixel(&file).0)
        };
        assert_eq!(kind("webp;90", ""), (image::ImageFormat::WebP, true));
        assert_eq!(kind("webp;90", "rgb"), (image::ImageFormat::WebP, false));
        assert_eq!(kind("jpeg;50", ""), (image::ImageFormat::Jpeg, false));
        assert!(matches!(preview(b"text", &Preview::parse("webp", "")), Err(ViewError::Decode(_))));
    }

    #[test]
    fn a_mask_becomes_the_alpha_and_texts_stay() {
        let texts = [("prompt".to_owned(), "{}".to_owned())];
        let original = png(3, &[200, 100, 50], &texts);
        let mask = png(4, &[0, 0, 0, 128], &[]);
        let file = replace_alpha(&original, &mask).unwrap();
        assert_eq!(first_pixel(&file), (true, vec![200, 100, 50, 128]));
        assert_eq!(read_text_chunks(&file).unwrap(), texts);
        let small = Bitmap { width: 2, height: 2, channels: 1, samples: vec![0; 4] };
        let small = encode_png(&small, PngCompression::Fast, &[]).unwrap();
        assert!(matches!(replace_alpha(&original, &small), Err(ViewError::MaskSize { .. })));
    }
}
