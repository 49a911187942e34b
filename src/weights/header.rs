//! The safetensors header, read strictly.
//!
//! Format (<https://github.com/huggingface/safetensors#format>): eight bytes
//! little-endian header length N, N bytes of JSON `{name: {dtype, shape,
//! data_offsets: [begin, end]}, "__metadata__": {string: string}}`, then the
//! data, which the tensors must cover without overlap or hole.
//!
//! The `safetensors` crate checks most of that but reads the JSON into maps, so
//! that of two equal names the last one silently wins, and its errors name
//! neither tensor nor numbers. This module walks the JSON itself and reports
//! the first fault precisely; the crate is then asked as a second, independent
//! reader, and only what both accept is opened.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::error::HeaderFault;
use crate::tensor::DType;

/// The format's cap on the header's length.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More dimensions than any model's weights have (video models' convolutions have five).
const MAX_RANK: usize = 8;
/// Bytes before the header.
const LENGTH_BYTES: u64 = 8;

/// A checked header.
#[derive(Debug)]
pub(super) struct Header {
    /// All tensors in the file's order; their ranges lie inside the file.
    pub tensors: Vec<HeaderEntry>,
    /// What `__metadata__` says.
    pub metadata: BTreeMap<String, String>,
}

/// A tensor's checked entry.
#[derive(Debug)]
pub(super) struct HeaderEntry {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub begin: usize,
    /// Past the last byte, counted from the start of the file.
    pub end: usize,
    /// The data, if the file does not have them in one piece.
    pub copy: Option<Box<[u8]>>,
}

/// Reads and checks the header of a file whose whole content is `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Result<Header, HeaderFault> {
    let len = bytes.len() as u64;
    let text = header_text(bytes)?;
    let raw = RawHeader::read(text)?;
    let data_begin = LENGTH_BYTES + text.len() as u64;
    let mut spans = raw.tensors.into_iter().map(check_entry).collect::<Result<Vec<_>, _>>()?;
    spans.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    let data_bytes = check_cover(&spans)?;
    let needed = data_begin.saturating_add(data_bytes);
    if needed > len {
        return Err(HeaderFault::Truncated { len, needed });
    }
    if needed < len {
        return Err(HeaderFault::Trailing { len, needed });
    }
    if let Err(error) = SafeTensors::read_metadata(bytes) {
        return Err(HeaderFault::Refused { message: error.to_string() });
    }
    let tensors = spans.into_iter().map(|span| span.into_entry(data_begin)).collect::<Result<_, _>>()?;
    Ok(Header { tensors, metadata: raw.metadata })
}

/// The JSON text of the header.
fn header_text(bytes: &[u8]) -> Result<&str, HeaderFault> {
    let len = bytes.len() as u64;
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(if len == 0 { HeaderFault::Empty } else { HeaderFault::NoLength { len } });
    };
    let header_len = u64::from_le_bytes(*length);
    if header_len > MAX_HEADER_BYTES {
        return Err(HeaderFault::TooLarge { len: header_len, cap: MAX_HEADER_BYTES });
    }
    let text = usize::try_from(header_len).ok().and_then(|n| rest.get(..n));
    let Some(text) = text else {
        return Err(HeaderFault::Short { needed: LENGTH_BYTES + header_len, len });
    };
    let text = std::str::from_utf8(text)
        .map_err(|error| HeaderFault::NotText { at: LENGTH_BYTES + error.valid_up_to() as u64 })?;
    if !text.starts_with('{') {
        return Err(HeaderFault::NotJson { message: "it does not begin with {".into() });
    }
    Ok(text)
}

/// The JSON as written, names still unchecked against each other's bytes.
#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
}

/// A tensor's entry as written.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawHeader {
    fn read(text: &str) -> Result<Self, HeaderFault> {
        let mut fault = None;
        let mut json = serde_json::Deserializer::from_str(text);
        let header = HeaderSeed { fault: &mut fault }.deserialize(&mut json);
        match header.and_then(|header| json.end().map(|()| header)) {
            Ok(header) => Ok(header),
            Err(error) => Err(fault.unwrap_or_else(|| HeaderFault::NotJson { message: error.to_string() })),
        }
    }
}

