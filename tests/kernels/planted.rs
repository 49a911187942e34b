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
fn the_fast_build_finds_all_but_three_planted_bugs() {
    assert_eq!(BUGS.iter().filter(|bug| bug.only_checked).count(), 3);
    finds_all(SimtVariant::Fast);
}

#[test]
fn the_checked_build_finds_every_planted_bug() {
    finds_all(SimtVariant::Checked);
}
