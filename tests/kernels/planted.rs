//! The SIMT layer finds planted bugs: a test instrument must itself be tested.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln::backend::cuda::check::Case;
use kiln::backend::cuda::{Element, Geometry, Gpu, Kernel};
use kiln::driver::simt::{Order, SimtDriver, SimtOptions, built_library};
use kiln::driver::toolchain::{SimtVariant, build_simt};
use kiln::driver::{DevicePtr, Driver, DriverError, Launch, MapElement, Swizzle, TensorMapDesc};

/// A kernel of `planted.cu` and how to launch it.
struct Bug {
    kernel: &'static str,
    threads: u32,
    blocks: u32,
    /// Blocks of a cluster.
    cluster: u32,
    shared: u32,
    /// Where it is simple to say what is right: `y[i] = x[i ^ partner]`.
    partner: usize,
    /// What the error must say; empty if only a wrong result shows it.
    says: &'static str,
    /// Block and thread that the error must name, with threads in order; none where several wait for each other.
    at: Option<(u32, u32)>,
    /// The first element that a wrong result must show, if it must.
    element: Option<usize>,
    /// The fast build cannot see it.
    only_checked: bool,
    /// The first parameter is a tensor map.
    takes_map: bool,
}

/// In block 0.
const fn bug(kernel: &'static str, thread: u32, says: &'static str) -> Bug {
    Bug {
        kernel,
        at: Some((0, thread)),
        element: None,
        threads: 64,
        blocks: 1,
        cluster: 1,
        shared: 4096,
        partner: 0,
        says,
        only_checked: false,
        takes_map: false,
    }
}

/// Threads that wait for each other in vain.
const fn deadlock(kernel: &'static str, says: &'static str) -> Bug {
    Bug { at: None, ..bug(kernel, 0, says) }
}

const fn tile_bug(kernel: &'static str, thread: u32, says: &'static str) -> Bug {
    Bug { shared: 17408, ..bug(kernel, thread, says) }
}

/// In a cluster of two blocks.
const fn pair_bug(kernel: &'static str, thread: u32, says: &'static str) -> Bug {
    Bug { blocks: 2, cluster: 2, ..tile_bug(kernel, thread, says) }
}

const BUGS: &[Bug] = &[
    bug("read_past_end", 63, "out of bounds"),
    bug("read_far_past_end", 0, "global memory"),
    bug("use_after_free", 0, "freed"),
    Bug { element: Some(61), ..bug("unwritten_tail", 0, "") },
    bug("read_uninitialised_global", 0, ""),
    bug("read_uninitialised_shared", 0, ""),
    Bug { shared: 256, ..bug("shared_past_end", 63, "shared memory") },
    Bug { partner: 33, ..bug("missing_syncthreads", 0, "") },
    Bug { partner: 1, only_checked: true, ..bug("missing_syncwarp", 31, "race") },
    Bug { partner: 33, ..bug("missing_second_sync", 30, "") },
    deadlock("divergent_syncthreads", "deadlock in block 0,0,0\n  threads 0-31 wait at __syncthreads"),
    bug("two_syncthreads", 32, "divergent barrier"),
    deadlock("divergent_shuffle", "deadlock in block 0,0,0\n  threads 0-15 wait at shfl.bfly"),
    bug("mismatched_collectives", 1, "divergent warp"),
    bug("shuffle_outside_mask", 15, "not in the mask"),
    bug("cp_async_no_wait", 63, ""),
    bug("cp_async_misaligned", 0, "misaligned"),
    Bug { blocks: 2, only_checked: true, at: Some((1, 0)), ..bug("blocks_overlap", 0, "race") },
    tile_bug("mbarrier_not_initialised", 0, "before mbarrier.init"),
    Bug {
        takes_map: true,
        at: None,
        ..tile_bug(
            "mbarrier_too_few_bytes",
            0,
            "deadlock in block 0,0,0\n  threads 0-63 wait at mbarrier.wait",
        )
    },
    Bug { takes_map: true, ..tile_bug("mbarrier_wrong_parity", 63, "") },
    Bug { threads: 128, only_checked: true, ..tile_bug("wgmma_no_proxy_fence", 127, "fence.proxy.async") },
    Bug { threads: 128, ..tile_bug("wgmma_no_wait", 0, "") },
    Bug { takes_map: true, only_checked: true, ..tile_bug("bulk_copy_over_stores", 0, "fence.proxy.async") },
    Bug { takes_map: true, ..tile_bug("leaves_copies_behind", 63, "in flight") },
    tile_bug("mbarrier_runs_ahead", 0, "before a thread that waits"),
    tile_bug("mbarrier_phase_missed", 0, "parities hide"),
    bug("divergent_named_barrier", 31, "divergent warp"),
    pair_bug("divergent_cluster_sync", 31, "divergent warp"),
    pair_bug("neighbour_not_begun", 63, "may not have begun"),
    pair_bug("neighbour_gone", 62, "has exited"),
    pair_bug("neighbour_not_signalled", 0, "may not have begun"),
    Bug { takes_map: true, at: Some((1, 62)), ..pair_bug("multicast_not_expected", 62, "in flight") },
    Bug { takes_map: true, ..pair_bug("multicast_half_expected", 63, "did not expect") },
    bug("stack_overflow", 0, "stack overflow"),
];

