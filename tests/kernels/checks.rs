//! Every kernel against its reference under the SIMT layer: three orders of threads, both builds, both tiers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use kiln::backend::cuda::Gpu;
use kiln::backend::cuda::check::{self, Case, EACH, Measured, Options};
use kiln::driver::simt::{Order, SimtDriver, SimtOptions};
use kiln::driver::toolchain::SimtVariant;
use kiln::driver::{Capability, Driver};

use crate::library;

const AMPERE: Capability = Capability { major: 8, minor: 0 };
const HOPPER: Capability = Capability { major: 9, minor: 0 };

/// The random cases that launched each kernel; no kernel of the library is left out.
pub(crate) type Coverage = BTreeMap<String, BTreeSet<String>>;

/// Runs a case on a driver that traces: the kernels it launched, and what is wrong, if something is.
pub fn run(gpu: &Gpu, case: &Case) -> (BTreeSet<String>, Option<String>) {
    let result = check::run(gpu, case, &Options::default());
    let launched = gpu.driver().instruments().take_trace();
    let kernels: BTreeSet<String> = launched.into_iter().map(|launch| launch.kernel).collect();
    let (name, most) = (&case.name, case.tolerance);
    let failure = match result {
        Ok(Measured { error, .. }) if error <= most => None,
        Ok(Measured { error, fault, .. }) => {
            let fault = fault.map(|fault| fault.to_string()).unwrap_or_default();
            Some(format!("{name}, by {kernels:?}: error {error:.2e}, at most {most:.2e}: {fault}"))
        }
        Err(error) => Some(format!("{name}: {error}")),
    };
    (kernels, failure)
}

fn pass(variant: SimtVariant, options: SimtOptions, takes: impl Fn(&Case) -> bool) -> Coverage {
    pass_of(variant, options, check::cases().into_iter().filter(takes))
}

/// Runs those of the cases that are not too large.
pub(crate) fn pass_of(
    variant: SimtVariant,
    options: SimtOptions,
    cases: impl Iterator<Item = Case>,
) -> Coverage {
    let driver = Arc::new(SimtDriver::open(&library(variant), options).expect("the library loads"));
    let mut coverage: Coverage = driver.kernels().into_iter().map(|name| (name, BTreeSet::new())).collect();
    let before = driver.instruments().counts().bytes_in_use;
    driver.instruments().set_tracing(true);
    let gpu = Gpu::new(driver.clone()).expect("a stream");
    let (mut count, mut failures) = (0, Vec::new());
    for case in cases.filter(|case| !case.needs_gpu) {
        count += 1;
        let (kernels, failure) = run(&gpu, &case);
        failures.extend(failure);
        for kernel in kernels.into_iter().filter(|_| case.is_random) {
            coverage.entry(kernel).or_default().insert(case.name.clone());
        }
    }
    gpu.drop_workspace().expect("scratch memory is given back");
    println!("{count} cases, {} failed", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(count >= 20, "only {count} cases");
    assert_eq!(driver.instruments().counts().bytes_in_use, before, "device memory was left behind");
    coverage
}

/// Every kernel of a tier was launched for at least `least` random shapes. The ceilings, which measure the machine and
/// compute nothing, have no cases.
fn assert_covered(coverage: &Coverage, least: usize, wants_hopper: bool) {
    let is_of_hopper = |name: &str| name.contains("_sm90_") || name.starts_with("groupnorm_cluster_");
    let names = coverage.keys().filter(|name| !name.starts_with("ceiling_"));
    let names: Vec<&String> = names.filter(|name| is_of_hopper(name) == wants_hopper).collect();
    assert!(names.len() >= 50, "only {} kernels", names.len());
    assert_each(coverage, &names, least);
}

/// Each of the kernels was launched for at least `least` random shapes.
pub(crate) fn assert_each(coverage: &Coverage, names: &[&String], least: usize) {
    let missing: Vec<String> = names
        .iter()
        .map(|name| (name, coverage[name.as_str()].len()))
        .filter(|(_, shapes)| *shapes < least)
        .map(|(name, shapes)| format!("{name}: {shapes} random shapes"))
        .collect();
    println!("{} kernels, each by {least} random shapes or more", names.len());
    assert!(missing.is_empty(), "at least {least} for each kernel:\n{}", missing.join("\n"));
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
    let coverage = pass(SimtVariant::Fast, options(AMPERE, Order::Forward), |case| !is_hopper(case));
    assert_covered(&coverage, EACH, false);
}

#[test]
fn hopper_kernels_equal_their_references() {
    // Norms are one family: the launcher takes clusters on Hopper.
    let takes = |case: &Case| is_hopper(case) || (case.family == "norm" && case.quick && !case.is_random);
    let coverage = pass(SimtVariant::Fast, options(HOPPER, Order::Forward), takes);
    assert_covered(&coverage, EACH, true);
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
    let quick = |options, wants_hopper| {
        let coverage =
            pass(SimtVariant::Checked, options, |case| case.quick && is_hopper(case) == wants_hopper);
        assert_covered(&coverage, 1, wants_hopper);
    };
    quick(options(AMPERE, Order::Forward), false);
    quick(options(HOPPER, Order::Random(7)), true);
}
