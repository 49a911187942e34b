//! What a node takes and gives: the one source of `/object_info` and validation.

use serde_json::{Map, Value as Json};

/// Where the options of a combo input come from.
#[derive(Clone, Debug, PartialEq)]
pub enum ComboSource {
    /// A fixed list, in the order shown to the user.
    Static(Vec<Json>),
    /// File names that exist when the question is asked.
    Files(FileList),
}

/// A live list of file names (asked of the server's folders each time).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileList {
    /// Model files of a folder type (`checkpoints`, `vae`, `loras`, …), plus fixed entries.
    Models {
        /// ComfyUI's folder type.
        folder: &'static str,
        /// Entries that are listed although no file has that name, after the files.
        extra: Vec<String>,
    },
    /// VAE files, and the names of the tiny autoencoders whose files are there.
    Vaes,
    /// Folders that hold a pipeline of the diffusers library.
    Pipelines,
    /// Pictures in the input folder.
    InputImages,
    /// `*.latent` files in the input folder.
    InputLatents,
}

/// The type of an input.
#[derive(Clone, Debug, PartialEq)]
pub enum InputKind {
    /// A whole number.
    Int,
    /// A floating point number.
    Float,
    /// A text.
    String,
    /// True or false.
    Boolean,
    /// One of a list.
    Combo(ComboSource),
    /// A value of this type name, only through a link (`MODEL`, `LATENT`, …; `*` takes any).
    Link(&'static str),
}

impl InputKind {
    /// ComfyUI's type name (`COMBO` for lists).
    pub fn type_name(&self) -> &'static str {
        match self {
            InputKind::Int => "INT",
            InputKind::Float => "FLOAT",
            InputKind::String => "STRING",
            InputKind::Boolean => "BOOLEAN",
            InputKind::Combo(_) => "COMBO",
            InputKind::Link(name) => name,
        }
    }
}

/// Whether an input must be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Must be in the prompt.
    Required,
    /// May be left out.
    Optional,
    /// Filled in by the executor (`PROMPT`, `EXTRA_PNGINFO`, `UNIQUE_ID`), never by the client.
    Hidden,
}

/// One input of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Name in the prompt.
    pub name: &'static str,
    /// Type.
    pub kind: InputKind,
    /// Required, optional or hidden.
    pub presence: Presence,
    /// The options object of `/object_info`, in order (`default`, `min`, `max`, `step`, …).
    /// `None` writes no object at all (`["LATENT"]` instead of `["LATENT", {}]`).
    pub options: Option<Map<String, Json>>,
}

impl Input {
    fn new(name: &'static str, kind: InputKind) -> Self {
        Self { name, kind, presence: Presence::Required, options: Some(Map::new()) }
    }

    /// A linked input of type `type_name`.
    pub fn link(name: &'static str, type_name: &'static str) -> Self {
        Self::new(name, InputKind::Link(type_name))
    }

    /// A whole number with default and range.
    pub fn int(name: &'static str, default: i64, min: i64, max: impl Into<Json>) -> Self {
        Self::new(name, InputKind::Int).opt("default", default).opt("min", min).opt("max", max)
    }

    /// A floating point number with default and range.
    pub fn float(name: &'static str, default: f64, min: f64, max: f64) -> Self {
        Self::new(name, InputKind::Float).opt("default", default).opt("min", min).opt("max", max)
    }

    /// A whole number without default or range.
    pub fn open_int(name: &'static str) -> Self {
        Self::new(name, InputKind::Int)
    }

    /// A floating point number without default or range.
    pub fn open_float(name: &'static str) -> Self {
        Self::new(name, InputKind::Float)
    }

    /// A text without default.
    pub fn string(name: &'static str) -> Self {
        Self::new(name, InputKind::String)
    }

    /// True or false without default.
    pub fn boolean(name: &'static str) -> Self {
        Self::new(name, InputKind::Boolean)
    }

    /// One of a fixed list.
    pub fn combo<S: Into<String> + Clone>(name: &'static str, options: &[S]) -> Self {
        let list = options.iter().map(|s| Json::String(s.clone().into())).collect();
        Self::new(name, InputKind::Combo(ComboSource::Static(list)))
    }

    /// One of the files that exist.
    pub fn files(name: &'static str, list: FileList) -> Self {
        Self::new(name, InputKind::Combo(ComboSource::Files(list)))
    }

    /// A model file of folder type `folder`.
    pub fn model_file(name: &'static str, folder: &'static str) -> Self {
        Self::files(name, FileList::Models { folder, extra: Vec::new() })
    }

    /// A hidden input that the executor fills in (`type_name` e.g. `PROMPT`).
    pub fn hidden(name: &'static str, type_name: &'static str) -> Self {
        let mut input = Self::link(name, type_name);
        input.presence = Presence::Hidden;
        input
    }

