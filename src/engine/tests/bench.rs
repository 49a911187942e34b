//! Small nodes and an engine to run them in.

use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::broadcast::error::TryRecvError;

use super::super::*;
use crate::graph::{Input, Schema};
use crate::nodes::{Inputs, NodeCtx, NodeError, NodeOutput, Value};
use crate::tensor::HostTensor;

type Body = dyn Fn(&mut NodeCtx<'_>, &Inputs) -> Result<NodeOutput, NodeError> + Send + Sync;

/// A node made of a schema and a closure; notes the id of every call.
pub struct Fake {
    schema: Schema,
    body: Box<Body>,
    calls: Arc<Mutex<Vec<String>>>,
    is_cacheable: bool,
    /// The outside world, for classes that look at it.
    world: Option<Arc<AtomicUsize>>,
}

impl Node for Fake {
    fn schema(&self) -> Schema {
        self.schema.clone()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        lock(&self.calls).push(ctx.node_id.to_owned());
        (self.body)(ctx, inputs)
    }

    fn is_cacheable(&self) -> bool {
        self.is_cacheable
    }

    fn fingerprint(&self, _: &Services, _: &Map<String, Json>) -> Option<String> {
        self.world.as_ref().map(|w| w.load(Ordering::SeqCst).to_string())
    }
}

/// An engine with small nodes, its events and the calls of the nodes.
pub struct Bench {
    pub engine: Arc<Engine>,
    pub events: broadcast::Receiver<Arc<Event>>,
    pub calls: Arc<Mutex<Vec<String>>>,
    /// What `World` sees.
    pub world: Arc<AtomicUsize>,
    /// A copy of every value that `Big` made.
    pub big: Arc<Mutex<Vec<std::sync::Weak<Vec<u8>>>>>,
}

pub fn number(inputs: &Inputs, name: &str) -> Result<i64, NodeError> {
    inputs.int(name)
}

fn num(value: i64) -> Value {
    Value::Json(json!(value))
}

fn text_ui(texts: Vec<String>) -> Map<String, Json> {
    Map::from_iter([("text".to_owned(), json!(texts))])
}

/// Counts steps until interrupted; `steps` of 0 never ends by itself.
fn slow(ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
    let steps = inputs.int("steps")? as u64;
    for step in 1.. {
        ctx.progress(step, steps.max(10_000), None)?;
        if step == steps {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(NodeOutput::one(num(0)))
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut EngineConfig)) -> Self {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let world = Arc::new(AtomicUsize::new(0));
        let big = Arc::new(Mutex::new(Vec::new()));
        let nodes = nodes(&calls, &world, &big);
        let services = Services {
            folders: Arc::default(),
            models: Arc::default(),
            save_metadata: true,
            png_level: 4,
            preview: Default::default(),
        };
        let mut config = EngineConfig::new(services, nodes);
        change(&mut config);
        let engine = Engine::new(config);
        let events = engine.subscribe();
        Self { engine, events, calls, world, big }
    }

    pub fn submit(&self, prompt: Json) -> String {
        let client_id = Some("me".to_owned());
        self.engine
            .submit(Submission { prompt, client_id, ..Default::default() })
            .expect("accepted")
            .prompt_id
    }

    /// Runs a prompt to its end; gives its events and its history entry.
    pub fn run(&mut self, prompt: Json) -> (Vec<Arc<Event>>, Json) {
        let id = self.submit(prompt);
        self.finish(&id)
    }

    pub fn finish(&mut self, id: &str) -> (Vec<Arc<Event>>, Json) {
        let is_end = |e: &Event| matches!(&e.kind, EventKind::Executing { node: None, prompt_id } if **prompt_id == *id);
        let events = self.until(is_end);
        (events, self.engine.history_one(id)[id].clone())
    }

    /// Collects events up to and including the first accepted one.
    pub fn until(&mut self, is_last: impl Fn(&Event) -> bool) -> Vec<Arc<Event>> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut events = Vec::new();
        loop {
            match self.events.try_recv() {
                Ok(event) => {
                    events.push(event.clone());
                    if is_last(&event) {
                        return events;
                    }
                }
                Err(TryRecvError::Empty) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error} after {:?}", names(&events)),
            }
        }
    }

    /// Starts a prompt that runs until interrupted and waits for its first step.
    pub fn start_slow(&mut self) -> String {
        let id = self.submit(
            json!({"s": node("Slow", json!({"steps": 0})), "9": node("Show", json!({"x": ["s", 0]}))}),
        );
        self.until(|e| matches!(e.kind, EventKind::Progress { .. }));
        id
    }

    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.calls))
    }
}

