//! Regional prompting: the predictions of a side's conditionings averaged by place, weighted with strength, mask and
//! area.
//!
//! On a device the parts of the latent and the predictions stay there; weights are copied to it once in a run.

use super::conditioning::{Rect, ResolvedCond};
use super::field::Placed;
use super::model::{DenoiseItem, Model};
use super::{DiffusionError, Field};
use crate::tensor::HostTensor;

/// A conditioning at work: which side, where, and with what weights.
struct Piece<'a> {
    side: usize,
    cond: &'a ResolvedCond,
    rect: Rect,
    x: Field,
    /// `[B or 1, 1, h, w]` over `rect`; `None` is `strength` everywhere.
    weights: Option<Field>,
}

/// The averaged prediction of every side at `sigma`, where `x` is, as far as that goes; zeros in host memory for `None`.
///
/// # Errors
/// What the model returns, and [`DiffusionError::Shape`] if it returns other
/// shapes than it was given.
pub fn evaluate(
    model: &dyn Model,
    sides: &[Option<&[ResolvedCond]>],
    x: &Field,
    sigma: f32,
) -> Result<Vec<Field>, DiffusionError> {
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    let mut crops = Crops { x, parts: Vec::new() };
    for (side, conds) in sides.iter().enumerate() {
        for cond in conds.iter().copied().flatten().filter(|c| c.is_active(sigma)) {
            pieces.extend(Piece::new(side, cond, &mut crops)?);
        }
    }
    let mut sums: Vec<Sum> = sides.iter().map(|_| Sum::default()).collect();
    while let Some(first) = pieces.first() {
        let joins = |p: &Piece<'_>| p.is_like(&first.x) && model.can_batch(&first.cond.entry, &p.cond.entry);
        let joins: Vec<bool> = pieces.iter().map(joins).collect();
        let mut batch = Vec::with_capacity(pieces.len());
        for (piece, joins) in std::mem::take(&mut pieces).into_iter().zip(joins) {
            if joins { batch.push(piece) } else { pieces.push(piece) }
        }
        batch.reverse();
        let full_size = (x.dim(2), x.dim(3));
        let items: Vec<DenoiseItem<'_>> = batch.iter().map(|p| p.item(full_size)).collect();
        let outputs = model.denoise(&items, sigma)?;
        for (piece, output) in batch.iter().zip(outputs) {
            if output.shape() != piece.x.shape() {
                let (got, want) = (output.shape().to_vec(), piece.x.shape().to_vec());
                return Err(DiffusionError::Shape { what: "the model's prediction", got, want });
            }
            if let Some(sum) = sums.get_mut(piece.side) {
                let weights = piece.weights.clone();
                sum.parts.push(Part {
                    output,
                    rect: piece.rect,
                    strength: piece.cond.entry.strength,
                    weights,
                });
            }
        }
    }
    sums.into_iter().map(|sum| sum.mean(x)).collect()
}

/// Cells of the ramp on an area's inner edges.
const RAMP: usize = 8;

impl<'a> Piece<'a> {
    /// What the model is asked.
    fn item(&self, full_size: (usize, usize)) -> DenoiseItem<'_> {
        DenoiseItem {
            x: &self.x,
            cond: &self.cond.entry,
            full_size,
            offset: (self.rect.y, self.rect.x),
            is_negative: self.cond.is_negative,
            run: &self.cond.run,
        }
    }

    /// Whether a call can take this piece beside one for `x`: of the same shape, in the same place.
    fn is_like(&self, x: &Field) -> bool {
        match x {
            Field::Host(x) => self.x.on_device().is_none() && self.x.shape() == x.shape(),
            Field::Device(_) => self.x.is_same_on_device(x),
        }
    }

    /// `None` if the area lies outside the latent.
    fn new(
        side: usize,
        cond: &'a ResolvedCond,
        crops: &mut Crops<'_>,
    ) -> Result<Option<Self>, DiffusionError> {
        let x = crops.x;
        let (h, w) = (x.dim(2), x.dim(3));
        if let Some(mask) = cond.mask.as_ref().filter(|m| (m.dim(1), m.dim(2)) != (h, w)) {
            let (got, want) = (mask.shape().to_vec(), vec![mask.dim(0), h, w]);
            return Err(DiffusionError::Shape { what: "mask of a conditioning", got, want });
        }
        let rect = cond.rect.map_or(whole(x), |r| Rect {
            height: r.height.min(h.saturating_sub(r.y)),
            width: r.width.min(w.saturating_sub(r.x)),
            ..r
        });
        if rect.height == 0 || rect.width == 0 {
            return Ok(None);
        }
        let weights = cond.weights.over(rect, (h, w), || {
            let weights = match (&cond.mask, cond.rect) {
                (Some(mask), _) => Some(mask_weights(mask, rect, cond)),
                (None, Some(_)) => Some(ramp_weights(rect, (h, w), cond.entry.strength as f32)),
                (None, None) => None,
            };
            weights.map(|weights| Field::Host(weights).beside(x)).transpose()
        })?;
        Ok(Some(Self { side, cond, rect, x: crops.part(rect)?, weights }))
    }
}

/// The place of a whole picture.
fn whole(x: &Field) -> Rect {
    Rect { height: x.dim(2), width: x.dim(3), y: 0, x: 0 }
}

/// Parts of a latent: conditionings for the same place share one, and so a call of the model.
struct Crops<'a> {
    x: &'a Field,
    parts: Vec<(Rect, Field)>,
}