    /// Adds an entry to the options object.
    pub fn opt(mut self, key: &str, value: impl Into<Json>) -> Self {
        self.options.get_or_insert_default().insert(key.to_owned(), value.into());
        self
    }

    /// Makes the input optional.
    pub fn optional(mut self) -> Self {
        self.presence = Presence::Optional;
        self
    }

    /// Whether an entry of the options object is true.
    pub fn is_set(&self, option: &str) -> bool {
        self.options.as_ref().is_some_and(|options| options.get(option) == Some(&Json::Bool(true)))
    }

    /// What a new widget for it shows: the default, or what is nothing for its type; `None` for links and for
    /// files, which depend on what is there.
    pub fn initial(&self) -> Option<Json> {
        let default = self.options.as_ref().and_then(|options| options.get("default"));
        default.cloned().or_else(|| match &self.kind {
            InputKind::Int | InputKind::Float => Some(0.into()),
            InputKind::String => Some("".into()),
            InputKind::Boolean => Some(false.into()),
            InputKind::Combo(ComboSource::Static(list)) => list.first().cloned(),
            InputKind::Combo(ComboSource::Files(_)) | InputKind::Link(_) => None,
        })
    }

    /// Writes no options object in `/object_info`.
    pub fn bare(mut self) -> Self {
        self.options = None;
        self
    }
}

/// One output slot of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// ComfyUI's type name.
    pub type_name: &'static str,
    /// Name shown to the user.
    pub name: &'static str,
    /// Whether the slot gives a list whose items run downstream nodes one by one.
    pub is_list: bool,
}

/// Everything the outside needs to know about a node class.
#[derive(Clone, Debug, PartialEq)]
pub struct Schema {
    /// `class_type` in prompts.
    pub class: &'static str,
    /// Name shown to the user.
    pub display_name: &'static str,
    /// Menu path, e.g. `latent/batch`.
    pub category: &'static str,
    /// ComfyUI's Python module, e.g. `nodes`; clients group by it.
    pub python_module: &'static str,
    /// One or two sentences for the user, our own words.
    pub description: &'static str,
    /// Inputs in order.
    pub inputs: Vec<Input>,
    /// Output slots in order.
    pub outputs: Vec<Output>,
    /// Whether the node is a sink that starts execution.
    pub is_output_node: bool,
    /// Whether list inputs are given whole instead of item by item.
    pub input_is_list: bool,
    /// Further fields of the `/object_info` entry, appended in order
    /// (`deprecated`, `experimental`, `api_node`, … where the reference has them).
    pub extra: Map<String, Json>,
}

impl Schema {
    /// Starts a schema; `display_name` is the class and `python_module` is `nodes` until set.
    pub fn new(class: &'static str, category: &'static str) -> Self {
        Self {
            class,
            display_name: class,
            category,
            python_module: "nodes",
            description: "",
            inputs: Vec::new(),
            outputs: Vec::new(),
            is_output_node: false,
            input_is_list: false,
            extra: Map::new(),
        }
    }

    /// Sets the name shown to the user.
    pub fn display(mut self, name: &'static str) -> Self {
        self.display_name = name;
        self
    }

    /// Sets ComfyUI's module name.
    pub fn module(mut self, module: &'static str) -> Self {
        self.python_module = module;
        self
    }

    /// Sets the description.
    pub fn describe(mut self, text: &'static str) -> Self {
        self.description = text;
        self
    }

    /// Appends an input.
    pub fn input(mut self, input: Input) -> Self {
        self.inputs.push(input);
        self
    }

    /// Appends an output slot named like its type.
    pub fn output(self, type_name: &'static str) -> Self {
        self.named_output(type_name, type_name)
    }

    /// Appends an output slot with a name of its own.
    pub fn named_output(mut self, type_name: &'static str, name: &'static str) -> Self {
        self.outputs.push(Output { type_name, name, is_list: false });
        self
    }

    /// Makes the last output slot a list.
    pub fn list(mut self) -> Self {
        if let Some(last) = self.outputs.last_mut() {
            last.is_list = true;
        }
        self
    }

    /// Marks the node as a sink.
    pub fn sink(mut self) -> Self {
        self.is_output_node = true;
        self
    }

    /// Appends a further field to the `/object_info` entry.
    pub fn flag(mut self, key: &str, value: impl Into<Json>) -> Self {
        self.extra.insert(key.to_owned(), value.into());
        self
    }

    /// The input of that name.
    pub fn find_input(&self, name: &str) -> Option<&Input> {
        self.inputs.iter().find(|i| i.name == name)
    }
}
