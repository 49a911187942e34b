//! Picture files → pixels, as ComfyUI's `LoadImage` sees them.
//!
//! Values are 8-bit sRGB samples divided by 255; colour profiles and gamma are
//! ignored. The mask is 1 − alpha where the file has an alpha channel or a
//! transparent palette. A transparent *colour* (PNG `tRNS` of grey and RGB
//! files) counts only when a single channel is asked for
//! ([`DecodedImage::channel`]), which converts to RGBA first. EXIF orientation
//! is applied. Animated GIF, PNG and WebP give one batch item a frame.

use std::io::Cursor;

use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, tiff::TiffDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageFormat};
use thiserror::Error;

use super::{jpeg_decode, orientation, png_decode};
use crate::tensor::HostTensor;

/// Side of the mask that stands for "no mask", as in ComfyUI.
const EMPTY_MASK_SIDE: usize = 64;

/// Bounds on what a picture file may unpack to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest width or height.
    pub max_side: u32,
    /// Most pixels, summed over all frames.
    pub max_pixels: u64,
    /// Most frames of an animation.
    pub max_frames: usize,
}

impl Default for Limits {
    /// 32,768 a side, 64 Mi pixels (256 MiB as RGBA), 4,096 frames.
    fn default() -> Self {
        Self { max_side: 32_768, max_pixels: 64 << 20, max_frames: 4096 }
    }
}

impl Limits {
    /// Checks the size of one frame.
    pub(super) fn check(&self, width: u32, height: u32) -> Result<(), DecodeError> {
        let pixels = u64::from(width) * u64::from(height);
        if width == 0 || height == 0 {
            return Err(DecodeError::Malformed(format!("the picture is {width}x{height}")));
        }
        if width > self.max_side || height > self.max_side || pixels > self.max_pixels {
            return Err(DecodeError::TooLarge { width, height, limits: *self });
        }
        Ok(())
    }

    /// Checks that `frames` frames of this size fit.
    pub(super) fn check_frames(&self, width: u32, height: u32, frames: usize) -> Result<(), DecodeError> {
        let pixels = (u64::from(width) * u64::from(height)).saturating_mul(frames as u64);
        if frames > self.max_frames || pixels > self.max_pixels {
            return Err(DecodeError::TooManyFrames { frames, width, height, limits: *self });
        }
        Ok(())
    }

    fn for_codec(&self) -> image::Limits {
        let mut limits = image::Limits::default();
        limits.max_image_width = Some(self.max_side);
        limits.max_image_height = Some(self.max_side);
        // 16-bit RGBA is the widest format, and a codec may hold two copies.
        limits.max_alloc = Some(self.max_pixels.saturating_mul(16));
        limits
    }
}

/// Why a picture cannot be decoded.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The first bytes belong to no supported format.
    #[error("not a picture this server reads (PNG, JPEG, WebP, GIF, BMP or TIFF)")]
    UnknownFormat,
    /// The header announces an unreasonable size.
    #[error(
        "the picture is {width}x{height}; at most {} pixels a side and {} in all are accepted",
        limits.max_side, limits.max_pixels
    )]
    TooLarge {
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
        /// Bounds in force.
        limits: Limits,
    },
    /// An animation unpacks to too much.
    #[error(
        "the animation has {frames} or more frames of {width}x{height}; at most {} frames and {} pixels in all are accepted",
        limits.max_frames, limits.max_pixels
    )]
    TooManyFrames {
        /// Frames seen so far.
        frames: usize,
        /// Width of a frame.
        width: u32,
        /// Height of a frame.
        height: u32,
        /// Bounds in force.
        limits: Limits,
    },
    /// The file breaks its format's rules.
    #[error("the picture file is damaged or incomplete: {0}")]
    Malformed(String),
}

impl From<image::ImageError> for DecodeError {
    fn from(error: image::ImageError) -> Self {
        Self::Malformed(error.to_string())
    }
}

impl From<png::DecodingError> for DecodeError {
    fn from(error: png::DecodingError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// One channel of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Red.
    Red,
    /// Green.
    Green,
    /// Blue.
    Blue,
    /// Alpha.
    Alpha,
}

impl Channel {
    /// The channel of ComfyUI's name (`red`, `green`, `blue`, `alpha`).
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "red" => Self::Red,
            "green" => Self::Green,
            "blue" => Self::Blue,
            "alpha" => Self::Alpha,
            _ => return None,
        })
    }
}

/// A decoded picture: one or more RGBA frames of the same size.
#[derive(Clone, Debug)]
pub struct DecodedImage {
    /// Width of every frame.
    pub width: u32,
    /// Height of every frame.
    pub height: u32,
    /// RGBA samples of each frame, row-major, not premultiplied.
    pub frames: Vec<Vec<u8>>,
    /// Whether the file has an alpha channel or a transparent palette. A
    /// single transparent colour does not count.
    pub has_alpha: bool,
}

