//! ESRGAN (Wang et al. 2018): residual-in-residual dense blocks, then doublings by nearest neighbour.
//!
//! A dense block's convolutions see everything before them in the block. They
//! are cut by input channels into parts of two tensors each, whose sums pass
//! through the residual input, so nothing is copied to be concatenated.

use super::shuffle::{cropped, padded, unshuffle};
use super::{Device, dims};
use crate::models::ModelError;
use crate::models::layers::{LazyConv, Loader, Ops};
use crate::tensor::{Activation, Conv2d, HostTensor, Tensor};

/// Factor on every residual branch.
const RESIDUAL_SCALE: f32 = 0.2;
const CONVS: usize = 5;

/// Where the layers of one file are.
pub(super) struct Layout {
    first: String,
    /// Prefix of every block, e.g. `body.0.`.
    blocks: Vec<String>,
    /// Prefix of a dense block and suffix of its convolutions.
    dense: (&'static str, &'static str),
    trunk: String,
    ups: Vec<String>,
    high: String,
    last: String,
}

impl Layout {
    /// The layout of a file with these tensors, if it is of this architecture.
    pub fn of(names: &[String]) -> Option<Self> {
        let has = |name: &str| names.iter().any(|n| n == name);
        let count = |prefix: &str| {
            (0..names.len())
                .take_while(|i| names.iter().any(|n| n.starts_with(&format!("{prefix}{i}."))))
                .count()
        };
        if has("model.0.weight") {
            let blocks: Vec<usize> =
                (0..count("model.1.sub.")).filter(|i| !has(&format!("model.1.sub.{i}.weight"))).collect();
            let number =
                |n: &String| n.strip_prefix("model.")?.strip_suffix(".weight")?.parse::<usize>().ok();
            let mut convs: Vec<usize> = names.iter().filter_map(number).filter(|n| *n > 0).collect();
            convs.sort_unstable();
            let (last, high) = (convs.pop()?, convs.pop()?);
            let conv = |n: &usize| format!("model.{n}");
            return Some(Self {
                first: "model.0".into(),
                trunk: format!("model.1.sub.{}", blocks.len()),
                blocks: blocks.iter().map(|i| format!("model.1.sub.{i}.")).collect(),
                dense: ("RDB", ".0"),
                ups: convs.iter().map(conv).collect(),
                high: conv(&high),
                last: conv(&last),
            });
        }
        let tables = [
            ("body.", ("rdb", ""), ["conv_first", "conv_body", "conv_up", "conv_hr", "conv_last"]),
            ("RRDB_trunk.", ("RDB", ""), ["conv_first", "trunk_conv", "upconv", "HRconv", "conv_last"]),
        ];
        tables.into_iter().find_map(|(body, dense, [first, trunk, up, high, last])| {
            let blocks = count(body);
            let first_dense = format!("{body}0.{}1.conv1.weight", dense.0);
            has(&first_dense).then(|| Self {
                first: first.into(),
                blocks: (0..blocks).map(|i| format!("{body}{i}.")).collect(),
                dense,
                trunk: trunk.into(),
                ups: (1..9).map(|i| format!("{up}{i}")).filter(|n| has(&format!("{n}.weight"))).collect(),
                high: high.into(),
                last: last.into(),
            })
        })
    }
}

/// A convolution as parts over pairs of inputs.
struct Parts(Vec<LazyConv>);

struct Dense {
    convs: Vec<Parts>,
}

impl Dense {
    fn load(loader: &Loader, (width, growth): (usize, usize), suffix: &str) -> Result<Self, ModelError> {
        let mut convs = Vec::with_capacity(CONVS);
        for i in 0..CONVS {
            let cin = width + i * growth;
            let cout = if i + 1 == CONVS { width } else { growth };
            let name = format!("conv{}{suffix}", i + 1);
            // Inputs 0 and 1, 2 and 3, 4.
            let mut parts = Vec::new();
            let mut from = 0;
            for inputs in (0..=i).step_by(2) {
                let to = (width + (inputs + 1) * growth).min(cin);
                parts.push(loader.conv_part(&name, (cout, cin, 3), from..to)?);
                from = to;
            }
            convs.push(Parts(parts));
        }
        Ok(Self { convs })
    }

    fn forward(&self, ops: Ops<'_>, x: &Tensor) -> Result<Tensor, ModelError> {
        let mut grown: Vec<Tensor> = Vec::with_capacity(CONVS);
        for (i, Parts(parts)) in self.convs.iter().enumerate() {
            let is_last = i + 1 == CONVS;
            let mut sum: Option<Tensor> = None;
            for (p, part) in parts.iter().enumerate() {
                let input = |at: usize| if at == 0 { Some(x) } else { grown.get(at - 1) };
                let Some(first) = input(2 * p) else { continue };
                let x2 = if 2 * p < i { input(2 * p + 1) } else { None };
                // The last convolution is added to the block's input; the others end in an activation.
                let scale = if is_last { RESIDUAL_SCALE } else { 1.0 };
                let residual = sum.as_ref().or(if is_last { Some(x) } else { None });
                let is_whole = parts.len() == 1 && !is_last;
                let act = if is_whole { Activation::LeakyRelu } else { Activation::None };
                let op = Conv2d { x2, scale, residual, act, ..Conv2d::new(first, part.get()?) };
                sum = Some(ops.conv(&op)?);
            }
            let Some(sum) = sum else { continue };
            let needs_activation = parts.len() > 1 && !is_last;
            grown.push(if needs_activation { ops.activate(&sum, Activation::LeakyRelu)? } else { sum });
        }
        grown.pop().ok_or(ModelError::Input {
            what: "convolutions of a dense block",
            expected: CONVS,
            found: 0,
        })
    }
}

