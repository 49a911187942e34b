//! Pixels → picture files.
//!
//! A float becomes a byte by clipping 255·x to 0..=255 and cutting the
//! fraction off, as ComfyUI does. PNG compression defaults to the fast mode of
//! the `png` crate: for a 1024² picture about 14 ms instead of 450 ms at
//! Pillow's level 4, for 6 % more bytes.

use std::borrow::Cow;
use std::io::Cursor;

use png::chunk::ChunkType;
use thiserror::Error;

use crate::tensor::HostTensor;

/// Largest side a WebP file can have.
const WEBP_MAX_SIDE: u32 = 16_383;
/// Largest side a JPEG file can have.
const JPEG_MAX_SIDE: u32 = 65_535;
/// Chunk in which ComfyUI keeps the texts of animated PNGs, after the pixels.
const COMF: ChunkType = ChunkType(*b"comf");

/// Why a picture cannot be encoded.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The tensor is no batch of pictures, or has no such picture.
    #[error(
        "picture {index} of a tensor of shape {shape:?} cannot be encoded: [B, H, W, 1, 3 or 4] is needed"
    )]
    Shape {
        /// Index of the picture asked for.
        index: usize,
        /// Shape of the tensor.
        shape: Vec<usize>,
    },
    /// The format cannot hold a picture of this size.
    #[error("{format} cannot hold a {width}x{height} picture: a side must be 1 to {max}")]
    Size {
        /// Name of the format.
        format: &'static str,
        /// Width of the picture.
        width: u32,
        /// Height of the picture.
        height: u32,
        /// Largest side the format knows.
        max: u32,
    },
    /// The frames of an animation differ in size, or there are none.
    #[error("an animation needs at least one frame, and all of one size")]
    Frames,
    /// A metadata keyword that a PNG cannot hold.
    #[error("metadata name {0:?} does not fit a PNG text chunk: 1 to 79 Latin-1 characters are allowed")]
    Keyword(String),
    /// The codec failed.
    #[error("the {format} encoder failed: {message}")]
    Codec {
        /// Name of the format.
        format: &'static str,
        /// What the codec says.
        message: String,
    },
}

fn codec(format: &'static str, error: impl std::fmt::Display) -> EncodeError {
    EncodeError::Codec { format, message: error.to_string() }
}

/// An 8-bit picture in memory: grey, RGB or RGBA, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Samples a pixel: 1, 3 or 4.
    pub channels: u8,
    /// `width · height · channels` samples.
    pub samples: Vec<u8>,
}

impl Bitmap {
    /// Picture `index` of a `[B, H, W, C]` batch, C = 1, 3 or 4.
    ///
    /// # Errors
    /// [`EncodeError::Shape`] for any other shape or an index outside.
    pub fn from_images(images: &HostTensor, index: usize) -> Result<Self, EncodeError> {
        let shape = || EncodeError::Shape { index, shape: images.shape().to_vec() };
        let &[batch, height, width, channels] = images.shape() else { return Err(shape()) };
        if index >= batch || !matches!(channels, 1 | 3 | 4) {
            return Err(shape());
        }
        let samples = images.row(index).iter().map(|&v| to_byte(v)).collect();
        let side = |n: usize| u32::try_from(n).map_err(|_| shape());
        Ok(Self { width: side(width)?, height: side(height)?, channels: channels as u8, samples })
    }

    /// The same picture without alpha and with three channels.
    pub fn to_rgb(&self) -> Cow<'_, [u8]> {
        match self.channels {
            3 => Cow::Borrowed(&self.samples),
            4 => self.samples.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
            _ => self.samples.iter().flat_map(|&v| [v; 3]).collect(),
        }
    }

    fn check(&self, format: &'static str, max: u32) -> Result<(), EncodeError> {
        let (width, height) = (self.width, self.height);
        if width == 0 || height == 0 || width > max || height > max {
            return Err(EncodeError::Size { format, width, height, max });
        }
        let wanted = u64::from(width) * u64::from(height) * u64::from(self.channels);
        if wanted != self.samples.len() as u64 {
            let message = format!("{} samples for {width}x{height}x{}", self.samples.len(), self.channels);
            return Err(EncodeError::Codec { format, message });
        }
        Ok(())
    }
}

