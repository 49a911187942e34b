//! Running a resizing network in overlapping tiles, feathered together.
//!
//! Each pass cuts the input into tiles of one shape, and adds up the results
//! under weights that rise linearly over the overlap. Three passes with tall,
//! wide and square tiles are averaged, so that no seam lies in the same place
//! in all of them.

use crate::models::ModelError;
use crate::tensor::HostTensor;

/// Tile sizes in units of the network's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Side of the square tiles.
    pub tile: usize,
    /// Overlap of neighbouring tiles.
    pub overlap: usize,
}

/// How the network changes sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Output is this many times larger.
    Up(usize),
    /// Output is this many times smaller.
    Down(usize),
}

impl Scale {
    fn apply(self, n: usize) -> usize {
        match self {
            Scale::Up(s) => n * s,
            // Rounds half to even, as the reference's language does.
            Scale::Down(s) => (n as f64 / s as f64).round_ties_even() as usize,
        }
    }
}

impl Tiling {
    /// The three tile shapes (width, height) that are averaged.
    fn passes(self) -> [(usize, usize); 3] {
        let (half, double) = ((self.tile / 2).max(1), self.tile * 2);
        [(half, double), (double, half), (self.tile, self.tile)]
    }
}

/// Runs `network` over `x` `[B, C, h, w]` in tiles and averages three passes.
/// `progress` is called before each tile with (done, total).
pub fn run(
    x: &HostTensor,
    tiling: Tiling,
    scale: Scale,
    mut network: impl FnMut(&HostTensor) -> Result<HostTensor, ModelError>,
    mut progress: impl FnMut(usize, usize) -> Result<(), ModelError>,
) -> Result<HostTensor, ModelError> {
    let (h, w) = (x.dim(2), x.dim(3));
    let tiles_of =
        |(tw, th): (usize, usize)| starts(h, th, tiling.overlap).len() * starts(w, tw, tiling.overlap).len();
    let total: usize = x.dim(0) * tiling.passes().into_iter().map(tiles_of).sum::<usize>();
    let mut done = 0;
    let mut sum: Option<HostTensor> = None;
    for (tw, th) in tiling.passes() {
        let pass = Pass { th, tw, overlap: tiling.overlap, scale };
        let out = pass.run(x, &mut |tile| {
            progress(done, total)?;
            done += 1;
            network(tile)
        })?;
        sum = Some(match sum {
            None => out,
            Some(sum) => sum.zip(&out, |a, b| a + b),
        });
    }
    Ok(sum.unwrap_or_default().map(|v| v / 3.0))
}

/// Runs `network` over `x` in square tiles of `tiling`, once.
/// `progress` is called before each tile with (done, total).
pub fn run_once(
    x: &HostTensor,
    tiling: Tiling,
    scale: Scale,
    mut network: impl FnMut(&HostTensor) -> Result<HostTensor, ModelError>,
    mut progress: impl FnMut(usize, usize) -> Result<(), ModelError>,
) -> Result<HostTensor, ModelError> {
    let Tiling { tile, overlap } = tiling;
    let total = x.dim(0) * starts(x.dim(2), tile, overlap).len() * starts(x.dim(3), tile, overlap).len();
    let mut done = 0;
    Pass { th: tile, tw: tile, overlap, scale }.run(x, &mut |part| {
        progress(done, total)?;
        done += 1;
        network(part)
    })
}

/// Where tiles of side `tile` begin on a side of length `n`.
fn starts(n: usize, tile: usize, overlap: usize) -> Vec<usize> {
    if n <= tile {
        return vec![0];
    }
    let step = tile.saturating_sub(overlap).max(1);
    let last = n - overlap.min(n);
    (0..last).step_by(step).map(|s| s.min(last)).collect()
}

struct Pass {
    th: usize,
    tw: usize,
    overlap: usize,
    scale: Scale,
}

impl Pass {
    fn run(
        &self,
        x: &HostTensor,
        network: &mut dyn FnMut(&HostTensor) -> Result<HostTensor, ModelError>,
    ) -> Result<HostTensor, ModelError> {
        let mut samples = Vec::new();
        let mut channels = 0;
        let (h, w) = (x.dim(2), x.dim(3));
        for b in 0..x.dim(0) {
            let sample = x.rows(b, 1);
            let out =
                if h <= self.th && w <= self.tw { network(&sample)? } else { self.sample(&sample, network)? };
            channels = out.dim(1);
            samples.extend(out.into_data());
        }
        let shape = [x.dim(0), channels, self.scale.apply(h), self.scale.apply(w)];
        HostTensor::new(&shape, samples).ok_or(ModelError::Input {
            what: "tile output size",
            expected: shape[2],
            found: h,
        })
    }

