//! Patches: changes to a model's weights that are applied when a backend asks for them.
//!
//! A handle carries [`Patches`], a list that is cheap to clone and only grows;
//! the file below stays as it is. A [`PatchedSource`] between file and network
//! gives the changed tensors, so every backend packs the same numbers. All
//! arithmetic is f32 and in the order of the list, as in ComfyUI. LoRA and
//! model merges are patches; what changes a forward pass (FreeU, a
//! hypernetwork) is not.

mod apply;
mod decompose;
mod extract;
mod generalised;
mod low_rank;
mod orthogonal;
mod values;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::f16;

use super::detect::{ClipConfig, UnetConfig};
use super::layers::WeightSource;
use crate::tensor::{DType, RawTensor};
pub use extract::low_rank_factors;
pub use values::Values;

/// What the names of a diffusion model's patches begin with.
pub const DIFFUSION: &str = "diffusion_model.";

/// Prefixes of a file's tensors, and what the names of their patches begin with instead.
pub type Prefixes = Vec<(String, String)>;

/// How patches name the tensors of a diffusion model.
pub fn unet_names(config: &UnetConfig) -> Prefixes {
    vec![(config.prefix.clone(), DIFFUSION.to_owned())]
}

/// How patches name the tensors of a text encoder: `clip_l.transformer.text_model.…`.
pub fn clip_names(config: &ClipConfig) -> Prefixes {
    let key = config.variant.key();
    let projection = config
        .projection
        .as_ref()
        .map(|(name, _)| (name.clone(), format!("{key}.transformer.text_projection.weight")));
    let layers = (config.prefix.clone(), format!("{key}.transformer.text_model."));
    projection.into_iter().chain([layers]).collect()
}

/// A change to one tensor: `strength_model · weight`, then `strength` of the change.
#[derive(Clone)]
pub struct Patch {
    /// Factor on the change.
    pub strength: f64,
    /// The change.
    pub change: Arc<Change>,
    /// Factor on the weight before the change.
    pub strength_model: f64,
}

/// What a patch does to a weight. Matrices are given as files store them.
pub enum Change {
    /// Adds a tensor of the same shape.
    Add(Values),
    /// Takes the place of the weight, whatever the strength.
    Set(Values),
    /// Adds `up · down`, through `mid` if there is one (LoRA, LoCon).
    LowRank {
        /// `[out, rank]`.
        up: Values,
        /// `[rank, in…]`.
        down: Values,
        /// `[rank, rank, kh, kw]`, the core of a Tucker decomposition.
        mid: Option<Values>,
        /// Scaling and magnitude.
        scale: Scale,
    },
    /// Adds the elementwise product of two low-rank products (LoHa).
    Hadamard {
        /// `[a, b]` of both products.
        factors: [[Values; 2]; 2],
        /// Cores of both products, if they are Tucker decompositions.
        cores: Option<[Values; 2]>,
        /// Scaling and magnitude.
        scale: Scale,
    },
    /// Adds the Kronecker product of two matrices (LoKr).
    Kronecker {
        /// The first, coarse factor.
        first: Factor,
        /// The second, fine factor.
        second: Factor,
        /// Scaling and magnitude.
        scale: Scale,
    },
    /// Adds `weight · A + B` of two low-rank products (GLoRA).
    Generalised {
        /// `a1`, `a2`, `b1`, `b2`, as files name them.
        factors: [Values; 4],
        /// Scaling and magnitude.
        scale: Scale,
    },
    /// Turns the outputs (OFT; BOFT if the blocks have four dimensions).
    Orthogonal {
        /// `[blocks, n, n]` or `[rounds, blocks, n, n]`.
        blocks: Values,
        /// Factors on the outputs, which only BOFT heeds.
        rescale: Option<Values>,
        /// Magnitude, and in alpha a limit.
        scale: Scale,
    },
}

impl Change {
    /// Whether a weight of so many elements may be what the change is for.
    pub fn fits(&self, elements: usize) -> bool {
        match self {
            Change::Orthogonal { blocks, .. } => {
                let rows: usize = blocks.shape().iter().rev().skip(1).take(2).product();
                rows > 0 && elements.is_multiple_of(rows)
            }
            Change::Generalised { factors: [_, _, b1, b2], .. } => {
                let product =
                    |a: &Values, b: &Values| a.extent(0) * b.shape().iter().skip(1).product::<usize>();
                product(b1, b2) == elements || product(b2, b1) == elements
            }
            _ => self.elements() == elements,
        }
    }

