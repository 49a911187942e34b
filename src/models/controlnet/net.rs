//! The network of a ControlNet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Additions;
use super::hint::{HintEncoder, Kept};
use super::union::Union;
use crate::models::ModelError;
use crate::models::detect::{self, UnetConfig};
use crate::models::layers::{LazyLinear, Loader, Ops};
use crate::models::store::{Network, Opening};
use crate::models::unet::{Builder, ContextCache, ContextKv, LayerInputs, Scope, Stage, run_stage};
use crate::tensor::{Activation, Attention, Backend, Cols, HostTensor, Linear, Tensor};
use crate::weights::WeightsFile;

/// The next net's id.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A ControlNet on a backend.
pub struct ControlNet {
    config: UnetConfig,
    backend: Arc<dyn Backend>,
    time1: LazyLinear,
    time2: LazyLinear,
    /// The two layers that the vector goes through, in families that have one.
    label: Option<[LazyLinear; 2]>,
    time_biases: LazyLinear,
    input: Vec<Stage>,
    middle: [Stage; 2],
    hint: HintEncoder,
    hints: Kept<Tensor>,
    union: Option<Union>,
    /// 1×1 convolutions behind every block on the way down.
    zero: Vec<LazyLinear>,
    middle_out: LazyLinear,
    contexts: ContextCache,
    id: u64,
}

/// One forward pass of a net.
pub(super) struct Pass<'a> {
    pub ops: Ops<'a>,
    /// What the UNet reads, with this net's own keys and values.
    pub unet: LayerInputs<'a>,
    pub hint: &'a Tensor,
    pub kind: Option<&'a Tensor>,
    pub strength: f32,
    pub is_averaged: bool,
}

impl Network for ControlNet {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let config = detect::detect_control_net(opening.file)?;
        let backend = opening.placement.diffusion.clone();
        let loader = Loader::new(opening.source.clone(), backend.clone(), &config.prefix);
        Self::load(config, backend, &loader)
    }

    fn prefix(file: &WeightsFile) -> &'static str {
        detect::control_prefix(file)
    }
}