/// Walks the header's object; a fault that serde's error type cannot carry is left in `fault`.
struct HeaderSeed<'f> {
    fault: &'f mut Option<HeaderFault>,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawHeader, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                *self.fault = Some(HeaderFault::Duplicate { name });
                return Err(A::Error::custom("duplicate name"));
            }
            if name == "__metadata__" {
                header.metadata =
                    map.next_value_seed(MetadataSeed { fault: &mut *self.fault }).inspect_err(|error| {
                        self.fault
                            .get_or_insert_with(|| HeaderFault::Metadata { message: error.to_string() });
                    })?;
            } else {
                let entry = map.next_value::<RawEntry>().inspect_err(|error| {
                    *self.fault = Some(HeaderFault::Entry { name: name.clone(), message: error.to_string() });
                })?;
                header.tensors.push((name, entry));
            }
        }
        Ok(header)
    }
}

/// Walks `__metadata__`.
struct MetadataSeed<'f> {
    fault: &'f mut Option<HeaderFault>,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of strings")
    }

    /// `null`, which some writers put for "none".
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if metadata.contains_key(&key) {
                map.next_value::<IgnoredAny>()?;
                *self.fault = Some(HeaderFault::Duplicate { name: key });
                return Err(A::Error::custom("duplicate key"));
            }
            let value = map.next_value::<String>()?;
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

/// A tensor whose own numbers agree; offsets still relative to the data.
struct Span {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    begin: u64,
    end: u64,
}

impl Span {
    /// Shifts the offsets to the start of the file, which is known to reach that far.
    fn into_entry(self, data_begin: u64) -> Result<HeaderEntry, HeaderFault> {
        let overflow = || HeaderFault::Overflow { name: self.name.clone(), shape: self.shape.clone() };
        let position = |offset: u64| {
            data_begin.checked_add(offset).and_then(|at| usize::try_from(at).ok()).ok_or_else(overflow)
        };
        let (begin, end) = (position(self.begin)?, position(self.end)?);
        let shape = self
            .shape
            .iter()
            .map(|&d| usize::try_from(d))
            .collect::<Result<_, _>>()
            .map_err(|_| overflow())?;
        Ok(HeaderEntry { name: self.name, dtype: self.dtype, shape, begin, end, copy: None })
    }
}

/// Checks what one entry says about itself.
fn check_entry((name, raw): (String, RawEntry)) -> Result<Span, HeaderFault> {
    let Some(dtype) = dtype_named(&raw.dtype) else {
        return Err(HeaderFault::DType { name, dtype: raw.dtype });
    };
    if raw.shape.len() > MAX_RANK {
        return Err(HeaderFault::Rank { name, rank: raw.shape.len(), cap: MAX_RANK });
    }
    let size = raw.shape.iter().try_fold(dtype.size() as u64, |size, &d| size.checked_mul(d));
    let Some(needed) = size else {
        return Err(HeaderFault::Overflow { name, shape: raw.shape });
    };
    let (begin, end) = raw.data_offsets;
    let Some(span) = end.checked_sub(begin) else {
        return Err(HeaderFault::Reversed { name, begin, end });
    };
    if span != needed {
        return Err(HeaderFault::Span { name, dtype, shape: raw.shape, needed, span });
    }
    Ok(Span { name, dtype, shape: raw.shape, begin, end })
}

/// Checks that `spans`, sorted by offset, follow each other exactly; their total length.
fn check_cover(spans: &[Span]) -> Result<u64, HeaderFault> {
    let mut at = 0;
    let mut previous: Option<&Span> = None;
    for span in spans {
        if let Some(first) = previous
            && span.begin < at
        {
            return Err(HeaderFault::Overlap {
                first: first.name.clone(),
                second: span.name.clone(),
                at: span.begin,
            });
        }
        if span.begin > at {
            return Err(HeaderFault::Hole { name: span.name.clone(), at, bytes: span.begin - at });
        }
        at = span.end;
        previous = Some(span);
    }
    Ok(at)
}

/// The element type of a name in the header.
fn dtype_named(name: &str) -> Option<DType> {
    Some(match name {
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "F64" => DType::F64,
        "F8_E4M3" => DType::F8E4M3,
        "F8_E5M2" => DType::F8E5M2,
        "I8" => DType::I8,
        "U8" => DType::U8,
        "I16" => DType::I16,
        "U16" => DType::U16,
        "I32" => DType::I32,
        "U32" => DType::U32,
        "I64" => DType::I64,
        "U64" => DType::U64,
        "BOOL" => DType::Bool,
        _ => return None,
    })
}