/// clip(255·x, 0, 255) with the fraction cut off; NaN gives 0.
fn to_byte(value: f32) -> u8 {
    (255.0 * value).clamp(0.0, 255.0) as u8
}

/// How hard the PNG encoder works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PngCompression {
    /// Fastest useful compression.
    #[default]
    Fast,
    /// A zlib level, 0 (stored) to 9.
    Level(u8),
}

fn png_encoder<'a>(
    out: &'a mut Vec<u8>,
    picture: &Bitmap,
    compression: PngCompression,
) -> Result<png::Encoder<'a, &'a mut Vec<u8>>, EncodeError> {
    picture.check("PNG", i32::MAX as u32)?;
    let mut encoder = png::Encoder::new(out, picture.width, picture.height);
    encoder.set_color(match picture.channels {
        1 => png::ColorType::Grayscale,
        3 => png::ColorType::Rgb,
        _ => png::ColorType::Rgba,
    });
    encoder.set_depth(png::BitDepth::Eight);
    match compression {
        PngCompression::Fast => encoder.set_compression(png::Compression::Fast),
        PngCompression::Level(0) => encoder.set_compression(png::Compression::NoCompression),
        PngCompression::Level(level) => {
            encoder.set_filter(png::Filter::Adaptive);
            encoder.set_deflate_compression(png::DeflateCompression::Level(level.min(9)));
        }
    }
    Ok(encoder)
}

fn check_keyword(keyword: &str) -> Result<(), EncodeError> {
    let count = keyword.chars().count();
    if !(1..=79).contains(&count) || keyword.chars().any(|c| c == '\0' || u32::from(c) > 255) {
        return Err(EncodeError::Keyword(keyword.to_owned()));
    }
    Ok(())
}

/// A PNG file with `text` as text chunks before the pixels, in order.
///
/// Texts are Latin-1 (`tEXt`); one with other characters becomes `iTXt`.
///
/// # Errors
/// [`EncodeError`] for an impossible size, keyword or codec failure.
pub fn encode_png(
    picture: &Bitmap,
    compression: PngCompression,
    text: &[(String, String)],
) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    let mut encoder = png_encoder(&mut out, picture, compression)?;
    for (keyword, text) in text {
        check_keyword(keyword)?;
        let is_latin1 = text.chars().all(|c| u32::from(c) <= 255);
        let added = if is_latin1 {
            encoder.add_text_chunk(keyword.clone(), text.clone())
        } else {
            encoder.add_itxt_chunk(keyword.clone(), text.clone())
        };
        added.map_err(|e| codec("PNG", e))?;
    }
    let mut writer = encoder.write_header().map_err(|e| codec("PNG", e))?;
    writer.write_image_data(&picture.samples).map_err(|e| codec("PNG", e))?;
    writer.finish().map_err(|e| codec("PNG", e))?;
    Ok(out)
}

/// A baseline JPEG file of quality 1 to 100; alpha is dropped.
///
/// # Errors
/// [`EncodeError`] for an impossible size or a codec failure.
pub fn encode_jpeg(picture: &Bitmap, quality: u8) -> Result<Vec<u8>, EncodeError> {
    picture.check("JPEG", JPEG_MAX_SIDE)?;
    let mut out = Cursor::new(Vec::new());
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, quality.clamp(1, 100))
        .encode(&picture.to_rgb(), picture.width, picture.height, image::ExtendedColorType::Rgb8)
        .map_err(|e| codec("JPEG", e))?;
    Ok(out.into_inner())
}

