//! The SIMT layer finds planted bugs: a test instrument must itself be tested.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

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
    /// The fast build cannot see it.
    only_checked: bool,
    /// The first parameter is a tensor map.
    takes_map: bool,
}

const fn bug(kernel: &'static str, says: &'static str) -> Bug {
    Bug {
        kernel,
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

const fn tile_bug(kernel: &'static str, says: &'static str) -> Bug {
    Bug { shared: 17408, ..bug(kernel, says) }
}

/// In a cluster of two blocks.
const fn pair_bug(kernel: &'static str, says: &'static str) -> Bug {
    Bug { blocks: 2, cluster: 2, ..tile_bug(kernel, says) }
}

const BUGS: &[Bug] = &[
    bug("read_past_end", "out of bounds"),
    bug("read_far_past_end", "global memory"),
    bug("use_after_free", "freed"),
    bug("read_uninitialised_global", ""),
    bug("read_uninitialised_shared", ""),
    Bug { shared: 256, ..bug("shared_past_end", "shared memory") },
    Bug { partner: 33, ..bug("missing_syncthreads", "") },
    Bug { partner: 1, only_checked: true, ..bug("missing_syncwarp", "race") },
    Bug { partner: 33, ..bug("missing_second_sync", "") },
    bug("divergent_syncthreads", "deadlock"),
    bug("two_syncthreads", "divergent barrier"),
    bug("divergent_shuffle", "deadlock"),
    bug("mismatched_collectives", "divergent warp"),
    bug("shuffle_outside_mask", "not in the mask"),
    bug("cp_async_no_wait", ""),
    bug("cp_async_misaligned", "misaligned"),
    Bug { blocks: 2, only_checked: true, ..bug("blocks_overlap", "race") },
    tile_bug("mbarrier_not_initialised", "before mbarrier.init"),
    Bug { takes_map: true, ..tile_bug("mbarrier_too_few_bytes", "deadlock") },
    Bug { takes_map: true, ..tile_bug("mbarrier_wrong_parity", "") },
    Bug { threads: 128, only_checked: true, ..tile_bug("wgmma_no_proxy_fence", "fence.proxy.async") },
    Bug { threads: 128, ..tile_bug("wgmma_no_wait", "") },
    Bug { takes_map: true, only_checked: true, ..tile_bug("bulk_copy_over_stores", "fence.proxy.async") },
    Bug { takes_map: true, ..tile_bug("leaves_copies_behind", "in flight") },
    tile_bug("mbarrier_runs_ahead", "before a thread that waits"),
    tile_bug("mbarrier_phase_missed", "parities hide"),
    bug("divergent_named_barrier", "divergent warp"),
    pair_bug("divergent_cluster_sync", "divergent warp"),
    pair_bug("neighbour_not_begun", "may not have begun"),
    pair_bug("neighbour_gone", "has exited"),
    pair_bug("neighbour_not_signalled", "may not have begun"),
    Bug { takes_map: true, ..pair_bug("multicast_not_expected", "in flight") },
    Bug { takes_map: true, ..pair_bug("multicast_half_expected", "did not expect") },
    bug("stack_overflow", "stack overflow"),
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
fn run(driver: &SimtDriver, bug: &Bug) -> Option<String> {
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
    if y.iter().any(|v| v.is_nan()) {
        return Some("NaN in the output".into());
    }
    let is_wrong = bug.partner > 0 && (0..64).any(|i| y[i] != x[i ^ bug.partner]);
    is_wrong.then(|| "a wrong output".into())
}

fn finds_all(variant: SimtVariant) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let driver = open(variant);
    for bug in BUGS {
        let found = [Order::Forward, Order::Reverse, Order::Random(1)].into_iter().find_map(|order| {
            driver.set_order(order, 1);
            run(&driver, bug).map(|message| format!("{order:?}: {message}"))
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
