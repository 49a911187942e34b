//! Tiny nodes, so that the server's tests need no model and no picture.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, json};

use crate::backend::{self, Device, DeviceOptions};
use crate::files::{FolderOptions, Folders, Kind};
use crate::graph::{Input, Schema};
use crate::image::{Bitmap, PngCompression, encode_png};
use crate::models::ModelStore;
use crate::nodes::{
    Inputs, Node, NodeCtx, NodeError, NodeOutput, PreviewFrame, PreviewMethod, Services, Value,
};
use crate::tensor::HostTensor;
use crate::weights::OpenOptions;

/// Gives its number.
struct Number;
/// Shows a number to the client.
struct Show;
/// Works in steps of 5 ms until it is stopped, with a preview a step.
struct Slow;
/// Sends a picture.
struct Picture;
/// Saves a small picture, like `SaveImage`; takes the name of an input file.
struct Keep;

impl Node for Number {
    fn schema(&self) -> Schema {
        Schema::new("Number", "test").input(Input::int("value", 0, 0, u64::MAX)).output("INT")
    }

    fn execute(&self, _: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        Ok(NodeOutput::one(Value::Json(inputs.seed("value")?.into())))
    }
}

impl Node for Show {
    fn schema(&self) -> Schema {
        Schema::new("Show", "test").input(Input::link("value", "INT")).sink()
    }

    fn execute(&self, _: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let ui = json!({"text": [inputs.seed("value")?]});
        Ok(NodeOutput::ui(ui.as_object().cloned().unwrap_or_else(Map::new)))
    }
}

impl Node for Slow {
    fn schema(&self) -> Schema {
        Schema::new("Slow", "test")
            .input(Input::int("steps", 1, 1, 1_000_000))
            .input(Input::int("salt", 0, 0, u64::MAX))
            .sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let steps = inputs.seed("steps")?;
        for step in 1..=steps {
            std::thread::sleep(Duration::from_millis(5));
            let preview = PreviewFrame { image: HostTensor::full(&[1, 4, 8, 3], 0.5), max_size: 64 };
            ctx.progress(step, steps, Some(preview))?;
        }
        Ok(NodeOutput::ui(Map::new()))
    }
}

impl Node for Picture {
    fn schema(&self) -> Schema {
        Schema::new("Picture", "test").input(Input::int("side", 8, 1, 4096)).sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let side = inputs.size("side")?;
        ctx.sink.picture(ctx.node_id, &HostTensor::full(&[1, side, side, 3], 0.25));
        Ok(NodeOutput::default())
    }

    fn is_cacheable(&self) -> bool {
        false
    }
}

impl Node for Keep {
    fn schema(&self) -> Schema {
        Schema::new("Keep", "test")
            .input(Input::string("name"))
            .input(Input::string("from").optional())
            .sink()
    }

    fn execute(&self, ctx: &mut NodeCtx<'_>, inputs: &Inputs) -> Result<NodeOutput, NodeError> {
        let name = format!("{}.png", inputs.string("name")?);
        let fail = |e: &dyn std::fmt::Display| NodeError::failed("Keep", e.to_string());
        let picture = Bitmap::from_images(&HostTensor::full(&[1, 2, 3, 3], 0.5), 0).map_err(|e| fail(&e))?;
        let file = encode_png(&picture, PngCompression::Fast, &[]).map_err(|e| fail(&e))?;
        let folders = &ctx.services.folders;
        let path = folders.resolve(Kind::Output, "", &name).map_err(|e| fail(&e))?;
        std::fs::write(path, file).map_err(|e| fail(&e))?;
        let ui = json!({"images": [{"filename": name, "subfolder": "", "type": "output"}]});
        Ok(NodeOutput::ui(ui.as_object().cloned().unwrap_or_else(Map::new)))
    }
}

pub(super) fn all() -> Vec<Box<dyn Node>> {
    vec![Box::new(Number), Box::new(Show), Box::new(Slow), Box::new(Picture), Box::new(Keep)]
}

pub(super) fn folders(base: &Path) -> Folders {
    Folders::open(&FolderOptions { base: base.to_owned(), ..FolderOptions::default() }).unwrap()
}

pub(super) fn services(folders: Arc<Folders>) -> Services {
    Services {
        folders,
        models: Arc::new(ModelStore::new(
            backend::open(DeviceOptions {
                device: Device::Cpu,
                threads: Some(1),
                ..DeviceOptions::default()
            })
            .unwrap(),
            OpenOptions { mmap: true },
        )),
        save_metadata: true,
        png_level: 1,
        preview: PreviewMethod::None,
    }
}