impl DecodedImage {
    /// All frames as `[B, H, W, 3]`, values in 0..=1.
    pub fn images(&self) -> HostTensor {
        let shape = [self.frames.len(), self.height as usize, self.width as usize, 3];
        let pixels = self.frames.iter().flat_map(|frame| frame.chunks_exact(4));
        let mut data = Vec::with_capacity(shape.iter().product());
        pixels.for_each(|p| data.extend(p[..3].iter().map(|&v| f32::from(v) / 255.0)));
        HostTensor::new(&shape, data).unwrap_or_default()
    }

    /// 1 − alpha as `[B, H, W]`; zeros `[B, 64, 64]` if there is no alpha.
    pub fn masks(&self) -> HostTensor {
        let batch = self.frames.len();
        if !self.has_alpha {
            return HostTensor::zeros(&[batch, EMPTY_MASK_SIDE, EMPTY_MASK_SIDE]);
        }
        let alpha =
            self.frames.iter().flat_map(|frame| frame.chunks_exact(4)).map(|p| 1.0 - f32::from(p[3]) / 255.0);
        let shape = [batch, self.height as usize, self.width as usize];
        HostTensor::new(&shape, alpha.collect()).unwrap_or_default()
    }

    /// One channel of the first frame as `[1, H, W]`; alpha is inverted.
    pub fn channel(&self, channel: Channel) -> HostTensor {
        let shape = [1, self.height as usize, self.width as usize];
        let pixels = self.frames.iter().take(1).flat_map(|frame| frame.chunks_exact(4));
        let data = pixels.map(|p| match channel {
            Channel::Red => f32::from(p[0]) / 255.0,
            Channel::Green => f32::from(p[1]) / 255.0,
            Channel::Blue => f32::from(p[2]) / 255.0,
            Channel::Alpha => 1.0 - f32::from(p[3]) / 255.0,
        });
        HostTensor::new(&shape, data.collect()).unwrap_or_default()
    }
}

/// Decodes a picture file of any supported format, told by its first bytes.
///
/// # Errors
/// [`DecodeError`]: unknown format, a size over `limits`, or a damaged file.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let format = image::guess_format(bytes).map_err(|_| DecodeError::UnknownFormat)?;
    let reader = Cursor::new(bytes);
    match format {
        ImageFormat::Png => png_decode::decode(bytes, limits),
        ImageFormat::Jpeg => jpeg_decode::decode(bytes, limits),
        ImageFormat::Gif => decode_gif(bytes, limits),
        ImageFormat::Bmp => still(BmpDecoder::new(reader)?, limits),
        ImageFormat::Tiff => still(TiffDecoder::new(reader)?, limits),
        ImageFormat::WebP => {
            let decoder = WebPDecoder::new(reader)?;
            if decoder.has_animation() { animation(decoder, limits) } else { still(decoder, limits) }
        }
        _ => Err(DecodeError::UnknownFormat),
    }
}

fn still(mut decoder: impl ImageDecoder, limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    decoder.set_limits(limits.for_codec())?;
    let has_alpha = decoder.color_type().has_alpha();
    let code = match decoder.exif_metadata() {
        Ok(Some(exif)) => orientation::read(&exif),
        _ => decoder.orientation().map_or(1, |o| u32::from(o.to_exif())),
    };
    let rgba = DynamicImage::from_decoder(decoder)?.into_rgba8().into_raw();
    let (width, height, rgba) = orientation::apply(code, width, height, rgba);
    Ok(DecodedImage { width, height, frames: vec![rgba], has_alpha })
}

fn animation<'a, D>(mut decoder: D, limits: &Limits) -> Result<DecodedImage, DecodeError>
where
    D: ImageDecoder + AnimationDecoder<'a>,
{
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    decoder.set_limits(limits.for_codec())?;
    let has_alpha = decoder.color_type().has_alpha();
    let mut frames = Vec::new();
    for frame in decoder.into_frames() {
        limits.check_frames(width, height, frames.len() + 1)?;
        frames.push(frame?.into_buffer().into_raw());
    }
    if frames.is_empty() {
        return Err(DecodeError::Malformed("the animation has no frame".to_owned()));
    }
    Ok(DecodedImage { width, height, frames, has_alpha })
}

/// GIF frames, composited. The first frame keeps the palette's colours under
/// transparent pixels, which compositing would blacken. There is a mask if any
/// pixel is transparent.
fn decode_gif(bytes: &[u8], limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let mut picture = animation(GifDecoder::new(Cursor::new(bytes))?, limits)?;
    let mut first = GifDecoder::new(Cursor::new(bytes))?;
    first.set_limits(limits.for_codec())?;
    if let Some(frame) = picture.frames.first_mut() {
        *frame = DynamicImage::from_decoder(first)?.into_rgba8().into_raw();
    }
    picture.has_alpha = picture.frames.iter().any(|frame| frame.chunks_exact(4).any(|p| p[3] != 255));
    Ok(picture)
}
