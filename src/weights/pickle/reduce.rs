//! What calls would make: the names that are known, and placeholders for all others.

use super::PickleFault;
use super::machine::Machine;
use super::value::{Id, Node, Storage, Tensor};
use crate::tensor::DType;

/// More dimensions than any model's weights have.
const MAX_RANK: usize = 8;
/// Calls inside the arguments of calls.
const MAX_CALLS: usize = 4;

impl Machine<'_> {
    /// What `function(*arguments)` is.
    pub(super) fn reduce(&mut self, function: Id, arguments: Id, depth: usize) -> Result<Id, PickleFault> {
        let Node::Global(name) = self.graph.node(function) else {
            return self.add(Node::Object { class: "a value that is no function".into(), state: None });
        };
        let name = name.clone();
        let items = self.graph.items(arguments).unwrap_or_default();
        // No known function has more.
        let items: Vec<Id> = items.iter().take(16).copied().collect();
        match (name.as_str(), items.as_slice()) {
            (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                [storage, offset, shape, strides, ..],
            ) => self.tensor(*storage, [*offset, *shape, *strides], None),
            ("torch._utils._rebuild_tensor_v3", [storage, offset, shape, strides, _, _, dtype, ..]) => {
                self.tensor(*storage, [*offset, *shape, *strides], Some(*dtype))
            }
            (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                [data, ..],
            ) => Ok(*data),
            ("torch._tensor._rebuild_from_type_v2", [function, _, arguments, ..]) if depth < MAX_CALLS => {
                self.reduce(*function, *arguments, depth + 1)
            }
            ("torch.Size", [extents]) => Ok(*extents),
            ("collections.OrderedDict" | "builtins.dict" | "__builtin__.dict", [])
            | ("collections.defaultdict", _) => self.add(Node::Dict(Vec::new())),
            ("collections.OrderedDict" | "builtins.dict" | "__builtin__.dict", [pairs]) => {
                self.dict_of(*pairs)
            }
            // How Python makes an instance of a class without calling it.
            ("copy_reg._reconstructor" | "copyreg._reconstructor" | "copyreg.__newobj__", [class, ..]) => {
                match self.graph.node(*class) {
                    Node::Global(class) => self.placeholder(class.clone()),
                    _ => self.placeholder(name),
                }
            }
            _ => self.placeholder(name),
        }
    }

    fn placeholder(&mut self, class: String) -> Result<Id, PickleFault> {
        self.graph.foreign.insert(class.clone());
        self.add(Node::Object { class, state: None })
    }

    /// A dictionary of a list of pairs.
    fn dict_of(&mut self, list: Id) -> Result<Id, PickleFault> {
        if self.graph.pairs(list).is_some() {
            return Ok(list);
        }
        let items = self.graph.items(list).ok_or_else(|| self.broken("a dictionary of no pairs"))?;
        let pair = |item: &Id| match self.graph.items(*item) {
            Some(&[key, value]) => Some((key, value)),
            _ => None,
        };
        let pairs: Option<Vec<(Id, Id)>> = items.iter().map(pair).collect();
        let pairs = pairs.ok_or_else(|| self.broken("a dictionary of no pairs"))?;
        self.charge(pairs.len())?;
        self.add(Node::Dict(pairs))
    }

    fn tensor(
        &mut self,
        storage: Id,
        [offset, shape, strides]: [Id; 3],
        dtype: Option<Id>,
    ) -> Result<Id, PickleFault> {
        let Node::Storage(storage) = self.graph.node(storage) else {
            return Err(self.broken("a tensor without storage"));
        };
        let mut storage = storage.clone();
        if let Some(dtype) = dtype {
            retype(&mut storage, self.graph.node(dtype));
        }
        let counts = |id| -> Option<Vec<u64>> {
            let items = self.graph.items(id)?;
            (items.len() <= MAX_RANK).then(|| items.iter().map(|&i| self.graph.count(i)).collect())?
        };
        let (shape, strides) = (counts(shape), counts(strides));
        let (Some(offset), Some(shape), Some(strides)) = (self.graph.count(offset), shape, strides) else {
            return Err(self.broken("a tensor whose offset, shape or strides are no numbers"));
        };
        if shape.len() != strides.len() {
            return Err(self.broken("a tensor with more extents than strides, or fewer"));
        }
        self.add(Node::Tensor(Tensor { storage, offset, shape, strides }))
    }

    /// A reference to what is beside the pickle: a storage, or a module's class with its source (in old files).
    pub(super) fn persistent(&mut self, id: Id) -> Result<(), PickleFault> {
        let items = self.graph.items(id).unwrap_or_default();
        if let &[tag, class, ..] = items
            && self.graph.text(tag) == Some("module")
        {
            return self.push_id(class);
        }
        let &[tag, kind, key, _location, elements, ref view @ ..] = items else {
            return Err(self.broken("a reference to no storage"));
        };
        let key = match self.graph.node(key) {
            Node::Text(text) if text.len() < 256 => Some(text.clone()),
            Node::Int(number) => Some(number.to_string()),
            _ => None,
        };
        let type_name = match self.graph.node(kind) {
            Node::Global(name) => Some(name.clone()),
            _ => None,
        };
        let known = self.graph.text(tag) == Some("storage");
        let (Some(key), Some(type_name), Some(mut elements), true) =
            (key, type_name, self.graph.count(elements), known)
        else {
            return Err(self.broken("a reference to no storage"));
        };
        let mut begin = 0;
        // Before PyTorch 0.4 a storage could be a part of another one.
        if let Some(view) = view.first().and_then(|view| self.graph.items(*view)) {
            let &[_, from, count] = view else { return Err(self.broken("a part of no storage")) };
            let part = self.graph.count(from).zip(self.graph.count(count));
            (begin, elements) = part.ok_or_else(|| self.broken("a part of no storage"))?;
        }
        let dtype = dtype_of(&type_name);
        self.push(Node::Storage(Storage { key, type_name, dtype, begin, elements }))
    }
}

/// A storage of bytes as one of elements of `dtype`, a name like `torch.float8_e4m3fn`.
fn retype(storage: &mut Storage, dtype: &Node) {
    let Node::Global(name) = dtype else { return };
    storage.type_name = name.clone();
    storage.dtype = match name.as_str() {
        "torch.float32" => Some(DType::F32),
        "torch.float16" => Some(DType::F16),
        "torch.bfloat16" => Some(DType::BF16),
        "torch.float64" => Some(DType::F64),
        "torch.float8_e4m3fn" => Some(DType::F8E4M3),
        "torch.float8_e5m2" => Some(DType::F8E5M2),
        "torch.uint16" => Some(DType::U16),
        "torch.uint32" => Some(DType::U32),
        "torch.uint64" => Some(DType::U64),
        _ => None,
    };
    if let Some(dtype) = storage.dtype {
        storage.elements /= dtype.size() as u64;
    }
}

fn dtype_of(type_name: &str) -> Option<DType> {
    let (module, name) = type_name.rsplit_once('.')?;
    if !matches!(module, "torch" | "torch.cuda" | "torch.storage") {
        return None;
    }
    Some(match name {
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "DoubleStorage" => DType::F64,
        "CharStorage" => DType::I8,
        "ByteStorage" | "UntypedStorage" => DType::U8,
        "ShortStorage" => DType::I16,
        "IntStorage" => DType::I32,
        "LongStorage" => DType::I64,
        "BoolStorage" => DType::Bool,
        _ => return None,
    })
}
