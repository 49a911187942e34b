//! Canny edges, with the constants of the kornia library that ComfyUI uses.
//!
//! J. Canny, "A computational approach to edge detection", 1986: blur (Gaussian
//! 5 × 5, σ = 1, mirrored border), Sobel gradients (repeated border), thinning
//! across the edge (border counts as 0), two thresholds, hysteresis.

use super::plane::{self, Planes};
use super::shapes::{image, image_output, newer_unnamed, tensor};
use super::{Inputs, Node, NodeCtx, NodeError, NodeOutput, Schema};
use crate::graph::Input;

/// Keeps the square root away from 0.
const EPSILON: f32 = 1e-6;

/// The edge nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![Box::new(Canny)]
}

/// `Canny`.
pub struct Canny;

/// The 5 × 5 Gaussian of σ = 1 pixel.
fn blur_kernel() -> Vec<f32> {
    let row: Vec<f32> = (-2..=2).map(|i: i32| (-(i * i) as f32 / 2.0).exp()).collect();
    let sum: f32 = row.iter().sum();
    let row: Vec<f32> = row.iter().map(|v| v / sum).collect();
    row.iter().flat_map(|a| row.iter().map(move |b| a * b)).collect()
}

/// One plane of values.
struct Plane {
    h: usize,
    w: usize,
    data: Vec<f32>,
}

impl Plane {
    /// The value at an offset; outside, the nearest one inside.
    fn nearest(&self, y: usize, x: usize, dy: isize, dx: isize) -> f32 {
        let clamp = |i: usize, d: isize, n: usize| (i as isize + d).clamp(0, n as isize - 1) as usize;
        self.data[clamp(y, dy, self.h) * self.w + clamp(x, dx, self.w)]
    }

    /// The value at an offset; outside, 0.
    fn or_zero(&self, y: usize, x: usize, (dy, dx): (isize, isize)) -> f32 {
        match (y.checked_add_signed(dy), x.checked_add_signed(dx)) {
            (Some(y), Some(x)) if y < self.h && x < self.w => self.data[y * self.w + x],
            _ => 0.0,
        }
    }

    fn map(&self, f: impl Fn(usize, usize) -> f32) -> Plane {
        let data = (0..self.h * self.w).map(|i| f(i / self.w, i % self.w)).collect();
        Plane { h: self.h, w: self.w, data }
    }

    /// Sobel gradient along x and along y.
    fn gradient(&self, y: usize, x: usize) -> (f32, f32) {
        let at = |dy, dx| self.nearest(y, x, dy, dx);
        let across = |dy| at(dy, 1) - at(dy, -1);
        let down = |dx| at(1, dx) - at(-1, dx);
        (across(-1) + 2.0 * across(0) + across(1), down(-1) + 2.0 * down(0) + down(1))
    }
}

/// The neighbours at 0°, 45°, … as (dy, dx); y points down.
const NEIGHBOURS: [(isize, isize); 8] =
    [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)];

/// 1 on edges, 0 elsewhere.
fn edges(grey: &Plane, low: f32, high: f32) -> Plane {
    let gradients: Vec<(f32, f32)> =
        (0..grey.data.len()).map(|i| grey.gradient(i / grey.w, i % grey.w)).collect();
    let magnitude = grey.map(|y, x| {
        let (gx, gy) = gradients[y * grey.w + x];
        (gx * gx + gy * gy + EPSILON).sqrt()
    });
    let thin = magnitude.map(|y, x| {
        let (gx, gy) = gradients[y * grey.w + x];
        let degrees = 180.0 * gy.atan2(gx) / std::f32::consts::PI;
        let direction = ((degrees / 45.0).round_ties_even() as i32).rem_euclid(8) as usize;
        let here = magnitude.data[y * grey.w + x];
        let ahead = here - magnitude.or_zero(y, x, NEIGHBOURS[direction]);
        let behind = here - magnitude.or_zero(y, x, NEIGHBOURS[(direction + 4) % 8]);
        if ahead.min(behind) > 0.0 { here } else { 0.0 }
    });
    hysteresis(&thin, low, high)
}

/// Strong places, and the weak ones connected to them.
fn hysteresis(magnitude: &Plane, low: f32, high: f32) -> Plane {
    let (h, w) = (magnitude.h, magnitude.w);
    let mut out = magnitude.map(|y, x| f32::from(u8::from(magnitude.data[y * w + x] > high)));
    let mut waiting: Vec<usize> = (0..h * w).filter(|&i| out.data[i] > 0.0).collect();
    while let Some(i) = waiting.pop() {
        for (dy, dx) in NEIGHBOURS {
            let (Some(y), Some(x)) = ((i / w).checked_add_signed(dy), (i % w).checked_add_signed(dx)) else {
                continue;
            };
            if y < h && x < w && out.data[y * w + x] == 0.0 && magnitude.data[y * w + x] > low {
                out.data[y * w + x] = 1.0;
                waiting.push(y * w + x);
            }
        }
    }
    out
}

impl Node for Canny {
    fn schema(&self) -> Schema {
        let schema = Schema::new("Canny", "image/preprocessors")
            .module("comfy_extras.nodes_canny")
            .describe("White edges on black, from two thresholds.")
            .input(Input::link("image", "IMAGE"))
            .input(Input::float("low_threshold", 0.4, 0.01, 0.99).opt("step", 0.01))
            .input(Input::float("high_threshold", 0.8, 0.01, 0.99).opt("step", 0.01))
            .output("IMAGE");
        newer_unnamed(schema, false)
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let (x, [b, h, w, c]) = image(inputs, "image")?;
        let (low, high) = (inputs.float("low_threshold")? as f32, inputs.float("high_threshold")? as f32);
        if low > high {
            let what = format!("is {low}, more than high_threshold {high}");
            return Err(NodeError::input("low_threshold", &what));
        }
        let grey: Vec<f32> = match c {
            3.. => x.data().chunks_exact(c).map(|p| 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]).collect(),
            _ => x.data().iter().step_by(c).copied().collect(),
        };
        let planes = Planes { count: b, h, w, cell: 1 };
        let blurred = plane::convolve(&grey, planes, &blur_kernel())?;
        let mut out = Vec::with_capacity(b * h * w * 3);
        for data in blurred.chunks_exact(h * w) {
            ctx.check_interrupt()?;
            let found = edges(&Plane { h, w, data: data.to_vec() }, low, high);
            out.extend(found.data.iter().flat_map(|&v| [v; 3]));
        }
        image_output(tensor(&[b, h, w, 3], out)?)
    }
}
