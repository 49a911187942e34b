//! The CUDA driver code without a GPU: `libcuda.cpp` stands in for the vendor's library.
//!
//! It implements the driver API over the SIMT layer, does queued work as late
//! as it may, and calls misuse an error. The loader finds it through
//! `LD_LIBRARY_PATH`, which must be set before a process starts: each test here
//! runs one of the ignored tests below in a child.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod choice;
mod late;
mod tools;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use kiln::backend::cuda::launch::elementwise::{Act, Activate, Axpby, Function, activate, axpby};
use kiln::backend::cuda::{Element, Gpu, check};
use kiln::driver::cuda::{CudaDriver, Modules, device_count};
use kiln::driver::nvcc::Nvcc;
use kiln::driver::simt::built_library;
use kiln::driver::toolchain::{SimtVariant, ToolError, kernel_sources, module_name};
use kiln::driver::{DevicePtr, Driver, DriverError, Launch, MapElement, Swizzle, TensorMapDesc, embedded};

/// Builds the library that stands in, in a folder of its own.
fn stand_in(name: &str, flags: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Command::new("c++")
        .args(["-std=c++20", "-O1", "-Wall", "-shared", "-fPIC"])
        .args(flags)
        .arg(format!("-I{}", here.join("kernels/simt").display()))
        .arg("-o")
        .arg(folder.join("libcuda.so"))
        .arg(here.join("tests/cuda_driver/libcuda.cpp"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    folder
}

/// Says why a test does not run, which `.ci/run` does not accept.
fn skip(reason: &str) {
    assert!(std::env::var_os("KILN_REQUIRE_TOOLS").is_none(), "{reason}");
    eprintln!("skipped: {reason}");
}

/// Runs one of the ignored tests with that library in place of the driver.
fn in_child(test: &str, library: impl FnOnce() -> PathBuf) {
    in_child_with(test, library, &[]);
}

/// The same with more environment variables.
fn in_child_with(test: &str, library: impl FnOnce() -> PathBuf, environment: &[(&str, &str)]) {
    let Some(simt) = built_library(SimtVariant::Fast) else {
        skip("the build script made no SIMT layer");
        return;
    };
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", library())
        .env("SIMULATED_CUDA_SIMT", simt)
        .env("SIMULATED_CUDA_MEMORY", MEMORY.to_string())
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}\n{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

/// A driver as it should be; built once.
fn complete() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| stand_in("simulated-cuda", &[])).clone()
}

/// A driver of a time when `cuFuncLoad` did not exist.
fn old() -> PathBuf {
    stand_in("simulated-old-cuda", &["-DcuFuncLoad=cuFuncLoadAbsent"])
}

/// Bytes of the simulated device.
const MEMORY: u64 = 256 << 20;

#[test]
fn kernels_run_through_the_driver_api() {
    in_child("child_runs_checks", complete);
}

#[test]
fn memory_is_counted_and_given_back() {
    in_child("child_uses_memory", complete);
}

#[test]
fn copies_take_their_bytes_in_time() {
    in_child("child_copies", complete);
}

#[test]
fn graphs_are_captured_and_replayed() {
    in_child("child_captures", complete);
}

#[test]
fn launches_carry_their_attributes_and_errors_their_names() {
    in_child("child_launches", complete);
}

#[test]
fn an_old_driver_is_an_error_not_a_panic() {
    in_child("child_finds_an_old_driver", old);
}

#[test]
fn kernels_come_from_a_folder() {
    if let Err(error) = Nvcc::find(&[]) {
        skip(&error.to_string());
        return;
    }
    in_child("child_compiles_a_folder", complete);
}

/// Images of all kernel files that `takes`: each names the file, its kernels are those of the SIMT layer.
fn images(takes: impl Fn(&str) -> bool) -> Modules {
    let sources = kernel_sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")).unwrap();
    let names = sources.iter().map(|source| module_name(source)).filter(|name| takes(name));
    let image = |name: &str| [&[0x50, 0xed, 0x55, 0xba, 0x57, 0x7e, 0, 0], name.as_bytes(), &[0]].concat();
    Modules::Images(names.map(|name| (name.clone(), image(&name))).collect())
}

/// Opens the simulated GPU.
fn open() -> CudaDriver {
    CudaDriver::open(0, &images(|_| true)).unwrap()
}

/// What the library that stands in says of itself.
fn stand_in_calls() -> String {
    type Calls = unsafe extern "C" fn() -> *const std::ffi::c_char;
    // SAFETY: the library is loaded already, and the function has this type there.
    unsafe {
        let library = libloading::Library::new("libcuda.so").unwrap();
        let calls = *library.get::<Calls>(b"simulated_cuda_calls").unwrap();
        std::ffi::CStr::from_ptr(calls()).to_string_lossy().into_owned()
    }
}

/// Objects, allocations and contexts that were not given back.
fn stand_in_alive() -> i32 {
    // SAFETY: as above.
    unsafe {
        let library = libloading::Library::new("libcuda.so").unwrap();
        let alive = *library.get::<unsafe extern "C" fn() -> i32>(b"simulated_cuda_alive").unwrap();
        alive()
    }
}

fn invalid<T>(result: Result<T, DriverError>) -> String {
    match result {
        Err(error @ DriverError::Invalid { .. }) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
#[ignore = "a child of kernels_run_through_the_driver_api"]
fn child_runs_checks() {
    let driver: Arc<dyn Driver> = Arc::new(open());
    assert_eq!(driver.device().name, "simulated GPU");
    assert_eq!((driver.device().multiprocessors, driver.device().memory), (8, MEMORY));
    let gpu = Gpu::new(driver).unwrap();
    let options = check::Options { seed: 0, timing: false };
    // What the kernels compute is tested elsewhere; here a few of each family show that they are launched right.
    let mut per_family: HashMap<&str, usize> = HashMap::new();
    let cases = check::cases();
    for case in cases.iter().filter(|c| c.quick && !c.needs_gpu && c.runs_on(&gpu)) {
        let count = per_family.entry(case.family).or_default();
        *count += 1;
        if *count <= 12 {
            let measured =
                check::run(&gpu, case, &options).unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert!(measured.error <= case.tolerance, "{}: {}", case.name, measured.error);
        }
    }
    assert!(per_family["elementwise"] >= 12, "{per_family:?}");
    drop(gpu);
    assert_eq!(stand_in_alive(), 0, "objects were left behind");
}

#[test]
#[ignore = "a child of memory_is_counted_and_given_back"]
fn child_uses_memory() {
    let driver = open();
    let stream = driver.create_stream().unwrap();
    let before = driver.memory().unwrap();
    assert_eq!(before.total, MEMORY);
    let half = (MEMORY / 2) as usize;
    let first = driver.alloc(half, stream).unwrap();
    let second = driver.alloc(half - 1024, stream).unwrap();
    assert_eq!(driver.instruments().counts().bytes_in_use, MEMORY - 1024);
    match driver.alloc(2048, stream) {
        Err(DriverError::OutOfMemory { requested: 2048, free: 1024, .. }) => {}
        other => panic!("{other:?}"),
    }
    // What was freed counts only when the stream is there: the driver waits for it before it gives up.
    driver.free(first, stream).unwrap();
    let syncs = driver.instruments().counts().syncs;
    let third = driver.alloc(half, stream).unwrap();
    assert_eq!(driver.instruments().counts().syncs, syncs + 1);
    assert!(invalid(driver.free(first, stream)).contains("freed before"));
    assert!(invalid(driver.fill(second, 0, half, stream)).contains("the allocation before it"));
    assert!(invalid(driver.fill(DevicePtr::NULL, 0, 1, stream)).contains("no device memory"));

    driver.instruments().fail_allocations(1, 1);
    driver.free(third, stream).unwrap();
    let one = driver.alloc(16, stream).unwrap();
    assert!(matches!(driver.alloc(16, stream), Err(DriverError::OutOfMemory { .. })));
    let none = driver.alloc(0, stream).unwrap();
    for ptr in [second, one, none] {
        driver.free(ptr, stream).unwrap();
    }
    driver.trim().unwrap();
    assert_eq!(driver.memory().unwrap(), before);
    assert_eq!(driver.instruments().counts().bytes_in_use, 0);
    // What a caller forgets goes with the driver; page-locked memory may outlive it.
    let pinned = driver.pinned(100).unwrap();
    driver.alloc(100, stream).unwrap();
    driver.begin_capture(stream).unwrap();
    driver.end_capture(stream).unwrap();
    driver.create_event(true).unwrap();
    drop(driver);
    assert_eq!(stand_in_alive(), 2, "the pinned buffer and the context it holds");
    std::thread::spawn(move || drop(pinned)).join().unwrap();
    assert_eq!(stand_in_alive(), 0, "objects were left behind");
}

#[test]
#[ignore = "a child of copies_take_their_bytes_in_time"]
fn child_copies() {
    let driver = open();
    let stream = driver.create_stream().unwrap();
    // More than the ring of page-locked pieces holds, and not a multiple of a piece.
    let bytes = (10 << 20) + 13;
    let mut source: Vec<u8> = (0..bytes).map(|i| (i * 7 % 251) as u8).collect();
    let expected = source.clone();
    let memory = driver.alloc(bytes, stream).unwrap();
    let uploaded = driver.instruments().counts();
    driver.upload(memory, &source, stream).unwrap();
    source.fill(0);
    let mut back = vec![0; bytes];
    driver.download(&mut back, memory, stream).unwrap();
    assert!(back == expected, "an upload must have taken its bytes when it returns");
    let counts = driver.instruments().counts();
    assert_eq!(counts.uploaded - uploaded.uploaded, bytes as u64);
    assert_eq!(counts.downloaded, bytes as u64);

    // Few small uploads wait for nothing; memory that happens to be page-locked is taken in time as well.
    let mut pinned = driver.pinned(64).unwrap();
    pinned.bytes_mut().fill(3);
    let syncs = driver.instruments().counts().syncs;
    for i in 0..16 {
        driver.upload(memory.offset(i * 64), pinned.bytes(), stream).unwrap();
    }
    assert_eq!(driver.instruments().counts().syncs, syncs);
    pinned.bytes_mut().fill(4);
    let event = driver.create_event(false).unwrap();
    driver.upload_pinned(memory.offset(1024), &pinned, 64, stream).unwrap();
    driver.record(event, stream).unwrap();
    assert!(!driver.is_done(event).unwrap(), "nothing has waited yet");
    driver.synchronize_event(event).unwrap();
    assert!(driver.is_done(event).unwrap());
    driver.copy(memory.offset(2048), memory.offset(960), 128, stream).unwrap();
    driver.fill(memory.offset(2048), 9, 1, stream).unwrap();
    // Another thread has no context of its own: the driver sets it.
    std::thread::scope(|scope| {
        scope.spawn(|| driver.download(&mut back, memory, stream).unwrap());
    });
    assert_eq!((back[1023], back[1024], back[1088]), (3, 4, expected[1088]));
    assert_eq!((back[2048], back[2049], back[2111], back[2112]), (9, 3, 3, 4));
    driver.destroy_event(event).unwrap();
    assert!(invalid(driver.is_done(event)).contains("destroyed"));
    assert!(
        invalid(driver.upload_pinned(memory, &pinned, 65, stream))
            .contains("65 bytes of a pinned buffer of 64")
    );
}

#[test]
#[ignore = "a child of graphs_are_captured_and_replayed"]
fn child_captures() {
    let driver: Arc<dyn Driver> = Arc::new(open());
    let gpu = Gpu::new(driver.clone()).unwrap();
    let stream = gpu.stream();
    let count = 1000;
    let (x, y) = (driver.alloc(4 * count, stream).unwrap(), driver.alloc(4 * count, stream).unwrap());
    driver.upload(x, bytemuck::cast_slice(&vec![1.0f32; count]), stream).unwrap();
    driver.upload(y, bytemuck::cast_slice(&vec![2.0f32; count]), stream).unwrap();
    driver.begin_capture(stream).unwrap();
    axpby(&gpu, &Axpby { x, y, out: x, count, a: 1.0, b: 1.0, element: Element::F32 }).unwrap();
    let workspace = gpu.workspace(4 * count).unwrap();
    driver.copy(workspace, x, 4 * count, stream).unwrap();
    assert!(invalid(driver.upload(x, &[0; 4], stream)).contains("records a graph"));
    assert!(invalid(driver.free(y, stream)).contains("records a graph"));
    assert!(invalid(driver.synchronize(stream)).contains("records a graph"));
    assert!(invalid(driver.begin_capture(stream)).contains("records a graph"));
    let graph = driver.end_capture(stream).unwrap();
    assert!(invalid(driver.end_capture(stream)).contains("does not record"));

    let read = || {
        let mut values = vec![0f32; count];
        driver.download(bytemuck::cast_slice_mut(&mut values), workspace, stream).unwrap();
        values
    };
    let launches = driver.instruments().counts().launches;
    for _ in 0..3 {
        driver.launch_graph(graph, stream).unwrap();
    }
    assert_eq!(read(), vec![7.0; count], "1 + 3 times 2");
    let counts = driver.instruments().counts();
    assert_eq!((counts.launches - launches, counts.graph_launches), (0, 3));
    driver.destroy_graph(graph).unwrap();
    assert!(invalid(driver.launch_graph(graph, stream)).contains("destroyed"));
}

#[test]
#[ignore = "a child of launches_carry_their_attributes_and_errors_their_names"]
fn child_launches() {
    assert_eq!(device_count().unwrap(), 1);
    let absent = CudaDriver::open(3, &Modules::Embedded);
    assert!(matches!(absent, Err(DriverError::NoDevice { ordinal: 3, count: 1 })));
    let none = CudaDriver::open(0, &Modules::Images(Vec::new()));
    assert!(matches!(none, Err(DriverError::NoKernels { .. })));

    let driver: Arc<dyn Driver> = Arc::new(open());
    let gpu = Gpu::new(driver.clone()).unwrap();
    let stream = gpu.stream();
    assert!(matches!(driver.function("elementwise", "absent"), Err(DriverError::NoFunction { .. })));
    assert!(matches!(driver.function("absent", "axpby_f32"), Err(DriverError::NoFunction { .. })));
    assert!(matches!(driver.function("copy", "axpby_f32"), Err(DriverError::NoFunction { .. })));
    let function = driver.function("elementwise", "activate_f32").unwrap();
    assert_eq!(driver.function("elementwise", "activate_f32").unwrap(), function);
    assert_eq!(driver.function_info(function).unwrap().registers, 32);

    let x = driver.alloc(64, stream).unwrap();
    driver.instruments().set_tracing(true);
    activate(
        &gpu,
        &Activate { x, out: x, count: 0, function: Function::Act(Act::None), element: Element::F32 },
    )
    .unwrap();
    activate(
        &gpu,
        &Activate { x, out: x, count: 16, function: Function::Act(Act::None), element: Element::F32 },
    )
    .unwrap();
    let trace = driver.instruments().take_trace();
    assert_eq!(trace.len(), 1);
    assert_eq!(
        (trace[0].kernel.as_str(), trace[0].duration_us),
        ("activate_f32", 500.0),
        "the simulated half millisecond"
    );
    driver.instruments().set_tracing(false);

    // Clusters of any size can be counted, of one block too; what the device does not have counts as none.
    let count = |cluster: u32| {
        let launch = Launch::new(function, [cluster, 1, 1], [32, 1, 1], stream);
        driver.clusters(&Launch { cluster: [cluster, 1, 1], overlaps: true, ..launch }).unwrap()
    };
    assert_eq!((count(1), count(2), count(8), count(9)), (8, 1, 1, 0));

    // A struct of 32 bytes, all zero: no elements, so the kernel touches nothing.
    let params: &[&[u8]] = &[&[0; 32]];
    let clustered = Launch {
        cluster: [2, 1, 1],
        overlaps: true,
        shared: 100 << 10,
        ..Launch::new(function, [4, 1, 1], [32, 1, 1], stream)
    };
    let error = driver.launch(&clustered, &[&[0; 31]]).unwrap_err().to_string();
    assert_eq!(error, "kernel activate_f32: parameter 0 has 31 bytes, the kernel declares 32");
    driver.launch(&clustered, params).unwrap();
    let calls = stand_in_calls();
    assert!(calls.ends_with("launch activate_f32 grid 4 1 1 cluster 2 1 1 overlaps 1\n"), "{calls}");

    let desc = TensorMapDesc {
        base: x,
        element: MapElement::F16,
        extents: vec![8, 4],
        strides: vec![16],
        box_extents: vec![8, 4],
        swizzle: Swizzle::None,
        im2col: None,
    };
    driver.tensor_map(&desc).unwrap();
    let unaligned = TensorMapDesc { strides: vec![24], ..desc };
    assert!(invalid(driver.tensor_map(&unaligned)).contains("multiples of 16"));

    // A kernel that reads behind its memory: the wait reports it, with the call's name and CUDA's words.
    activate(
        &gpu,
        &Activate { x, out: x, count: 1 << 20, function: Function::Act(Act::None), element: Element::F32 },
    )
    .unwrap();
    let error = driver.synchronize(stream).unwrap_err().to_string();
    assert!(error.starts_with("cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (719): "), "{error}");
}

#[test]
#[ignore = "a child of kernels_come_from_a_folder"]
fn child_compiles_a_folder() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("edited-kernels");
    let family = root.join("elementwise");
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&family).unwrap();
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    std::os::unix::fs::symlink(kernels.join("include"), root.join("include")).unwrap();
    let source = std::fs::read_to_string(kernels.join("elementwise/elementwise.cu")).unwrap();
    let file = family.join("elementwise.cu");
    std::fs::write(&file, &source).unwrap();
    // Not for this device: left out.
    std::fs::write(family.join("later.cu"), "// targets: sm_100a\n#error\n").unwrap();
    let modules = Modules::Folder { kernels: root.clone(), cache: root.join("cache") };
    let driver = CudaDriver::open(0, &modules).unwrap();
    driver.function("elementwise", "axpby_f16").unwrap();
    // What the folder lacks comes from the binary.
    if embedded().is_some() {
        driver.function("layernorm", "layernorm_any_f16").unwrap();
    }
    assert!(matches!(driver.function("later", "any"), Err(DriverError::NoFunction { .. })));
    // The same again compiles nothing.
    let compiled = std::fs::read_dir(root.join("cache")).unwrap().count();
    drop(CudaDriver::open(0, &modules).unwrap());
    assert_eq!(std::fs::read_dir(root.join("cache")).unwrap().count(), compiled);
    // A mistake is told in the compiler's words.
    std::fs::write(&file, source.replace("axpby_f16", "axpby_f16(")).unwrap();
    match CudaDriver::open(0, &modules) {
        Err(DriverError::Tool(ToolError::Compile { file, output })) => {
            assert!(file.ends_with("elementwise/elementwise.cu") && output.contains("error"), "{output}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
}

#[test]
#[ignore = "a child of an_old_driver_is_an_error_not_a_panic"]
fn child_finds_an_old_driver() {
    match CudaDriver::open(0, &Modules::Embedded) {
        Err(DriverError::NoDriver { reason }) => {
            assert!(reason.contains("too old, it lacks cuFuncLoad"), "{reason}")
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
}
