//! Conditioning: what to denoise towards, where in the picture and when.
//!
//! Entries hold what nodes set, in the units nodes use (fractions, percentages,
//! masks of any size). [`resolve`] turns them into cells of one latent and into
//! sigmas of one model.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::inpaint::resize_mask;
use super::model::RunInputs;
use super::schedule::ModelSampling;
use super::{DiffusionError, Field};
use crate::tensor::HostTensor;

/// A list of conditionings that act side by side: what a `CONDITIONING` link carries.
pub type Conditioning = Vec<CondEntry>;

/// A rectangle of the picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Area {
    /// In latent cells.
    Cells(Rect),
    /// In fractions of the picture.
    Fraction {
        /// Height.
        height: f64,
        /// Width.
        width: f64,
        /// Top edge.
        y: f64,
        /// Left edge.
        x: f64,
    },
}

/// A rectangle in latent cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Height.
    pub height: usize,
    /// Width.
    pub width: usize,
    /// Top edge.
    pub y: usize,
    /// Left edge.
    pub x: usize,
}

impl Rect {
    fn contains(&self, inner: &Rect) -> bool {
        inner.y >= self.y
            && inner.x >= self.x
            && inner.y + inner.height <= self.y + self.height
            && inner.x + inner.width <= self.x + self.width
    }
}

/// Further typed values of a conditioning by name.
#[derive(Clone, Default)]
pub struct Extras(BTreeMap<String, Arc<dyn Any + Send + Sync>>);

impl Extras {
    /// The value of that name, if it has type `T`.
    pub fn get<T: Any + Send + Sync>(&self, name: &str) -> Option<Arc<T>> {
        self.0.get(name)?.clone().downcast().ok()
    }

    /// Sets a value.
    pub fn insert<T: Any + Send + Sync>(&mut self, name: &str, value: T) {
        self.0.insert(name.to_owned(), Arc::new(value));
    }

    /// Sets a value that others share.
    pub fn insert_shared<T: Any + Send + Sync>(&mut self, name: &str, value: Arc<T>) {
        self.0.insert(name.to_owned(), value);
    }

    /// Whether there is a value of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Takes over another one's value, if it has one.
    pub fn copy(&mut self, name: &str, from: &Self) {
        if let Some(value) = from.0.get(name) {
            self.0.insert(name.to_owned(), value.clone());
        }
    }

    /// Removes a value.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }
}

