//! Lagrange interpolation for multistep methods.

/// Coefficients (lowest power first) of the Lagrange polynomial that is 1 at
/// `nodes[which]` and 0 at the others.
pub(super) fn lagrange(nodes: &[f64], which: usize) -> Vec<f64> {
    let mut poly = vec![1.0];
    for (_, &node) in nodes.iter().enumerate().filter(|(i, _)| *i != which) {
        let scale = 1.0 / (nodes[which] - node);
        let mut next = vec![0.0; poly.len() + 1];
        for (power, &c) in poly.iter().enumerate() {
            next[power + 1] += c * scale;
            next[power] -= c * scale * node;
        }
        poly = next;
    }
    poly
}

/// Weights `w` such that `Σ w·f(node)` integrates the interpolant of `f`
/// against a kernel whose moments `∫ u^k` over the step are `moments[k]`.
pub(super) fn quadrature_weights(nodes: &[f64], moments: &[f64]) -> Vec<f64> {
    (0..nodes.len()).map(|j| lagrange(nodes, j).iter().zip(moments).map(|(c, m)| c * m).sum()).collect()
}

/// Weights of the plain integral over `[from, to]` for samples at `nodes`
/// (the Adams-Bashforth weights of a variable-step method).
pub(super) fn adams_weights(nodes: &[f64], from: f64, to: f64) -> Vec<f64> {
    // Powers are taken relative to `from`, which keeps them small.
    let shifted: Vec<f64> = nodes.iter().map(|n| n - from).collect();
    let h = to - from;
    let moments: Vec<f64> = (1..=nodes.len()).map(|k| h.powi(k as i32) / k as f64).collect();
    quadrature_weights(&shifted, &moments)
}

#[cfg(test)]
mod tests {
    use super::adams_weights;

    /// Equal steps give the textbook Adams-Bashforth weights.
    #[test]
    fn equal_steps_are_adams_bashforth() {
        let w = adams_weights(&[3.0, 2.0, 1.0, 0.0], 3.0, 4.0);
        for (got, want) in w.iter().zip([55.0, -59.0, 37.0, -9.0]) {
            assert!((got - want / 24.0).abs() < 1e-12, "{got} {want}");
        }
    }
}
