//! ImageQuantize: pictures in few colours, with or without dithering.

use super::pure::PureNode;
use super::shapes::{image, newer_unnamed, tensor, unknown};
use super::string::choice;
use super::{Inputs, Node, NodeError, Schema, Value};
use crate::graph::Input;
use crate::image::quantize::{Rgb, map_floyd_steinberg, map_nearest, palette};

const DITHERS: [&str; 6] = ["none", "floyd-steinberg", "bayer-2", "bayer-4", "bayer-8", "bayer-16"];

/// The node.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![PureNode::boxed(schema, quantize)]
}

fn schema() -> Schema {
    let schema = Schema::new("ImageQuantize", "image/postprocessing")
        .module("comfy_extras.nodes_post_processing")
        .describe("Reduces the number of colours, with a choice of dithering.")
        .input(Input::link("image", "IMAGE"))
        .input(Input::int("colors", 256, 1, 256).opt("step", 1))
        .input(choice("dither", &DITHERS))
        .output("IMAGE");
    newer_unnamed(schema, false)
}

fn quantize(inputs: &Inputs) -> Result<Vec<Value>, NodeError> {
    let (x, [b, h, w, c]) = image(inputs, "image")?;
    if c < 3 {
        return Err(NodeError::input("image", &format!("has {c} channels; 3 are needed")));
    }
    let (colors, dither) = (inputs.size("colors")?, inputs.string("dither")?);
    let mut out = Vec::with_capacity(b * h * w * 3);
    for sample in 0..b {
        let byte = |v: &f32| (v * 255.0) as u8;
        let pixels: Vec<Rgb> =
            x.row(sample).chunks_exact(c).map(|p| [byte(&p[0]), byte(&p[1]), byte(&p[2])]).collect();
        let palette = palette(&pixels, colors);
        let mapped = match dither {
            "none" => map_nearest(&pixels, &palette),
            "floyd-steinberg" => map_floyd_steinberg(&pixels, w, &palette),
            "bayer-2" => ordered(&pixels, w, 1, &palette),
            "bayer-4" => ordered(&pixels, w, 2, &palette),
            "bayer-8" => ordered(&pixels, w, 3, &palette),
            "bayer-16" => ordered(&pixels, w, 4, &palette),
            other => return Err(unknown("dither", other)),
        };
        out.extend(mapped.iter().flatten().map(|v| f32::from(*v) / 255.0));
    }
    Ok(vec![Value::object("IMAGE", tensor(&[b, h, w, 3], out)?)])
}

/// Adds a Bayer matrix of side 2^`order`, as strong as the colours are few, before mapping.
fn ordered(pixels: &[Rgb], width: usize, order: u32, palette: &[Rgb]) -> Vec<Rgb> {
    let matrix = bayer(order);
    let (side, spread) = (1usize << order, 512.0 / palette.len().max(1) as f64);
    let offset = |i: usize| {
        let (y, x) = (i / width.max(1) % side, i % width.max(1) % side);
        spread as f32 * matrix[y * side + x] + 0.5
    };
    let shifted: Vec<Rgb> = pixels
        .iter()
        .enumerate()
        .map(|(i, p)| p.map(|v| (f32::from(v) + offset(i)).clamp(0.0, 255.0) as u8))
        .collect();
    map_nearest(&shifted, palette)
}

/// The normalised Bayer matrix of side 2^`order`, values around 0.
fn bayer(order: u32) -> Vec<f32> {
    let mut matrix = vec![0f32];
    for n in 1..=order {
        let (half, q) = (1usize << (n - 1), 4f32.powi(n as i32));
        let side = 2 * half;
        let value = |i: usize| {
            let (y, x) = (i / side, i % side);
            let shift = [[-1.5, 0.5], [1.5, -0.5]][y / half][x / half];
            (q * matrix[y % half * half + x % half] + shift) / q
        };
        matrix = (0..side * side).map(value).collect();
    }
    matrix
}

#[cfg(test)]
mod tests {
    /// Every value of a Bayer matrix occurs once, evenly spaced around 0.
    #[test]
    fn bayer_matrices_are_even() {
        assert_eq!(super::bayer(1), [-0.375, 0.125, 0.375, -0.125]);
        let mut values = super::bayer(3);
        values.sort_by(f32::total_cmp);
        for pair in values.windows(2) {
            assert!((pair[1] - pair[0] - 1.0 / 64.0).abs() < 1e-6, "{pair:?}");
        }
    }
}
