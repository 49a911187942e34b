//! The pickle machine: a stack, a memo, and instructions that build plain values.
//!
//! Instructions are those of pickle protocols 2 to 5
//! (<https://docs.python.org/3/library/pickletools.html>) that PyTorch's files use;
//! an unknown one is an error. Nothing is ever looked up or called: what a call
//! would make is decided in [`reduce`](super::reduce).

use std::collections::HashMap;

use super::PickleFault;
use super::value::{Graph, Id, Node};

/// More values than any checkpoint has (SDXL's has 60,000).
const MAX_NODES: usize = 4_000_000;
const MAX_STACK: usize = 1_000_000;

/// A machine at work on one pickle.
pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    /// The next byte.
    at: usize,
    pub(super) graph: Graph,
    stack: Vec<Id>,
    /// Heights of the stack at marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Elements of lists and dictionaries so far.
    elements: usize,
}

impl<'a> Machine<'a> {
    /// Runs the pickle that `bytes` begin with: its values, its result, and its length.
    pub fn run(bytes: &'a [u8]) -> Result<(Graph, Id, usize), PickleFault> {
        let (graph, stack, marks, memo) = Default::default();
        let mut machine = Self { bytes, at: 0, graph, stack, marks, memo, elements: 0 };
        loop {
            let at = machine.at;
            let opcode = machine.byte()?;
            if opcode == b'.' {
                let root = machine.pop()?;
                return Ok((machine.graph, root, machine.at));
            }
            machine.step(opcode, at)?;
            if machine.stack.len() > MAX_STACK || machine.marks.len() > MAX_STACK {
                return Err(PickleFault::Limit { what: "values on its stack", cap: MAX_STACK });
            }
        }
    }

