//! Pictures from files and to files.

use std::path::PathBuf;

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use super::mask::to_grey;
use super::shapes::{image, mask, unknown};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Services, Value};
use crate::files::{Kind, PathError, SaveTarget, write_new};
use crate::graph::{FileList, Input};
use crate::image::{
    Animation, Bitmap, Channel, DecodeError, DecodedImage, EncodeError, Limits, PngCompression, WebpOptions,
    decode, encode_apng, encode_png, encode_webp_animation, python_json,
};
use crate::tensor::HostTensor;

/// The nodes that read and write picture files.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(LoadImage),
        Box::new(LoadImageMask),
        Box::new(LoadImageOutput),
        Box::new(SaveImage),
        Box::new(PreviewImage),
        Box::new(MaskPreview),
        Box::new(SaveImageWebsocket),
        Box::new(SaveAnimatedPng),
        Box::new(SaveAnimatedWebp),
    ]
}

impl From<PathError> for NodeError {
    fn from(error: PathError) -> Self {
        let kind = match &error {
            PathError::NotFound { .. } => "FileNotFoundError",
            PathError::Io { .. } => "OSError",
            _ => "Exception",
        };
        NodeError::failed(kind, error)
    }
}

impl From<DecodeError> for NodeError {
    fn from(error: DecodeError) -> Self {
        NodeError::failed("UnidentifiedImageError", error)
    }
}

impl From<EncodeError> for NodeError {
    fn from(error: EncodeError) -> Self {
        NodeError::failed("ValueError", error)
    }
}

fn read(services: &Services, name: &str) -> Result<Vec<u8>, NodeError> {
    let path = services.folders.resolve_annotated(name, Kind::Input)?;
    std::fs::read(&path).map_err(|source| PathError::Io { path, source }.into())
}

fn load(services: &Services, name: &str) -> Result<DecodedImage, NodeError> {
    Ok(decode(&read(services, name)?, &Limits::default())?)
}

/// Whether the literal input names a file that exists.
pub(super) fn validate_file(
    services: &Services,
    inputs: &Map<String, Json>,
    input: &str,
    what: &str,
) -> Result<(), String> {
    let Some(name) = inputs.get(input).and_then(Json::as_str) else { return Ok(()) };
    match services.folders.resolve_annotated(name, Kind::Input) {
        Ok(path) if path.is_file() => Ok(()),
        _ => Err(format!("Invalid {what} file: {name}")),
    }
}

/// SHA-256 of the file that a literal input names.
pub(super) fn file_hash(services: &Services, inputs: &Map<String, Json>, input: &str) -> Option<String> {
    let bytes = read(services, inputs.get(input)?.as_str()?).ok()?;
    Some(Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect())
}

fn load_image(services: &Services, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
    let picture = load(services, inputs.string("image")?)?;
    let values = vec![Value::object("IMAGE", picture.images()), Value::object("MASK", picture.masks())];
    Ok(NodeOutput::many(values))
}

fn image_upload() -> Input {
    Input::files("image", FileList::InputImages).opt("image_upload", true)
}

/// `LoadImage`.
pub struct LoadImage;

impl Node for LoadImage {
    fn schema(&self) -> Schema {
        Schema::new("LoadImage", "image")
            .display("Load Image")
            .describe("Reads a picture of the input folder; its inverted alpha is the mask.")
            .input(image_upload())
            .output("IMAGE")
            .output("MASK")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        load_image(ctx.services, inputs)
    }

    fn validate(&self, services: &Services, inputs: &Map<String, Json>) -> Result<(), String> {
        validate_file(services, inputs, "image", "image")
    }

    fn validated_inputs(&self) -> &'static [&'static str] {
        &["image"]
    }

    fn fingerprint(&self, services: &Services, inputs: &Map<String, Json>) -> Option<String> {
        file_hash(services, inputs, "image")
    }
}

/// `LoadImageOutput`.
pub struct LoadImageOutput;

impl Node for LoadImageOutput {
    fn schema(&self) -> Schema {
        let route = json!({
            "route": "/internal/files/output", "refresh_button": true, "control_after_refresh": "first"
        });
        let picture = Input::files("image", FileList::InputImages)
            .opt("image_upload", true)
            .opt("image_folder", "output")
            .opt("remote", route);
        Schema::new("LoadImageOutput", "image")
            .display("Load Image (from Outputs)")
            .describe("Reads a picture of the output folder.")
            .input(picture)
            .output("IMAGE")
            .output("MASK")
            .flag("experimental", true)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        load_image(ctx.services, inputs)
    }

    fn validate(&self, services: &Services, inputs: &Map<String, Json>) -> Result<(), String> {
        validate_file(services, inputs, "image", "image")
    }

