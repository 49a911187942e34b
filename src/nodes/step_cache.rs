//! EasyCache and LazyCache: steps that are predicted to change little take their result from an earlier one.
//!
//! EasyCache stands around the network, one conditioning beside the other: the first one seen decides, the others
//! follow. LazyCache stands around the guided prediction. Of a UNet that sees further channels beside the latents
//! the latents count.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::pure::PureNode;
use super::sd_model::{NetworkCall, SdModel};
use super::{Inputs, Node, NodeError, Schema, Value, shapes};
use crate::diffusion::guidance_patch::GuidancePatch;
use crate::diffusion::schedule::ModelSampling;
use crate::diffusion::step_cache::{Reuse, ReuseOptions};
use crate::diffusion::{DiffusionError, Field, Model, ModelHandle};
use crate::graph::Input;
use crate::models::ModelError;
use crate::tensor::HostTensor;

/// The nodes.
pub(super) fn nodes() -> Vec<Box<dyn Node>> {
    vec![
        PureNode::boxed(
            || schema("EasyCache", "Skips the network at steps whose change is predicted to be small."),
            |inputs| patch(inputs, |options| Arc::new(EasyCache { options })),
        ),
        PureNode::boxed(
            || schema("LazyCache", "Skips whole steps whose change is predicted to be small."),
            |inputs| patch(inputs, |options| Arc::new(LazyCache { options, run: None })),
        ),
    ]
}

fn schema(class: &'static str, about: &'static str) -> Schema {
    let share = |name, default| Input::float(name, default, 0.0, 1.0).opt("step", 0.01);
    let schema = Schema::new(class, "advanced/debug/model")
        .display(class)
        .module("comfy_extras.nodes_easycache")
        .describe(about)
        .input(Input::link("model", "MODEL"))
        .input(Input::float("reuse_threshold", 0.2, 0.0, 3.0).opt("step", 0.01))
        .input(share("start_percent", 0.15))
        .input(share("end_percent", 0.95))
        .input(Input::boolean("verbose").opt("default", false))
        .output("MODEL");
    shapes::newer(schema, true)
}

fn patch(
    inputs: &Inputs,
    make: impl FnOnce(ReuseOptions) -> Arc<dyn GuidancePatch>,
) -> Result<Vec<Value>, NodeError> {
    let model = inputs.object::<ModelHandle>("model")?;
    SdModel::of(&model)?;
    let options = ReuseOptions {
        threshold: inputs.float("reuse_threshold")?,
        start_percent: inputs.float("start_percent")?,
        end_percent: inputs.float("end_percent")?,
    };
    Ok(vec![Value::object("MODEL", model.with_patch(make(options)))])
}

struct EasyCache {
    options: ReuseOptions,
}

impl GuidancePatch for EasyCache {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        Box::new(Self { options: self.options })
    }

    fn needs_host(&self) -> bool {
        true
    }

    fn model(&self, model: Arc<dyn Model>) -> Arc<dyn Model> {
        let Some(base) = model.network().downcast_ref::<SdModel>() else { return model };
        let reuse = Reuse::new(self.options, |percent| model.sampling().percent_to_sigma(percent));
        Arc::new(base.with_cache(Arc::new(CallCache(Mutex::new(Calls::new(reuse))))))
    }
}

/// What the network added to its input, by conditioning.
struct Calls {
    reuse: Reuse,
    added: HashMap<u64, HostTensor>,
    /// The conditioning that decides.
    first: Option<u64>,
    /// It has decided that this step is skipped.
    is_skipped: bool,
}

impl Calls {
    fn new(reuse: Reuse) -> Self {
        Self { reuse, added: HashMap::new(), first: None, is_skipped: false }
    }

    /// The result for a call that need not be made.
    fn known(&mut self, call: &NetworkCall<'_>, x: &HostTensor) -> Option<HostTensor> {
        if !self.reuse.has_begun(call.sigma) {
            return None;
        }
        if self.reuse.is_reset(x.shape().get(1..).unwrap_or_default()) {
            (self.first, self.is_skipped) = (None, false);
            self.added.clear();
        }
        let can_reuse = call.conds.iter().all(|cond| self.added.contains_key(cond));
        let first = *self.first.get_or_insert(*call.conds.first()?);
        match call.conds.iter().position(|cond| *cond == first) {
            // A call with the deciding conditioning is a step's first.
            Some(at) => self.is_skipped = self.reuse.is_small(&part(x, at, call.conds.len()), can_reuse),
            None if !can_reuse => return None,
            None => {}
        }
        if !self.is_skipped {
            return None;
        }
        let rows = call.conds.iter().filter_map(|cond| self.added.get(cond));
        let added: Vec<f32> = rows.flat_map(|added| added.data().iter().copied()).collect();
        HostTensor::new(x.shape(), added).map(|added| x.zip(&added, |x, a| x + a))
    }

