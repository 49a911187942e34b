//! `kiln convert`: a workflow as the web page saves it, in API format.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value as Json;

use super::output::say;
use crate::graph;

/// Arguments of `kiln convert`.
#[derive(clap::Args, Debug)]
pub struct ConvertArgs {
    /// The workflow file; an API-format file comes out as it is
    workflow: PathBuf,
    /// Where to write the prompt; to the terminal if not given
    #[arg(long, short)]
    out: Option<PathBuf>,
}

/// Converts the file.
pub fn run(args: &ConvertArgs) -> Result<()> {
    let name = args.workflow.display();
    let text = std::fs::read_to_string(&args.workflow).with_context(|| format!("reading {name}"))?;
    let workflow: Json = serde_json::from_str(&text).with_context(|| format!("{name} is no JSON"))?;
    let prompt = to_prompt(workflow).with_context(|| format!("converting {name}"))?;
    let text = serde_json::to_string_pretty(&prompt)?;
    match &args.out {
        Some(out) => std::fs::write(out, text + "\n").with_context(|| format!("writing {}", out.display())),
        None => {
            say!("{text}");
            Ok(())
        }
    }
}

/// A prompt from either format.
pub fn to_prompt(workflow: Json) -> Result<Json> {
    if !graph::is_ui_workflow(&workflow) {
        return Ok(workflow);
    }
    let schemas: HashMap<&str, graph::Schema> =
        crate::nodes::registry().iter().map(|node| node.schema()).map(|s| (s.class, s)).collect();
    Ok(graph::convert_workflow(&workflow, &|class| schemas.get(class))?)
}
