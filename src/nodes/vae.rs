//! VAE nodes: latents to pictures and back.
//!
//! Pictures are `[B, H, W, C]` in 0..1; the network works on -1..1. Sides that
//! are not multiples of the downscale are cropped centrally, as in ComfyUI.

use super::loaders::VaeHandle;
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::Latent;
use crate::graph::Input;
use crate::image::resample::{self, Method, Resize};
use crate::models::ModelError;
use crate::models::vae::Autoencoder;
use crate::models::vae::tiled::{self, Scale, Tiling};
use crate::tensor::HostTensor;

/// Tiles when a picture doesn't fit in memory as a whole: latent cells.
const FALLBACK_DECODE: Tiling = Tiling { tile: 64, overlap: 16 };
/// Tiles when a picture doesn't fit in memory as a whole: pixels.
const FALLBACK_ENCODE: Tiling = Tiling { tile: 512, overlap: 64 };

/// Runs `network` over `x` in tiles, with progress and interruption.
fn run_tiled(
    ctx: &NodeCtx<'_>,
    x: &HostTensor,
    tiling: Tiling,
    scale: Scale,
    network: impl FnMut(&HostTensor) -> Result<HostTensor, ModelError>,
) -> Result<HostTensor, NodeError> {
    let mut interrupted = false;
    let progress = |done: usize, total: usize| {
        ctx.progress(done as u64, total as u64, None).map_err(|_| {
            interrupted = true;
            ModelError::File("interrupted".into())
        })
    };
    let result = tiled::run(x, tiling, scale, network, progress);
    if interrupted { Err(NodeError::Interrupted) } else { Ok(result?) }
}

/// Sample by sample, so that memory doesn't grow with the batch.
fn each_sample(
    ctx: &NodeCtx<'_>,
    x: &HostTensor,
    mut f: impl FnMut(&HostTensor) -> Result<HostTensor, NodeError>,
) -> Result<HostTensor, NodeError> {
    let mut shape = Vec::new();
    let mut data = Vec::new();
    for b in 0..x.dim(0) {
        ctx.check_interrupt()?;
        let out = f(&x.rows(b, 1))?;
        shape = out.shape().to_vec();
        data.extend(out.into_data());
    }
    if let Some(first) = shape.first_mut() {
        *first = x.dim(0);
    }
    HostTensor::new(&shape, data).ok_or_else(|| NodeError::failed("ValueError", "the batch is empty"))
}

/// Whether decoding a whole `h`×`w` latent would take more memory than there is.
fn is_short_of_memory(ctx: &NodeCtx<'_>, vae: &dyn Autoencoder, h: usize, w: usize) -> bool {
    let backend = &ctx.services.models.placement().vae;
    let memory = backend.memory();
    vae.decode_bytes(h, w, backend.info().element_bytes) > memory.available.saturating_add(memory.cached)
}

fn decode(
    ctx: &NodeCtx<'_>,
    vae: &dyn Autoencoder,
    latent: &HostTensor,
    tiling: Option<Tiling>,
) -> Result<HostTensor, NodeError> {
    let scale = Scale::Up(vae.downscale());
    let decoded = each_sample(ctx, latent, |sample| {
        let in_tiles = |tiling| run_tiled(ctx, sample, tiling, scale, |tile| vae.decode_raw(tile));
        match tiling {
            Some(tiling) => in_tiles(tiling),
            None if is_short_of_memory(ctx, vae, sample.dim(2), sample.dim(3)) => {
                tracing::warn!("memory is short: decoding in tiles");
                in_tiles(FALLBACK_DECODE)
            }
            None => match vae.decode_raw(sample) {
                Err(e) if e.is_out_of_memory() => {
                    tracing::warn!("{e}: decoding in tiles instead");
                    ctx.services.models.trim();
                    in_tiles(FALLBACK_DECODE)
                }
                other => Ok(other?),
            },
        }
    })?;
    Ok(to_picture(&decoded))
}

pub(super) fn encode(
    ctx: &NodeCtx<'_>,
    vae: &dyn Autoencoder,
    picture: &HostTensor,
    tiling: Option<Tiling>,
) -> Result<HostTensor, NodeError> {
    let scale = Scale::Down(vae.downscale());
    each_sample(ctx, &to_network(picture), |sample| {
        let in_tiles = |tiling| run_tiled(ctx, sample, tiling, scale, |tile| vae.encode_raw(tile));
        let cells = |side: usize| side / vae.downscale();
        match tiling {
            Some(tiling) => in_tiles(tiling),
            None if is_short_of_memory(ctx, vae, cells(sample.dim(2)), cells(sample.dim(3))) => {
                tracing::warn!("memory is short: encoding in tiles");
                in_tiles(FALLBACK_ENCODE)
            }
            None => match vae.encode_raw(sample) {
                Err(e) if e.is_out_of_memory() => {
                    tracing::warn!("{e}: encoding in tiles instead");
                    ctx.services.models.trim();
                    in_tiles(FALLBACK_ENCODE)
                }
                other => Ok(other?),
            },
        }
    })
}