fn nodes(
    calls: &Arc<Mutex<Vec<String>>>,
    world: &Arc<AtomicUsize>,
    big: &Arc<Mutex<Vec<std::sync::Weak<Vec<u8>>>>>,
) -> Vec<Box<dyn Node>> {
    let fake = |schema: Schema, body: Box<Body>| Fake {
        schema,
        body,
        calls: calls.clone(),
        is_cacheable: true,
        world: None,
    };
    let class = |name| Schema::new(name, "test");
    let big = big.clone();
    let make_big = move |_: &mut NodeCtx<'_>, _: &Inputs| {
        let data = Arc::new(vec![0_u8; 1000]);
        lock(&big).push(Arc::downgrade(&data));
        Ok(NodeOutput::one(Value::shared("NUM", data)))
    };
    let int = |name| Input::int(name, 0, -1_000_000, u64::MAX);
    let own_id = class("OwnId").input(Input::hidden("id", "UNIQUE_ID")).output("NUM");
    let show = class("Show").input(Input::link("x", "*")).input(Input::hidden("prompt", "PROMPT")).sink();
    let show_body = |_: &mut NodeCtx<'_>, i: &Inputs| {
        Ok(NodeOutput::ui(text_ui(vec![i.get("x").map(Value::describe).unwrap_or_default()])))
    };
    let add = class("Add").input(Input::link("a", "NUM")).input(Input::link("b", "NUM")).output("NUM");
    let say = |ctx: &mut NodeCtx<'_>, _: &Inputs| {
        ctx.sink.text(ctx.node_id, "width: 24");
        ctx.sink.picture(ctx.node_id, &HostTensor::zeros(&[1, 2, 3, 3]));
        Ok(NodeOutput::default())
    };
    let all: Vec<Fake> = vec![
        fake(class("Say").sink(), Box::new(say)),
        fake(
            class("Num").input(int("value")).output("NUM"),
            Box::new(|_, i| Ok(NodeOutput::one(num(i.int("value")?)))),
        ),
        fake(add, Box::new(|_, i| Ok(NodeOutput::one(num(number(i, "a")? + number(i, "b")?))))),
        fake(
            class("List").input(int("count")).output("NUM").list(),
            Box::new(|_, i| Ok(NodeOutput::one(Value::List((0..i.int("count")?).map(num).collect())))),
        ),
        fake(
            {
                let mut schema =
                    class("Total").input(Input::link("x", "NUM")).input(int("plus")).output("NUM");
                schema.input_is_list = true;
                schema
            },
            Box::new(|_, i| {
                let sum: i64 = i.list("x")?.iter().filter_map(|v| v.json()?.as_i64()).sum();
                let plus: i64 = i.list("plus")?.iter().filter_map(|v| v.json()?.as_i64()).sum();
                Ok(NodeOutput::one(num(sum + plus)))
            }),
        ),
        fake(show, Box::new(show_body)),
        fake(
            class("Fail").input(Input::link("x", "*")).output("NUM"),
            Box::new(|_, _| Err(NodeError::failed("WeightsError", "no such tensor"))),
        ),
        fake(class("Panic").output("NUM"), Box::new(|_, _| panic!("index 7 out of range"))),
        fake(class("Short").output("NUM"), Box::new(|_, _| Ok(NodeOutput::default()))),
        fake(class("Slow").input(int("steps")).output("NUM"), Box::new(slow)),
        fake(own_id, Box::new(|ctx, _| Ok(NodeOutput::one(Value::Json(ctx.node_id.into()))))),
        fake(class("Big").input(int("seed")).output("NUM"), Box::new(make_big)),
        fake(class("Quiet").input(Input::link("x", "*")).sink(), Box::new(|_, _| Ok(NodeOutput::default()))),
        Fake {
            is_cacheable: false,
            ..fake(class("Fresh").output("NUM"), Box::new(|_, _| Ok(NodeOutput::one(num(1)))))
        },
        Fake {
            world: Some(world.clone()),
            ..fake(class("World").output("NUM"), Box::new(|_, _| Ok(NodeOutput::one(num(2)))))
        },
    ];
    all.into_iter().map(|f| Box::new(f) as Box<dyn Node>).collect()
}

pub fn node(class: &str, inputs: Json) -> Json {
    json!({"class_type": class, "inputs": inputs})
}

/// `Num` → `Add` to itself → `Show`: three nodes.
pub fn small(value: i64) -> Json {
    json!({
        "1": node("Num", json!({"value": value})),
        "2": node("Add", json!({"a": ["1", 0], "b": ["1", 0]})),
        "3": node("Show", json!({"x": ["2", 0]})),
    })
}

/// A short text an event.
pub fn name(event: &Event) -> String {
    let join = |ids: &[Id]| ids.iter().map(|id| &**id).collect::<Vec<_>>().join(",");
    match &event.kind {
        EventKind::Status { queue_remaining } => format!("status:{queue_remaining}"),
        EventKind::Executing { node, .. } => format!("executing:{}", node.as_deref().unwrap_or("None")),
        EventKind::Executed { node, .. } => format!("executed:{node}"),
        EventKind::ExecutionCached { nodes, .. } => format!("execution_cached:{}", join(nodes)),
        EventKind::Progress { value, max, node, .. } => format!("progress:{node}:{value}/{max}"),
        EventKind::ProgressState { nodes, .. } => {
            let states = nodes
                .iter()
                .map(|n| format!("{}={}", n.node, if n.is_finished { "finished" } else { "running" }));
            format!("progress_state:{}", states.collect::<Vec<_>>().join(","))
        }
        other => other.type_name().unwrap_or("binary").to_owned(),
    }
}

pub fn names(events: &[Arc<Event>]) -> Vec<String> {
    events.iter().map(|e| name(e)).collect()
}

/// Without `status`, `progress_state` and `progress`.
pub fn brief(events: &[Arc<Event>]) -> Vec<String> {
    let is_noise = |n: &String| n.starts_with("status") || n.starts_with("progress");
    names(events).into_iter().filter(|n| !is_noise(n)).collect()
}

/// The data of the only event of that type.
pub fn data(events: &[Arc<Event>], type_name: &str) -> Json {
    let found: Vec<_> = events.iter().filter(|e| e.kind.type_name() == Some(type_name)).collect();
    assert_eq!(found.len(), 1, "{type_name} in {:?}", names(events));
    found[0].kind.data()
}
