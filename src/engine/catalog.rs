//! The node classes of this engine and what validation asks about them.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value as Json};

use crate::graph::{Classes, FileList, FileLists, Schema};
use crate::nodes::{Node, Services};

/// A node class with its schema.
pub(super) struct Class {
    pub node: Box<dyn Node>,
    pub schema: Schema,
}

/// All node classes, in the order of `/object_info`.
pub(super) struct Catalog {
    classes: Vec<Class>,
    index: HashMap<&'static str, usize>,
    services: Services,
}

impl Catalog {
    /// Of two nodes with the same class name the later one counts.
    pub fn new(nodes: Vec<Box<dyn Node>>, services: Services) -> Self {
        let mut catalog = Self { classes: Vec::with_capacity(nodes.len()), index: HashMap::new(), services };
        for node in nodes {
            let class = Class { schema: node.schema(), node };
            match catalog.index.get(class.schema.class) {
                Some(&place) => catalog.classes[place] = class,
                None => {
                    catalog.index.insert(class.schema.class, catalog.classes.len());
                    catalog.classes.push(class);
                }
            }
        }
        catalog
    }

    pub fn class(&self, name: &str) -> Option<&Class> {
        self.index.get(name).and_then(|&i| self.classes.get(i))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Class> {
        self.classes.iter()
    }
}

impl FileLists for Catalog {
    fn list(&self, list: &FileList) -> Vec<String> {
        match list {
            FileList::Models { folder, extra } => {
                let mut names = self.services.folders.list_models(folder);
                let more: Vec<String> = extra.iter().filter(|name| !names.contains(name)).cloned().collect();
                names.extend(more);
                names
            }
            FileList::Vaes => crate::nodes::tiny_vae::vae_names(&self.services.folders),
            FileList::Pipelines => self.services.folders.pipelines(),
            FileList::InputImages => self.services.folders.input_images(),
            FileList::InputLatents => self.services.folders.input_latents(),
        }
    }
}

impl Classes for Catalog {
    fn schema(&self, class: &str) -> Option<&Schema> {
        self.class(class).map(|c| &c.schema)
    }

    fn checked_inputs(&self, class: &str) -> &[&str] {
        self.class(class).map_or(&[], |c| c.node.validated_inputs())
    }

    fn check(&self, class: &str, inputs: &Map<String, Json>) -> Result<(), String> {
        let Some(class) = self.class(class) else { return Ok(()) };
        catch_unwind(AssertUnwindSafe(|| class.node.validate(&self.services, inputs)))
            .unwrap_or_else(|_| Err("the check itself failed".to_owned()))
    }
}
