//! What ControlNet nodes attach to a conditioning, and how a model call takes it.

use std::sync::Arc;

use crate::diffusion::model::tokens_batch;
use crate::diffusion::schedule::ModelSampling;
use crate::diffusion::{CondEntry, DenoiseItem};
use crate::image::resample::{self, Crop, Method, Resize};
use crate::models::controlnet::{
    Adapter, AdapterInput, CONTROL_LORA_MARK, ControlInput, ControlNet, NetInput,
};
use crate::models::patch::Patches;
use crate::models::{ModelError, ModelFile};
use crate::tensor::HostTensor;

/// Name of the attachment that holds the nets.
const CONTROL: &str = crate::diffusion::guidance::CONTROL;
/// Name of the attachment that says that the other sides get the nets too.
pub(super) const SHARES_CONTROL: &str = crate::diffusion::guidance::SHARES_CONTROL;
/// The text embedding that nets are given in place of the conditioning's own, as an extra of it.
pub(super) const CONTROL_TEXT: &str = "cross_attention_controlnet";
/// Pixels of a net's picture to a latent cell, in each direction.
const CELL: usize = 8;

/// The model that nets steer: its file, and the patches that it is under.
pub(super) type Steered<'a> = (&'a ModelFile, &'a Patches);

/// What travels on a `CONTROL_NET` link.
#[derive(Clone)]
pub struct ControlHandle {
    /// The file that holds the net.
    pub file: Arc<ModelFile>,
    /// Patches of its weights: the model that it is a difference to.
    pub patches: Patches,
    /// Kinds of picture for a union net; empty if it shall guess.
    pub kinds: Vec<usize>,
    /// Whether outputs are averaged over all places.
    pub is_averaged: bool,
}

impl ControlHandle {
    /// Whether the net is a change of the model that is sampled.
    pub fn is_control_lora(&self) -> Result<bool, ModelError> {
        self.file.has_tensor(CONTROL_LORA_MARK)
    }

    /// Checks the file, as far as it can be without a model.
    pub fn check(&self) -> Result<(), ModelError> {
        if !self.is_control_lora()? {
            self.own_net()?;
        }
        Ok(())
    }

    /// The net for a model, loaded.
    pub fn net(&self, model: Steered<'_>) -> Result<Net, ModelError> {
        match self.is_control_lora()? {
            true => Ok(Net::Control(self.file.network_over(model, ControlNet::from_lora)?)),
            false => self.own_net(),
        }
    }

    fn own_net(&self) -> Result<Net, ModelError> {
        if ["zero_convs.0.0.weight", "control_model.zero_convs.0.0.weight"]
            .into_iter()
            .any(|name| self.file.has_tensor(name).unwrap_or(false))
        {
            return Ok(Net::Control(self.file.network_under(&self.patches)?));
        }
        Ok(Net::Adapter(self.file.network()?))
    }
}

/// A network that steers a UNet by a picture.
pub enum Net {
    /// A ControlNet.
    Control(Arc<ControlNet>),
    /// A T2I-Adapter.
    Adapter(Arc<Adapter>),
}

/// A net with its picture, and those attached before it.
pub struct Control {
    /// The net.
    pub net: ControlHandle,
    /// Its picture `[B, C, H, W]`.
    pub hint: Arc<HostTensor>,
    /// Factor on its outputs.
    pub strength: f32,
    /// Shares of the sampling between which it acts.
    pub range: (f64, f64),
    /// Nets attached earlier.
    pub previous: Option<Arc<Control>>,
}

/// The nets attached to a conditioning.
pub(super) fn attached(entry: &CondEntry) -> Option<Arc<Control>> {
    entry.attachments.get::<Control>(CONTROL)
}

/// The text embedding that nets are given.
fn text(entry: &CondEntry) -> Arc<HostTensor> {
    entry.extra.get(CONTROL_TEXT).unwrap_or_else(|| entry.cond.clone())
}

/// Whether the nets of two conditionings can run in one call as far as their texts go: both have one of their own
/// or none has, and the lengths fit.
pub(super) fn texts_batch(a: &CondEntry, b: &CondEntry) -> bool {
    let (x, y) = (text(a), text(b));
    a.extra.contains(CONTROL_TEXT) == b.extra.contains(CONTROL_TEXT)
        && tokens_batch(x.dim(1), y.dim(1))
        && x.dim(2) == y.dim(2)
}

/// Whether two conditionings have the very same nets, so that they can run in one call.
pub(super) fn is_same(a: &CondEntry, b: &CondEntry) -> bool {
    match (attached(a), attached(b)) {
        (Some(a), Some(b)) => Arc::ptr_eq(&a, &b),
        (None, None) => true,
        _ => false,
    }
}

