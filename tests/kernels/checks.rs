//! Every kernel against its reference under the SIMT layer: three orders of threads, both builds, both tiers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use kiln::backend::cuda::Gpu;
use kiln::backend::cuda::check::{self, Case, Options};
use kiln::driver::simt::{Order, SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;
use kiln::driver::{Capability, Driver};

use crate::library;

const AMPERE: Capability = Capability { major: 8, minor: 0 };
const HOPPER: Capability = Capability { major: 9, minor: 0 };

pub(crate) fn pass(variant: SimtVariant, options: SimtOptions, takes: impl Fn(&Case) -> bool) {
    let driver = SimtDriver::open(&library(variant), options).expect("the library loads");
    let driver: Arc<dyn Driver> = Arc::new(driver);
    let before = driver.instruments().counts().bytes_in_use;
    let gpu = Gpu::new(driver.clone()).expect("a stream");
    let (mut count, mut failures) = (0, Vec::new());
    for case in check::cases().iter().filter(|case| !case.needs_gpu && takes(case)) {
        count += 1;
        match check::run(&gpu, case, &Options::default()) {
            Ok(measured) if measured.error <= case.tolerance => {}
            Ok(measured) => failures
                .push(format!("{}: error {:.2e}, at most {:.2e}", case.name, measured.error, case.tolerance)),
            Err(error) => failures.push(format!("{}: {error}", case.name)),
        }
    }
    gpu.drop_workspace().expect("scratch memory is given back");
    println!("{count} cases, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(count >= 20, "only {count} cases");
    assert_eq!(driver.instruments().counts().bytes_in_use, before, "device memory was left behind");
}

/// Kernels of sm_90a have families of their own.
fn is_hopper(case: &Case) -> bool {
    case.family.ends_with("_sm90")
}

fn options(capability: Capability, order: Order) -> SimtOptions {
    SimtOptions { capability, order, ..SimtOptions::default() }
}

#[test]
fn every_kernel_equals_its_reference() {
    pass(SimtVariant::Fast, options(AMPERE, Order::Forward), |case| !is_hopper(case));
}

#[test]
fn hopper_kernels_equal_their_references() {
    pass(SimtVariant::Fast, options(HOPPER, Order::Forward), is_hopper);
}

#[test]
fn the_order_of_threads_does_not_matter() {
    for order in [Order::Reverse, Order::Random(3)] {
        pass(SimtVariant::Fast, options(AMPERE, order), |case| case.quick && !is_hopper(case));
        pass(SimtVariant::Fast, options(HOPPER, order), |case| case.quick && is_hopper(case));
    }
}

/// The order belongs to a launch: with one that all drivers share, blocks would run twice and others never.
#[test]
fn the_order_of_another_driver_does_not_matter() {
    let library = library(SimtVariant::Fast);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other =
                SimtDriver::open(&library, options(AMPERE, Order::Forward)).expect("the library loads");
            while !is_over.load(Relaxed) {
                other.set_order(Order::Reverse, 2);
                other.set_order(Order::Random(5), 2);
            }
        });
        let result = std::panic::catch_unwind(|| {
            let is_small =
                |case: &Case| case.quick && matches!(case.family, "elementwise" | "norm" | "layout");
            pass(SimtVariant::Fast, options(AMPERE, Order::Forward), is_small);
        });
        is_over.store(true, Relaxed);
        assert!(result.is_ok(), "another driver's order reached into a launch");
    });
}

#[test]
fn the_checked_build_finds_no_race_and_no_stray_access() {
    pass(SimtVariant::Checked, options(AMPERE, Order::Forward), |case| case.quick && !is_hopper(case));
    pass(SimtVariant::Checked, options(HOPPER, Order::Forward), |case| case.quick && is_hopper(case));
}
