//! `kiln demo`: the whole way from a prompt to a picture, over real HTTP, on the model inside the binary.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use serde_json::{Value as Json, json};
use tokio_tungstenite::tungstenite::Message;

use super::client::Client;
use super::local::LocalServer;
use super::output::say;
use super::progress::Bar;
use super::setup::RuntimeArgs;
use crate::files::DEMO_CHECKPOINT;

/// Arguments of `kiln demo`.
#[derive(clap::Args, Debug)]
pub struct DemoArgs {
    /// What to draw; the demo model knows coloured shapes, a few things and landscapes.
    #[arg(default_value = "a red circle on a blue background")]
    prompt: String,
    /// Seed of the noise.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Denoising steps.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: u32,
    /// Width and height in pixels; the demo model was trained at 128.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(16..=2048))]
    size: u32,
    /// Where to save the picture.
    #[arg(long, default_value = "kiln-demo.png")]
    out: PathBuf,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// The classic seven-node text-to-image workflow.
fn workflow(args: &DemoArgs) -> Json {
    json!({
        "3": {"class_type": "KSampler", "inputs": {
            "seed": args.seed, "steps": args.steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": DEMO_CHECKPOINT}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": args.size, "height": args.size, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": args.prompt, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "demo", "images": ["8", 0]}},
    })
}

/// Runs the demo.
pub fn run(args: DemoArgs) -> Result<()> {
    let began = Instant::now();
    let folder = tempfile::tempdir().context("making a folder for the demo server")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(draw(&args, folder.path(), began))
}

async fn draw(args: &DemoArgs, folder: &Path, began: Instant) -> Result<()> {
    let server = LocalServer::start(&args.runtime, folder).await?;
    let client = Client::new(server.address());
    let stats = client.get_json("/system_stats").await?;
    say!("kiln {} on {}", env!("CARGO_PKG_VERSION"), stats["devices"][0]["name"].as_str().unwrap_or("?"));
    say!("server: http://{} (for this demo only)   prompt: {:?}", server.address(), args.prompt);

    let id = uuid::Uuid::new_v4().to_string();
    let mut socket = client.socket(&id).await?;
    let prompt = workflow(args);
    let accepted = client.post_json("/prompt", &json!({"prompt": prompt, "client_id": id})).await?;
    let prompt_id =
        accepted["prompt_id"].as_str().context("the server's answer has no prompt_id")?.to_owned();

    let mut stages = Stages::default();
    let bar = Bar::new();
    while let Some(message) = socket.next().await {
        let Message::Text(text) = message? else { continue };
        let event: Json = serde_json::from_str(&text)?;
        let data = &event["data"];
        match event["type"].as_str().unwrap_or_default() {
            "executing" => match data["node"].as_str() {
                Some(node) => stages.enter(prompt[node]["class_type"].as_str().unwrap_or(node)),
                None => break,
            },
            "progress" => bar.set(data["value"].as_u64().unwrap_or(0), data["max"].as_u64().unwrap_or(0)),
            "execution_error" => bail!("{}: {}", data["node_type"], data["exception_message"]),
            _ => {}
        }
    }
    stages.leave();
    bar.clear();

    let history = client.get_json(&format!("/history/{prompt_id}")).await?;
    let image = &history[prompt_id.as_str()]["outputs"]["9"]["images"][0];
    let name = image["filename"].as_str().context("the prompt gave no picture")?;
    let png = client.get(&format!("/view?filename={name}&type=output&subfolder=")).await?;
    std::fs::write(&args.out, &png).with_context(|| format!("writing {}", args.out.display()))?;
    server.stop().await;

    for (stage, time) in &stages.times {
        say!("  {stage:<24} {:>7.1} ms", time.as_secs_f64() * 1e3);
    }
    let path = args.out.canonicalize().unwrap_or_else(|_| args.out.clone());
    say!("{} ({} bytes) in {:.2} s from start", path.display(), png.len(), began.elapsed().as_secs_f64());
    say!();
    say!("next: kiln demo \"a purple cat on a yellow background\"   another picture");
    say!("      kiln serve                                         ComfyUI's API on http://127.0.0.1:8188");
    say!("      kiln run WORKFLOW.json --set 6.text=\"...\"            a workflow without a server");
    Ok(())
}

/// Time of each node, in order.
#[derive(Default)]
struct Stages {
    current: Option<(String, Instant)>,
    times: Vec<(String, Duration)>,
}

impl Stages {
    fn enter(&mut self, stage: &str) {
        self.leave();
        self.current = Some((stage.to_owned(), Instant::now()));
    }

    fn leave(&mut self) {
        if let Some((stage, began)) = self.current.take() {
            self.times.push((stage, began.elapsed()));
        }
    }
}