impl ControlNet {
    pub(super) fn load(
        config: UnetConfig,
        backend: Arc<dyn Backend>,
        loader: &Loader,
    ) -> Result<Self, ModelError> {
        let mut builder = Builder::new(&config, loader);
        let (input, skips) = builder.input()?;
        let bottom = skips.last().copied().unwrap_or(config.model_channels);
        let middle = builder.middle(bottom)?;
        let (width, emb) = (config.model_channels, config.time_embed_dim);
        let label = |adm: usize| -> Result<[LazyLinear; 2], ModelError> {
            Ok([loader.linear("label_emb.0.0", emb, adm)?, loader.linear("label_emb.0.2", emb, emb)?])
        };
        let label = config.adm_channels.map(label).transpose()?;
        let zero = skips.iter().enumerate();
        let zero = zero.map(|(i, c)| loader.linear(&format!("zero_convs.{i}.0"), *c, *c));
        Ok(Self {
            time1: loader.linear("time_embed.0", emb, width)?,
            time2: loader.linear("time_embed.2", emb, emb)?,
            time_biases: builder.time_biases()?,
            label,
            zero: zero.collect::<Result<_, _>>()?,
            middle_out: loader.linear("middle_block_out.0", bottom, bottom)?,
            hint: HintEncoder::load(&loader.sub("input_hint_block"), width)?,
            hints: Kept::default(),
            union: Union::load(&config, loader)?,
            contexts: ContextCache::default(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            input,
            middle,
            config,
            backend,
        })
    }

    /// The configuration of the half UNet.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// Names this net; no other loaded net has it.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether it can be told what kind of picture it is given.
    pub fn is_union(&self) -> bool {
        self.union.is_some()
    }

    /// What the net makes of a picture `[B, C, H, W]` of the kinds given (union nets), kept for further
    /// steps under `key`; and what it adds to the time embedding.
    pub fn hint(
        &self,
        key: (&Arc<HostTensor>, &[usize]),
        kinds: &[usize],
        picture: impl FnOnce() -> Result<HostTensor, ModelError>,
    ) -> Result<(Arc<Tensor>, Option<Arc<Tensor>>), ModelError> {
        let ops = Ops(self.backend.as_ref());
        let features = self.hints.get(key, kinds, || {
            let picture = picture()?;
            let (expected, found) = (self.hint.channels(), picture.dim(1));
            if expected != found {
                return Err(ModelError::Input {
                    what: "channels of a ControlNet's picture",
                    expected,
                    found,
                });
            }
            let features = self.hint.forward(ops, &picture)?;
            match &self.union {
                Some(union) if !kinds.is_empty() => union.shifted(ops, &features, kinds),
                _ => Ok(features),
            }
        })?;
        let batch = key.1.first().copied().unwrap_or(1);
        let kind = self.union.as_ref().map(|union| union.time_shift(ops, kinds, batch)).transpose()?;
        Ok((features, kind.map(Arc::new)))
    }

    /// Keys and values of the cross-attentions.
    pub fn context(&self, conds: &[Arc<HostTensor>]) -> Result<Arc<ContextKv>, ModelError> {
        self.contexts.get(conds, &[], |context| {
            let (expected, found) = (self.config.context_dim, context.dim(2));
            if expected != found {
                let what = "width of the text conditioning for the ControlNet (it may be of another family)";
                return Err(ModelError::Input { what, expected, found });
            }
            let ops = Ops(self.backend.as_ref());
            let context = ops.upload_tokens(context)?;
            let mut kv = Vec::new();
            for stage in self.input.iter().chain(&self.middle) {
                if let Some(transformer) = &stage.transformer {
                    transformer.context_kv(ops, std::slice::from_ref(&context), &mut kv)?;
                }
            }
            Ok(ContextKv { kv })
        })
    }

    /// The net's outputs times its strength, added to those of the nets before it.
    pub(super) fn forward(&self, pass: &Pass<'_>, before: Additions) -> Result<Additions, ModelError> {
        let ops = pass.ops;
        let time = self.time(pass)?;
        let mut probe = |_: &str, _: &Tensor| {};
        let context = pass.unet.context;
        let mut scope = Scope { ops, time: &time, context, probe: &mut probe, hooks: None };
        let mut skips = Vec::with_capacity(self.zero.len());
        let mut h: Option<Tensor> = None;
        for (i, (stage, zero)) in self.input.iter().zip(&self.zero).enumerate() {
            let mut y = run_stage(&mut scope, stage, h.as_ref().unwrap_or(pass.unet.x), None, None)?;
            if i == 0 {
                y = ops.axpby(1.0, &y, 1.0, pass.hint)?;
            }
            skips.push(pass.output(&y, zero, before.skips.get(i))?);
            h = Some(y);
        }
        let mut h = h.ok_or(ModelError::Input { what: "blocks of a ControlNet", expected: 1, found: 0 })?;
        for stage in &self.middle {
            h = run_stage(&mut scope, stage, &h, None, None)?;
        }
        let middle = Some(pass.output(&h, &self.middle_out, before.middle.as_ref())?);
        Ok(Additions { skips, middle, input: before.input })
    }

    fn time(&self, pass: &Pass<'_>) -> Result<Tensor, ModelError> {
        let ops = pass.ops;
        let act = Activation::Silu;
        let emb = ops.linear(&Linear { act, ..Linear::new(pass.unet.embedded, self.time1.get()?) })?;
        let mut sum = ops.linear(&Linear { residual: pass.kind, ..Linear::new(&emb, self.time2.get()?) })?;
        if let (Some([first, second]), Some(vector)) = (&self.label, pass.unet.vector) {
            let inner = ops.linear(&Linear { act, ..Linear::new(vector, first.get()?) })?;
            sum = ops.linear(&Linear { residual: Some(&sum), ..Linear::new(&inner, second.get()?) })?;
        }
        let emb = ops.activate(&sum, act)?;
        ops.linear(&Linear::new(&emb, self.time_biases.get()?))
    }
}

impl Pass<'_> {
    /// An output: `strength · w(h) + before`.
    fn output(&self, h: &Tensor, w: &LazyLinear, before: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let (ops, scale) = (self.ops, self.strength);
        // The sum of nets for another size of picture is refused by the UNet.
        let before = before.filter(|before| before.shape() == h.shape());
        if !self.is_averaged {
            return ops.linear(&Linear { scale, residual: before, ..Linear::new(h, w.get()?) });
        }
        let out = ops.linear(&Linear { scale, ..Linear::new(h, w.get()?) })?;
        let mean = averaged(ops, &out)?;
        match before {
            Some(before) => ops.axpby(1.0, &mean, 1.0, before),
            None => Ok(mean),
        }
    }
}

/// The mean over all places, at every place: attention that looks everywhere alike.
fn averaged(ops: Ops<'_>, x: &Tensor) -> Result<Tensor, ModelError> {
    let shape = x.shape();
    let mut tokens = ops.axpby(1.0, x, 0.0, x)?;
    tokens.reshape(shape.as_tokens())?;
    let nothing = ops.axpby(0.0, &tokens, 0.0, &tokens)?;
    let heads = [40, 32, 8].into_iter().find(|d| shape.c.is_multiple_of(*d)).map_or(1, |d| shape.c / d);
    let (q, v) = (Cols::all(&nothing), Cols::all(&tokens));
    let op = Attention { q, k: Cols::all(&nothing), v, heads, is_causal: false, scale: 1.0 };
    let mut mean = ops.attention(&op)?;
    mean.reshape(shape)?;
    Ok(mean)
}
