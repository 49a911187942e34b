//! Pictures: blending, blurring, sharpening, edges, morphology, colour spaces, noise.

use rayon::prelude::*;

use super::image::{bare, with_channels};
use super::plane::{self, Planes};
use super::shapes::{self, image, image_output, newer_unnamed, resize_images, tensor, unknown};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema, Value};
use crate::diffusion::noise::Generator;
use crate::graph::Input;
use crate::image::{Crop, Method, Resize};
use crate::tensor::HostTensor;

const POST_PROCESSING: &str = "comfy_extras.nodes_post_processing";
const MORPHOLOGY: &str = "comfy_extras.nodes_morphology";

/// The picture nodes that filter.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        Box::new(ImageBlend),
        Box::new(ImageBlur),
        Box::new(ImageSharpen),
        Box::new(ImageAddNoise),
        Box::new(Morphology),
        Box::new(ImageRgbToYuv),
        Box::new(ImageYuvToRgb),
    ]
}

/// `ImageBlend`.
pub struct ImageBlend;

/// One value of the lower picture `a` and the upper one `b`.
fn blend(mode: &str, a: f32, b: f32) -> Option<f32> {
    Some(match mode {
        "normal" => b,
        "multiply" => a * b,
        "screen" => 1.0 - (1.0 - a) * (1.0 - b),
        "overlay" if a <= 0.5 => 2.0 * a * b,
        "overlay" => 1.0 - 2.0 * (1.0 - a) * (1.0 - b),
        "soft_light" if b <= 0.5 => a - (1.0 - 2.0 * b) * a * (1.0 - a),
        "soft_light" => {
            let lit = if a <= 0.25 { ((16.0 * a - 12.0) * a + 4.0) * a } else { a.sqrt() };
            a + (2.0 * b - 1.0) * (lit - a)
        }
        "difference" => a - b,
        _ => return None,
    })
}

impl Node for ImageBlend {
    fn schema(&self) -> Schema {
        let modes = ["normal", "multiply", "screen", "overlay", "soft_light", "difference"];
        let schema = Schema::new("ImageBlend", "image/postprocessing")
            .module(POST_PROCESSING)
            .describe("Blends two pictures; the second is resized to the first.")
            .input(Input::link("image1", "IMAGE"))
            .input(Input::link("image2", "IMAGE"))
            .input(Input::float("blend_factor", 0.5, 0.0, 1.0).opt("step", 0.01))
            .input(Input::combo("blend_mode", &modes).opt("multiselect", false))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (first, [_, h, w, c]) = image(inputs, "image1")?;
        let (second, [_, h2, w2, _]) = image(inputs, "image2")?;
        let mut second = with_channels(&second, c)?;
        if (h, w) != (h2, w2) {
            let to = Resize { width: w, height: h, method: Method::Bicubic, crop: Crop::Center };
            second = resize_images(&second, to)?;
        }
        let (first, second) = shapes::broadcast(&first, &second, "image2")?;
        let (factor, mode) = (inputs.float("blend_factor")?, inputs.string("blend_mode")?);
        let (keep, add) = ((1.0 - factor) as f32, factor as f32);
        blend(mode, 0.0, 0.0).ok_or_else(|| unknown("blend_mode", mode))?;
        let mix = |a: f32, b: f32| (a * keep + blend(mode, a, b).unwrap_or(b) * add).clamp(0.0, 1.0);
        image_output(first.zip(&second, mix))
    }
}

/// `ImageBlur`.
pub struct ImageBlur;

impl Node for ImageBlur {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageBlur", "image/postprocessing")
            .module(POST_PROCESSING)
            .describe("Blurs pictures with a Gaussian.")
            .input(Input::link("image", "IMAGE"))
            .input(Input::int("blur_radius", 1, 1, 31).opt("step", 1))
            .input(Input::float("sigma", 1.0, 0.1, 10.0).opt("step", 0.1))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let radius = inputs.size("blur_radius")?;
        if radius == 0 {
            return Ok(NodeOutput::one(Value::shared("IMAGE", x)));
        }
        let kernel = plane::gaussian(radius, inputs.float("sigma")? as f32);
        image_output(tensor(&dims, plane::convolve(x.data(), Planes::of_images(dims), &kernel)?)?)
    }
}

