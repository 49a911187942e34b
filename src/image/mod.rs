//! Pictures as bytes and as numbers: decoding, encoding, PNG metadata and
//! resampling.
//!
//! Everything that decides which value a pixel gets follows what ComfyUI's
//! users see through PyTorch and Pillow, because "same workflow, same picture"
//! includes the pictures that go in and come out: [`decode`] for what
//! `LoadImage` sees, [`encode`] for what `SaveImage` writes, [`resample`] for
//! the resize methods, [`view`] for what the viewing routes make of a file and
//! [`python_json`] for the text in a PNG. Codecs themselves come from crates.
//!
//! Bytes from the network are not trusted: [`Limits`] bounds sides, pixels and
//! frames before anything is allocated, and compressed text is inflated only
//! up to a bound.

mod decode;
#[cfg(test)]
mod decode_tests;
mod encode;
mod jpeg_decode;
mod lanczos;
mod orientation;
mod png_decode;
mod png_text;
mod python_json;
pub mod quantize;
pub mod resample;
mod view;

pub use decode::{Channel, DecodeError, DecodedImage, Limits, decode};
pub use encode::{
    Animation, Bitmap, EncodeError, PngCompression, WebpOptions, encode_apng, encode_jpeg, encode_png,
    encode_webp, encode_webp_animation,
};
pub use png_text::read_text_chunks;
pub use python_json::python_json;
pub use resample::{Crop, Method, ResampleError, Resize, upscale, upscale_images, upscale_masks};
pub use view::{Preview, PreviewFormat, ViewError, channel_alpha, channel_rgb, preview, replace_alpha};