    fn validated_inputs(&self) -> &'static [&'static str] {
        &["image"]
    }

    fn fingerprint(&self, services: &Services, inputs: &Map<String, Json>) -> Option<String> {
        file_hash(services, inputs, "image")
    }
}

/// `LoadImageMask`.
pub struct LoadImageMask;

impl Node for LoadImageMask {
    fn schema(&self) -> Schema {
        Schema::new("LoadImageMask", "mask")
            .display("Load Image (as Mask)")
            .describe("Reads one channel of a picture of the input folder as a mask; alpha is inverted.")
            .input(image_upload())
            .input(Input::combo("channel", &["alpha", "red", "green", "blue"]).bare())
            .output("MASK")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let name = inputs.string("channel")?;
        let channel = Channel::from_name(name).ok_or_else(|| unknown("channel", name))?;
        let picture = load(ctx.services, inputs.string("image")?)?;
        Ok(NodeOutput::one(Value::object("MASK", picture.channel(channel))))
    }

    fn validate(&self, services: &Services, inputs: &Map<String, Json>) -> Result<(), String> {
        validate_file(services, inputs, "image", "image")
    }

    fn validated_inputs(&self) -> &'static [&'static str] {
        &["image"]
    }

    fn fingerprint(&self, services: &Services, inputs: &Map<String, Json>) -> Option<String> {
        file_hash(services, inputs, "image")
    }
}

/// The texts that a saved file carries: the prompt and whatever else the client sent.
pub(super) fn metadata(ctx: &NodeCtx<'_>) -> Vec<(String, String)> {
    if !ctx.services.save_metadata {
        return Vec::new();
    }
    let mut texts = vec![("prompt".to_owned(), python_json(ctx.prompt))];
    let extra = ctx.extra_pnginfo.and_then(Json::as_object).into_iter().flatten();
    texts.extend(extra.map(|(name, value)| (name.clone(), python_json(value))));
    texts
}

/// Writes a file under the next free name, and describes it for the client.
pub(super) fn save_next(
    target: &mut SaveTarget,
    (index, extension): (usize, &str),
    kind: Kind,
    bytes: &[u8],
) -> Result<Json, NodeError> {
    loop {
        let name = target.next_name(index, extension);
        // Another prompt may have taken the name since the folder was read.
        if write_new(&target.folder.join(&name), bytes)? {
            return Ok(json!({"filename": name, "subfolder": target.subfolder, "type": kind.name()}));
        }
    }
}

fn ui(entries: impl IntoIterator<Item = (&'static str, Json)>) -> NodeOutput {
    NodeOutput::ui(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// ComfyUI's level 1 and our fast mode mean the same: little work.
fn compression(level: u8) -> PngCompression {
    if level == 1 { PngCompression::Fast } else { PngCompression::Level(level) }
}

/// Writes each picture of a batch as a PNG.
fn save_images(ctx: &NodeCtx<'_>, x: &HostTensor, kind: Kind, prefix: &str) -> Result<NodeOutput, NodeError> {
    let level = if kind == Kind::Temp { PngCompression::Fast } else { compression(ctx.services.png_level) };
    let texts = metadata(ctx);
    let mut target = ctx.services.folders.save_path(kind, prefix, x.dim(2), x.dim(1))?;
    let mut saved = Vec::new();
    for index in 0..x.dim(0) {
        ctx.check_interrupt()?;
        let file = encode_png(&Bitmap::from_images(x, index)?, level, &texts)?;
        saved.push(save_next(&mut target, (index, "png"), kind, &file)?);
    }
    Ok(ui([("images", Json::Array(saved))]))
}

/// A prefix that no other run uses: previews must not overwrite each other.
fn temp_prefix() -> String {
    let random = uuid::Uuid::new_v4();
    let letters = random.as_bytes().iter().take(5).map(|b| char::from(b'a' + b % 26));
    format!("ComfyUI_temp_{}", letters.collect::<String>())
}

fn with_hidden(schema: Schema) -> Schema {
    schema.input(Input::hidden("prompt", "PROMPT")).input(Input::hidden("extra_pnginfo", "EXTRA_PNGINFO"))
}

/// `SaveImage`.
pub struct SaveImage;

impl Node for SaveImage {
    fn schema(&self) -> Schema {
        let schema = Schema::new("SaveImage", "image")
            .display("Save Image")
            .describe("Writes pictures to the output folder, with the workflow inside.")
            .input(Input::link("images", "IMAGE"))
            .input(Input::string("filename_prefix").opt("default", "ComfyUI"));
        with_hidden(schema).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = image(inputs, "images")?;
        save_images(ctx, &x, Kind::Output, inputs.string("filename_prefix")?)
    }
}

/// `PreviewImage`.
pub struct PreviewImage;

impl Node for PreviewImage {
    fn schema(&self) -> Schema {
        let schema = Schema::new("PreviewImage", "image")
            .display("Preview Image")
            .describe("Shows pictures without keeping them.")
            .input(Input::link("images", "IMAGE").bare());
        with_hidden(schema).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, _) = image(inputs, "images")?;
        save_images(ctx, &x, Kind::Temp, &temp_prefix())
    }
}

/// `MaskPreview`.
pub struct MaskPreview;

impl Node for MaskPreview {
    fn schema(&self) -> Schema {
        let schema = Schema::new("MaskPreview", "mask")
            .module("comfy_extras.nodes_mask")
            .describe("Shows a mask as a grey picture.")
            .input(Input::link("mask", "MASK").bare());
        with_hidden(schema).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = mask(inputs, "mask")?;
        save_images(ctx, &to_grey(&x, dims)?, Kind::Temp, &temp_prefix())
    }
}

/// `SaveImageWebsocket`.
pub struct SaveImageWebsocket;

impl Node for SaveImageWebsocket {
    fn schema(&self) -> Schema {
        Schema::new("SaveImageWebsocket", "api/image")
            .module("custom_nodes.websocket_image_save")
            .describe("Sends pictures to the client over the WebSocket instead of saving them.")
            .input(Input::link("images", "IMAGE").bare())
            .sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, ..]) = image(inputs, "images")?;
        for index in 0..b {
            // The reference counts from 0 here.
            ctx.progress(index as u64, b as u64, None)?;
            ctx.sink.picture(ctx.node_id, &x.rows(index, 1));
        }
        Ok(NodeOutput::default())
    }

    fn is_cacheable(&self) -> bool {
        false
    }
}

