//! LoRA files and their relatives: names in the file to patches of a model.
//!
//! Kohya, diffusers/PEFT and LyCORIS files (LoRA, LoCon, LoHa, LoKr, GLoRA, OFT, BOFT, DoRA, full
//! differences) name the same layers in different ways; [`Target`] lists the
//! names under which a layer may occur. Nothing is read here but scalars: the
//! matrices stay in the file until a weight is made ([`patch`](super::patch)).

mod diffusers;
mod names;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::ModelError;
use super::layers::WeightSource;
use super::patch::{Change, Factor, Patch, Scale, Values};
use super::store::FileSource;
use crate::weights::WeightsFile;
pub use names::{Target, clip_targets, unet_targets};

/// Patches at strength 1 and what became of the file's tensors.
pub struct Lora {
    /// Changes by patch name.
    pub changes: HashMap<String, Arc<Change>>,
    /// Tensors that belong to none of the targets.
    pub unused: Vec<String>,
    /// Targets whose shape is not that of the file's change.
    pub misfits: Vec<String>,
}

impl Lora {
    /// Reads the file at `path` for a model with these layers.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn open(path: &Path, targets: &[Target]) -> Result<Self, ModelError> {
        Ok(Self::read(&WeightsFile::open(path)?, targets))
    }

    /// The changes in `file` for a model with these layers.
    pub fn read(file: &Arc<WeightsFile>, targets: &[Target]) -> Self {
        let source: Arc<dyn WeightSource> = Arc::new(FileSource::new(file.clone()));
        let mut reader = Reader { source: &source, used: BTreeSet::new() };
        let mut changes: HashMap<String, Arc<Change>> = HashMap::new();
        let mut misfits = Vec::new();
        for target in targets {
            for alias in &target.aliases {
                changes.extend(reader.changes(alias, target));
            }
            if changes.get(&target.name).is_some_and(|change| !change.fits(target.elements)) {
                changes.remove(&target.name);
                misfits.push(target.name.clone());
            }
        }
        let used = reader.used;
        let unused = file.names().filter(|name| !used.contains(*name)).map(str::to_owned).collect();
        Self { changes, unused, misfits }
    }

    /// The changes at a strength.
    pub fn at(&self, strength: f64) -> HashMap<String, Patch> {
        let patch = |change: &Arc<Change>| Patch { strength, change: change.clone(), strength_model: 1.0 };
        self.changes.iter().map(|(name, change)| (name.clone(), patch(change))).collect()
    }
}

/// Names of `up`, `down` and `mid` behind a layer's name, by who writes them.
const LOW_RANK: &[(&str, &str, Option<&str>)] = &[
    (".lora_up.weight", ".lora_down.weight", Some(".lora_mid.weight")),
    ("_lora.up.weight", "_lora.down.weight", None),
    (".lora_B.weight", ".lora_A.weight", None),
    (".lora.up.weight", ".lora.down.weight", None),
    (".lora_B", ".lora_A", None),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", None),
    (".lora_B.default.weight", ".lora_A.default.weight", None),
];

struct Reader<'a> {
    source: &'a Arc<dyn WeightSource>,
    used: BTreeSet<String>,
}

impl Reader<'_> {
    fn take(&mut self, layer: &str, suffix: &str) -> Option<Values> {
        let name = format!("{layer}{suffix}");
        let values = Values::of(self.source, &name)?;
        self.used.insert(name);
        Some(values)
    }

    /// What the file says about `layer`: changes of the target's weight and bias.
    fn changes(&mut self, layer: &str, target: &Target) -> Vec<(String, Arc<Change>)> {
        let mut changes = Vec::new();
        let alpha = self.take(layer, ".alpha").and_then(|v| v.read().first().map(|v| f64::from(*v)));
        let magnitude = self.take(layer, ".dora_scale");
        let scale = Scale { alpha, magnitude };
        let weight = self
            .low_rank(layer, &scale)
            .or_else(|| self.hadamard(layer, &scale))
            .or_else(|| self.kronecker(layer, &scale))
            .or_else(|| self.generalised(layer, &scale))
            .or_else(|| self.orthogonal(layer, &scale))
            .or_else(|| self.take(layer, ".w_norm").map(Change::Add))
            .or_else(|| self.take(layer, ".diff").map(Change::Add))
            .or_else(|| self.take(layer, ".set_weight").map(Change::Set));
        if let Some(change) = weight {
            changes.push((target.name.clone(), Arc::new(change)));
        }
        let bias = self.take(layer, ".b_norm").or_else(|| self.take(layer, ".diff_b"));
        if let (Some(values), Some(stem)) = (bias, target.name.strip_suffix(".weight")) {
            changes.push((format!("{stem}.bias"), Arc::new(Change::Add(values))));
        }
        changes
    }

    fn low_rank(&mut self, layer: &str, scale: &Scale) -> Option<Change> {
        LOW_RANK.iter().find_map(|(up, down, mid)| {
            let up = self.take(layer, up)?;
            let down = self.take(layer, down)?;
            let mid = mid.and_then(|mid| self.take(layer, mid));
            Some(Change::LowRank { up, down, mid, scale: scale.clone() })
        })
    }

    fn hadamard(&mut self, layer: &str, scale: &Scale) -> Option<Change> {
        let mut pair = |a, b| Some([self.take(layer, a)?, self.take(layer, b)?]);
        let factors = [pair(".hada_w1_a", ".hada_w1_b")?, pair(".hada_w2_a", ".hada_w2_b")?];
        let cores = pair(".hada_t1", ".hada_t2");
        Some(Change::Hadamard { factors, cores, scale: scale.clone() })
    }

    fn kronecker(&mut self, layer: &str, scale: &Scale) -> Option<Change> {
        let mut factor = |n: u8| {
            if let Some(whole) = self.take(layer, &format!(".lokr_w{n}")) {
                return Some(Factor::Whole(whole));
            }
            let a = self.take(layer, &format!(".lokr_w{n}_a"))?;
            let b = self.take(layer, &format!(".lokr_w{n}_b"))?;
            let core = if n == 2 { self.take(layer, ".lokr_t2") } else { None };
            Some(Factor::Product { a, b, core })
        };
        let (first, second) = (factor(1)?, factor(2)?);
        Some(Change::Kronecker { first, second, scale: scale.clone() })
    }

    fn generalised(&mut self, layer: &str, scale: &Scale) -> Option<Change> {
        let mut factor = |name: &str| self.take(layer, name);
        let factors = [".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"].map(&mut factor);
        let [Some(a1), Some(a2), Some(b1), Some(b2)] = factors else { return None };
        Some(Change::Generalised { factors: [a1, a2, b1, b2], scale: scale.clone() })
    }

    fn orthogonal(&mut self, layer: &str, scale: &Scale) -> Option<Change> {
        let blocks =
            self.take(layer, ".oft_blocks").filter(|blocks| matches!(blocks.shape().len(), 3 | 4))?;
        let rescale = self.take(layer, ".rescale");
        Some(Change::Orthogonal { blocks, rescale, scale: scale.clone() })
    }
}