impl Crops<'_> {
    fn part(&mut self, rect: Rect) -> Result<Field, DiffusionError> {
        if rect == whole(self.x) {
            return Ok(self.x.clone());
        }
        if let Some((_, part)) = self.parts.iter().find(|(known, _)| *known == rect) {
            return Ok(part.clone());
        }
        let part = match self.x {
            Field::Host(x) => crop(x, rect).into(),
            Field::Device(x) => Field::Device(x.crop([rect.y, rect.x], [rect.height, rect.width])?),
        };
        self.parts.push((rect, part.clone()));
        Ok(part)
    }
}

fn crop(x: &HostTensor, rect: Rect) -> HostTensor {
    let (b, c, h, w) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    let mut out = Vec::with_capacity(b * c * rect.height * rect.width);
    for plane in x.data().chunks_exact(h * w) {
        for row in plane.chunks_exact(w).skip(rect.y).take(rect.height) {
            out.extend_from_slice(&row[rect.x..rect.x + rect.width]);
        }
    }
    HostTensor::new(&[b, c, rect.height, rect.width], out).unwrap_or_default()
}

fn mask_weights(mask: &HostTensor, rect: Rect, cond: &ResolvedCond) -> HostTensor {
    let (b, h, w) = (mask.dim(0), mask.dim(1), mask.dim(2));
    let as_latent = mask.clone().reshape(&[b, 1, h, w]).unwrap_or_default();
    let (mask_strength, strength) = (cond.entry.mask_strength as f32, cond.entry.strength as f32);
    crop(&as_latent, rect).map(|v| v * mask_strength * strength)
}

/// `strength`, rising linearly over a few cells from every edge inside the picture.
fn ramp_weights(rect: Rect, full: (usize, usize), strength: f32) -> HostTensor {
    let profile = |length: usize, start: usize, full: usize| -> Vec<f32> {
        let ramp = RAMP.min(length / 4);
        let rise = |distance: usize| {
            if distance < ramp { (1.0 / ramp as f64 * (distance + 1) as f64) as f32 } else { 1.0 }
        };
        let low = |i: usize| if start != 0 { rise(i) } else { 1.0 };
        let high = |i: usize| if start + length < full { rise(length - 1 - i) } else { 1.0 };
        (0..length).map(|i| low(i) * high(i)).collect()
    };
    let rows = profile(rect.height, rect.y, full.0);
    let columns = profile(rect.width, rect.x, full.1);
    let width = rect.width;
    HostTensor::from_fn(&[1, 1, rect.height, width], |i| strength * rows[i / width] * columns[i % width])
}

/// A prediction with its place and weights.
struct Part {
    output: Field,
    rect: Rect,
    strength: f64,
    weights: Option<Field>,
}

/// A weighted mean by place in the making.
#[derive(Default)]
struct Sum {
    parts: Vec<Part>,
}

impl Sum {
    /// Where the parts are; zeros in host memory if there are none.
    fn mean(self, x: &Field) -> Result<Field, DiffusionError> {
        if self.parts.is_empty() || self.parts.iter().any(|part| part.output.on_device().is_none()) {
            let mut sum = HostSum::new(x.shape());
            for part in &self.parts {
                let weights = part.weights.as_ref().map(Field::to_host).transpose()?;
                sum.add(part, weights.as_deref(), &*part.output.to_host()?);
            }
            return Ok(sum.mean().into());
        }
        if self.parts.iter().any(|part| part.weights.is_some()) {
            let placed = |part: &Part| Placed {
                field: part.output.clone(),
                at: [part.rect.y, part.rect.x],
                strength: part.strength as f32,
                weights: part.weights.clone(),
            };
            let parts: Vec<Placed> = self.parts.iter().map(placed).collect();
            return Field::mean_by_place(&parts, x, COVERED as f32);
        }
        if let [part] = self.parts.as_slice()
            && part.strength != 0.0
        {
            return Ok(part.output.clone());
        }
        let total: f64 = self.parts.iter().map(|part| part.strength).sum();
        let weighted = self.parts.iter().map(|part| (part.strength / (total + COVERED), &part.output));
        Field::lincomb(&weighted.collect::<Vec<_>>())
    }
}

/// Weight of every place before anything covers it: a place that nothing covers becomes 0 / 1e-37 = 0.
const COVERED: f64 = 1e-37;

/// The same in host memory.
struct HostSum {
    total: HostTensor,
    weight: HostTensor,
}

impl HostSum {
    fn new(shape: &[usize]) -> Self {
        Self { total: HostTensor::zeros(shape), weight: HostTensor::full(shape, COVERED as f32) }
    }

    fn add(&mut self, part: &Part, weights: Option<&HostTensor>, output: &HostTensor) {
        let (channels, h, w) = (self.total.dim(1), self.total.dim(2), self.total.dim(3));
        let rect = part.rect;
        let uniform = part.strength as f32;
        let (total, weight) = (self.total.data_mut(), self.weight.data_mut());
        for (row, line) in output.data().chunks_exact(rect.width).enumerate() {
            let (plane, y) = (row / rect.height, row % rect.height);
            let start = (plane * h + rect.y + y) * w + rect.x;
            for (i, &value) in line.iter().enumerate() {
                let m = match weights {
                    None => uniform,
                    Some(t) => {
                        let sample = (plane / channels) % t.dim(0).max(1);
                        t.data()[(sample * rect.height + y) * rect.width + i]
                    }
                };
                total[start + i] += value * m;
                weight[start + i] += m;
            }
        }
    }

    fn mean(self) -> HostTensor {
        self.total.zip(&self.weight, |t, w| t / w)
    }
}
