//! Quantiles of the Beta distribution, as places in a table.
//!
//! The `beta` scheduler rounds quantiles to table indices. Which index a
//! probability falls on is decided exactly by the cumulative distribution at
//! the boundaries between indices, so no inverse function is needed, except on
//! a boundary itself (the median of a symmetric shape is one): there the
//! quantile is bisected and rounded half to even. (SciPy's own last bit decides
//! at an exact median; for the default shape 0.6, 0.6 it agrees.)

use statrs::function::beta::checked_beta_reg;

/// Probabilities closer than this to a boundary's are bisected. The cumulative
/// distribution is good to about 1e-14.
const BOUNDARY_TOLERANCE: f64 = 1e-11;

/// Halvings after which an interval of length 1 has no f64 between its ends
/// near 1; near 0 the interval keeps shrinking, which costs nothing.
const HALVINGS: usize = 80;

/// A Beta distribution stretched over the indices `0..=last`.
pub(super) struct BetaPlaces {
    alpha: f64,
    beta: f64,
    last: usize,
    /// Cumulative probability half way between index i and i + 1.
    boundaries: Vec<f64>,
}

impl BetaPlaces {
    /// Beta(`alpha`, `beta`), both positive, over the indices `0..=last`.
    pub(super) fn new(alpha: f64, beta: f64, last: usize) -> Self {
        let boundary = |i: usize| cumulative(alpha, beta, (i as f64 + 0.5) / last as f64);
        Self { alpha, beta, last, boundaries: (0..last).map(boundary).collect() }
    }

    /// The index nearest to the quantile of `probability`, half to even.
    pub(super) fn place(&self, probability: f64) -> usize {
        let place = self.boundaries.partition_point(|&boundary| boundary < probability);
        let is_close = |boundary: &f64| (boundary - probability).abs() < BOUNDARY_TOLERANCE;
        let neighbours = place.saturating_sub(1)..(place + 1).min(self.boundaries.len());
        if self.boundaries[neighbours].iter().any(is_close) {
            let quantile = quantile(probability, self.alpha, self.beta);
            return (quantile * self.last as f64).round_ties_even() as usize;
        }
        place
    }
}

/// P(X <= x) for X from Beta(`alpha`, `beta`).
fn cumulative(alpha: f64, beta: f64, x: f64) -> f64 {
    // An overflow inside (absurd shapes) counts as "below".
    checked_beta_reg(alpha, beta, x).unwrap_or(0.0)
}

/// The x in 0..1 with P(X <= x) = `probability`.
fn quantile(probability: f64, alpha: f64, beta: f64) -> f64 {
    if probability <= 0.0 {
        return 0.0;
    }
    if probability >= 1.0 {
        return 1.0;
    }
    if alpha == beta && probability == 0.5 {
        return 0.5;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if cumulative(alpha, beta, middle) < probability {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::{BetaPlaces, quantile};

    /// Closed forms: Beta(1, 1) is uniform; Beta(1/2, 1/2) is the arcsine law,
    /// whose quantile is sin²(πp/2); Beta(2, 1) has the quantile √p.
    #[test]
    fn closed_forms() {
        for i in 0..=1000 {
            let p = f64::from(i) / 1000.0;
            let arcsine = (std::f64::consts::FRAC_PI_2 * p).sin().powi(2);
            assert!((quantile(p, 1.0, 1.0) - p).abs() < 1e-12, "uniform at {p}");
            assert!((quantile(p, 0.5, 0.5) - arcsine).abs() < 1e-12, "arcsine at {p}");
            assert!((quantile(p, 2.0, 1.0) - p.sqrt()).abs() < 1e-12, "power law at {p}");
        }
    }

    /// `rint(scipy.stats.beta.ppf(1 - linspace(0, 1, 20, endpoint=False), a, b) * 999)`
    /// by SciPy 1.17.
    #[test]
    fn places_are_scipys() {
        let recorded: [(f64, f64, [usize; 20]); 5] = [
            (
                1.2,
                0.4,
                [
                    999, 999, 996, 992, 985, 974, 960, 941, 918, 890, 856, 816, 770, 717, 656, 586, 506, 414,
                    308, 180,
                ],
            ),
            (0.05, 3.0, [999, 99, 30, 9, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (
                33.3,
                1.1,
                [
                    999, 997, 995, 993, 991, 989, 986, 984, 981, 979, 976, 972, 969, 965, 960, 954, 948, 939,
                    928, 908,
                ],
            ),
            (
                2.5,
                0.7,
                [
                    999, 994, 985, 974, 961, 946, 929, 910, 889, 866, 841, 813, 782, 748, 709, 665, 614, 553,
                    476, 366,
                ],
            ),
            (0.01, 50.0, [999, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ];
        for (alpha, beta, want) in recorded {
            let places = BetaPlaces::new(alpha, beta, 999);
            let got: Vec<usize> = (0..20).map(|i| places.place(1.0 - f64::from(i) * 0.05)).collect();
            assert_eq!(got, want, "Beta({alpha}, {beta})");
        }
    }

    /// The median of a symmetric shape lies on the boundary 499.5: half to even.
    #[test]
    fn a_boundary_rounds_to_even() {
        for shape in [0.01, 0.6, 1.0, 7.0, 50.0] {
            assert_eq!(BetaPlaces::new(shape, shape, 999).place(0.5), 500, "shape {shape}");
            assert_eq!(BetaPlaces::new(shape, shape, 1001).place(0.5), 500, "shape {shape}");
        }
    }
}