impl fmt::Debug for Extras {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// One conditioning.
#[derive(Clone, Debug)]
pub struct CondEntry {
    /// Text embedding `[1, tokens, width]`.
    pub cond: Arc<HostTensor>,
    /// Pooled text embedding `[1, width]`.
    pub pooled: Option<Arc<HostTensor>>,
    /// Limits the conditioning to a rectangle.
    pub area: Option<Area>,
    /// Weight in the mean with others.
    pub strength: f64,
    /// Weights by place `[B, H, W]`, at any size.
    pub mask: Option<Arc<HostTensor>>,
    /// Factor on the mask.
    pub mask_strength: f64,
    /// Makes the mask's bounding box the area.
    pub set_area_to_bounds: bool,
    /// Share of the sampling at which the conditioning begins.
    pub start_percent: Option<f64>,
    /// Share of the sampling at which the conditioning ends.
    pub end_percent: Option<f64>,
    /// Further inputs of the model (picture sizes for SDXL, …); they belong to the embedding.
    pub extra: Extras,
    /// What acts beside the embedding (control nets, …); it belongs to area and range.
    pub attachments: Extras,
}

impl CondEntry {
    /// A conditioning of the whole picture at all times.
    pub fn new(cond: Arc<HostTensor>) -> Self {
        Self {
            cond,
            pooled: None,
            area: None,
            strength: 1.0,
            mask: None,
            mask_strength: 1.0,
            set_area_to_bounds: false,
            start_percent: None,
            end_percent: None,
            extra: Extras::default(),
            attachments: Extras::default(),
        }
    }
}

/// Every conditioning of `to` with the tokens of `from`'s first one appended.
///
/// # Errors
/// [`DiffusionError::Shape`] if the embeddings differ in batch or width.
pub fn concat(to: &[CondEntry], from: &[CondEntry]) -> Result<Conditioning, DiffusionError> {
    let Some(other) = from.first() else { return Ok(to.to_vec()) };
    let append = |entry: &CondEntry| {
        let (a, b) = (&entry.cond, &other.cond);
        check_embedding(b, a)?;
        let data: Vec<f32> = (0..a.dim(0)).flat_map(|i| [a.row(i), b.row(i)].concat()).collect();
        let cond = HostTensor::new(&[a.dim(0), a.dim(1) + b.dim(1), a.dim(2)], data);
        Ok(CondEntry { cond: cond.map_or_else(|| a.clone(), Arc::new), ..entry.clone() })
    };
    to.iter().map(append).collect()
}

/// `strength · to + (1 − strength) · from`, with the first conditioning of `from`
/// cut or padded with zeros to the token count of each of `to`.
///
/// # Errors
/// [`DiffusionError::Shape`] if the embeddings differ in batch or width.
pub fn average(to: &[CondEntry], from: &[CondEntry], strength: f32) -> Result<Conditioning, DiffusionError> {
    let Some(other) = from.first() else { return Ok(to.to_vec()) };
    let mix = |a: &[f32], b: &[f32]| -> Vec<f32> {
        let padded = b.iter().copied().chain(std::iter::repeat(0.0));
        a.iter().zip(padded).map(|(a, b)| a * strength + b * (1.0 - strength)).collect()
    };
    let average = |entry: &CondEntry| {
        let (a, b) = (&entry.cond, &other.cond);
        check_embedding(b, a)?;
        let data: Vec<f32> = (0..a.dim(0)).flat_map(|i| mix(a.row(i), b.row(i))).collect();
        let cond = HostTensor::new(a.shape(), data).map_or_else(|| a.clone(), Arc::new);
        let pooled = match (&entry.pooled, &other.pooled) {
            (Some(a), Some(b)) if a.len() == b.len() => {
                HostTensor::new(a.shape(), mix(a.data(), b.data())).map(Arc::new)
            }
            (Some(a), _) => Some(a.clone()),
            (None, b) => b.clone(),
        };
        Ok(CondEntry { cond, pooled, ..entry.clone() })
    };
    to.iter().map(average).collect()
}

/// Whether an embedding `[1, tokens, width]` goes with another one.
fn check_embedding(got: &HostTensor, with: &HostTensor) -> Result<(), DiffusionError> {
    if got.shape().len() == 3 && got.dim(0) == with.dim(0) && got.dim(2) == with.dim(2) {
        return Ok(());
    }
    let (got, want) = (got.shape().to_vec(), with.shape().to_vec());
    Err(DiffusionError::Shape { what: "text embedding of the second conditioning", got, want })
}

/// The same conditionings with all embeddings zero.
pub fn zero_out(conds: &[CondEntry]) -> Conditioning {
    let zeros = |t: &Arc<HostTensor>| Arc::new(HostTensor::zeros(t.shape()));
    let zero = |entry: &CondEntry| CondEntry {
        cond: zeros(&entry.cond),
        pooled: entry.pooled.as_ref().map(zeros),
        ..entry.clone()
    };
    conds.iter().map(zero).collect()
}

/// A conditioning in cells of one latent and sigmas of one model.
#[derive(Clone, Debug)]
pub struct ResolvedCond {
    /// The conditioning.
    pub entry: CondEntry,
    /// Its rectangle, which may reach beyond the latent.
    pub rect: Option<Rect>,
    /// Its weights `[B, h, w]` by cell of the whole latent, without `mask_strength`.
    pub mask: Option<Arc<HostTensor>>,
    /// Used at this sigma and below.
    pub start_sigma: Option<f64>,
    /// Used at this sigma and above.
    pub end_sigma: Option<f64>,
    /// Whether it is one to denoise away from.
    pub is_negative: bool,
    /// What the run starts from.
    pub run: Arc<RunInputs>,
    /// Its weights where the run is.
    pub weights: KnownWeights,
}

/// Where something is in a picture of some size: its rectangle, and height and width of the picture.
type Place = (Rect, (usize, usize));
/// Weights, if there are any, and where they are.
type PlacedWeights = (Place, Option<Field>);

/// Weights by place, which do not change during a run. Copies are of one conditioning and share them.
#[derive(Clone, Debug, Default)]
pub struct KnownWeights(Arc<Mutex<Option<PlacedWeights>>>);

impl KnownWeights {
    /// The weights over `rect` of a picture of `size`: those that are known, or what `make` gives.
    pub(super) fn over(
        &self,
        rect: Rect,
        size: (usize, usize),
        make: impl FnOnce() -> Result<Option<Field>, DiffusionError>,
    ) -> Result<Option<Field>, DiffusionError> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, weights)) = known.as_ref().filter(|(place, _)| *place == (rect, size)) {
            return Ok(weights.clone());
        }
        let weights = make()?;
        *known = Some(((rect, size), weights.clone()));
        Ok(weights)
    }
}

impl ResolvedCond {
    /// Whether the conditioning counts at `sigma`.
    pub fn is_active(&self, sigma: f32) -> bool {
        let sigma = f64::from(sigma);
        self.start_sigma.is_none_or(|start| sigma <= start) && self.end_sigma.is_none_or(|end| sigma >= end)
    }
}

/// Smallest side of the box around a mask, in cells.
const MIN_BOUNDS: usize = 8;

