//! Engine events as WebSocket messages.
//!
//! Text messages are `{"type", "data"}`. Binary ones start with a big-endian
//! u32 that says what follows:
//!
//! | number | follows |
//! | --- | --- |
//! | 1 | u32 image format (1 JPEG, 2 PNG), the file |
//! | 3 | u32 length of the node id, the node id, a text |
//! | 4 | u32 length of a JSON object, the object, the file |
//!
//! Kind 4 goes to clients that announced `supports_preview_metadata`, before
//! the `progress` it belongs to; kind 1 goes to all others, after it.

use serde_json::json;
use tokio_tungstenite::tungstenite::{Bytes, Message, Utf8Bytes};

use super::outbox::Weight;
use crate::engine::{Event, EventKind};
use crate::image::{self, Bitmap, PngCompression};
use crate::nodes::PreviewFrame;
use crate::tensor::HostTensor;

const IMAGE: u32 = 1;
const TEXT: u32 = 3;
const IMAGE_WITH_METADATA: u32 = 4;
/// JPEG quality of previews; previews of a few dozen kB at 512 pixels.
const PREVIEW_QUALITY: u8 = 95;

/// An encoded picture and what it belongs to.
struct Picture {
    weight: Weight,
    /// 1 JPEG, 2 PNG.
    format: u32,
    media_type: &'static str,
    file: Vec<u8>,
}

/// The messages of one event, ready for both kinds of clients.
#[derive(Default)]
pub(super) struct Frames {
    text: Option<(Weight, Utf8Bytes)>,
    /// Weight, form without metadata, form with metadata.
    binary: Option<(Weight, Bytes, Bytes)>,
}

