//! The quantile function of the Beta distribution.
//!
//! The `beta` scheduler rounds quantiles to table indices, so a quantile must
//! be right to about 1e-9; bisection on the regularised incomplete beta
//! function needs no tuning for any shape and gives full precision.

use statrs::function::beta::checked_beta_reg;

/// Halvings after which an interval of length 1 has no f64 between its ends
/// near 1; near 0 the interval keeps shrinking, which costs nothing.
const HALVINGS: usize = 80;

/// The x in 0..1 at which Beta(`alpha`, `beta`)'s cumulative probability is
/// `probability`; both shape parameters must be positive.
pub(super) fn beta_quantile(probability: f64, alpha: f64, beta: f64) -> f64 {
    if probability <= 0.0 {
        return 0.0;
    }
    if probability >= 1.0 {
        return 1.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        // An overflow inside (absurd shapes) counts as "below".
        if checked_beta_reg(alpha, beta, middle).unwrap_or(0.0) < probability {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::beta_quantile;

    /// Closed forms: Beta(1, 1) is uniform; Beta(1/2, 1/2) is the arcsine law,
    /// whose quantile is sin²(πp/2); Beta(2, 1) has the quantile √p.
    #[test]
    fn closed_forms() {
        for i in 0..=1000 {
            let p = f64::from(i) / 1000.0;
            let arcsine = (std::f64::consts::FRAC_PI_2 * p).sin().powi(2);
            assert!((beta_quantile(p, 1.0, 1.0) - p).abs() < 1e-12, "uniform at {p}");
            assert!((beta_quantile(p, 0.5, 0.5) - arcsine).abs() < 1e-12, "arcsine at {p}");
            assert!((beta_quantile(p, 2.0, 1.0) - p.sqrt()).abs() < 1e-12, "power law at {p}");
        }
    }
}