/// `ImageSharpen`.
pub struct ImageSharpen;

impl Node for ImageSharpen {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageSharpen", "image/postprocessing")
            .module(POST_PROCESSING)
            .describe("Sharpens pictures by unsharp masking.")
            .input(Input::link("image", "IMAGE"))
            .input(Input::int("sharpen_radius", 1, 1, 31).opt("step", 1))
            .input(Input::float("sigma", 1.0, 0.1, 10.0).opt("step", 0.01))
            .input(Input::float("alpha", 1.0, 0.0, 5.0).opt("step", 0.01))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let radius = inputs.size("sharpen_radius")?;
        if radius == 0 {
            return Ok(NodeOutput::one(Value::shared("IMAGE", x)));
        }
        let kernel = plane::sharpener(radius, inputs.float("sigma")? as f32, inputs.float("alpha")? as f32);
        let sharp = tensor(&dims, plane::convolve(x.data(), Planes::of_images(dims), &kernel)?)?;
        image_output(sharp.map(|v| v.clamp(0.0, 1.0)))
    }
}

/// `ImageAddNoise`.
pub struct ImageAddNoise;

impl Node for ImageAddNoise {
    fn schema(&self) -> Schema {
        Schema::new("ImageAddNoise", "image")
            .module("comfy_extras.nodes_images")
            .describe("Adds Gaussian noise to pictures.")
            .input(bare("image"))
            .input(Input::int("seed", 0, 0, u64::MAX).opt("control_after_generate", true))
            .input(Input::float("strength", 0.5, 0.0, 1.0).opt("step", 0.01))
            .output("IMAGE")
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let noise = Generator::new(inputs.seed("seed")?).randn(&dims);
        let strength = inputs.float("strength")? as f32;
        image_output(x.zip(&noise, |v, n| (v + strength * n).clamp(0.0, 1.0)))
    }
}

/// `Morphology`.
pub struct Morphology;

/// The largest (or smallest) value in a square window, `before` to `after` every
/// pixel; what lies outside the picture does not count. Rows and columns are
/// independent, so this is two passes.
fn extreme(
    x: &[f32],
    planes: Planes,
    (before, after): (usize, usize),
    pick: fn(f32, f32) -> f32,
) -> Vec<f32> {
    let Planes { h, w, cell, .. } = planes;
    let window = |i: usize, length: usize| i.saturating_sub(before)..(i + after + 1).min(length);
    let mut wide = vec![0.0; x.len()];
    wide.par_chunks_exact_mut(w * cell).zip(x.par_chunks_exact(w * cell)).for_each(|(to, from)| {
        for column in 0..w {
            for channel in 0..cell {
                let values = window(column, w).map(|i| from[i * cell + channel]);
                to[column * cell + channel] = values.reduce(pick).unwrap_or(0.0);
            }
        }
    });
    let mut out = vec![0.0; x.len()];
    out.par_chunks_exact_mut(w * cell).enumerate().for_each(|(n, to)| {
        let plane = &wide[n / h * h * w * cell..][..h * w * cell];
        for (i, row) in window(n % h, h).enumerate() {
            let from = &plane[row * w * cell..][..w * cell];
            if i == 0 {
                to.copy_from_slice(from);
            } else {
                to.iter_mut().zip(from).for_each(|(t, &v)| *t = pick(*t, v));
            }
        }
    });
    out
}