/// Memory faults are signals of the process: one library at a time.
static ONE: Mutex<()> = Mutex::new(());

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn open(variant: SimtVariant) -> SimtDriver {
    // Beside the build script's library, whose objects serve here too.
    let out = match built_library(variant).and_then(|path| path.parent().map(Path::to_owned)) {
        Some(folder) => folder,
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("planted"),
    };
    let extra = [root().join("tests/kernels/planted.cu")];
    let library = build_simt(&root().join("kernels"), &extra, &out, variant).expect("the kernels compile");
    let options = SimtOptions { workers: 1, ..SimtOptions::default() };
    SimtDriver::open(&library, options).expect("the library loads")
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What is found in one run: an error, or what is wrong with the result.
fn run(driver: &SimtDriver, bug: &Bug, order: Order) -> Option<String> {
    let stream = driver.create_stream().unwrap();
    let x: Vec<f32> = (0u8..64).map(|i| f32::from(i) * 0.1 - 3.0).collect();
    let alloc = |bytes| driver.alloc(bytes, stream).unwrap();
    let (dx, dy, big) = (alloc(256), alloc(256), alloc(64 * 64 * 2));
    if bug.kernel != "read_uninitialised_global" {
        driver.upload(dx, &f32s(&x), stream).unwrap();
    }
    driver.upload(big, &[0x00, 0x3c].repeat(64 * 64), stream).unwrap();
    let map = driver
        .tensor_map(&TensorMapDesc {
            base: big,
            element: MapElement::F16,
            extents: vec![64, 64],
            strides: vec![128],
            box_extents: vec![64, 64],
            swizzle: Swizzle::B128,
            im2col: None,
        })
        .unwrap();
    if bug.kernel == "use_after_free" {
        driver.free(dx, stream).unwrap();
    }
    let first: Vec<u8> =
        if bug.takes_map { bytemuck::bytes_of(&map).to_vec() } else { bytemuck::bytes_of(&dx).to_vec() };
    let function = driver.function("planted", bug.kernel).unwrap();
    let launch = Launch {
        shared: bug.shared,
        cluster: [bug.cluster, 1, 1],
        ..Launch::new(function, [bug.blocks, 1, 1], [bug.threads, 1, 1], stream)
    };
    match driver.launch(&launch, &[&first, bytemuck::bytes_of(&dy)]) {
        Err(DriverError::Kernel(message)) => {
            assert!(message.contains(bug.kernel), "{message}: names the kernel");
            assert!(message.contains(bug.says), "{}: '{}' in: {message}", bug.kernel, bug.says);
            if let (Some((block, thread)), Order::Forward) = (bug.at, order) {
                let place = format!("block ({block},0,0), thread ({thread},0,0) ");
                assert!(message.contains(&place), "{}: '{place}' in: {message}", bug.kernel);
            }
            Some(message)
        }
        Err(other) => panic!("{}: {other}", bug.kernel),
        Ok(()) => wrong_result(driver, bug, dy, &x),
    }
}

fn wrong_result(driver: &SimtDriver, bug: &Bug, dy: DevicePtr, x: &[f32]) -> Option<String> {
    let mut bytes = vec![0; 256];
    let stream = driver.create_stream().unwrap();
    driver.download(&mut bytes, dy, stream).unwrap();
    let y: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let is_wrong = |i: &usize| y[*i].is_nan() || (bug.partner > 0 && y[*i] != x[*i ^ bug.partner]);
    let first = (0..64).find(is_wrong);
    if bug.element.is_some() {
        assert_eq!(first, bug.element, "{}: the first wrong element", bug.kernel);
    }
    first.map(|i| format!("kernel {}: element {i} is {}", bug.kernel, y[i]))
}

fn finds_all(variant: SimtVariant) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let driver = open(variant);
    for bug in BUGS {
        let found = [Order::Forward, Order::Reverse, Order::Random(1)].into_iter().find_map(|order| {
            driver.set_order(order, 1);
            run(&driver, bug, order).map(|message| format!("{order:?}: {message}"))
        });
        println!("{:<28} {}", bug.kernel, found.as_deref().unwrap_or("not found"));
        let is_visible = variant == SimtVariant::Checked || !bug.only_checked;
        assert_eq!(found.is_some(), is_visible, "{} in the {} build", bug.kernel, variant.name());
    }
}

