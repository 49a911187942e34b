//! Which kernels and which device are chosen, by what the driver has code for.

use std::sync::{Arc, Mutex};

use kiln::backend::cuda::launch::elementwise::{Act, Activate, Function, activate};
use kiln::backend::cuda::{Element, Gpu, check};
use kiln::backend::{Device, DeviceOptions};
use kiln::driver::cuda::{CudaDriver, Modules};
use kiln::driver::{Driver, DriverError, embedded};

use crate::{complete, images, in_child, in_child_with, open, stand_in_calls};

#[test]
fn a_build_without_hopper_kernels_runs_the_others_on_hopper() {
    in_child("choice::child_lacks_hopper_images", complete);
}

#[test]
fn hopper_kernels_without_code_for_the_device_are_not_used() {
    let unfit = [("SIMULATED_CUDA_UNFIT", "conv_sm90")];
    in_child_with("choice::child_has_unfit_hopper_images", complete, &unfit);
}

#[test]
fn a_gpu_without_kernels_is_not_used_and_says_why() {
    in_child_with("choice::child_has_no_code", complete, &[("SIMULATED_CUDA_UNFIT", "all")]);
}

#[test]
fn code_of_an_earlier_architecture_does_not_overlap() {
    for (compiled_for, expected) in [("80", "overlaps 0"), ("90", "overlaps 1")] {
        let environment = [("SIMULATED_CUDA_COMPILED_FOR", compiled_for), ("EXPECTED_OVERLAP", expected)];
        in_child_with("choice::child_overlaps", complete, &environment);
    }
}

/// Runs some cases of every family and returns what was launched.
fn run_checks(gpu: &Gpu) -> String {
    let options = check::Options { seed: 0, timing: false };
    for family in ["gemm", "conv", "attention", "norm"] {
        let mut count = 0;
        for case in check::cases().iter().filter(|c| c.quick && !c.needs_gpu && c.family == family).take(6) {
            let measured =
                check::run(gpu, case, &options).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert!(measured.error <= case.tolerance, "{}: {}", case.name, measured.error);
            count += 1;
        }
        assert!(count >= 3, "{count} cases of {family}");
    }
    stand_in_calls()
}

#[test]
#[ignore = "a child of a_build_without_hopper_kernels_runs_the_others_on_hopper"]
fn child_lacks_hopper_images() {
    // All images, first, to see that the same work takes them.
    let all = Gpu::new(Arc::new(open())).unwrap();
    assert!(all.is_hopper());
    drop(all);
    let calls = stand_in_calls();
    assert!(calls.contains("load gemm_sm90\n"), "{calls}");

    let driver = CudaDriver::open(0, &images(|name| !name.ends_with("_sm90"))).unwrap();
    assert_eq!((driver.device().capability.major, driver.device().capability.minor), (9, 0));
    assert!(!driver.has_module("gemm_sm90").unwrap() && driver.has_module("gemm_sm80").unwrap());
    let gpu = Gpu::new(Arc::new(driver)).unwrap();
    assert!(!gpu.is_hopper());
    let launched = run_checks(&gpu).split_off(calls.len());
    assert!(launched.contains("gemm_sm80") && launched.contains("conv_sm80"), "{launched}");
    assert!(launched.contains("attention_sm80") && !launched.contains("sm90"), "{launched}");
    assert!(!launched.contains("groupnorm_cluster"), "{launched}");
}

#[test]
#[ignore = "a child of hopper_kernels_without_code_for_the_device_are_not_used"]
fn child_has_unfit_hopper_images() {
    let driver = open();
    assert!(!driver.has_module("conv_sm90").unwrap());
    match driver.function("conv_sm90", "conv_sm90_128x160_f16") {
        Err(DriverError::NoKernels { device, .. }) => {
            assert_eq!(device, "simulated GPU (compute capability 9.0)");
        }
        other => panic!("{other:?}"),
    }
    assert!(!Gpu::new(Arc::new(driver)).unwrap().is_hopper());
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
#[ignore = "a child of a_gpu_without_kernels_is_not_used_and_says_why"]
fn child_has_no_code() {
    match CudaDriver::open(0, &images(|_| true)) {
        Err(DriverError::NoKernels { device, reason }) => {
            assert_eq!(device, "simulated GPU (compute capability 9.0)");
            assert!(reason.contains("KILN_CUDA_ARCHS"), "{reason}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
    // Images of the caller that are none of ours show it at their first use.
    let own = Modules::Images(vec![("own".into(), vec![0x50, 0xed, 0x55, 0xba, 0, 0, 0, 0])]);
    let driver = CudaDriver::open(0, &own).unwrap();
    assert!(matches!(driver.function("own", "any"), Err(DriverError::NoKernels { .. })));
    drop(driver);

    let expected =
        ["simulated GPU", "compute capability 9.0", embedded().map_or("without nvcc", |build| build.targets)];
    let named = kiln::backend::open(DeviceOptions { device: Device::Cuda, ..DeviceOptions::default() });
    let error = named.err().expect("a GPU that was asked for must be there").to_string();
    assert!(expected.iter().all(|part| error.contains(part)), "{error}");

    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    let opened =
        tracing::subscriber::with_default(subscriber, || kiln::backend::open(DeviceOptions::default()));
    assert_eq!(opened.unwrap().diffusion.info().kind, "cpu");
    let said = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("WARN") && expected.iter().all(|part| said.contains(part)), "{said}");
}

#[test]
#[ignore = "a child of code_of_an_earlier_architecture_does_not_overlap"]
fn child_overlaps() {
    let driver: Arc<dyn Driver> = Arc::new(open());
    let gpu = Gpu::new(driver.clone()).unwrap();
    let x = driver.alloc(64, gpu.stream()).unwrap();
    activate(
        &gpu,
        &Activate { x, out: x, count: 16, function: Function::Act(Act::None), element: Element::F32 },
    )
    .unwrap();
    let (calls, expected) = (stand_in_calls(), std::env::var("EXPECTED_OVERLAP").unwrap());
    assert!(calls.trim_end().ends_with(&expected), "{calls}");
}