    fn step(&mut self, opcode: u8, at: usize) -> Result<(), PickleFault> {
        match opcode {
            0x80 => self.take(1).map(drop),
            0x95 => self.take(8).map(drop),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.discard(),
            b'1' => self.since_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
                Ok(())
            }
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' | b'K' | b'M' | b'G' | 0x8a | 0x8b => self.number(opcode),
            b'X' | 0x8c | 0x8d | b'U' | b'T' | b'C' | b'B' | 0x8e | 0x96 => self.text(opcode),
            b']' => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            0x8f => self.push(Node::List(Vec::new())),
            0x85..=0x87 | b't' | b'l' | b'd' | 0x91 => self.collect(opcode),
            b'a' | b'e' | b's' | b'u' | 0x90 => self.extend(opcode),
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember(opcode),
            b'c' | 0x93 => self.global(opcode),
            b'R' | 0x81 | 0x92 | b'b' => self.call(opcode),
            b'Q' => {
                let id = self.pop()?;
                self.persistent(id)
            }
            _ => Err(PickleFault::Opcode { opcode, at }),
        }
    }

    /// A fault at the current byte.
    pub(super) fn broken(&self, what: &'static str) -> PickleFault {
        PickleFault::Broken { at: self.at, what }
    }

    /// A new value; the caller decides where it goes.
    pub(super) fn add(&mut self, node: Node) -> Result<Id, PickleFault> {
        if self.graph.nodes.len() >= MAX_NODES {
            return Err(PickleFault::Limit { what: "values", cap: MAX_NODES });
        }
        self.graph.nodes.push(node);
        Ok((self.graph.nodes.len() - 1) as Id)
    }

    /// Counts elements that are about to be put into a list or dictionary.
    pub(super) fn charge(&mut self, elements: usize) -> Result<(), PickleFault> {
        self.elements += elements;
        match self.elements > MAX_NODES {
            true => Err(PickleFault::Limit { what: "elements", cap: MAX_NODES }),
            false => Ok(()),
        }
    }

    pub(super) fn push(&mut self, node: Node) -> Result<(), PickleFault> {
        let id = self.add(node)?;
        self.stack.push(id);
        Ok(())
    }

    pub(super) fn push_id(&mut self, id: Id) -> Result<(), PickleFault> {
        self.stack.push(id);
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, PickleFault> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleFault> {
        let short = PickleFault::Short { part: "pickle", at: self.bytes.len() };
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| short)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], PickleFault> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(PickleFault::Short { part: "pickle", at: self.bytes.len() });
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// The bytes up to a line's end.
    fn line(&mut self) -> Result<&'a str, PickleFault> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().take(1024).position(|b| *b == b'\n');
        let Some(length) = length else { return Err(self.broken("a name without end")) };
        let line = std::str::from_utf8(&rest[..length]).map_err(|_| self.broken("a name that is no text"))?;
        self.at += length + 1;
        Ok(line)
    }

    /// Whether the stack has values above the last mark.
    fn has_value(&self) -> bool {
        self.stack.len() > self.marks.last().copied().unwrap_or(0)
    }

    pub(super) fn pop(&mut self) -> Result<Id, PickleFault> {
        match self.has_value().then(|| self.stack.pop()).flatten() {
            Some(id) => Ok(id),
            None => Err(self.broken("a value is missing")),
        }
    }

    fn top(&self) -> Result<Id, PickleFault> {
        let top = self.stack.last().filter(|_| self.has_value());
        top.copied().ok_or_else(|| self.broken("a value is missing"))
    }

    /// Drops a value, or a mark without values.
    fn discard(&mut self) -> Result<(), PickleFault> {
        if self.has_value() || self.marks.pop().is_none() {
            self.pop()?;
        }
        Ok(())
    }

    /// The values above the last mark, which goes.
    fn since_mark(&mut self) -> Result<Vec<Id>, PickleFault> {
        match self.marks.pop() {
            Some(height) if height <= self.stack.len() => Ok(self.stack.split_off(height)),
            _ => Err(self.broken("a mark is missing")),
        }
    }

    fn number(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let node = match opcode {
            b'J' => Node::Int(i64::from(i32::from_le_bytes(self.array()?))),
            b'K' => Node::Int(i64::from(self.byte()?)),
            b'M' => Node::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'G' => Node::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let count = match opcode {
                    0x8a => usize::from(self.byte()?),
                    _ => self.length::<4>()?,
                };
                long(self.take(count)?)
            }
        };
        self.push(node)
    }

    /// A length of `N` bytes.
    fn length<const N: usize>(&mut self) -> Result<usize, PickleFault> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.array::<N>()?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|_| self.broken("a length without bounds"))
    }

    fn text(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let count = match opcode {
            0x8c | b'U' | b'C' => self.length::<1>()?,
            b'X' | b'T' | b'B' => self.length::<4>()?,
            _ => self.length::<8>()?,
        };
        let bytes = self.take(count)?;
        match opcode {
            b'C' | b'B' | 0x8e | 0x96 => self.push(Node::Bytes),
            _ => self.push(Node::Text(String::from_utf8_lossy(bytes).into_owned())),
        }
    }

    /// Values on the stack to one tuple, list or dictionary.
    fn collect(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let items = match opcode {
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                items
            }
            _ => self.since_mark()?,
        };
        self.charge(items.len())?;
        match opcode {
            b'l' | 0x91 => self.push(Node::List(items)),
            b'd' => {
                let pairs = self.paired(&items)?;
                self.push(Node::Dict(pairs))
            }
            _ => self.push(Node::Tuple(items)),
        }
    }

    fn paired(&self, items: &[Id]) -> Result<Vec<(Id, Id)>, PickleFault> {
        match items.as_chunks::<2>() {
            (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
            _ => Err(self.broken("a key without value")),
        }
    }

    /// Puts values into the list or dictionary below them.
    fn extend(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let items = match opcode {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.since_mark()?,
        };
        self.charge(items.len())?;
        let target = self.top()?;
        let is_pairs = matches!(opcode, b's' | b'u');
        let pairs = if is_pairs { self.paired(&items)? } else { Vec::new() };
        match self.graph.nodes.get_mut(target as usize) {
            Some(Node::Dict(known)) if is_pairs => known.extend(pairs),
            Some(Node::List(known)) if !is_pairs => known.extend(items),
            // A placeholder takes everything and keeps nothing.
            Some(Node::Object { .. }) => {}
            _ => return Err(self.broken("values for something that holds none")),
        }
        Ok(())
    }

    fn remember(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let place = match opcode {
            b'q' | b'h' => u32::from(self.byte()?),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        if matches!(opcode, b'h' | b'j') {
            let id = self.memo.get(&place).copied();
            let id = id.ok_or_else(|| self.broken("a value that was never kept"))?;
            return self.push_id(id);
        }
        let top = self.top()?;
        self.memo.insert(place, top);
        if self.memo.len() > MAX_NODES {
            return Err(PickleFault::Limit { what: "kept values", cap: MAX_NODES });
        }
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let name = match opcode {
            b'c' => format!("{}.{}", self.line()?, self.line()?),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                let texts = self.graph.text(module).zip(self.graph.text(name));
                let texts = texts.filter(|(module, name)| module.len() + name.len() < 1024);
                let (module, name) = texts.ok_or_else(|| self.broken("a name that is no text"))?;
                format!("{module}.{name}")
            }
        };
        self.push(Node::Global(name))
    }

    fn call(&mut self, opcode: u8) -> Result<(), PickleFault> {
        if opcode == b'b' {
            let state = self.pop()?;
            let target = self.top()?;
            // Dictionaries and tensors may carry attributes, which are not asked for.
            if let Some(Node::Object { state: slot, .. }) = self.graph.nodes.get_mut(target as usize) {
                *slot = Some(state);
            }
            return Ok(());
        }
        if opcode == 0x92 {
            self.pop()?;
        }
        let (arguments, function) = (self.pop()?, self.pop()?);
        let made = self.reduce(function, arguments, 0)?;
        self.push_id(made)
    }
}

/// A whole number in two's complement.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::Long(bytes.to_vec());
    }
    let is_negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if is_negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(wide))
}
