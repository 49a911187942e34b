//! A prompt's first denoise step comes within a second: for the demo model from a cold start, for a model
//! of full size once it is loaded; and loading reads only what is used.
//!
//! The second is one of CPU time, over all threads, so that other work on the machine doesn't count: two
//! threads that wait for nothing need half of it on a clock. Clock times are printed beside it.
#![cfg(target_os = "linux")]

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln::cli::device::DeviceArgs;
use kiln::cli::setup::{RuntimeArgs, services};
use kiln::cli::trace::TraceArgs;
use kiln::engine::{Engine, EngineConfig, Event, EventKind, Submission};
use kiln::files::DEMO_CHECKPOINT;
use serde_json::{Value as Json, json};
use tokio::sync::broadcast::Receiver;

/// SD1.5's sizes and names with synthetic weights, as the golden runner makes it.
const FULL_SIZE: &str = "synth-sd15.safetensors";

/// Two steps at 64×64, so that the step itself takes next to nothing.
fn prompt(checkpoint: &str, seed: u64) -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": seed, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": format!("a red circle {seed}"), "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "first", "images": ["8", 0]}},
    })
}

fn engine(base: &Path) -> Arc<Engine> {
    let args = RuntimeArgs {
        base_directory: base.to_owned(),
        device: DeviceArgs { cpu: true, threads: Some(2), ..DeviceArgs::default() },
        ..RuntimeArgs::default()
    };
    let (services, _) = services(&args, &args.folders(), &TraceArgs::default()).unwrap();
    Engine::new(EngineConfig::new(services, kiln::nodes::registry()))
}

/// The tests measure the whole process, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// The process at a moment.
#[derive(Clone, Copy)]
struct Moment {
    clock: Instant,
    cpu: Duration,
    resident_bytes: u64,
}

impl Moment {
    fn now() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        // User and system time, in hundredths of a second, after the name in brackets.
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|f| f.parse::<u64>().unwrap()).sum();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kb: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
        Self { clock: Instant::now(), cpu: Duration::from_millis(10 * ticks), resident_bytes: kb << 10 }
    }

    fn since(&self, earlier: &Self) -> Spent {
        let resident_bytes = self.resident_bytes.saturating_sub(earlier.resident_bytes);
        Spent { clock: self.clock - earlier.clock, cpu: self.cpu - earlier.cpu, resident_bytes }
    }
}

/// What lies between two moments.
struct Spent {
    clock: Duration,
    cpu: Duration,
    resident_bytes: u64,
}

impl fmt::Display for Spent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of CPU, {:?}, {} MB more resident",
            self.cpu,
            self.clock,
            self.resident_bytes / 1_000_000
        )
    }
}

/// The prompt's start, its sampler's start, and the end of its first step.
fn run(engine: &Engine, events: &mut Receiver<Arc<Event>>, prompt: Json) -> [Moment; 3] {
    engine.submit(Submission { prompt, ..Submission::default() }).unwrap();
    let (mut start, mut sampler, mut step) = (None, None, None);
    loop {
        let event = events.blocking_recv().unwrap();
        let now = Some(Moment::now());
        match &event.kind {
            EventKind::ExecutionStart { .. } => start = now,
            EventKind::Executing { node: Some(node), .. } if **node == *"3" => sampler = now,
            EventKind::Progress { node, .. } if **node == *"3" => step = step.or(now),
            EventKind::ExecutionError(error) => panic!("{}", error.exception_message),
            EventKind::ExecutionSuccess { .. } => break,
            _ => {}
        }
    }
    [start.unwrap(), sampler.unwrap(), step.unwrap()]
}

#[test]
fn the_demo_model_takes_its_first_step_within_a_second() {
    if cfg!(debug_assertions) {
        eprintln!("skipped: times hold for optimised builds");
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let base = tempfile::tempdir().unwrap();
    let engine = engine(base.path());
    let mut events = engine.subscribe();
    // Nothing is warm here: no trial prompt, no vocabulary, no code pages.
    let [start, sampler, step] = run(&engine, &mut events, prompt(DEMO_CHECKPOINT, 1));
    eprintln!("demo: sampler after {}; first step done after {}", sampler.since(&start), step.since(&start));
    assert!(step.since(&start).cpu < Duration::from_secs(1), "{}", step.since(&start));
    engine.shutdown();
}

/// SD1.5's real size. The first use of each weight, two gigabytes in the first step, is only reported;
/// before it the sampler starts within a second and another for the text encoder's weights, with no more
/// of the file read than those, an eighth. From there on the whole step takes a second at most.
#[test]
fn a_model_of_full_size_takes_its_first_step_soon() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/golden-models");
    let file = models.join("checkpoints").join(FULL_SIZE);
    if cfg!(debug_assertions) || !file.is_file() {
        eprintln!("skipped: needs an optimised build and {}", file.display());
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let base = tempfile::tempdir().unwrap();
    let paths =
        format!("test:\n  base_path: {:?}\n  checkpoints: checkpoints\n", models.display().to_string());
    fs::write(base.path().join("extra_model_paths.yaml"), paths).unwrap();
    let engine = engine(base.path());
    let mut events = engine.subscribe();
    let [start, sampler, step] = run(&engine, &mut events, prompt(FULL_SIZE, 1));
    let loading = sampler.since(&start);
    eprintln!("loading: sampler after {loading}; first step done after {}", step.since(&start));
    assert!(loading.cpu < Duration::from_secs(2), "{loading}");
    assert!(loading.resident_bytes < file.metadata().unwrap().len() / 4, "{loading}");
    // Loaded, but all of this prompt is new: text, seed, and with them all that is computed.
    let [start, sampler, step] = run(&engine, &mut events, prompt(FULL_SIZE, 2));
    eprintln!(
        "loaded: sampler after {}; first step done after {}",
        sampler.since(&start),
        step.since(&start)
    );
    assert!(step.since(&start).cpu < Duration::from_secs(1), "{}", step.since(&start));
    engine.shutdown();
}
