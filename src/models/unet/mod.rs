//! The latent diffusion UNet (Rombach et al. 2022) in the LDM layout: SD1.x, SD2.x, SDXL (Podell et al. 2023)
//! and its refiner. They differ in widths, depths and heads, in how transformers are entered, and in the
//! vector of sizes that SDXL adds to the time embedding.

mod blocks;
mod context;
mod device;
pub mod hooks;
pub mod noise_augmentation;
pub mod vector;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ModelError;
use super::controlnet::{self, Additions, ControlInput};
use super::detect::UnetConfig;
use super::layers::{LazyConv, LazyLinear, LazyNorm, Loader, Ops};
use crate::tensor::{Activation, Backend, Cols, Conv2d, GroupNorm, HostTensor, Linear, Outcome, Tensor};
pub(super) use blocks::Scope;
use blocks::{ResBlock, SpatialTransformer};
pub(super) use context::ContextCache;
pub use device::DeviceInput;
use hooks::{HookCall, HookScope, Hooks, UnetHook};

/// Keys and values of every cross-attention for one text conditioning.
///
/// They depend on the prompt only, so they are computed once and used by all steps.
pub struct ContextKv {
    pub(super) kv: Vec<Tensor>,
}

/// Sees the output of named modules while a forward pass runs (for tests and debugging).
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// One forward pass.
pub struct UnetInput<'a> {
    /// `[B, C, h, w]`, already scaled for the model.
    pub x: &'a HostTensor,
    /// One timestep a sample.
    pub timesteps: &'a [f32],
    /// Text conditioning; its batch divides `B`.
    pub context: &'a ContextKv,
    /// `[B, adm_channels]`: pooled text and sizes, for models that have such an input; see [`vector`].
    pub vector: Option<&'a HostTensor>,
}

/// One pass over all layers, on the device.
struct Call<'a> {
    x: &'a Tensor,
    timesteps: &'a [f32],
    context: &'a ContextKv,
    vector: Option<&'a Tensor>,
    /// The latents alone, where nets see fewer channels.
    latents: Option<&'a Tensor>,
}

/// One stage of the way down or up.
pub(super) struct Stage {
    name: String,
    res: Option<ResBlock>,
    pub(super) transformer: Option<SpatialTransformer>,
    resample: Option<Resample>,
}

pub(super) enum Resample {
    /// The first convolution.
    Input(LazyConv),
    /// Stride-2 convolution.
    Down(LazyConv),
    /// Nearest-neighbour doubling and convolution.
    Up(LazyConv),
}

/// A UNet on a backend.
pub struct Unet {
    config: UnetConfig,
    backend: Arc<dyn Backend>,
    time1: LazyLinear,
    time2: LazyLinear,
    /// The two layers that the vector goes through before it is added to the time embedding.
    label: Option<[LazyLinear; 2]>,
    /// All ResBlocks' time projections as one GEMM.
    time_biases: LazyLinear,
    input: Vec<Stage>,
    middle: [Stage; 2],
    output: Vec<Stage>,
    out_norm: LazyNorm,
    out_conv: LazyConv,
    contexts: context::ContextCache,
    /// What device calls are given besides latents.
    kept: device::Kept,
    /// Names this model's recorded work; no other loaded model has it.
    id: u64,
}

/// The next model's [`Unet::id`].
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Builds stages and keeps count of what they share.
pub(super) struct Builder<'a> {
    config: &'a UnetConfig,
    loader: &'a Loader,
    /// (name, width) of every ResBlock's time projection so far.
    time_parts: Vec<(String, usize)>,
    time_width: usize,
    cross_attentions: usize,
}

impl<'a> Builder<'a> {
    pub(super) fn new(config: &'a UnetConfig, loader: &'a Loader) -> Self {
        Self { config, loader, time_parts: Vec::new(), time_width: 0, cross_attentions: 0 }
    }

    /// The time projections of all stages so far, as one layer.
    pub(super) fn time_biases(&self) -> Result<LazyLinear, ModelError> {
        self.loader.stacked(&self.time_parts, self.emb_width())
    }

    fn emb_width(&self) -> usize {
        self.config.time_embed_dim
    }

    fn stage(&mut self, name: String, channels: (usize, usize), depth: usize) -> Result<Stage, ModelError> {
        let (cin, cout) = channels;
        let loader = self.loader.sub(&name);
        let res = ResBlock::load(&loader.sub("0"), self.config.norm_groups, cin, cout, self.time_width)?;
        self.time_parts.push((format!("{name}.0.emb_layers.1"), cout));
        self.time_width += cout;
        let transformer = self.transformer(&loader.sub("1"), cout, depth)?;
        Ok(Stage { name, res: Some(res), transformer, resample: None })
    }