/// Resolves a conditioning for a latent of `size` (height, width).
pub fn resolve(entry: &CondEntry, size: (usize, usize), sampling: &ModelSampling) -> ResolvedCond {
    let mut rect = entry.area.map(|area| match area {
        Area::Cells(rect) => rect,
        Area::Fraction { height, width, y, x } => {
            let cells = |part: f64, all: usize| (part * all as f64).round_ties_even() as usize;
            Rect {
                height: cells(height, size.0).max(1),
                width: cells(width, size.1).max(1),
                y: cells(y, size.0),
                x: cells(x, size.1),
            }
        }
    });
    let mask = entry.mask.as_ref().map(|mask| Arc::new(resize_mask(mask, size)));
    if let Some(mask) = mask.as_ref().filter(|_| entry.set_area_to_bounds) {
        rect = Some(bounds(mask));
    }
    ResolvedCond {
        entry: entry.clone(),
        rect,
        mask,
        start_sigma: entry.start_percent.map(|p| sampling.percent_to_sigma(p)),
        end_sigma: entry.end_percent.map(|p| sampling.percent_to_sigma(p)),
        is_negative: false,
        run: Arc::default(),
        weights: KnownWeights::default(),
    }
}

/// The box around all cells that any sample's mask `[B, h, w]` touches.
fn bounds(mask: &HostTensor) -> Rect {
    let (h, w) = (mask.dim(1), mask.dim(2));
    let (mut top, mut left, mut bottom, mut right) = (usize::MAX, usize::MAX, 0, 0);
    for (i, _) in mask.data().iter().enumerate().filter(|(_, v)| **v != 0.0) {
        let (y, x) = (i / w % h, i % w);
        (top, left) = (top.min(y), left.min(x));
        (bottom, right) = (bottom.max(y), right.max(x));
    }
    if top == usize::MAX {
        return Rect { height: MIN_BOUNDS, width: MIN_BOUNDS, y: 0, x: 0 };
    }
    Rect {
        height: (bottom - top + 1).max(MIN_BOUNDS),
        width: (right - left + 1).max(MIN_BOUNDS),
        y: top,
        x: left,
    }
}

/// Gives every conditioning with an area a counterpart on the other sides, so
/// that all sides mix with the same weights: the smallest conditioning there that
/// encloses the area is used once more in that area (unless it has exactly that
/// area), with the first one's strength, mask and range.
pub fn match_areas(sides: &mut [Vec<ResolvedCond>]) {
    for side in 0..sides.len() {
        for i in 0..sides[side].len() {
            let cond = sides[side][i].clone();
            for (_, other) in sides.iter_mut().enumerate().filter(|(k, _)| *k != side) {
                if let Some(extra) = counterpart(&cond, other) {
                    other.push(extra);
                }
            }
        }
    }
}

/// Gives attachment `name` of positive conditionings that have `flag` to the other sides' conditionings, in
/// turn, if none there has one. Conditionings with an area are left out.
pub fn share_attachment(sides: &mut [Vec<ResolvedCond>], name: &str, flag: &str) {
    let Some((positive, others)) = sides.split_first_mut() else { return };
    let is_whole = |cond: &&ResolvedCond| cond.rect.is_none();
    let has = |cond: &ResolvedCond| cond.entry.attachments.contains(name);
    let shared: Vec<_> = positive
        .iter()
        .filter(is_whole)
        .filter(|cond| has(cond) && cond.entry.attachments.contains(flag))
        .map(|cond| cond.entry.attachments.clone())
        .collect();
    for side in others {
        let mut bare: Vec<&mut ResolvedCond> = side.iter_mut().filter(|cond| cond.rect.is_none()).collect();
        if bare.is_empty() || bare.iter().any(|cond| has(cond)) {
            continue;
        }
        let count = bare.len();
        for (i, attachments) in shared.iter().enumerate() {
            bare[i % count].entry.attachments.copy(name, attachments);
        }
    }
}

fn counterpart(cond: &ResolvedCond, others: &[ResolvedCond]) -> Option<ResolvedCond> {
    let rect = cond.rect?;
    let mut smallest: Option<&ResolvedCond> = None;
    for other in others {
        match (other.rect, smallest.map(|s| s.rect)) {
            (Some(r), _) if !r.contains(&rect) => {}
            (_, None) => smallest = Some(other),
            (Some(_), Some(None)) => smallest = Some(other),
            (Some(r), Some(Some(s))) if r.height * r.width < s.height * s.width => smallest = Some(other),
            _ => {}
        }
    }
    let smallest = smallest.filter(|s| s.rect != Some(rect))?;
    let mut entry = cond.entry.clone();
    entry.cond = smallest.entry.cond.clone();
    entry.pooled = smallest.entry.pooled.clone();
    entry.extra = smallest.entry.extra.clone();
    let (is_negative, run) = (smallest.is_negative, smallest.run.clone());
    Some(ResolvedCond { entry, is_negative, run, ..cond.clone() })
}