/// `[B, 3, H, W]` in -1..1 to `[B, H, W, 3]` clamped to 0..1.
fn to_picture(x: &HostTensor) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    HostTensor::from_fn(&[b, h, w, c], |i| {
        let (n, y, k, ch) = (i / (h * w * c), i / (w * c) % h, i / c % w, i % c);
        ((x.data()[((n * c + ch) * h + y) * w + k] + 1.0) / 2.0).clamp(0.0, 1.0)
    })
}

/// `[B, H, W, ≥3]` in 0..1 to `[B, 3, H, W]` in -1..1.
fn to_network(x: &HostTensor) -> HostTensor {
    let (b, h, w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    HostTensor::from_fn(&[b, 3, h, w], |i| {
        let (n, ch, y, k) = (i / (3 * h * w), i / (h * w) % 3, i / w % h, i % w);
        x.data()[((n * h + y) * w + k) * c + ch.min(c - 1)] * 2.0 - 1.0
    })
}

/// Central crop of `[B, H, W, C]` to multiples of `unit`.
pub(super) fn crop_to_multiple(x: &HostTensor, unit: usize) -> Result<HostTensor, NodeError> {
    let (b, h, w, c) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let (ch, cw) = (h / unit * unit, w / unit * unit);
    if ch == 0 || cw == 0 {
        return Err(NodeError::input(
            "pixels",
            &format!("is {w}x{h}; each side must be at least {unit} pixels"),
        ));
    }
    if (ch, cw) == (h, w) {
        return Ok(x.clone());
    }
    let (top, left) = (h % unit / 2, w % unit / 2);
    Ok(HostTensor::from_fn(&[b, ch, cw, c], |i| {
        let (n, y, k, channel) = (i / (ch * cw * c), i / (cw * c) % ch, i / c % cw, i % c);
        x.data()[((n * h + top + y) * w + left + k) * c + channel]
    }))
}

/// Tile and overlap inputs; the overlap is cut to a quarter of the tile.
fn tiling(inputs: &Inputs, unit: usize) -> Result<Tiling, NodeError> {
    let (tile, overlap) = (inputs.size("tile_size")?, inputs.size("overlap")?);
    let overlap = if tile < overlap * 4 { tile / 4 } else { overlap };
    Ok(Tiling { tile: (tile / unit).max(1), overlap: overlap / unit })
}

fn tile_inputs(schema: Schema, tile_step: i64) -> Schema {
    schema
        .input(Input::int("tile_size", 512, 64, 4096).opt("step", tile_step))
        .input(Input::int("overlap", 64, 0, 4096).opt("step", 32))
        .input(Input::int("temporal_size", 64, 8, 4096).opt("step", 4))
        .input(Input::int("temporal_overlap", 8, 4, 4096).opt("step", 4))
}

/// The VAE nodes.
pub fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(VaeDecode),
        Box::new(VaeDecodeTiled),
        Box::new(VaeEncode),
        Box::new(VaeEncodeTiled),
        Box::new(VaeEncodeForInpaint),
    ]
}

/// `VAEDecode`.
pub struct VaeDecode;