fn header(numbers: &[u32], capacity: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(numbers.len() * 4 + capacity);
    numbers.iter().for_each(|n| bytes.extend_from_slice(&n.to_be_bytes()));
    bytes
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

fn text_frame(node: &str, text: &str) -> Bytes {
    let mut frame = header(&[TEXT, length(node.as_bytes())], node.len() + text.len());
    frame.extend_from_slice(node.as_bytes());
    frame.extend_from_slice(text.as_bytes());
    frame.into()
}

fn picture_frames(picture: &Picture, node: &str, prompt_id: &str) -> (Bytes, Bytes) {
    let file = &picture.file;
    let mut plain = header(&[IMAGE, picture.format], file.len());
    plain.extend_from_slice(file);
    let metadata = json!({
        "node_id": node,
        "prompt_id": prompt_id,
        "display_node_id": node,
        "parent_node_id": null,
        "real_node_id": node,
        "image_type": picture.media_type,
    })
    .to_string();
    let mut described =
        header(&[IMAGE_WITH_METADATA, length(metadata.as_bytes())], metadata.len() + file.len());
    described.extend_from_slice(metadata.as_bytes());
    described.extend_from_slice(file);
    (plain.into(), described.into())
}

/// Width and height whose longer side is `longest`, keeping the proportions.
fn fit(width: usize, height: usize, longest: usize) -> (usize, usize) {
    let scale =
        |side: usize, other: usize| ((side * longest) as f64 / other as f64).round().max(1.0) as usize;
    if width >= height { (longest, scale(height, width)) } else { (scale(width, height), longest) }
}

fn encode_preview(preview: &PreviewFrame, longest: u32) -> Result<Picture, String> {
    let [_, height, width, _] = *preview.image.shape() else {
        return Err(format!("a preview has the shape {:?}, not [1, H, W, 3]", preview.image.shape()));
    };
    let (width, height) = fit(width.max(1), height.max(1), longest.clamp(1, 4096) as usize);
    let resized =
        image::upscale_images(&preview.image, image::Resize::to(width, height, image::Method::Bilinear))
            .map_err(|e| e.to_string())?;
    let bitmap = Bitmap::from_images(&resized, 0).map_err(|e| e.to_string())?;
    let file = image::encode_jpeg(&bitmap, PREVIEW_QUALITY).map_err(|e| e.to_string())?;
    Ok(Picture { weight: Weight::Preview, format: 1, media_type: "image/jpeg", file })
}

/// A preview as a JPEG file; CPU work.
pub(in crate::server) fn preview_jpeg(preview: &PreviewFrame, size: Option<u32>) -> Result<Vec<u8>, String> {
    encode_preview(preview, size.unwrap_or(preview.max_size)).map(|picture| picture.file)
}

fn encode_picture(image: &HostTensor) -> Result<Picture, String> {
    let bitmap = Bitmap::from_images(image, 0).map_err(|e| e.to_string())?;
    let file = image::encode_png(&bitmap, PngCompression::Fast, &[]).map_err(|e| e.to_string())?;
    Ok(Picture { weight: Weight::Vital, format: 2, media_type: "image/png", file })
}

impl EventKind {
    /// Whether making the frames takes an image encoder.
    pub(super) fn has_picture(&self) -> bool {
        matches!(self, EventKind::Picture { .. } | EventKind::Progress { preview: Some(_), .. })
    }
}

impl Frames {
    /// Encodes an event, previews with `preview_size` pixels if given; CPU work if it [has a picture](EventKind::has_picture).
    pub(super) fn new(event: &Event, preview_size: Option<u32>) -> Self {
        let weight = match event.kind {
            EventKind::Progress { .. } | EventKind::ProgressState { .. } => Weight::Progress,
            _ => Weight::Vital,
        };
        let text = event.to_json().map(|json| (weight, Utf8Bytes::from(json.to_string())));
        let binary = match &event.kind {
            EventKind::Text { node, text, .. } => {
                let frame = text_frame(node, text);
                Some((Weight::Vital, frame.clone(), frame))
            }
            EventKind::Picture { prompt_id, node, image } => encoded(encode_picture(image), node, prompt_id),
            EventKind::Progress { prompt_id, node, preview: Some(preview), .. } => {
                let longest = preview_size.unwrap_or(preview.max_size);
                encoded(encode_preview(preview, longest), node, prompt_id)
            }
            _ => None,
        };
        Self { text, binary }
    }

    /// The messages for one client, in order.
    pub(super) fn for_client(&self, knows_metadata: bool) -> impl Iterator<Item = (Weight, Message)> {
        let text = self.text.as_ref().map(|(weight, text)| (*weight, Message::Text(text.clone())));
        let binary = self.binary.as_ref().map(|(weight, plain, described)| {
            (*weight, Message::Binary(if knows_metadata { described } else { plain }.clone()))
        });
        let (first, second) = if knows_metadata { (binary, text) } else { (text, binary) };
        first.into_iter().chain(second)
    }
}

fn encoded(picture: Result<Picture, String>, node: &str, prompt_id: &str) -> Option<(Weight, Bytes, Bytes)> {
    match picture {
        Ok(picture) => {
            let (plain, described) = picture_frames(&picture, node, prompt_id);
            Some((picture.weight, plain, described))
        }
        Err(error) => {
            tracing::warn!(%error, node, "a picture could not be sent");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_frame_layout() {
        let frame = text_frame("22", "width: 24");
        assert_eq!(&frame[..], b"\x00\x00\x00\x03\x00\x00\x00\x0222width: 24");
    }

    #[test]
    fn picture_frame_layouts() {
        let picture =
            Picture { weight: Weight::Vital, format: 2, media_type: "image/png", file: b"PNGDATA".to_vec() };
        let (plain, described) = picture_frames(&picture, "7", "p-1");
        assert_eq!(&plain[..], b"\x00\x00\x00\x01\x00\x00\x00\x02PNGDATA");
        assert_eq!(&described[..4], b"\x00\x00\x00\x04");
        let length = u32::from_be_bytes(described[4..8].try_into().unwrap()) as usize;
        let metadata: serde_json::Value = serde_json::from_slice(&described[8..8 + length]).unwrap();
        assert_eq!(
            metadata,
            json!({"node_id": "7", "prompt_id": "p-1", "display_node_id": "7", "parent_node_id": null,
                   "real_node_id": "7", "image_type": "image/png"})
        );
        assert_eq!(&described[8 + length..], b"PNGDATA");
    }

    #[test]
    fn previews_fill_the_longer_side() {
        assert_eq!(fit(64, 64, 512), (512, 512));
        assert_eq!(fit(96, 64, 512), (512, 341));
        assert_eq!(fit(64, 128, 512), (256, 512));
        assert_eq!(fit(2048, 1, 512), (512, 1));
    }
}