/// Settings of the WebP encoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WebpOptions {
    /// Exact pixels instead of small files.
    pub lossless: bool,
    /// 0 to 100: picture quality, or effort if lossless.
    pub quality: f32,
    /// 0 (fast) to 6 (small).
    pub method: u8,
}

impl WebpOptions {
    /// Lossy with libwebp's default method.
    pub fn lossy(quality: f32) -> Self {
        Self { lossless: false, quality, method: 4 }
    }

    fn config(&self) -> Result<webp::WebPConfig, EncodeError> {
        let mut config = webp::WebPConfig::new().map_err(|()| codec("WebP", "no configuration"))?;
        config.lossless = i32::from(self.lossless);
        config.alpha_compression = i32::from(!self.lossless);
        config.quality = self.quality.clamp(0.0, 100.0);
        config.method = i32::from(self.method.min(6));
        Ok(config)
    }
}

/// A WebP file; alpha is kept if there is any.
///
/// # Errors
/// [`EncodeError`] for an impossible size or a codec failure.
pub fn encode_webp(picture: &Bitmap, options: WebpOptions) -> Result<Vec<u8>, EncodeError> {
    picture.check("WebP", WEBP_MAX_SIDE)?;
    let config = options.config()?;
    let rgb;
    let encoder = if picture.channels == 4 {
        webp::Encoder::from_rgba(&picture.samples, picture.width, picture.height)
    } else {
        rgb = picture.to_rgb();
        webp::Encoder::from_rgb(&rgb, picture.width, picture.height)
    };
    let file = encoder.encode_advanced(&config).map_err(|e| codec("WebP", format!("{e:?}")))?;
    Ok(file.to_vec())
}

/// Pictures to play one after the other, for ever.
#[derive(Clone, Copy, Debug)]
pub struct Animation<'a> {
    /// The pictures, all of one size and channel count.
    pub frames: &'a [Bitmap],
    /// Time each picture stays, in milliseconds.
    pub frame_ms: u16,
}

impl Animation<'_> {
    fn first(&self) -> Result<&Bitmap, EncodeError> {
        let first = self.frames.first().ok_or(EncodeError::Frames)?;
        let same =
            |f: &Bitmap| (f.width, f.height, f.channels) == (first.width, first.height, first.channels);
        if self.frames.iter().all(same) { Ok(first) } else { Err(EncodeError::Frames) }
    }
}

/// An animated PNG; `text` goes into `comf` chunks behind the pixels.
///
/// # Errors
/// [`EncodeError`] for unequal frames, an impossible size or a codec failure.
pub fn encode_apng(
    animation: Animation<'_>,
    compression: PngCompression,
    text: &[(String, String)],
) -> Result<Vec<u8>, EncodeError> {
    let first = animation.first()?;
    let count = u32::try_from(animation.frames.len()).map_err(|_| EncodeError::Frames)?;
    let mut out = Vec::new();
    let mut encoder = png_encoder(&mut out, first, compression)?;
    if count > 1 {
        encoder.set_animated(count, 0).map_err(|e| codec("PNG", e))?;
        encoder.set_frame_delay(animation.frame_ms, 1000).map_err(|e| codec("PNG", e))?;
    }
    let mut writer = encoder.write_header().map_err(|e| codec("PNG", e))?;
    for frame in animation.frames {
        frame.check("PNG", i32::MAX as u32)?;
        writer.write_image_data(&frame.samples).map_err(|e| codec("PNG", e))?;
    }
    for (keyword, text) in text {
        check_keyword(keyword)?;
        let latin1 = |s: &str| s.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect::<Vec<u8>>();
        let chunk = [latin1(keyword), vec![0], latin1(text)].concat();
        writer.write_chunk(COMF, &chunk).map_err(|e| codec("PNG", e))?;
    }
    writer.finish().map_err(|e| codec("PNG", e))?;
    Ok(out)
}

