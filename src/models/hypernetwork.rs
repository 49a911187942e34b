//! Hypernetworks: small networks that change what keys and values are made of.
//!
//! A file holds, for every width of an attention's input, one network for keys and one
//! for values; each is added to that input times a strength. The files are
//! AUTOMATIC1111's: `768.0.linear.0.weight` is a layer of the keys' network for inputs
//! of 768 channels. Facts about the networks are plain values beside them, here the
//! file's metadata. They are read as ComfyUI 0.3.64 reads them: with norms, the last
//! linear layer has an activation too. Dropout, which is for training, does nothing.

use std::collections::BTreeMap;

use super::ModelError;
use super::layers::{LazyLinear, LazyNorm, Loader, Ops};
use super::store::{Network, Opening};
use crate::tensor::{Activation, Curve, Linear, Tensor};
use crate::weights::WeightsFile;

/// Largest number of layers looked for in a network.
const MAX_LAYERS: usize = 64;

/// Nonlinearities by the names they have in files.
const CURVES: [(&str, Curve); 7] = [
    ("leakyrelu", Curve::LeakyRelu),
    ("elu", Curve::Elu),
    ("swish", Curve::HardSwish),
    ("tanh", Curve::Tanh),
    ("sigmoid", Curve::Sigmoid),
    ("softsign", Curve::Softsign),
    ("mish", Curve::Mish),
];

#[derive(Clone, Copy)]
enum Act {
    None,
    Relu,
    /// An op of its own.
    Curve(Curve),
}

impl Act {
    fn named(name: &str) -> Option<Self> {
        match name {
            "linear" => Some(Act::None),
            "relu" => Some(Act::Relu),
            _ => CURVES.iter().find(|(known, _)| *known == name).map(|(_, curve)| Act::Curve(*curve)),
        }
    }
}

enum Step {
    Linear(LazyLinear, Act),
    Norm(LazyNorm),
}

/// Networks by the width of what they change: for keys, for values.
pub struct Hypernetwork {
    networks: BTreeMap<usize, [Vec<Step>; 2]>,
}

impl Network for Hypernetwork {
    fn open(opening: &Opening<'_>) -> Result<Self, ModelError> {
        let file = opening.file;
        let widths: Vec<usize> = widths(file);
        if widths.is_empty() {
            return Err(opening.is_not("a hypernetwork"));
        }
        let facts = Facts::of(file)?;
        let loader = Loader::new(opening.source.clone(), opening.placement.diffusion.clone(), "");
        let mut networks = BTreeMap::new();
        for width in widths {
            let network = |index: usize| facts.network(file, &loader, width, index);
            networks.insert(width, [network(0)?, network(1)?]);
        }
        Ok(Self { networks })
    }
}

impl Hypernetwork {
    /// What keys and what values are made of, at a strength; `None` if there are no networks of that width.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn apply(
        &self,
        ops: Ops<'_>,
        [keys, values]: [&Tensor; 2],
        strength: f32,
    ) -> Result<Option<[Tensor; 2]>, ModelError> {
        let Some([for_keys, for_values]) = self.networks.get(&keys.shape().c) else { return Ok(None) };
        let changed = |x: &Tensor, steps: &[Step]| match run(ops, x, steps)? {
            Some(y) => ops.axpby(1.0, x, strength, &y),
            None => ops.axpby(1.0 + strength, x, 0.0, x),
        };
        Ok(Some([changed(keys, for_keys)?, changed(values, for_values)?]))
    }
}

/// The widths that a file has networks for.
fn widths(file: &WeightsFile) -> Vec<usize> {
    let mut widths: Vec<usize> = file
        .names()
        .filter_map(|name| {
            let (width, rest) = name.split_once('.')?;
            (rest.starts_with("0.") || rest.starts_with("1.")).then(|| width.parse().ok())?
        })
        .collect();
    widths.sort_unstable();
    widths.dedup();
    widths
}

/// How the networks of a file are built.
struct Facts {
    act: Act,
    has_norms: bool,
    is_output_activated: bool,
}

impl Facts {
    fn of(file: &WeightsFile) -> Result<Self, ModelError> {
        let fact = |key: &str| file.metadata().get(key).map(String::as_str);
        let name = fact("activation_func").unwrap_or("linear");
        let act = Act::named(name).ok_or_else(|| {
            let known: Vec<&str> = CURVES.iter().map(|(name, _)| *name).collect();
            ModelError::File(format!(
                "{} has the activation {name:?}; linear, relu, {} are known",
                file.path().display(),
                known.join(", ")
            ))
        })?;
        let is = |key| fact(key) == Some("true");
        Ok(Self { act, has_norms: is("is_layer_norm"), is_output_activated: is("activate_output") })
    }

    /// The layers of one network, in the order in which the file has them.
    fn network(
        &self,
        file: &WeightsFile,
        loader: &Loader,
        width: usize,
        index: usize,
    ) -> Result<Vec<Step>, ModelError> {
        let prefix = format!("{width}.{index}.");
        let layers: Vec<&str> = file
            .names()
            .filter_map(|name| name.strip_prefix(&prefix)?.strip_suffix(".weight"))
            .take(MAX_LAYERS)
            .collect();
        let loader = loader.sub(width).sub(index);
        let mut steps = Vec::new();
        let mut channels = width;
        let mut at = 0;
        while let Some(name) = layers.get(at) {
            let is_last = at + 1 == layers.len();
            let act = if is_last && !self.is_output_activated { Act::None } else { self.act };
            let out = loader.shape(&format!("{name}.weight")).and_then(|s| s.first().copied()).unwrap_or(0);
            steps.push(Step::Linear(loader.linear(name, out, channels)?, act));
            channels = out;
            at += 1;
            if self.has_norms {
                let missing = || ModelError::Missing { name: format!("{prefix}norm after {name}") };
                steps.push(Step::Norm(loader.norm(layers.get(at).ok_or_else(missing)?, channels)?));
                at += 1;
            }
        }
        if channels != width {
            let what = "channels that a hypernetwork gives back";
            return Err(ModelError::Input { what, expected: width, found: channels });
        }
        Ok(steps)
    }
}

/// The network's result; `None` if it has no layers.
fn run(ops: Ops<'_>, x: &Tensor, steps: &[Step]) -> Result<Option<Tensor>, ModelError> {
    let mut held: Option<Tensor> = None;
    for step in steps {
        let x = held.as_ref().unwrap_or(x);
        let y = match step {
            Step::Norm(norm) => ops.layer_norm(x, norm, 1e-5)?,
            Step::Linear(w, act) => {
                let relu = if matches!(act, Act::Relu) { Activation::Relu } else { Activation::None };
                let y = ops.linear(&Linear { act: relu, ..Linear::new(x, w.get()?) })?;
                match act {
                    Act::Curve(curve) => ops.curve(&y, *curve)?,
                    Act::None | Act::Relu => y,
                }
            }
        };
        held = Some(y);
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::{Act, Curve};

    #[test]
    fn nonlinearities_by_their_names_in_files() {
        assert!(matches!(Act::named("swish"), Some(Act::Curve(Curve::HardSwish))));
        assert!(matches!(Act::named("relu"), Some(Act::Relu)) && Act::named("gelu").is_none());
    }
}
