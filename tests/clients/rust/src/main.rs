//! The crate comfyui-client, whose structs take every field by its exact type.
//!
//! `client-test URL WORKFLOW FOLDER` writes the picture of a run into the folder.

use anyhow::{bail, ensure, Context};
use comfyui_client::meta::{ComfyEvent, Event};
use comfyui_client::ClientBuilder;
use futures_util::StreamExt;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(url), Some(workflow), Some(folder)) = (args.next(), args.next(), args.next()) else {
        bail!("usage: client-test URL WORKFLOW FOLDER");
    };
    let mut graph: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(workflow)?)?;
    graph["3"]["inputs"]["seed"] = 31.into();
    let (client, mut events) = ClientBuilder::new(&url).build().await?;
    let prompt = client.post_prompt(&graph).await?;
    let (mut steps, mut pictures) = (0, 0);
    while let Some(event) = events.next().await {
        match event? {
            Event::Comfy(ComfyEvent::Progress { .. }) => steps += 1,
            Event::Comfy(ComfyEvent::Executed { data }) => {
                for image in data.output.and_then(|output| output.images).unwrap_or_default() {
                    let bytes = client.get_view(&image).await?;
                    std::fs::write(format!("{folder}/{pictures}.png"), bytes)?;
                    pictures += 1;
                }
            }
            Event::Comfy(ComfyEvent::ExecutionSuccess { data }) if data.prompt_id == prompt.prompt_id => break,
            Event::Comfy(ComfyEvent::ExecutionError { data }) => bail!("{data:?}"),
            Event::Comfy(ComfyEvent::Unknown(message)) => {
                let kind = message["type"].as_str().context("a message without a type")?;
                let known = ["status", "progress", "executed", "executing", "execution_start", "execution_cached"];
                ensure!(!known.contains(&kind), "the crate's structs do not take {message}");
            }
            _ => {}
        }
    }
    ensure!(steps >= 4, "{steps} progress messages for 4 steps");
    client.get_history(&prompt.prompt_id).await?;
    Ok(())
}
