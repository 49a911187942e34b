//! ControlNet (Zhang et al. 2023): a copy of a UNet's way down that is told a
//! picture and adds to what the UNet hands over to its way up. And the
//! T2I-Adapter (Mou et al. 2023), a small network that adds to the way down.
//!
//! Their outputs stay on the device and go straight into the UNet's forward
//! pass, in one recorded piece of work. Several add up: each adds to the sum of
//! those before it.

mod adapter;
mod hint;
mod lora;
mod net;
mod union;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::ModelError;
use super::layers::Ops;
use super::unet::{ContextKv, LayerInputs};
use crate::tensor::{HostTensor, Tensor};
pub use adapter::{Adapter, Features};
pub use lora::MARK as CONTROL_LORA_MARK;
pub use net::ControlNet;
pub use union::KINDS;

/// A net or an adapter at work in a forward pass.
pub enum ControlInput {
    /// A ControlNet.
    Net(NetInput),
    /// A T2I-Adapter.
    Adapter(AdapterInput),
}

/// A ControlNet at work.
pub struct NetInput {
    /// The net.
    pub net: Arc<ControlNet>,
    /// What it makes of its picture.
    pub hint: Arc<Tensor>,
    /// Keys and values of its own cross-attentions.
    pub context: Arc<ContextKv>,
    /// Added to the time embedding, by union nets.
    pub kind: Option<Arc<Tensor>>,
    /// Factor on its outputs.
    pub strength: f32,
    /// Every output is averaged over all places.
    pub is_averaged: bool,
}

/// A T2I-Adapter at work.
pub struct AdapterInput {
    /// The adapter.
    pub adapter: Arc<Adapter>,
    /// What it makes of its picture.
    pub features: Arc<Features>,
    /// Factor on them.
    pub strength: f32,
}

impl ControlInput {
    /// Everything that changes from call to call, in the order in which [`run_all`] takes it.
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        match self {
            ControlInput::Net(net) => {
                let (hint, kind) = (net.hint.as_ref(), net.kind.as_deref());
                [hint].into_iter().chain(kind).chain(&net.context.kv).collect()
            }
            ControlInput::Adapter(input) => {
                input.features.input.iter().flatten().chain(&input.features.middle).collect()
            }
        }
    }
}

/// What nets add to a UNet.
#[derive(Default)]
pub(super) struct Additions {
    /// To the outputs of the way down as the way up takes them, first block first.
    pub skips: Vec<Tensor>,
    /// To the output of the middle.
    pub middle: Option<Tensor>,
    /// To the outputs of the way down as they go on down.
    pub input: Vec<Option<Tensor>>,
}

impl Additions {
    /// What is added to the output of block `i` of the way down.
    pub fn input(&mut self, i: usize) -> Option<Tensor> {
        self.input.get_mut(i).and_then(Option::take)
    }
}

/// Names the recorded work of a UNet with these nets.
pub(super) fn key(unet: u64, controls: &[ControlInput]) -> u64 {
    if controls.is_empty() {
        return unet;
    }
    let mut hasher = DefaultHasher::new();
    unet.hash(&mut hasher);
    for control in controls {
        match control {
            ControlInput::Net(net) => {
                (0, net.net.id(), net.strength.to_bits(), net.is_averaged).hash(&mut hasher);
            }
            ControlInput::Adapter(input) => {
                (1, input.adapter.id(), input.strength.to_bits()).hash(&mut hasher);
            }
        }
    }
    hasher.finish()
}

/// How many channels nets see, where the UNet sees others beside the latents and nets don't.
pub(super) fn fewer_channels(of_unet: usize, controls: &[ControlInput]) -> Option<usize> {
    let seen = controls.iter().filter_map(|control| match control {
        ControlInput::Net(net) => Some(net.net.config().in_channels),
        ControlInput::Adapter(_) => None,
    });
    seen.min().filter(|channels| *channels < of_unet)
}

/// The latents alone, uploaded once more where nets see [fewer channels](fewer_channels).
pub(super) fn latents(
    ops: Ops<'_>,
    x: &HostTensor,
    controls: &[ControlInput],
) -> Result<Option<Tensor>, ModelError> {
    let Some(channels) = fewer_channels(x.dim(1), controls) else { return Ok(None) };
    let plane = x.dim(2) * x.dim(3);
    let rows = (0..x.dim(0)).flat_map(|i| x.row(i)[..channels * plane].iter().copied());
    let latents = HostTensor::new(&[x.dim(0), channels, x.dim(2), x.dim(3)], rows.collect());
    Ok(Some(ops.upload_nchw(&latents.unwrap_or_default())?))
}

/// The nets' outputs, added up. `tensors` are the [`latents`], if there are any, and those of all controls in a row.
pub(super) fn run_all(
    ops: Ops<'_>,
    unet: &LayerInputs<'_>,
    controls: &[ControlInput],
    tensors: &[&Tensor],
) -> Result<Additions, ModelError> {
    let count: usize = controls.iter().map(|c| c.tensors().len()).sum();
    let (latents, mut tensors) = tensors.split_at(tensors.len().saturating_sub(count));
    let x = latents.first().copied().unwrap_or(unet.x);
    let mut sum = Additions::default();
    for control in controls {
        let (own, rest) = tensors.split_at(control.tensors().len().min(tensors.len()));
        tensors = rest;
        sum = match control {
            ControlInput::Net(input) => {
                let [hint, own @ ..] = own else { continue };
                let (kind, context) = own.split_at(usize::from(input.kind.is_some()));
                let pass = net::Pass {
                    ops,
                    unet: LayerInputs { x, embedded: unet.embedded, vector: unet.vector, context },
                    hint,
                    kind: kind.first().copied(),
                    strength: input.strength,
                    is_averaged: input.is_averaged,
                };
                input.net.forward(&pass, sum)?
            }
            ControlInput::Adapter(input) => input.added(ops, own, sum)?,
        };
    }
    Ok(sum)
}

impl AdapterInput {
    /// The features in `tensors` times the strength, added to what nets before give.
    fn added(&self, ops: Ops<'_>, tensors: &[&Tensor], before: Additions) -> Result<Additions, ModelError> {
        let mut tensors = tensors.iter();
        let mut scaled = |before: Option<Tensor>| match tensors.next() {
            Some(x) => match before {
                Some(before) if before.shape() == x.shape() => {
                    ops.axpby(self.strength, x, 1.0, &before).map(Some)
                }
                _ => ops.axpby(self.strength, x, 0.0, x).map(Some),
            },
            None => Ok(before),
        };
        let mut earlier = before.input.into_iter();
        let mut input = Vec::with_capacity(self.features.input.len());
        for feature in &self.features.input {
            let before = earlier.next().flatten();
            input.push(if feature.is_some() { scaled(before)? } else { before });
        }
        input.extend(earlier);
        let middle = match self.features.middle {
            Some(_) => scaled(before.middle)?,
            None => before.middle,
        };
        Ok(Additions { skips: before.skips, middle, input })
    }
}

/// `x + addition`, if there is one. A net for another size of picture adds nothing.
pub(super) fn add(ops: Ops<'_>, x: Tensor, addition: Option<Tensor>) -> Result<Tensor, ModelError> {
    match addition {
        Some(addition) if addition.shape() == x.shape() => ops.axpby(1.0, &x, 1.0, &addition),
        Some(addition) => Err(ModelError::Input {
            what: "channels of a ControlNet's output (it may be of another family)",
            expected: x.shape().c,
            found: addition.shape().c,
        }),
        None => Ok(x),
    }
}