impl Node for Morphology {
    fn schema(&self) -> Schema {
        let operations = ["erode", "dilate", "open", "close", "gradient", "bottom_hat", "top_hat"];
        let schema = Schema::new("Morphology", "image/postprocessing")
            .display("ImageMorphology")
            .module(MORPHOLOGY)
            .describe("Erodes or dilates pictures, and combinations of both.")
            .input(Input::link("image", "IMAGE"))
            .input(Input::combo("operation", &operations).opt("multiselect", false))
            .input(Input::int("kernel_size", 3, 3, 999).opt("step", 1))
            .output("IMAGE");
        shapes::newer(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, dims) = image(inputs, "image")?;
        let size = inputs.size("kernel_size")?.max(1);
        let planes = Planes::of_images(dims);
        // An even window's larger half lies before the pixel; dilation mirrors it (kornia 0.9).
        let (large, small) = (size / 2, size - size / 2 - 1);
        let erode = |x: &[f32]| extreme(x, planes, (large, small), f32::min);
        let dilate = |x: &[f32]| extreme(x, planes, (small, large), f32::max);
        let minus = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f32>>();
        let x = x.data();
        let name = inputs.string("operation")?;
        let out = match name {
            "erode" => erode(x),
            "dilate" => dilate(x),
            "open" => dilate(&erode(x)),
            "close" => erode(&dilate(x)),
            "gradient" => minus(&dilate(x), &erode(x)),
            "top_hat" => minus(x, &dilate(&erode(x))),
            "bottom_hat" => minus(&erode(&dilate(x)), x),
            other => return Err(unknown("operation", other)),
        };
        image_output(tensor(&dims, out)?)
    }
}

/// Scale of the blue difference (ITU-R BT.601, in kornia's rounding).
const BLUE_SCALE: f32 = 0.564;
/// Scale of the red difference.
const RED_SCALE: f32 = 0.713;

/// `ImageRGBToYUV`: in fact Y'CbCr with the differences centred at ½.
pub struct ImageRgbToYuv;

impl Node for ImageRgbToYuv {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageRGBToYUV", "image/batch")
            .module(MORPHOLOGY)
            .describe("Splits pictures into brightness and two colour differences.")
            .input(Input::link("image", "IMAGE"))
            .named_output("IMAGE", "Y")
            .named_output("IMAGE", "U")
            .named_output("IMAGE", "V");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        if c != 3 {
            return Err(NodeError::input("image", &format!("has {c} channels; three are needed")));
        }
        let luma = |p: &[f32]| 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
        let plane = |f: &dyn Fn(&[f32]) -> f32| {
            let data = x.data().chunks_exact(3).flat_map(|p| [f(p); 3]);
            HostTensor::new(&[b, h, w, 3], data.collect()).unwrap_or_default()
        };
        let values = [
            plane(&luma),
            plane(&|p| (p[2] - luma(p)) * BLUE_SCALE + 0.5),
            plane(&|p| (p[0] - luma(p)) * RED_SCALE + 0.5),
        ];
        Ok(NodeOutput::many(values.map(|v| Value::object("IMAGE", v)).into()))
    }
}

/// `ImageYUVToRGB`.
pub struct ImageYuvToRgb;

impl Node for ImageYuvToRgb {
    fn schema(&self) -> Schema {
        let schema = Schema::new("ImageYUVToRGB", "image/batch")
            .module(MORPHOLOGY)
            .describe("Puts brightness and two colour differences together to pictures.")
            .input(Input::link("Y", "IMAGE"))
            .input(Input::link("U", "IMAGE"))
            .input(Input::link("V", "IMAGE"))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, _ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (y, [b, h, w, _]) = image(inputs, "Y")?;
        let mut planes = Vec::new();
        for name in ["Y", "U", "V"] {
            let (x, [pb, ph, pw, c]) = image(inputs, name)?;
            if [pb, ph, pw] != [b, h, w] {
                let what = format!("has shape {:?}, Y {:?}: they must agree", x.shape(), y.shape());
                return Err(NodeError::input(name, &what));
            }
            planes.push(
                x.data().chunks_exact(c).map(|p| p.iter().sum::<f32>() / c as f32).collect::<Vec<f32>>(),
            );
        }
        let [luma, u, v] = &planes[..] else { return Err(unknown("Y", "")) };
        let data = luma.iter().zip(u).zip(v);
        let rgb = data.flat_map(|((y, u), v)| {
            let (blue, red) = (u - 0.5, v - 0.5);
            let (r, b) = (y + red / RED_SCALE, y + blue / BLUE_SCALE);
            [r, (y - 0.299 * r - 0.114 * b) / 0.587, b].map(|v| v.clamp(0.0, 1.0))
        });
        image_output(tensor(&[b, h, w, 3], rgb.collect())?)
    }
}
