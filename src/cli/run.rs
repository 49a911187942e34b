//! `kiln run`: any API-format workflow without a server.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value as Json};
use tokio::sync::broadcast::error::RecvError;

use super::output::say;
use super::progress::Bar;
use super::setup::{self, RuntimeArgs};
use super::trace::{Trace, TraceArgs};
use crate::engine::{Engine, EngineConfig, EventKind, Submission};
use crate::files::{Folders, Kind};

/// Arguments of `kiln run`.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// A workflow in ComfyUI's API format (what is posted as `prompt`), or the whole body of such a post.
    workflow: PathBuf,
    /// Changes an input first, e.g. `6.text="a cat"` or `3.steps=30`; may be given several times.
    #[arg(long = "set", value_name = "NODE.INPUT=VALUE")]
    set: Vec<String>,
    /// Where output files go.
    #[arg(long, default_value = "output")]
    out: PathBuf,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Runs a workflow to its end.
pub fn run(args: RunArgs) -> Result<()> {
    let mut prompt = read(&args.workflow)?;
    for change in &args.set {
        apply(&mut prompt, change)?;
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("making {}", args.out.display()))?;
    let scratch = tempfile::tempdir().context("making a temporary folder")?;
    let folders = setup::local_folders(&args.runtime, &args.out, scratch.path());
    let (services, trace) = setup::services(&args.runtime, &folders, &args.trace)?;
    let folders = services.folders.clone();
    let engine = Engine::new(EngineConfig::new(services, crate::nodes::registry()));
    let mut events = engine.subscribe();
    let submission =
        Submission { prompt: Json::Object(prompt.clone()), extra_data: Map::new(), ..Submission::default() };
    let accepted = engine.submit(submission).map_err(|refused| {
        anyhow::anyhow!(
            "the workflow is not valid: {}\n{}",
            refused.error["message"].as_str().unwrap_or_default(),
            serde_json::to_string_pretty(&refused.node_errors).unwrap_or_default()
        )
    })?;

    let bar = Bar::new();
    let mut failure = None;
    loop {
        let event = match events.blocking_recv() {
            Ok(event) => event,
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => bail!("the engine stopped"),
        };
        match &event.kind {
            EventKind::Executing { node: Some(node), .. } => {
                let class = prompt.get(&**node).and_then(|n| n["class_type"].as_str()).unwrap_or("?");
                tracing::info!(node = &**node, class, "executing");
            }
            EventKind::Executing { node: None, .. } => break,
            EventKind::Progress { value, max, .. } => bar.set(*value, *max),
            EventKind::ExecutionError(e) => {
                failure = Some(format!("node {} ({}): {}", e.node_id, e.node_type, e.exception_message))
            }
            _ => {}
        }
    }
    bar.clear();
    let history = engine.history_one(&accepted.prompt_id);
    engine.shutdown();
    trace.map_or(Ok(()), Trace::finish)?;
    if let Some(failure) = failure {
        bail!(failure);
    }
    print_outputs(&history[accepted.prompt_id.as_str()]["outputs"], &folders)
}

fn read(path: &Path) -> Result<Map<String, Json>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let json: Json =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let Json::Object(mut object) = json else { bail!("{} holds no JSON object", path.display()) };
    if object.contains_key("nodes") && object.contains_key("links") {
        bail!("{} is a workflow of the web page; export it in API format first", path.display());
    }
    match object.remove("prompt") {
        Some(Json::Object(prompt)) => Ok(prompt),
        Some(other) => bail!("\"prompt\" in {} is not an object but {other}", path.display()),
        None => Ok(object),
    }
}

/// Applies `NODE.INPUT=VALUE`; the value is JSON if it parses, else text.
fn apply(prompt: &mut Map<String, Json>, change: &str) -> Result<()> {
    let (target, value) =
        change.split_once('=').with_context(|| format!("--set {change}: expected NODE.INPUT=VALUE"))?;
    let (node, input) =
        target.rsplit_once('.').with_context(|| format!("--set {change}: expected NODE.INPUT=VALUE"))?;
    let known: Vec<String> = prompt.keys().cloned().collect();
    let inputs =
        prompt.get_mut(node).and_then(|n| n.get_mut("inputs")).and_then(Json::as_object_mut).with_context(
            || format!("--set {change}: no node '{node}'; the workflow has {}", known.join(", ")),
        )?;
    let is_text = inputs.get(input).is_some_and(Json::is_string);
    let value = match serde_json::from_str(value) {
        Ok(Json::String(text)) => Json::String(text),
        Ok(parsed) if !is_text => parsed,
        _ => Json::String(value.to_owned()),
    };
    inputs.insert(input.to_owned(), value);
    Ok(())
}

fn print_outputs(outputs: &Json, folders: &Folders) -> Result<()> {
    for (node, output) in outputs.as_object().into_iter().flatten() {
        for (kind, files) in output.as_object().into_iter().flatten() {
            for file in files.as_array().into_iter().flatten() {
                match file["filename"].as_str() {
                    Some(name) => {
                        let kind = Kind::from_name(file["type"].as_str().unwrap_or_default())
                            .unwrap_or(Kind::Output);
                        let root = folders.root(kind);
                        say!(
                            "{}",
                            root.join(file["subfolder"].as_str().unwrap_or_default()).join(name).display()
                        );
                    }
                    None => say!("node {node} {kind}: {file}"),
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Map<String, Json> {
        let json =
            serde_json::json!({"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "n": 3}}});
        json.as_object().cloned().unwrap()
    }

    #[test]
    fn set_changes_text_and_numbers() {
        let mut p = prompt();
        apply(&mut p, "6.text=12").unwrap();
        apply(&mut p, "6.n=4.5").unwrap();
        apply(&mut p, "6.other=[\"4\", 1]").unwrap();
        assert_eq!(p["6"]["inputs"]["text"], "12");
        assert_eq!(p["6"]["inputs"]["n"], 4.5);
        assert_eq!(p["6"]["inputs"]["other"], serde_json::json!(["4", 1]));
    }

    #[test]
    fn set_names_what_is_wrong() {
        let mut p = prompt();
        assert!(
            apply(&mut p, "7.text=x").unwrap_err().to_string().contains("no node '7'; the workflow has 6")
        );
        assert!(apply(&mut p, "nonsense").unwrap_err().to_string().contains("NODE.INPUT=VALUE"));
    }
}