#[test]
fn the_fast_build_finds_all_but_four_planted_bugs() {
    assert_eq!(BUGS.iter().filter(|bug| bug.only_checked).count(), 4);
    finds_all(SimtVariant::Fast);
}

#[test]
fn the_checked_build_finds_every_planted_bug() {
    finds_all(SimtVariant::Checked);
}

/// What a case says of a kernel that leaves the end of its result as it was: the kernel, and the first such element.
#[test]
fn an_unwritten_tail_is_named_with_its_kernel_and_place() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = Gpu::new(Arc::new(open(SimtVariant::Fast))).unwrap();
    let case = Case {
        family: "planted",
        name: "planted 64".into(),
        quick: true,
        needs_gpu: false,
        is_random: false,
        flops: 0.0,
        bytes: 0.0,
        tolerance: 1.0,
        run: Box::new(|cx| {
            let values = cx.values(64, 1.0, Element::F32);
            let want: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let (x, y) = (cx.upload(&values, Element::F32)?, cx.output(256)?);
            let (gpu, kernel) = (cx.gpu, Kernel { module: "planted", name: "unwritten_tail" });
            let params = [bytemuck::bytes_of(&x.ptr), bytemuck::bytes_of(&y.ptr)];
            cx.measure(y, Element::F32, &want, || gpu.launch(&kernel, &Geometry::line(1, 64), &params))
        }),
    };
    gpu.driver().instruments().set_tracing(true);
    let (_, failure) = crate::checks::run(&gpu, &case);
    let said = failure.expect("a failure");
    assert!(said.contains("unwritten_tail") && said.contains("element 61 of 64 was not written"), "{said}");
}

/// Launches overlap: what one kernel writes the next may touch only once it has waited.
#[test]
fn a_kernel_that_does_not_wait_for_the_one_before_is_found() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let driver = open(SimtVariant::Checked);
    let stream = driver.create_stream().unwrap();
    let [x, y, z] = [0; 3].map(|_| driver.alloc(256, stream).unwrap());
    let run = |kernel: &str, from: DevicePtr, to: DevicePtr| {
        let function = driver.function("planted", kernel).unwrap();
        let launch = Launch { overlaps: true, ..Launch::new(function, [1; 3], [64, 1, 1], stream) };
        driver.launch(&launch, &[bytemuck::bytes_of(&from), bytemuck::bytes_of(&to)])
    };
    let fill = || driver.upload(x, &f32s(&[1.0; 64]), stream).unwrap();
    let race = |result: Result<(), DriverError>, what: &str| match result {
        Err(DriverError::Kernel(message)) => assert!(message.contains(what), "{message}"),
        other => panic!("{other:?}"),
    };
    fill();
    run("copies", x, y).unwrap();
    run("copies", y, z).unwrap();
    race(run("copies_too_early", y, z), "read after unordered write");
    race(run("writes_too_early", x, y), "race: write after unordered");
    // Nor is the kernel before the last one over: it may wait as well, in the last one's place.
    fill();
    run("copies", x, y).unwrap();
    run("copies", x, z).unwrap();
    race(run("copies_too_early", y, z), "read after unordered write");
    // A copy between two kernels waits for the first, and the second for it; a graph begins when all before it is done.
    run("copies", x, y).unwrap();
    fill();
    run("copies_too_early", y, z).unwrap();
    driver.begin_capture(stream).unwrap();
    run("copies_too_early", z, y).unwrap();
    let graph = driver.end_capture(stream).unwrap();
    run("copies", x, z).unwrap();
    driver.launch_graph(graph, stream).unwrap();
    run("copies", x, z).unwrap();
    driver.synchronize(stream).unwrap();
    run("writes_too_early", x, z).unwrap();
}

/// Memory that the system does not give is an error that says so.
#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let library = crate::library(SimtVariant::Fast);
    let options = SimtOptions { memory: 1 << 50, ..SimtOptions::default() };
    let driver = SimtDriver::open(&library, options).unwrap();
    let stream = driver.create_stream().unwrap();
    let error = driver.alloc(1 << 45, stream).unwrap_err().to_string();
    assert!(error.contains("no memory for the SIMT layer"), "{error}");
    let fine = driver.alloc(1 << 10, stream).unwrap();
    driver.free(fine, stream).unwrap();
    // Less address space than the layer reserves, in a process of its own.
    let test = std::env::current_exe().unwrap();
    let child = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 33554432 && exec \"$0\" --ignored --exact planted::child_with_little_memory"])
        .arg(test)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a child of memory_that_cannot_be_had_is_an_error"]
fn child_with_little_memory() {
    let driver = SimtDriver::open(&crate::library(SimtVariant::Fast), SimtOptions::default()).unwrap();
    let stream = driver.create_stream().unwrap();
    let error = driver.alloc(16, stream).unwrap_err().to_string();
    assert!(error.contains("no memory for the SIMT layer: mmap"), "{error}");
}