/// An animated WebP.
///
/// # Errors
/// [`EncodeError`] for unequal frames, an impossible size or a codec failure.
pub fn encode_webp_animation(animation: Animation<'_>, options: WebpOptions) -> Result<Vec<u8>, EncodeError> {
    let first = animation.first()?;
    let config = options.config()?;
    let mut encoder = webp::AnimEncoder::new(first.width, first.height, &config);
    let frames: Vec<Cow<'_, [u8]>> = animation
        .frames
        .iter()
        .map(|f| if f.channels == 4 { Cow::Borrowed(&f.samples[..]) } else { f.to_rgb() })
        .collect();
    let mut time_ms = 0i32;
    for (picture, samples) in animation.frames.iter().zip(&frames) {
        picture.check("WebP", WEBP_MAX_SIDE)?;
        let (width, height) = (picture.width, picture.height);
        encoder.add_frame(if picture.channels == 4 {
            webp::AnimFrame::from_rgba(samples, width, height, time_ms)
        } else {
            webp::AnimFrame::from_rgb(samples, width, height, time_ms)
        });
        time_ms = time_ms.saturating_add(i32::from(animation.frame_ms));
    }
    let file = encoder.try_encode().map_err(|e| codec("WebP", format!("{e:?}")))?;
    Ok(file.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, decode, python_json, read_text_chunks};

    fn picture(channels: u8) -> Bitmap {
        let (width, height) = (23, 17);
        let samples = (0..width * height * u32::from(channels)).map(|i| (i * 7 + i / 23) as u8).collect();
        Bitmap { width, height, channels, samples }
    }

    #[test]
    fn bytes_are_cut_not_rounded() {
        let values = [0.0, 1.0, 0.5, 0.999, -3.0, 7.0, f32::NAN, 0.1, 254.999 / 255.0];
        let images = HostTensor::new(&[1, 1, 3, 3], values.to_vec()).unwrap();
        let bitmap = Bitmap::from_images(&images, 0).unwrap();
        assert_eq!(bitmap.samples, [0, 255, 127, 254, 0, 255, 0, 25, 254]);
        assert!(matches!(Bitmap::from_images(&images, 1), Err(EncodeError::Shape { index: 1, .. })));
        let two = HostTensor::zeros(&[1, 1, 1, 2]);
        assert!(matches!(Bitmap::from_images(&two, 0), Err(EncodeError::Shape { .. })));
    }

    #[test]
    fn every_byte_survives_a_round_trip_through_floats() {
        let images = HostTensor::from_fn(&[1, 16, 16, 1], |i| i as f32 / 255.0);
        let samples = Bitmap::from_images(&images, 0).unwrap().samples;
        assert_eq!(samples, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn png_round_trip_with_texts_in_order() {
        let prompt = python_json(&serde_json::json!({"1": {"inputs": {"text": "雪 ü"}}}));
        let texts = vec![
            ("prompt".to_owned(), prompt),
            ("workflow".to_owned(), "{}".to_owned()),
            ("more".to_owned(), "[1]".to_owned()),
        ];
        for channels in [1, 3, 4] {
            for compression in [PngCompression::Fast, PngCompression::Level(0), PngCompression::Level(4)] {
                let bitmap = picture(channels);
                let file = encode_png(&bitmap, compression, &texts).unwrap();
                let back = decode(&file, &Limits::default()).unwrap();
                let samples: Vec<u8> = back.frames[0]
                    .chunks(4)
                    .flat_map(
                        |p| if channels == 1 { p[..1].to_vec() } else { p[..channels as usize].to_vec() },
                    )
                    .collect();
                assert_eq!(samples, bitmap.samples);
                assert_eq!(read_text_chunks(&file).unwrap(), texts);
                assert!(
                    file.windows(4).position(|w| w == b"tEXt") < file.windows(4).position(|w| w == b"IDAT")
                );
            }
        }
    }

    #[test]
    fn impossible_requests_are_typed_errors() {
        let keyword =
            |k: &str| encode_png(&picture(3), PngCompression::Fast, &[(k.to_owned(), String::new())]);
        for bad in ["", "雪", &"k".repeat(80), "a\0b"] {
            assert!(matches!(keyword(bad), Err(EncodeError::Keyword(_))), "{bad:?}");
        }
        let wide = Bitmap { width: 17_000, height: 1, channels: 3, samples: vec![0; 51_000] };
        assert!(matches!(encode_webp(&wide, WebpOptions::lossy(80.0)), Err(EncodeError::Size { .. })));
        let short = Bitmap { samples: vec![0; 5], ..picture(3) };
        assert!(encode_jpeg(&short, 80).is_err());
        assert!(encode_webp(&short, WebpOptions::lossy(80.0)).is_err());
        let empty = Bitmap { width: 0, height: 4, channels: 3, samples: Vec::new() };
        assert!(encode_png(&empty, PngCompression::Fast, &[]).is_err());
    }

    #[test]
    fn jpeg_and_webp_are_near_the_original() {
        let images = HostTensor::from_fn(&[1, 32, 32, 3], |i| {
            ((i / 3 % 32) as f32 / 31.0 + (i / 96) as f32 / 31.0) / 2.0
        });
        let bitmap = Bitmap::from_images(&images, 0).unwrap();
        for file in
            [encode_jpeg(&bitmap, 95).unwrap(), encode_webp(&bitmap, WebpOptions::lossy(95.0)).unwrap()]
        {
            let back = decode(&file, &Limits::default()).unwrap();
            let rgb: Vec<u8> = back.frames[0].chunks(4).flat_map(|p| p[..3].to_vec()).collect();
            let worst = rgb.iter().zip(&bitmap.samples).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            // A smooth grey ramp at quality 95: within a few quantisation steps.
            assert!(worst <= 8, "{worst}");
        }
        let lossless = WebpOptions { lossless: true, quality: 80.0, method: 4 };
        let back = decode(&encode_webp(&bitmap, lossless).unwrap(), &Limits::default()).unwrap();
        assert_eq!(
            back.frames[0].chunks(4).flat_map(|p| p[..3].to_vec()).collect::<Vec<u8>>(),
            bitmap.samples
        );
    }

    #[test]
    fn animations_have_all_frames() {
        let frames: Vec<Bitmap> =
            (0..3u8).map(|n| Bitmap { samples: vec![n * 90; 23 * 17 * 3], ..picture(3) }).collect();
        let animation = Animation { frames: &frames, frame_ms: 200 };
        let text = [("prompt".to_owned(), "{}".to_owned())];
        let apng = encode_apng(animation, PngCompression::Level(4), &text).unwrap();
        let comf = apng.windows(4).position(|w| w == b"comf").unwrap();
        assert!(apng.windows(4).rposition(|w| w == b"fdAT").unwrap() < comf);
        assert_eq!(&apng[comf + 4..comf + 13], b"prompt\0{}");
        let lossless = WebpOptions { lossless: true, quality: 80.0, method: 4 };
        let webp = encode_webp_animation(animation, lossless).unwrap();
        for file in [apng, webp] {
            let back = decode(&file, &Limits::default()).unwrap();
            let firsts: Vec<u8> = back.frames.iter().map(|f| f[0]).collect();
            // The WebP decoder blends opaque frames with a rounding error of 1.
            assert!(firsts.iter().zip([0u8, 90, 180]).all(|(a, b)| a.abs_diff(b) <= 1), "{firsts:?}");
            assert_eq!(firsts.len(), 3);
        }
        let unequal = [picture(3), picture(4)];
        let animation = Animation { frames: &unequal, frame_ms: 1 };
        assert!(matches!(encode_apng(animation, PngCompression::Fast, &[]), Err(EncodeError::Frames)));
        let none = Animation { frames: &[], frame_ms: 1 };
        assert!(matches!(encode_webp_animation(none, lossless), Err(EncodeError::Frames)));
    }
}