/// Saves one animation; `encode` makes the file from the frames.
fn save_animation(
    ctx: &NodeCtx<'_>,
    inputs: &Inputs,
    extension: &str,
    encode: impl FnOnce(Animation<'_>) -> Result<Vec<u8>, EncodeError>,
) -> Result<NodeOutput, NodeError> {
    let (x, [b, h, w, _]) = image(inputs, "images")?;
    let fps = inputs.float("fps")?;
    if fps <= 0.0 {
        return Err(NodeError::input("fps", &format!("must be more than 0: {fps}")));
    }
    let frames = (0..b).map(|i| Bitmap::from_images(&x, i)).collect::<Result<Vec<_>, _>>()?;
    let frame_ms = (1000.0 / fps).clamp(0.0, f64::from(u16::MAX)) as u16;
    let file = encode(Animation { frames: &frames, frame_ms })?;
    let mut target = ctx.services.folders.save_path(Kind::Output, inputs.string("filename_prefix")?, w, h)?;
    let saved = save_next(&mut target, (0, extension), Kind::Output, &file)?;
    Ok(ui([("images", json!([saved])), ("animated", json!([true]))]))
}

fn animation_schema(class: &'static str, description: &'static str) -> Schema {
    Schema::new(class, "image/animation")
        .module("comfy_extras.nodes_images")
        .describe(description)
        .input(Input::link("images", "IMAGE").bare())
        .input(Input::string("filename_prefix").opt("default", "ComfyUI"))
        .input(Input::float("fps", 6.0, 0.01, 1000.0).opt("step", 0.01))
}

/// `SaveAnimatedPNG`.
pub struct SaveAnimatedPng;

impl Node for SaveAnimatedPng {
    fn schema(&self) -> Schema {
        let schema = animation_schema("SaveAnimatedPNG", "Writes a batch of pictures as one animated PNG.")
            .input(Input::int("compress_level", 4, 0, 9));
        with_hidden(schema).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let level = compression(inputs.size("compress_level")?.min(9) as u8);
        let texts = metadata(ctx);
        save_animation(ctx, inputs, "png", |animation| encode_apng(animation, level, &texts))
    }
}

/// `SaveAnimatedWEBP`.
pub struct SaveAnimatedWebp;

impl Node for SaveAnimatedWebp {
    fn schema(&self) -> Schema {
        let schema = animation_schema("SaveAnimatedWEBP", "Writes a batch of pictures as one animated WebP.")
            .input(Input::boolean("lossless").opt("default", true))
            .input(Input::int("quality", 80, 0, 100))
            .input(Input::combo("method", &["default", "fastest", "slowest"]).bare());
        with_hidden(schema).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let method = match inputs.string("method")? {
            "fastest" => 0,
            "slowest" => 6,
            _ => 4,
        };
        let quality = inputs.float("quality")? as f32;
        let options = WebpOptions { lossless: inputs.boolean("lossless")?, quality, method };
        save_animation(ctx, inputs, "webp", |animation| encode_webp_animation(animation, options))
    }
}

/// The path of a literal file name, for nodes that read other files.
pub(super) fn input_path(services: &Services, name: &str) -> Result<PathBuf, NodeError> {
    Ok(services.folders.resolve_annotated(name, Kind::Input)?)
}