impl Control {
    /// Attaches these nets to a conditioning.
    pub(super) fn attach(self, entry: &mut CondEntry) {
        Self::attach_shared(Arc::new(self), entry);
    }

    /// Attaches nets that other conditionings share.
    pub(super) fn attach_shared(control: Arc<Self>, entry: &mut CondEntry) {
        entry.attachments.insert_shared(CONTROL, control);
    }

    /// This net and those before it, first attached first.
    fn chain(&self) -> Vec<&Control> {
        let mut chain = self.previous.as_ref().map(|p| p.chain()).unwrap_or_default();
        chain.push(self);
        chain
    }

    fn is_active(&self, sigma: f32, sampling: &ModelSampling) -> bool {
        let sigma = f64::from(sigma);
        let (start, end) = self.range;
        sigma <= sampling.percent_to_sigma(start) && sigma >= sampling.percent_to_sigma(end)
    }

    fn input(
        &self,
        items: &[DenoiseItem<'_>],
        model: Steered<'_>,
    ) -> Result<Option<ControlInput>, ModelError> {
        let Some(first) = items.first() else { return Ok(None) };
        let (each, h, w) = (first.x.dim(0), first.x.dim(2) * CELL, first.x.dim(3) * CELL);
        let shape = [each * items.len(), h, w, items.len()];
        let strength = self.strength;
        let net = match self.net.net(model)? {
            Net::Control(net) => net,
            Net::Adapter(adapter) => {
                let unit = adapter.unit();
                let features = adapter.features((&self.hint, &shape), || {
                    let picture = self.resized(h.next_multiple_of(unit), w.next_multiple_of(unit))?;
                    let is_grey = adapter.channels() == 1 && picture.dim(1) > 1;
                    Ok(spread(&if is_grey { grey(&picture) } else { picture }, each, items.len()))
                })?;
                return Ok(Some(ControlInput::Adapter(AdapterInput { adapter, features, strength })));
            }
        };
        let (hint, kind) = net.hint((&self.hint, &shape), &self.net.kinds, || {
            Ok(spread(&self.resized(h, w)?, each, items.len()))
        })?;
        let conds: Vec<_> = items.iter().map(|item| text(item.cond)).collect();
        let context = net.context(&conds)?;
        let is_averaged = self.net.is_averaged;
        Ok(Some(ControlInput::Net(NetInput { net, hint, context, kind, strength, is_averaged })))
    }

    /// The picture at `h`×`w`, cut to that aspect ratio.
    fn resized(&self, h: usize, w: usize) -> Result<HostTensor, ModelError> {
        let to = Resize { width: w, height: h, method: Method::NearestExact, crop: Crop::Center };
        resample::upscale(&self.hint, to).map_err(|e| ModelError::File(e.to_string()))
    }
}

/// The mean over channels `[B, 1, H, W]`.
fn grey(x: &HostTensor) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    HostTensor::from_fn(&[b, 1, h, w], |i| {
        let (n, at) = (i / (h * w), i % (h * w));
        (0..c).map(|ch| x.data()[(n * c + ch) * h * w + at]).sum::<f32>() / c as f32
    })
}

/// A batch of pictures for `each` samples of `sides` conditionings: cut or repeated to fit.
fn spread(pictures: &HostTensor, each: usize, sides: usize) -> HostTensor {
    let given = pictures.dim(0).max(1);
    let mut shape = pictures.shape().to_vec();
    if let Some(first) = shape.first_mut() {
        *first = each * sides;
    }
    let rows = (0..each * sides).flat_map(|i| pictures.row(i % each % given).iter().copied());
    HostTensor::new(&shape, rows.collect()).unwrap_or_default()
}

/// The nets that act in a model call whose items share them.
pub(super) fn inputs(
    items: &[DenoiseItem<'_>],
    sigma: f32,
    sampling: &ModelSampling,
    model: Steered<'_>,
) -> Result<Vec<ControlInput>, ModelError> {
    let Some(control) = items.first().and_then(|item| attached(item.cond)) else { return Ok(Vec::new()) };
    let active = control.chain().into_iter().filter(|c| c.is_active(sigma, sampling));
    let inputs: Result<Vec<Option<ControlInput>>, ModelError> =
        active.map(|c| c.input(items, model)).collect();
    Ok(inputs?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::spread;
    use crate::tensor::HostTensor;

    #[test]
    fn pictures_are_cut_and_repeated() {
        let x = HostTensor::from_fn(&[3, 1, 1, 1], |i| i as f32);
        assert_eq!(spread(&x, 2, 2).data(), [0.0, 1.0, 0.0, 1.0]);
        assert_eq!(spread(&x, 4, 1).data(), [0.0, 1.0, 2.0, 0.0]);
        assert_eq!(spread(&x.rows(1, 1), 2, 1).data(), [1.0, 1.0]);
    }
}