    fn transformer(
        &mut self,
        loader: &Loader,
        channels: usize,
        depth: usize,
    ) -> Result<Option<SpatialTransformer>, ModelError> {
        if depth == 0 {
            return Ok(None);
        }
        let t = SpatialTransformer::load(loader, self.config, channels, depth, self.cross_attentions)?;
        self.cross_attentions += depth;
        Ok(Some(t))
    }

    fn depth(depths: &[usize], i: usize) -> usize {
        depths.get(i).copied().unwrap_or(0)
    }

    /// The way down; returns the stages and the channels that each leaves for the way up.
    pub(super) fn input(&mut self) -> Result<(Vec<Stage>, Vec<usize>), ModelError> {
        let config = self.config;
        let mut channels = config.model_channels;
        let first = self.loader.conv("input_blocks.0.0", channels, config.in_channels, 3)?;
        let mut stages = vec![Stage {
            name: "input_blocks.0".into(),
            res: None,
            transformer: None,
            resample: Some(Resample::Input(first)),
        }];
        let mut skips = vec![channels];
        let mut res_index = 0;
        for (level, mult) in config.channel_mult.iter().enumerate() {
            let width = mult * config.model_channels;
            for _ in 0..Self::depth(&config.num_res_blocks, level) {
                let name = format!("input_blocks.{}", stages.len());
                stages.push(self.stage(
                    name,
                    (channels, width),
                    Self::depth(&config.input_depth, res_index),
                )?);
                res_index += 1;
                channels = width;
                skips.push(channels);
            }
            if level + 1 < config.channel_mult.len() {
                let name = format!("input_blocks.{}", stages.len());
                let conv = self.loader.conv(&format!("{name}.0.op"), channels, channels, 3)?;
                stages.push(Stage {
                    name,
                    res: None,
                    transformer: None,
                    resample: Some(Resample::Down(conv)),
                });
                skips.push(channels);
            }
        }
        Ok((stages, skips))
    }

    pub(super) fn middle(&mut self, channels: usize) -> Result<[Stage; 2], ModelError> {
        let groups = self.config.norm_groups;
        let block = |builder: &mut Self, index: usize| {
            let name = format!("middle_block.{index}");
            let res =
                ResBlock::load(&builder.loader.sub(&name), groups, channels, channels, builder.time_width)?;
            builder.time_parts.push((format!("{name}.emb_layers.1"), channels));
            builder.time_width += channels;
            Ok::<_, ModelError>(Stage { name, res: Some(res), transformer: None, resample: None })
        };
        let mut first = block(self, 0)?;
        let loader = self.loader.sub("middle_block.1");
        first.transformer = self.transformer(&loader, channels, self.config.middle_depth)?;
        let last = if self.config.middle_depth > 0 { 2 } else { 1 };
        Ok([first, block(self, last)?])
    }

    fn output(&mut self, mut channels: usize, mut skips: Vec<usize>) -> Result<Vec<Stage>, ModelError> {
        let config = self.config;
        let mut stages: Vec<Stage> = Vec::new();
        for (level, mult) in config.channel_mult.iter().enumerate().rev() {
            let width = mult * config.model_channels;
            let blocks = Self::depth(&config.num_res_blocks, level) + 1;
            for block in 0..blocks {
                let index = stages.len();
                let name = format!("output_blocks.{index}");
                let depth = Self::depth(&config.output_depth, index);
                let cin = channels + skips.pop().unwrap_or(0);
                let mut stage = self.stage(name.clone(), (cin, width), depth)?;
                channels = width;
                if level > 0 && block + 1 == blocks {
                    let place = if depth > 0 { 2 } else { 1 };
                    let conv = self.loader.conv(&format!("{name}.{place}.conv"), channels, channels, 3)?;
                    stage.resample = Some(Resample::Up(conv));
                }
                stages.push(stage);
            }
        }
        Ok(stages)
    }
}

/// What one run of all layers reads.
pub(super) struct LayerInputs<'t> {
    pub(super) x: &'t Tensor,
    /// The sinusoidal timestep embedding.
    pub(super) embedded: &'t Tensor,
    pub(super) vector: Option<&'t Tensor>,
    /// Keys and values of every cross-attention.
    pub(super) context: &'t [&'t Tensor],
}

