//! The zip form (PyTorch 1.6 and later): `NAME/data.pkl`, `NAME/data/KEY` and a few facts.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use super::machine::Machine;
use super::{Contents, PickleFault};

/// Members of the archive by name.
type Members = HashMap<String, Range<usize>>;

/// Takes the archive apart; only the pickle is read.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, PickleFault> {
    let members = members(bytes)?;
    let roots: Vec<&str> = members.keys().filter_map(|name| name.strip_suffix("data.pkl")).collect();
    let root =
        roots.into_iter().filter(|root| root.is_empty() || root.ends_with('/')).min_by_key(|r| r.len());
    let Some(root) = root else { return Err(PickleFault::NotTorch) };
    if members.contains_key(&format!("{root}constants.pkl")) {
        return Err(PickleFault::Script);
    }
    let member =
        |name: &str| members.get(&format!("{root}{name}")).and_then(|range| bytes.get(range.clone()));
    if member("byteorder").is_some_and(|order| order.starts_with(b"big")) {
        return Err(PickleFault::BigEndian);
    }
    let pickle = member("data.pkl").ok_or(PickleFault::NotTorch)?;
    let (graph, root_id, _) = Machine::run(pickle)?;
    let folder = format!("{root}data/");
    let storages = members.iter().filter_map(|(name, range)| Some((name.strip_prefix(&folder)?, range)));
    let storages = storages.map(|(key, range)| (key.to_owned(), range.clone())).collect();
    Ok(Contents { graph, root: root_id, storages })
}

/// Where the members are. Those that overlap or are not stored as they are are errors.
fn members(bytes: &[u8]) -> Result<Members, PickleFault> {
    let damaged = |error: zip::result::ZipError| PickleFault::Archive { message: error.to_string() };
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
    let mut members = Members::new();
    let mut spans: Vec<(usize, usize, String)> = Vec::with_capacity(archive.len());
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(damaged)?;
        let name = String::from_utf8_lossy(member.name_raw()).into_owned();
        if member.compression() != CompressionMethod::Stored || member.encrypted() {
            return Err(PickleFault::Compressed { member: name });
        }
        let (begin, size) = (member.data_start().unwrap_or(u64::MAX), member.compressed_size());
        let range = begin.checked_add(size).and_then(|end| {
            Some((usize::try_from(begin).ok()?, usize::try_from(end).ok().filter(|end| *end <= bytes.len())?))
        });
        let Some((from, to)) = range else {
            return Err(PickleFault::Member { member: name, begin, bytes: size });
        };
        if from < to {
            spans.push((from, to, name.clone()));
        }
        members.insert(name, from..to);
    }
    spans.sort();
    for pair in spans.windows(2) {
        if let [(_, end, _), (from, to, name)] = pair
            && from < end
        {
            let (begin, size) = (*from as u64, (to - from) as u64);
            return Err(PickleFault::Member { member: name.clone(), begin, bytes: size });
        }
    }
    Ok(members)
}