    /// Elements of the weight that the change is for, where its own shapes say.
    fn elements(&self) -> usize {
        let product = |a: &Values, b: &Values| a.extent(0) * b.shape().iter().skip(1).product::<usize>();
        // Of a Tucker decomposition both factors are transposed.
        let tucker = |a: &Values, b: &Values, core: &Values| a.extent(1) * b.extent(1) * core.taps();
        match self {
            Change::Add(values) | Change::Set(values) => values.count(),
            Change::Generalised { .. } | Change::Orthogonal { .. } => 0,
            Change::LowRank { up, down, mid, .. } => product(up, down) * mid.as_ref().map_or(1, Values::taps),
            Change::Hadamard { factors: [[a, b], _], cores: None, .. } => product(a, b),
            Change::Hadamard { factors: [[a, b], _], cores: Some([core, _]), .. } => tucker(a, b, core),
            Change::Kronecker { first, second, .. } => {
                let elements = |factor: &Factor| match factor {
                    Factor::Whole(values) => values.count(),
                    Factor::Product { a, b, core: None } => product(a, b),
                    Factor::Product { a, b, core: Some(core) } => tucker(a, b, core),
                };
                elements(first) * elements(second)
            }
        }
    }
}

/// A factor of a Kronecker product.
pub enum Factor {
    /// As it is.
    Whole(Values),
    /// `a · b`, through a core `[rank, rank, kh, kw]` if there is one.
    Product {
        /// `[rows, rank]`.
        a: Values,
        /// `[rank, columns]`.
        b: Values,
        /// The core of a Tucker decomposition.
        core: Option<Values>,
    },
}

/// How a decomposed change is scaled.
#[derive(Clone, Default)]
pub struct Scale {
    /// The change is multiplied by `alpha / rank`; by 1 if not given. A rotation is limited by it.
    pub alpha: Option<f64>,
    /// Norms that the changed weight gets (DoRA), by output or input channel.
    pub magnitude: Option<Values>,
}

/// Patches that were added together.
struct Group {
    id: u64,
    patches: HashMap<String, Patch>,
}

/// The next group's id.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A list of patches by tensor name. Cheap to clone.
#[derive(Clone, Default)]
pub struct Patches(Vec<Arc<Group>>);

impl Patches {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// These patches, then `more`.
    pub fn with(&self, more: HashMap<String, Patch>) -> Self {
        if more.is_empty() {
            return self.clone();
        }
        let group = Group { id: NEXT_ID.fetch_add(1, Ordering::Relaxed), patches: more };
        let mut groups = self.0.clone();
        groups.push(Arc::new(group));
        Self(groups)
    }

    /// The patches of one tensor, in the order in which they apply.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Patch> {
        self.0.iter().filter_map(move |group| group.patches.get(name))
    }

    /// Two lists of the same identity make the same weights.
    pub fn identity(&self) -> Vec<u64> {
        self.0.iter().map(|group| group.id).collect()
    }
}

/// A weight source under patches.
pub struct PatchedSource {
    base: Arc<dyn WeightSource>,
    names: Prefixes,
    patches: Patches,
    is_rounded: bool,
}

impl PatchedSource {
    /// `base` with patches, whose names differ from the file's in their beginning.
    pub fn new(base: Arc<dyn WeightSource>, names: Prefixes, patches: Patches) -> Self {
        Self { base, names, patches, is_rounded: false }
    }

    /// These tensors by patch name, as far as they are there.
    pub fn values(self, tensors: Vec<(String, Vec<usize>)>) -> Vec<(String, Values)> {
        let named = tensors.into_iter().filter_map(|(name, _)| Some((self.patch_name(&name)?, name)));
        let named: Vec<(String, String)> = named.collect();
        let source: Arc<dyn WeightSource> = Arc::new(self);
        let values = named.into_iter().filter_map(|(to, name)| Some((to, Values::of(&source, &name)?)));
        values.collect()
    }

    /// Patched weights are rounded to f16, as the reference does with text encoders.
    pub fn rounded(mut self) -> Self {
        self.is_rounded = true;
        self
    }

    /// The name of a tensor of the file among patches.
    fn patch_name(&self, name: &str) -> Option<String> {
        let rest = |(from, to): &(String, String)| {
            name.strip_prefix(from.as_str()).map(|rest| format!("{to}{rest}"))
        };
        self.names.iter().find_map(rest)
    }

    fn patched<'a>(&self, name: &str, raw: RawTensor<'a>) -> RawTensor<'a> {
        let mut weight = raw.to_f32();
        for patch in self.patches.of(name) {
            if let Err(why) = apply::apply(patch, &mut weight, raw.shape) {
                tracing::warn!("{name} is left unpatched: {why}");
            }
        }
        if !self.is_rounded {
            let bytes = bytemuck::cast_slice(&weight).to_vec().into();
            return RawTensor { dtype: DType::F32, shape: raw.shape, bytes };
        }
        let bytes: Vec<u8> = weight.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        RawTensor { dtype: DType::F16, shape: raw.shape, bytes: bytes.into() }
    }
}

impl WeightSource for PatchedSource {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let raw = self.base.raw(name)?;
        match self.patch_name(name).filter(|name| self.patches.of(name).next().is_some()) {
            Some(name) => Some(self.patched(&name, raw)),
            None => Some(raw),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.base.shape(name)
    }

    fn packed(&self, name: &str) {
        self.base.packed(name);
    }
}

#[cfg(test)]
mod tests;