impl Unet {
    /// Checks the tensors under `loader` (`model.diffusion_model.`); packs nothing yet.
    pub fn load(config: UnetConfig, backend: Arc<dyn Backend>, loader: &Loader) -> Result<Self, ModelError> {
        let mut builder = Builder::new(&config, loader);
        let emb = builder.emb_width();
        let (input, skips) = builder.input()?;
        let bottom = skips.last().copied().unwrap_or(config.model_channels);
        let middle = builder.middle(bottom)?;
        let output = builder.output(bottom, skips)?;
        let width = config.model_channels;
        Ok(Self {
            time1: loader.linear("time_embed.0", emb, width)?,
            time2: loader.linear("time_embed.2", emb, emb)?,
            label: match config.adm_channels {
                Some(adm) => Some([
                    loader.linear("label_emb.0.0", emb, adm)?,
                    loader.linear("label_emb.0.2", emb, emb)?,
                ]),
                None => None,
            },
            time_biases: builder.time_biases()?,
            out_norm: loader.norm("out.0", width)?,
            out_conv: loader.conv("out.2", config.out_channels, width, 3)?,
            contexts: context::ContextCache::default(),
            kept: device::Kept::default(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            input,
            middle,
            output,
            config,
            backend,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    fn transformers(&self) -> impl Iterator<Item = &SpatialTransformer> {
        self.input.iter().chain(&self.middle).chain(&self.output).filter_map(|s| s.transformer.as_ref())
    }

    /// Keys and values of `context` `[B, T, context_dim]` for every cross-attention.
    pub fn context_kv(&self, context: &HostTensor) -> Result<ContextKv, ModelError> {
        self.context_kv_hooked(context, &[])
    }

    /// The same under hooks that change what keys and values are made of.
    fn context_kv_hooked(
        &self,
        context: &HostTensor,
        hooks: &[Arc<dyn UnetHook>],
    ) -> Result<ContextKv, ModelError> {
        if context.dim(2) != self.config.context_dim {
            let (expected, found) = (self.config.context_dim, context.dim(2));
            return Err(ModelError::Input { what: "width of the text conditioning", expected, found });
        }
        let ops = Ops(self.backend.as_ref());
        let context = ops.upload_tokens(context)?;
        let context = match hooks::sources(hooks, ops, &context)? {
            Some(sources) => sources.into(),
            None => vec![context],
        };
        let mut kv = Vec::new();
        for transformer in self.transformers() {
            transformer.context_kv(ops, &context, &mut kv)?;
        }
        Ok(ContextKv { kv })
    }

    /// Smallest latent side the levels can halve; other sizes work too, as long as each is at least 1.
    pub fn levels(&self) -> usize {
        self.config.channel_mult.len()
    }

    /// As [`forward_controlled`](Self::forward_controlled), with hooks.
    pub fn forward_hooked(
        &self,
        input: &UnetInput<'_>,
        controls: &[ControlInput],
        hooks: Hooks<'_>,
    ) -> Result<HostTensor, ModelError> {
        if hooks.list.is_empty() {
            return self.forward_controlled(input, controls, None);
        }
        let (ops, size) = (Ops(self.backend.as_ref()), (input.x.dim(2), input.x.dim(3)));
        let call = HookCall { ops, sigma: hooks.sigma, size, sides: hooks.sides };
        self.pass(input, controls, (None, Some(&HookScope::new(hooks.list, call))))
    }

    fn check_channels(&self, found: usize) -> Result<(), ModelError> {
        let expected = self.config.in_channels;
        if found == expected {
            return Ok(());
        }
        Err(ModelError::Input { what: "latent channels", expected, found })
    }

    /// The model's raw prediction `[B, out_channels, h, w]`.
    pub fn forward(&self, input: &UnetInput<'_>, probe: Option<Probe<'_>>) -> Result<HostTensor, ModelError> {
        self.forward_controlled(input, &[], probe)
    }

    /// [`forward`](Self::forward) with ControlNets, which run on the same latents and timesteps.
    pub fn forward_controlled(
        &self,
        input: &UnetInput<'_>,
        controls: &[ControlInput],
        probe: Option<Probe<'_>>,
    ) -> Result<HostTensor, ModelError> {
        self.pass(input, controls, (probe, None))
    }

    /// Upload, all layers, download. A pass that nobody looks into is recorded, if its hooks can be.
    fn pass(
        &self,
        input: &UnetInput<'_>,
        controls: &[ControlInput],
        (probe, hooks): (Option<Probe<'_>>, Option<&HookScope<'_>>),
    ) -> Result<HostTensor, ModelError> {
        self.check_channels(input.x.dim(1))?;
        let ops = Ops(self.backend.as_ref());
        let x = ops.upload_nchw(input.x)?;
        let vector = self.vector_rows(input.vector, x.shape().n)?;
        let vector = vector.map(|rows| ops.upload_nchw(&rows)).transpose()?;
        let latents = controlnet::latents(ops, input.x, controls)?;
        let call = Call {
            x: &x,
            timesteps: input.timesteps,
            context: input.context,
            vector: vector.as_ref(),
            latents: latents.as_ref(),
        };
        ops.download_nchw(&self.run(ops, &call, controls, (probe, hooks))?)
    }

    /// All layers.
    fn run(
        &self,
        ops: Ops<'_>,
        call: &Call<'_>,
        controls: &[ControlInput],
        (probe, hooks): (Option<Probe<'_>>, Option<&HookScope<'_>>),
    ) -> Result<Tensor, ModelError> {
        let embedded = ops.timestep_embedding(call.timesteps, self.config.model_channels)?;
        let own = [call.x, &embedded].into_iter().chain(call.vector).chain(&call.context.kv);
        let nets = call.latents.into_iter().chain(controls.iter().flat_map(ControlInput::tensors));
        let count = own.clone().count();
        let inputs: Vec<&Tensor> = own.chain(nets).collect();
        let run = |inputs: &[&Tensor], watched: (Probe<'_>, Option<&HookScope<'_>>)| {
            let (own, nets) = inputs.split_at(count.min(inputs.len()));
            let own = self.split(own)?;
            let added = controlnet::run_all(ops, &own, controls, nets)?;
            let result = self.layers(ops, &own, added, watched)?;
            let beside = hooks.map_or_else(Vec::new, HookScope::take_watched);
            Ok::<_, ModelError>(Outcome { result, beside })
        };
        let work = controlnet::key(self.id, controls);
        let outcome = match (probe, hooks.map_or(Some(work), |hooks| hooks.key(work))) {
            (Some(probe), _) => run(&inputs, (probe, hooks)),
            (None, None) => run(&inputs, (&mut |_, _| {}, hooks)),
            (None, Some(key)) => self
                .backend
                .record(key, &inputs, &mut |inputs| Ok(run(inputs, (&mut |_, _| {}, hooks))?))
                .map_err(ModelError::from_recorded),
        }?;
        if let Some(hooks) = hooks {
            hooks.hand_out(outcome.beside);
        }
        Ok(outcome.result)
    }

    /// The vector as rows `[B, width, 1, 1]`, if the model has such an input.
    fn vector_rows(
        &self,
        vector: Option<&HostTensor>,
        batch: usize,
    ) -> Result<Option<HostTensor>, ModelError> {
        let Some(width) = self.config.adm_channels else { return Ok(None) };
        let found = vector.map_or(0, HostTensor::len);
        match vector.and_then(|v| v.clone().reshape(&[batch, width, 1, 1])) {
            Some(rows) => Ok(Some(rows)),
            None => {
                let (what, expected) = ("size of the vector of pooled text and sizes", batch * width);
                Err(ModelError::Input { what, expected, found })
            }
        }
    }

    /// The inputs of [`layers`](Self::layers) from the order in which they are recorded.
    fn split<'t>(&self, inputs: &'t [&'t Tensor]) -> Result<LayerInputs<'t>, ModelError> {
        let (expected, found) = (2 + usize::from(self.label.is_some()), inputs.len());
        match (inputs, &self.label) {
            ([x, embedded, vector, context @ ..], Some(_)) => {
                Ok(LayerInputs { x, embedded, vector: Some(vector), context })
            }
            ([x, embedded, context @ ..], None) => Ok(LayerInputs { x, embedded, vector: None, context }),
            _ => Err(ModelError::Input { what: "tensors of a recorded UNet call", expected, found }),
        }
    }

    /// Everything between upload and download: the same launches for the same shapes.
    fn layers(
        &self,
        ops: Ops<'_>,
        inputs: &LayerInputs<'_>,
        mut added: Additions,
        (probe, hooks): (Probe<'_>, Option<&HookScope<'_>>),
    ) -> Result<Tensor, ModelError> {
        let (x, context) = (inputs.x, inputs.context);
        let time = self.time(ops, inputs.embedded, inputs.vector)?;
        let mut scope = Scope { ops, time: &time, context, probe, hooks };
        let mut skips: Vec<Tensor> = Vec::with_capacity(self.input.len());
        // What goes further down, where that is not the skip connection.
        let mut down: Option<Tensor> = None;
        for (i, stage) in self.input.iter().enumerate() {
            let from = down.as_ref().or(skips.last()).unwrap_or(x);
            let next = run_stage(&mut scope, stage, from, None, None)?;
            let mut next = controlnet::add(ops, next, added.input(i))?;
            if let Some(hooks) = hooks {
                next = hooks.down(i, false, &next)?.unwrap_or(next);
                down = hooks.down(i, true, &next)?;
            }
            skips.push(next);
        }
        let bottom = down.as_ref().or(skips.last()).unwrap_or(x);
        let first = run_stage(&mut scope, &self.middle[0], bottom, None, None)?;
        let mut x = run_stage(&mut scope, &self.middle[1], &first, None, None)?;
        drop(first);
        x = controlnet::add(ops, x, added.middle.take())?;
        (scope.probe)("middle_block", &x);
        drop(down);
        for stage in &self.output {
            let mut skip = match skips.pop() {
                Some(skip) => Some(controlnet::add(ops, skip, added.skips.pop())?),
                None => None,
            };
            if let Some(hooks) = hooks
                && let Some(taken) = skip.take()
            {
                let joined = hooks.up(x, taken)?;
                (x, skip) = (joined.0, Some(joined.1));
            }
            let target = skips.last().map(|t| (t.shape().h, t.shape().w));
            x = run_stage(&mut scope, stage, &x, skip.as_ref(), target)?;
        }
        let normed = ops.group_norm(&GroupNorm {
            x: &x,
            x2: None,
            w: self.out_norm.get()?,
            groups: self.config.norm_groups,
            eps: 1e-5,
            silu: true,
        })?;
        let out = ops.conv_result(&Conv2d::new(&normed, self.out_conv.get()?))?;
        (scope.probe)("out", &out);
        Ok(out)
    }

    /// Every ResBlock's time bias, side by side: `[B, 1, 1, Σ cout]`.
    fn time(&self, ops: Ops<'_>, embedded: &Tensor, vector: Option<&Tensor>) -> Result<Tensor, ModelError> {
        let act = Activation::Silu;
        let emb = ops.linear(&Linear { act, ..Linear::new(embedded, self.time1.get()?) })?;
        // Each ResBlock applies SiLU to the embedding before its own projection.
        let emb = match (&self.label, vector) {
            (Some([label1, label2]), Some(vector)) => {
                let label = ops.linear(&Linear { act, ..Linear::new(vector, label1.get()?) })?;
                let label = ops.linear(&Linear::new(&label, label2.get()?))?;
                let residual = Some(&label);
                ops.activate(&ops.linear(&Linear { residual, ..Linear::new(&emb, self.time2.get()?) })?, act)?
            }
            _ => ops.linear(&Linear { act, ..Linear::new(&emb, self.time2.get()?) })?,
        };
        ops.linear(&Linear { x: Cols::all(&emb), ..Linear::new(&emb, self.time_biases.get()?) })
    }
}

pub(super) fn run_stage(
    scope: &mut Scope<'_, '_>,
    stage: &Stage,
    x: &Tensor,
    skip: Option<&Tensor>,
    target: Option<(usize, usize)>,
) -> Result<Tensor, ModelError> {
    let mut held: Option<Tensor> = None;
    if let Some(res) = &stage.res {
        let y = res.forward(scope, x, skip)?;
        (scope.probe)(&format!("{}.0", stage.name), &y);
        held = Some(y);
    }
    if let Some(transformer) = &stage.transformer {
        let y = transformer.forward(scope, held.as_ref().unwrap_or(x), &stage.name)?;
        held = Some(y);
    }
    if let Some(resample) = &stage.resample {
        let input = held.as_ref().unwrap_or(x);
        let y = match resample {
            Resample::Input(conv) => scope.ops.conv(&Conv2d::new(input, conv.get()?))?,
            Resample::Down(conv) => {
                scope.ops.conv(&Conv2d { stride: 2, ..Conv2d::new(input, conv.get()?) })?
            }
            Resample::Up(conv) => {
                let (h, w) = target.unwrap_or((input.shape().h * 2, input.shape().w * 2));
                blocks::upsample(scope.ops, input, conv.get()?, h, w)?
            }
        };
        held = Some(y);
    }
    let y = held.ok_or(ModelError::Input { what: "layers of a UNet stage", expected: 1, found: 0 })?;
    (scope.probe)(&stage.name, &y);
    Ok(y)
}
