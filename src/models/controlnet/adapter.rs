//! T2I-Adapter (Mou et al. 2023): a small network that makes features of a picture
//! once, which are added to the outputs of a UNet's way down at every step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::hint::Kept;
use crate::models::ModelError;
use crate::models::layers::{LazyConv, Loader, Ops};
use crate::models::store::{Network, Opening};
use crate::models::upscale::unshuffle;
use crate::tensor::{Activation, Backend, Conv2d, HostTensor, Tensor};

/// The next adapter's id.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);
const LEVELS: usize = 4;
const BLOCKS: usize = 2;
/// Input channels of adapters for SDXL: one or three, sixteen pixels square.
const XL_CHANNELS: [usize; 2] = [256, 768];

struct Block {
    down: Option<Down>,
    first: Option<LazyConv>,
    conv1: LazyConv,
    conv2: LazyConv,
}

enum Down {
    Conv(LazyConv),
    /// The mean of 2×2 places.
    Mean,
}

/// What an adapter makes of a picture.
pub struct Features {
    /// Added to the outputs of the blocks of the way down.
    pub input: Vec<Option<Tensor>>,
    /// Added to the middle's output.
    pub middle: Option<Tensor>,
}

/// A T2I-Adapter on a backend.
pub struct Adapter {
    backend: Arc<dyn Backend>,
    first: LazyConv,
    blocks: Vec<Block>,
    in_channels: usize,
    is_xl: bool,
    kept: Kept<Features>,
    id: u64,
}

impl Network for Adapter {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let backend = opening.placement.diffusion.clone();
        let prefix = if opening.file.contains("adapter.conv_in.weight") { "adapter." } else { "" };
        let loader = Loader::new(opening.source.clone(), backend.clone(), prefix);
        if !loader.has("conv_in.weight") || !(loader.has(&name(&loader, 0, 0, "block1.weight"))) {
            return Err(opening.is_not("a ControlNet or a T2I-Adapter of a kind that kiln knows"));
        }
        Self::load(backend, &loader)
    }
}

/// A block's tensor, by level and place in it: blocks are numbered in a row, or by level in files of the diffusers
/// library.
fn name(loader: &Loader, level: usize, block: usize, part: &str) -> String {
    let nested = format!("body.{level}.resnets.{block}.{part}");
    if loader.has(&nested) { nested } else { format!("body.{}.{part}", level * BLOCKS + block) }
}

impl Adapter {
    fn load(backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let shape = loader.shape("conv_in.weight").unwrap_or_default();
        let &[width, cin, ..] = shape.as_slice() else {
            return Err(ModelError::Missing { name: "conv_in.weight".into() });
        };
        let is_xl = XL_CHANNELS.contains(&cin);
        let mut blocks = Vec::new();
        let mut channels = width;
        for level in 0..LEVELS {
            let wide = width * [1, 2, 4, 4][level];
            for block in 0..BLOCKS {
                let kernel = |part: &str| {
                    let shape = loader.shape(&name(loader, level, block, &format!("{part}.weight")));
                    shape.and_then(|s| s.get(2).copied()).unwrap_or(1)
                };
                let stem = |part: &str| {
                    let name = name(loader, level, block, &format!("{part}.weight"));
                    name.trim_end_matches(".weight").to_owned()
                };
                let conv = |part: &str, from| loader.conv(&stem(part), wide, from, kernel(part));
                let halves = block == 0 && if is_xl { level == 2 } else { level > 0 };
                let down = match halves {
                    false => None,
                    true if loader.has(&format!("{}.weight", stem("down_opt.op"))) => {
                        Some(Down::Conv(loader.conv(&stem("down_opt.op"), channels, channels, 3)?))
                    }
                    true => Some(Down::Mean),
                };
                let first = (channels != wide).then(|| conv("in_conv", channels)).transpose()?;
                blocks.push(Block {
                    down,
                    first,
                    conv1: conv("block1", wide)?,
                    conv2: conv("block2", wide)?,
                });
                channels = wide;
            }
        }
        let (kept, id) = (Kept::default(), NEXT_ID.fetch_add(1, Ordering::Relaxed));
        Ok(Self {
            first: loader.conv("conv_in", width, cin, 3)?,
            blocks,
            in_channels: cin,
            is_xl,
            kept,
            backend,
            id,
        })
    }