    fn saw(&mut self, call: &NetworkCall<'_>, x: &HostTensor, output: &HostTensor) {
        let (added, count) = (output.zip(x, |o, x| o - x), call.conds.len());
        for (i, cond) in call.conds.iter().enumerate() {
            self.added.insert(*cond, part(&added, i, count));
        }
        if let Some(at) = call.conds.iter().position(|cond| Some(*cond) == self.first) {
            self.reuse.saw(&part(x, at, count), &part(output, at, count), output);
        }
    }
}

/// The rows of one conditioning of several.
fn part(x: &HostTensor, at: usize, count: usize) -> HostTensor {
    let each = x.dim(0) / count.max(1);
    x.rows(at * each, each)
}

/// The first `channels` channels of `[B, C, h, w]`.
fn latents(x: &HostTensor, channels: usize) -> HostTensor {
    let (b, h, w) = (x.dim(0), x.dim(2), x.dim(3));
    if x.dim(1) <= channels {
        return x.clone();
    }
    let rows = (0..b).flat_map(|i| x.row(i)[..channels * h * w].iter().copied());
    HostTensor::new(&[b, channels, h, w], rows.collect()).unwrap_or_default()
}

/// Stands between a model and its network for one run.
pub(super) struct CallCache(Mutex<Calls>);

impl CallCache {
    /// The network's output: an earlier one's change, or what `run` makes.
    pub(super) fn output(
        &self,
        call: &NetworkCall<'_>,
        run: impl FnOnce() -> Result<HostTensor, ModelError>,
    ) -> Result<HostTensor, ModelError> {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.reuse.is_over(call.sigma) {
            return run();
        }
        let x = latents(call.input, call.channels);
        if let Some(output) = calls.known(call, &x) {
            return Ok(output);
        }
        let output = run()?;
        calls.saw(call, &x, &output);
        Ok(output)
    }
}

struct LazyCache {
    options: ReuseOptions,
    /// The run's changes, and what its last prediction added to the latents.
    run: Option<(Reuse, Option<HostTensor>)>,
}

impl GuidancePatch for LazyCache {
    fn fresh(&self) -> Box<dyn GuidancePatch> {
        Box::new(Self { options: self.options, run: None })
    }

    fn needs_host(&self) -> bool {
        true
    }

    fn known(
        &mut self,
        sampling: &ModelSampling,
        x: &Field,
        sigma: f32,
    ) -> Result<Option<Field>, DiffusionError> {
        let options = self.options;
        let start = || (Reuse::new(options, |percent| sampling.percent_to_sigma(percent)), None);
        let (reuse, added) = self.run.get_or_insert_with(start);
        if reuse.is_over(sigma) || !reuse.has_begun(sigma) {
            return Ok(None);
        }
        if reuse.is_reset(x.shape()) {
            *added = None;
        }
        let x = x.to_host()?;
        let is_small = reuse.is_small(&x, added.is_some());
        Ok(added.as_ref().filter(|_| is_small).map(|added| x.zip(added, |x, a| x + a).into()))
    }

    fn saw(&mut self, x: &Field, sigma: f32, guided: &Field) -> Result<(), DiffusionError> {
        let Some((reuse, added)) = self.run.as_mut().filter(|(reuse, _)| !reuse.is_over(sigma)) else {
            return Ok(());
        };
        let (x, guided) = (x.to_host()?, guided.to_host()?);
        *added = Some(guided.zip(&x, |g, x| g - x));
        reuse.saw(&x, &guided, &guided);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two conditionings of one call: both are skipped while the first one's change is small.
    #[test]
    fn the_first_conditioning_decides() {
        let options = ReuseOptions { threshold: 0.25, start_percent: 0.0, end_percent: 1.0 };
        let cache = CallCache(Mutex::new(Calls::new(Reuse::new(options, |percent| 100.0 * (1.0 - percent)))));
        let ask = |value: f32, sigma: f32, conds: &[u64]| {
            let input = HostTensor::full(&[conds.len(), 4, 8, 8], value);
            let call = NetworkCall { conds, sigma, input: &input, channels: 4 };
            let mut has_run = false;
            let out = cache.output(&call, || {
                has_run = true;
                Ok(HostTensor::full(&[conds.len(), 4, 8, 8], 30.0 + 3.0 * value))
            });
            (has_run, out.unwrap().data()[0])
        };
        assert_eq!(ask(0.0, 90.0, &[7, 9]), (true, 30.0));
        assert_eq!(ask(1.0, 80.0, &[7, 9]), (true, 33.0));
        // Input 2: predicted change 3/33; what was added to 1 was 32.
        assert_eq!(ask(2.0, 70.0, &[7, 9]), (false, 34.0));
        // The other one alone, in the same step, is skipped too; a third is not known.
        assert_eq!(ask(2.0, 70.0, &[9]), (false, 34.0));
        assert!(ask(2.0, 70.0, &[5]).0);
        // Then 3/33 + 6/33 is over the threshold.
        assert_eq!(ask(3.0, 60.0, &[7, 9]), (true, 39.0));
        assert!(ask(3.0, 0.0, &[7, 9]).0, "at the end the network always runs");
    }
}
