//! PNG and APNG → RGBA frames.
//!
//! The `png` crate is used directly rather than through `image`, because the
//! kind of file decides what `LoadImage` sees: a transparent palette is an
//! alpha channel, a transparent colour is not; 16-bit colour keeps its high
//! byte, while 16-bit grey saturates at 255 (what Pillow ≥ 12 makes of its
//! `I;16` mode). Text and colour profiles are skipped unread. Composition of
//! APNG frames: PNG specification, third edition, `fcTL`.

use std::io::Cursor;

use png::{BitDepth, BlendOp, ColorType, Decoder, DisposeOp, FrameControl, Transformations};

use super::decode::{DecodeError, DecodedImage, Limits};
use super::orientation;

/// Decodes all frames of a PNG file.
pub(super) fn decode(bytes: &[u8], limits: &Limits) -> Result<DecodedImage, DecodeError> {
    let budget = usize::try_from(limits.max_pixels.saturating_mul(16)).unwrap_or(usize::MAX);
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: budget });
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(Transformations::EXPAND);
    let header = decoder.read_header_info()?;
    let (width, height) = (header.width, header.height);
    limits.check(width, height)?;
    let mut reader = decoder.read_info()?;

    let info = reader.info();
    let has_alpha = match info.color_type {
        ColorType::GrayscaleAlpha | ColorType::Rgba => true,
        ColorType::Indexed => info.trns.is_some(),
        ColorType::Grayscale | ColorType::Rgb => false,
    };
    let code = info.exif_metadata.as_deref().map_or(1, orientation::read);
    // The default picture may stand outside the animation: one frame more.
    let announced = info.animation_control.map_or(1, |a| a.num_frames as usize);
    let hidden = usize::from(info.animation_control.is_some() && info.frame_control.is_none());
    let count = announced.saturating_add(hidden).max(1);
    limits.check_frames(width, height, count)?;

    let size = reader.output_buffer_size().ok_or(DecodeError::TooLarge { width, height, limits: *limits })?;
    let mut raw = vec![0; size];
    let mut canvas = Canvas::new(width, height);
    let mut frames = Vec::new();
    for index in 0..count {
        let frame = match reader.next_frame(&mut raw) {
            Ok(frame) => frame,
            // A cut-off animation still has its first pictures.
            Err(_) if index > 0 => break,
            Err(error) => return Err(error.into()),
        };
        let pixels = to_rgba(&raw[..frame.buffer_size()], frame.color_type, frame.bit_depth);
        frames.push(match reader.info().frame_control {
            Some(control) if count > 1 => canvas.draw(&control, &pixels),
            _ => pixels,
        });
    }
    let (mut new_width, mut new_height) = (width, height);
    let frames = frames
        .into_iter()
        .map(|frame| {
            let (w, h, rgba) = orientation::apply(code, width, height, frame);
            (new_width, new_height) = (w, h);
            rgba
        })
        .collect();
    Ok(DecodedImage { width: new_width, height: new_height, frames, has_alpha })
}

/// Expanded samples (8 or big-endian 16 bits) → 8-bit RGBA.
fn to_rgba(raw: &[u8], color: ColorType, depth: BitDepth) -> Vec<u8> {
    let wide = depth == BitDepth::Sixteen;
    let grey = matches!(color, ColorType::Grayscale);
    let narrowed: Vec<u8>;
    let samples = if wide {
        narrowed =
            raw.chunks_exact(2).map(|s| if grey && s[0] > 0 { 255 } else { s[usize::from(grey)] }).collect();
        &narrowed
    } else {
        raw
    };
    match color {
        ColorType::Grayscale => samples.iter().flat_map(|&v| [v, v, v, 255]).collect(),
        ColorType::GrayscaleAlpha => samples.chunks_exact(2).flat_map(|p| [p[0], p[0], p[0], p[1]]).collect(),
        ColorType::Rgb => samples.chunks_exact(3).flat_map(|p| [p[0], p[1], p[2], 255]).collect(),
        // Indexed files arrive expanded to RGB or RGBA.
        ColorType::Rgba | ColorType::Indexed => samples.to_vec(),
    }
}

/// The picture an animation is drawn on.
struct Canvas {
    width: usize,
    height: usize,
    rgba: Vec<u8>,
}

impl Canvas {
    fn new(width: u32, height: u32) -> Self {
        let (width, height) = (width as usize, height as usize);
        Self { width, height, rgba: vec![0; width * height * 4] }
    }

    /// Draws one frame, returns the picture it yields and disposes of it.
    fn draw(&mut self, control: &FrameControl, pixels: &[u8]) -> Vec<u8> {
        let before = (control.dispose_op == DisposeOp::Previous).then(|| self.rgba.clone());
        let row_len = control.width as usize * 4;
        for (y, row) in pixels.chunks_exact(row_len.max(1)).enumerate() {
            let Some(target) = self.row(control, y) else { break };
            match control.blend_op {
                BlendOp::Source => target.copy_from_slice(row),
                BlendOp::Over => {
                    target.chunks_exact_mut(4).zip(row.chunks_exact(4)).for_each(|(under, p)| over(under, p));
                }
            }
        }
        let picture = self.rgba.clone();
        match control.dispose_op {
            DisposeOp::None => {}
            DisposeOp::Previous => self.rgba = before.unwrap_or_default(),
            DisposeOp::Background => {
                for y in 0..control.height as usize {
                    if let Some(row) = self.row(control, y) {
                        row.fill(0);
                    }
                }
            }
        }
        picture
    }

    /// The cells of the frame's row `y`; `None` outside the canvas.
    fn row(&mut self, control: &FrameControl, y: usize) -> Option<&mut [u8]> {
        let (x, y) = (control.x_offset as usize, control.y_offset as usize + y);
        let width = control.width as usize;
        if y >= self.height || x + width > self.width {
            return None;
        }
        self.rgba.get_mut((y * self.width + x) * 4..)?.get_mut(..width * 4)
    }
}

/// Alpha compositing of one pixel (Porter and Duff's "over").
fn over(under: &mut [u8], pixel: &[u8]) {
    let (top, bottom) = (u32::from(pixel[3]), u32::from(under[3]));
    if top == 255 || bottom == 0 {
        under.copy_from_slice(pixel);
        return;
    }
    if top == 0 {
        return;
    }
    // Weights scaled by 255 so that the sums stay integers.
    let below = bottom * (255 - top);
    let alpha = top * 255 + below;
    for (u, &p) in under.iter_mut().zip(&pixel[..3]) {
        *u = ((u32::from(p) * top * 255 + u32::from(*u) * below + alpha / 2) / alpha) as u8;
    }
    under[3] = ((alpha + 127) / 255) as u8;
}