    /// Names this adapter; no other loaded adapter has it.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Pixels that become channels, in each direction; the picture's sides are multiples of it.
    pub fn unit(&self) -> usize {
        if self.is_xl { 16 } else { 8 }
    }

    /// Channels of the picture.
    pub fn channels(&self) -> usize {
        self.in_channels / (self.unit() * self.unit())
    }

    /// Features of a picture `[B, C, H, W]`, kept for further steps under `key`.
    pub fn features(
        &self,
        key: (&Arc<HostTensor>, &[usize]),
        picture: impl FnOnce() -> Result<HostTensor, ModelError>,
    ) -> Result<Arc<Features>, ModelError> {
        self.kept.get(key, &[], || self.forward(&picture()?))
    }

    fn forward(&self, picture: &HostTensor) -> Result<Features, ModelError> {
        let (expected, found) = (self.channels(), picture.dim(1));
        if expected != found {
            return Err(ModelError::Input { what: "channels of a T2I-Adapter's picture", expected, found });
        }
        let ops = Ops(self.backend.as_ref());
        let x = ops.upload_nchw(&unshuffle(picture, self.unit()))?;
        let mut x = ops.conv(&Conv2d::new(&x, self.first.get()?))?;
        let (mut input, mut middle) = (Vec::new(), None);
        for (level, blocks) in self.blocks.chunks(BLOCKS).enumerate() {
            for block in blocks {
                x = block.forward(ops, x)?;
            }
            let copy = ops.axpby(1.0, &x, 0.0, &x)?;
            // Blocks of the way down before the one that the features belong to.
            let before = if self.is_xl { [3, 1, 2, 1][level] } else { 2 };
            input.extend((0..before).map(|_| None));
            match self.is_xl && level + 1 == LEVELS {
                true => middle = Some(copy),
                false => input.push(Some(copy)),
            }
        }
        Ok(Features { input, middle })
    }
}

impl Block {
    fn forward(&self, ops: Ops<'_>, mut x: Tensor) -> Result<Tensor, ModelError> {
        match &self.down {
            Some(Down::Conv(conv)) => x = ops.conv(&Conv2d { stride: 2, ..Conv2d::new(&x, conv.get()?) })?,
            Some(Down::Mean) => x = halved(ops, &x)?,
            None => {}
        }
        if let Some(conv) = &self.first {
            x = ops.conv(&Conv2d::new(&x, conv.get()?))?;
        }
        let act = Activation::Relu;
        let h = ops.conv(&Conv2d { act, ..Conv2d::new(&x, self.conv1.get()?) })?;
        ops.conv(&Conv2d { residual: Some(&x), ..Conv2d::new(&h, self.conv2.get()?) })
    }
}

/// The mean of 2×2 places, on the host: it happens three times a run.
fn halved(ops: Ops<'_>, x: &Tensor) -> Result<Tensor, ModelError> {
    let x = ops.download_nchw(x)?;
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    // An odd side keeps its last row or column, as a mean of what is there.
    let (oh, ow) = (h.div_ceil(2), w.div_ceil(2));
    let mean = |i: usize| {
        let (plane, y, k) = (i / (oh * ow), i / ow % oh * 2, i % ow * 2);
        let (rows, columns) = (y..(y + 2).min(h), k..(k + 2).min(w));
        let count = (rows.len() * columns.len()) as f32;
        let at = |r: usize| columns.clone().map(move |q| (r, q));
        rows.flat_map(at).map(|(r, q)| x.data()[(plane * h + r) * w + q]).sum::<f32>() / count
    };
    ops.upload_nchw(&HostTensor::from_fn(&[b, c, oh, ow], mean))
}