impl Node for VaeDecode {
    fn schema(&self) -> Schema {
        Schema::new("VAEDecode", "latent")
            .display("VAE Decode")
            .describe("Decodes a latent to a picture.")
            .input(Input::link("samples", "LATENT"))
            .input(Input::link("vae", "VAE"))
            .output("IMAGE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let latent = inputs.object::<Latent>("samples")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        Ok(NodeOutput::one(Value::object("IMAGE", decode(ctx, &*vae, &latent.samples, None)?)))
    }
}

/// `VAEDecodeTiled`.
pub struct VaeDecodeTiled;

impl Node for VaeDecodeTiled {
    fn schema(&self) -> Schema {
        let schema = Schema::new("VAEDecodeTiled", "_for_testing")
            .display("VAE Decode (Tiled)")
            .describe("Decodes a latent in overlapping tiles, with less memory.")
            .input(Input::link("samples", "LATENT").bare())
            .input(Input::link("vae", "VAE").bare());
        tile_inputs(schema, 32).output("IMAGE")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let latent = inputs.object::<Latent>("samples")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let tiling = tiling(inputs, vae.downscale())?;
        Ok(NodeOutput::one(Value::object("IMAGE", decode(ctx, &*vae, &latent.samples, Some(tiling))?)))
    }
}

/// `VAEEncode`.
pub struct VaeEncode;

impl Node for VaeEncode {
    fn schema(&self) -> Schema {
        Schema::new("VAEEncode", "latent")
            .display("VAE Encode")
            .describe("Encodes a picture to a latent.")
            .input(Input::link("pixels", "IMAGE").bare())
            .input(Input::link("vae", "VAE").bare())
            .output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let pixels = inputs.object::<HostTensor>("pixels")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let pixels = crop_to_multiple(&pixels, vae.downscale())?;
        let samples = encode(ctx, &*vae, &pixels, None)?;
        Ok(NodeOutput::one(Value::object("LATENT", Latent::new(samples))))
    }
}

/// `VAEEncodeTiled`.
pub struct VaeEncodeTiled;

impl Node for VaeEncodeTiled {
    fn schema(&self) -> Schema {
        let schema = Schema::new("VAEEncodeTiled", "_for_testing")
            .display("VAE Encode (Tiled)")
            .describe("Encodes a picture in overlapping tiles, with less memory.")
            .input(Input::link("pixels", "IMAGE").bare())
            .input(Input::link("vae", "VAE").bare());
        tile_inputs(schema, 64).output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let pixels = inputs.object::<HostTensor>("pixels")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let pixels = crop_to_multiple(&pixels, vae.downscale())?;
        let tiling = Tiling { tile: inputs.size("tile_size")?, overlap: inputs.size("overlap")? };
        let narrowest = tiling.tile / 2;
        if tiling.overlap >= narrowest && pixels.dim(1).max(pixels.dim(2)) > narrowest {
            let what = format!("is {}: it must be below half the tile_size, {narrowest}", tiling.overlap);
            return Err(NodeError::input("overlap", &what));
        }
        let samples = encode(ctx, &*vae, &pixels, Some(tiling))?;
        Ok(NodeOutput::one(Value::object("LATENT", Latent::new(samples))))
    }
}

/// `VAEEncodeForInpaint`.
pub struct VaeEncodeForInpaint;

impl Node for VaeEncodeForInpaint {
    fn schema(&self) -> Schema {
        Schema::new("VAEEncodeForInpaint", "latent/inpaint")
            .display("VAE Encode (for Inpainting)")
            .describe("Encodes a picture whose masked part is greyed out, and attaches the grown mask.")
            .input(Input::link("pixels", "IMAGE").bare())
            .input(Input::link("vae", "VAE").bare())
            .input(Input::link("mask", "MASK").bare())
            .input(Input::int("grow_mask_by", 6, 0, 64).opt("step", 1))
            .output("LATENT")
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let pixels = inputs.object::<HostTensor>("pixels")?;
        let mask = inputs.object::<HostTensor>("mask")?;
        let vae = inputs.object::<VaeHandle>("vae")?.open()?;
        let unit = vae.downscale();
        let (h, w) = (pixels.dim(1), pixels.dim(2));
        let rank = mask.shape().len();
        let (mh, mw) = (mask.dim(rank.saturating_sub(2)), mask.dim(rank.saturating_sub(1)));
        let batch = mask.len() / (mh * mw).max(1);
        let mask = HostTensor::new(&[batch, 1, mh, mw], mask.data().to_vec())
            .ok_or_else(|| NodeError::input("mask", "is empty"))?;
        let mask = resample::upscale(&mask, Resize::to(w, h, Method::Bilinear))
            .map_err(|e| NodeError::failed("ValueError", e))?;
        // The crop treats the mask as a one-channel picture.
        let mask = HostTensor::new(&[batch, h, w, 1], mask.into_data()).unwrap_or_default();
        let mask = crop_to_multiple(&mask, unit)?;
        let mut pixels = crop_to_multiple(&pixels, unit)?;
        grey_out(&mut pixels, &mask);
        let samples = encode(ctx, &*vae, &pixels, None)?;
        let grown = grow(&mask, inputs.size("grow_mask_by")?);
        Ok(NodeOutput::one(Value::object(
            "LATENT",
            Latent { noise_mask: Some(grown), ..Latent::new(samples) },
        )))
    }
}

/// Sets pixels under the rounded mask to middle grey.
pub(super) fn grey_out(pixels: &mut HostTensor, mask: &HostTensor) {
    let (plane, c) = (pixels.dim(1) * pixels.dim(2), pixels.dim(3));
    let masks = mask.dim(0).max(1);
    for (i, pixel) in pixels.data_mut().chunks_exact_mut(c.max(1)).enumerate() {
        let (n, at) = (i / plane, i % plane);
        let keep = 1.0 - mask.data()[(n % masks) * plane + at].round_ties_even();
        pixel.iter_mut().for_each(|v| *v = (*v - 0.5) * keep + 0.5);
    }
}

/// The rounded mask `[B, H, W, 1]` grown by a `by`×`by` square, as `[B, 1, H, W]`.
///
/// An even square reaches one pixel further up and left than down and right.
fn grow(mask: &HostTensor, by: usize) -> HostTensor {
    let (b, h, w) = (mask.dim(0), mask.dim(1), mask.dim(2));
    if by == 0 {
        let rounded = mask.map(f32::round_ties_even);
        return rounded.reshape(&[b, 1, h, w]).unwrap_or_default();
    }
    let before = (by - 1).div_ceil(2);
    let after = by - 1 - before;
    let is_set = |n: usize, y: usize, x: usize| mask.data()[(n * h + y) * w + x].round_ties_even() > 0.0;
    HostTensor::from_fn(&[b, 1, h, w], |i| {
        let (n, y, x) = (i / (h * w), i / w % h, i % w);
        let rows = y.saturating_sub(before)..=(y + after).min(h - 1);
        let hit = rows
            .into_iter()
            .any(|r| (x.saturating_sub(before)..=(x + after).min(w - 1)).any(|k| is_set(n, r, k)));
        f32::from(u8::from(hit))
    })
}