/// ESRGAN on a backend.
pub(super) struct Rrdb {
    backend: Device,
    first: LazyConv,
    blocks: Vec<[Dense; 3]>,
    trunk: LazyConv,
    ups: Vec<LazyConv>,
    high: LazyConv,
    last: LazyConv,
    /// Pixels that become channels on the way in, in each direction.
    shuffle: usize,
    in_channels: usize,
}

impl Rrdb {
    /// Checks the tensors of a layout; packs nothing yet.
    pub fn load(backend: Device, loader: &Loader, layout: &Layout) -> Result<Self, ModelError> {
        let first = dims(loader, &format!("{}.weight", layout.first))?;
        let last = dims(loader, &format!("{}.weight", layout.last))?;
        let extent = |shape: &[usize], i: usize| shape.get(i).copied().unwrap_or(1);
        let (width, inputs, outputs) = (extent(&first, 0), extent(&first, 1), extent(&last, 0));
        let (dense, suffix) = layout.dense;
        let growth = match layout.blocks.first() {
            Some(block) => extent(&dims(loader, &format!("{block}{dense}1.conv1{suffix}.weight"))?, 0),
            None => return Err(ModelError::Input { what: "blocks of the upscaler", expected: 1, found: 0 }),
        };
        let shuffle = [1, 2, 4].into_iter().find(|s| inputs == outputs * s * s).unwrap_or(1);
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for block in &layout.blocks {
            let load = |i: usize| {
                let name = format!("{block}{dense}{i}");
                Dense::load(&loader.sub(name), (width, growth), suffix)
            };
            blocks.push([load(1)?, load(2)?, load(3)?]);
        }
        let conv = |name: &str| loader.conv(name, width, width, 3);
        Ok(Self {
            first: loader.conv(&layout.first, width, inputs, 3)?,
            blocks,
            trunk: conv(&layout.trunk)?,
            ups: layout.ups.iter().map(|name| conv(name)).collect::<Result<_, _>>()?,
            high: conv(&layout.high)?,
            last: loader.conv(&layout.last, outputs, width, 3)?,
            shuffle,
            in_channels: inputs / (shuffle * shuffle),
            backend,
        })
    }

    /// How many times larger the result is.
    pub fn scale(&self) -> usize {
        ((1 << self.ups.len()) / self.shuffle).max(1)
    }

    /// Enlarges `[B, C, H, W]`.
    pub fn forward(&self, picture: &HostTensor) -> Result<HostTensor, ModelError> {
        if picture.dim(1) != self.in_channels {
            let (expected, found) = (self.in_channels, picture.dim(1));
            return Err(ModelError::Input { what: "channels of the picture to enlarge", expected, found });
        }
        let (h, w) = (picture.dim(2), picture.dim(3));
        let ops = Ops(self.backend.as_ref());
        let x = if self.shuffle == 1 {
            ops.upload_nchw(picture)?
        } else {
            ops.upload_nchw(&unshuffle(&padded(picture, 4), self.shuffle))?
        };
        let features = ops.conv(&Conv2d::new(&x, self.first.get()?))?;
        drop(x);
        let deep = self.body(ops, &features)?;
        let mut x =
            ops.conv(&Conv2d { residual: Some(&features), ..Conv2d::new(&deep, self.trunk.get()?) })?;
        drop((features, deep));
        let act = Activation::LeakyRelu;
        for up in &self.ups {
            x = ops.conv(&Conv2d { upsample2x: true, act, ..Conv2d::new(&x, up.get()?) })?;
        }
        x = ops.conv(&Conv2d { act, ..Conv2d::new(&x, self.high.get()?) })?;
        let out = ops.download_nchw(&ops.conv_result(&Conv2d::new(&x, self.last.get()?))?)?;
        Ok(cropped(&out, h * self.scale(), w * self.scale()))
    }

    fn body(&self, ops: Ops<'_>, features: &Tensor) -> Result<Tensor, ModelError> {
        let mut x: Option<Tensor> = None;
        for block in &self.blocks {
            let input = x.as_ref().unwrap_or(features);
            let y = block[0].forward(ops, input)?;
            let y = block[1].forward(ops, &y)?;
            let y = block[2].forward(ops, &y)?;
            x = Some(ops.axpby(RESIDUAL_SCALE, &y, 1.0, input)?);
        }
        x.ok_or(ModelError::Input { what: "blocks of the upscaler", expected: 1, found: 0 })
    }
}