    fn sample(
        &self,
        x: &HostTensor,
        network: &mut dyn FnMut(&HostTensor) -> Result<HostTensor, ModelError>,
    ) -> Result<HostTensor, ModelError> {
        let (h, w) = (x.dim(2), x.dim(3));
        let (oh, ow) = (self.scale.apply(h), self.scale.apply(w));
        let feather = self.scale.apply(self.overlap);
        let mut sum: Vec<f32> = Vec::new();
        let mut weight = vec![0.0f32; oh * ow];
        for &y in &starts(h, self.th, self.overlap) {
            for &left in &starts(w, self.tw, self.overlap) {
                let (hl, wl) = (self.th.min(h - y), self.tw.min(w - left));
                let tile = network(&crop(x, (y, hl), (left, wl)))?;
                let (c, th, tw) = (tile.dim(1), tile.dim(2), tile.dim(3));
                sum.resize(c * oh * ow, 0.0);
                let (ramp_y, ramp_x) = (ramp(th, feather), ramp(tw, feather));
                let (oy, ox) = (self.scale.apply(y), self.scale.apply(left));
                for (r, my) in ramp_y.iter().enumerate().take(oh.saturating_sub(oy)) {
                    for (k, mx) in ramp_x.iter().enumerate().take(ow.saturating_sub(ox)) {
                        let m = my * mx;
                        let at = (oy + r) * ow + ox + k;
                        weight[at] += m;
                        for ch in 0..c {
                            sum[ch * oh * ow + at] += tile.data()[(ch * th + r) * tw + k] * m;
                        }
                    }
                }
            }
        }
        for plane in sum.chunks_exact_mut((oh * ow).max(1)) {
            plane.iter_mut().zip(&weight).for_each(|(v, w)| *v /= w);
        }
        let c = sum.len() / (oh * ow).max(1);
        HostTensor::new(&[1, c, oh, ow], sum).ok_or(ModelError::Input {
            what: "tile output size",
            expected: oh,
            found: 0,
        })
    }
}

/// Weights along one side: rise over `feather` cells from each end.
fn ramp(n: usize, feather: usize) -> Vec<f32> {
    let mut ramp = vec![1.0f32; n];
    if feather >= n {
        return ramp;
    }
    for t in 0..feather {
        let a = (t + 1) as f32 / feather as f32;
        ramp[t] *= a;
        ramp[n - 1 - t] *= a;
    }
    ramp
}

/// Rows `y..y + hl`, columns `x..x + wl` of every channel.
fn crop(t: &HostTensor, (y, hl): (usize, usize), (x, wl): (usize, usize)) -> HostTensor {
    let (c, h, w) = (t.dim(1), t.dim(2), t.dim(3));
    HostTensor::from_fn(&[1, c, hl, wl], |i| {
        let (ch, r, k) = (i / (hl * wl), i / wl % hl, i % wl);
        t.data()[(ch * h + y + r) * w + x + k]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_side_and_stay_inside() {
        for n in 1..200 {
            for (tile, overlap) in [(64, 16), (32, 8), (16, 4), (8, 2), (5, 0)] {
                let s = starts(n, tile, overlap);
                let mut covered = 0;
                for &p in &s {
                    assert!(p <= covered, "gap before {p} at n={n} tile={tile}");
                    covered = covered.max((p + tile).min(n));
                }
                assert_eq!(covered, n, "n={n} tile={tile} overlap={overlap}");
            }
        }
    }

    #[test]
    fn an_identity_network_gives_the_input_back() {
        // f32 rounding of weighted sums of up to 16 tiles: 1e-5 relative.
        let x = HostTensor::from_fn(&[2, 3, 37, 50], |i| (i % 101) as f32 / 7.0 - 5.0);
        let tiling = Tiling { tile: 16, overlap: 4 };
        let y = run(&x, tiling, Scale::Up(1), |t| Ok(t.clone()), |_, _| Ok(())).unwrap();
        let worst = x.data().iter().zip(y.data()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{worst}");
    }
}
