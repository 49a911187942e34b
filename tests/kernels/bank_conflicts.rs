//! Linear layers and convolutions under the SIMT layer: right, and without a bank conflict of `ldmatrix`.

use std::sync::Arc;

use kiln::backend::cuda::{Gpu, check};
use kiln::driver::simt::{SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;

use crate::library;

#[test]
fn products_are_right_and_ldmatrix_never_conflicts() {
    let driver = Arc::new(SimtDriver::open(&library(SimtVariant::Fast), SimtOptions::default()).unwrap());
    let gpu = Gpu::new(driver.clone()).unwrap();
    let mut tiles = std::collections::BTreeSet::new();
    for case in check::cases().iter().filter(|c| c.quick && matches!(c.family, "gemm" | "conv")) {
        let measured = check::run(&gpu, case, &check::Options::default()).unwrap();
        assert!(measured.error <= case.tolerance, "{}: error {}", case.name, measured.error);
        // A split product ends with the kernel that adds the splits, which loads no matrices.
        assert_eq!(driver.last_bank_conflicts(), 0, "{}", case.name);
        if let Some((rest, "1")) = case.name.rsplit_once(" /") {
            tiles.insert(rest.rsplit(' ').next().unwrap_or_default().to_owned());
        }
    }
    assert_eq!(tiles.into_iter().collect::<Vec<_>>(), ["128x128", "128x160", "128x80", "64x64", "any"]);
}
