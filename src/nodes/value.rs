//! Values on the links between nodes.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use super::NodeError;

/// A typed object on a link (a latent, an image, a model handle, …).
#[derive(Clone)]
pub struct Object {
    type_name: &'static str,
    data: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{}>", self.type_name)
    }
}

/// What travels on a link.
#[derive(Clone, Debug)]
pub enum Value {
    /// A literal: number, text, boolean, null, list of literals.
    Json(Json),
    /// Any other type.
    Object(Object),
    /// Content of a list output slot: downstream nodes run once per item.
    List(Vec<Value>),
}

impl Value {
    /// Wraps an object under ComfyUI's type name (`LATENT`, `IMAGE`, …).
    pub fn object<T: Any + Send + Sync>(type_name: &'static str, data: T) -> Self {
        Self::shared(type_name, Arc::new(data))
    }

    /// Wraps a shared object under ComfyUI's type name.
    pub fn shared<T: Any + Send + Sync>(type_name: &'static str, data: Arc<T>) -> Self {
        Value::Object(Object { type_name, data })
    }

    /// The object inside, if this is one of Rust type `T`.
    pub fn downcast<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        match self {
            Value::Object(o) => o.data.clone().downcast::<T>().ok(),
            _ => None,
        }
    }

    /// The literal inside.
    pub fn json(&self) -> Option<&Json> {
        match self {
            Value::Json(v) => Some(v),
            _ => None,
        }
    }

    /// A short text for error reports (`current_inputs`): literals as Python
    /// prints them in JSON, objects as their type name.
    pub fn describe(&self) -> String {
        match self {
            Value::Json(Json::String(s)) => s.clone(),
            Value::Json(v) => v.to_string(),
            Value::Object(o) => format!("{o:?}"),
            Value::List(items) => {
                format!("[{}]", items.iter().map(Value::describe).collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// The inputs of one execution of a node.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    values: HashMap<String, Value>,
}

impl Inputs {
    /// Sets an input.
    pub fn insert(&mut self, name: impl Into<String>, value: Value) {
        self.values.insert(name.into(), value);
    }

    /// The value of an input, if given.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// All inputs.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.values.iter()
    }

    fn required(&self, name: &str) -> Result<&Value, NodeError> {
        self.get(name).ok_or_else(|| NodeError::input(name, "is missing"))
    }

    /// A linked object of Rust type `T`.
    pub fn object<T: Any + Send + Sync>(&self, name: &str) -> Result<Arc<T>, NodeError> {
        let value = self.required(name)?;
        value
            .downcast()
            .ok_or_else(|| NodeError::input(name, &format!("has the wrong type: {}", value.describe())))
    }

    /// A linked object that may be left out.
    pub fn object_opt<T: Any + Send + Sync>(&self, name: &str) -> Result<Option<Arc<T>>, NodeError> {
        match self.get(name) {
            None | Some(Value::Json(Json::Null)) => Ok(None),
            Some(_) => self.object(name).map(Some),
        }
    }

    /// All values of an input, for classes whose inputs are given as whole lists.
    pub fn list(&self, name: &str) -> Result<&[Value], NodeError> {
        match self.required(name)? {
            Value::List(items) => Ok(items),
            single => Ok(std::slice::from_ref(single)),
        }
    }

    /// A whole number (floats are truncated, as validation does).
    pub fn int(&self, name: &str) -> Result<i64, NodeError> {
        let value = self.required(name)?;
        let number = match value.json() {
            Some(Json::Number(n)) => {
                n.as_i64().or_else(|| n.as_u64().map(|u| u as i64)).or_else(|| n.as_f64().map(|f| f as i64))
            }
            Some(Json::Bool(b)) => Some(i64::from(*b)),
            _ => None,
        };
        number.ok_or_else(|| NodeError::input(name, &format!("is not a whole number: {}", value.describe())))
    }

    /// A whole number that is not negative, as a size.
    pub fn size(&self, name: &str) -> Result<usize, NodeError> {
        let value = self.int(name)?;
        usize::try_from(value).map_err(|_| NodeError::input(name, &format!("must not be negative: {value}")))
    }

    /// A seed: all 64 bits.
    pub fn seed(&self, name: &str) -> Result<u64, NodeError> {
        match self.required(name)?.json() {
            Some(Json::Number(n)) if n.is_u64() => Ok(n.as_u64().unwrap_or_default()),
            _ => self.int(name).map(|v| v as u64),
        }
    }

    /// A floating point number.
    pub fn float(&self, name: &str) -> Result<f64, NodeError> {
        let value = self.required(name)?;
        value
            .json()
            .and_then(|v| v.as_f64().or_else(|| v.as_bool().map(|b| f64::from(u8::from(b)))))
            .ok_or_else(|| NodeError::input(name, &format!("is not a number: {}", value.describe())))
    }

    /// A text.
    pub fn string(&self, name: &str) -> Result<&str, NodeError> {
        let value = self.required(name)?;
        value
            .json()
            .and_then(Json::as_str)
            .ok_or_else(|| NodeError::input(name, &format!("is not a text: {}", value.describe())))
    }

    /// True or false.
    pub fn boolean(&self, name: &str) -> Result<bool, NodeError> {
        let value = self.required(name)?;
        value
            .json()
            .and_then(Json::as_bool)
            .ok_or_else(|| NodeError::input(name, &format!("is not true or false: {}", value.describe())))
    }
}

/// What a node gives back.
#[derive(Clone, Debug, Default)]
pub struct NodeOutput {
    /// One value an output slot.
    pub values: Vec<Value>,
    /// What the client gets in `executed` and the history (`{"images": […]}`).
    pub ui: Option<Map<String, Json>>,
}

impl NodeOutput {
    /// An output with one slot.
    pub fn one(value: Value) -> Self {
        Self { values: vec![value], ui: None }
    }

    /// An output with several slots.
    pub fn many(values: Vec<Value>) -> Self {
        Self { values, ui: None }
    }

    /// A sink's output: only data for the client.
    pub fn ui(ui: Map<String, Json>) -> Self {
        Self { values: Vec::new(), ui: Some(ui) }
    }
}
