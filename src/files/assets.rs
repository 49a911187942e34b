//! Assets: records with an id over files that are known by the hash of their content.
//!
//! Uploads lie in `input/assets/<blake3>.<ending>`: the same bytes are stored
//! once, and a node that takes a file name finds them like any other input.
//! Results stay where the nodes wrote them and become assets when somebody asks
//! for the job. Records of uploads are appended to `user/assets.jsonl` and read
//! back at start; records of results live as long as the process, like the
//! history they belong to, the newest 50,000 of them.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value as Json, json};
use tempfile::NamedTempFile;

use super::{Folders, Kind, PathError};

/// The folder of uploads below the input folder.
const FOLDER: &str = "assets";
/// Records of results that are kept.
const OUTPUT_CAP: usize = 50_000;
/// Longest file name ending that is kept.
const MAX_ENDING: usize = 8;

/// A record over a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Its id, a UUID.
    pub id: String,
    /// `blake3:<hex>` of the content; computed late for results.
    pub hash: Option<String>,
    /// Size of the content in bytes.
    pub size: u64,
    /// Media type.
    pub content_type: String,
    /// The name that the client gave, or the result's file name.
    pub name: String,
    /// The folder with the file.
    pub kind: Kind,
    /// The subfolder in it.
    pub subfolder: String,
    /// The file.
    pub filename: String,
    /// Labels.
    pub tags: Vec<String>,
    /// What its owner noted about it.
    pub notes: Map<String, Json>,
    /// The job that made it.
    pub job_id: Option<String>,
    /// When the record was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it may be thrown away; never if not given.
    pub expires_ms: Option<u64>,
}

/// What a client says about a new asset.
#[derive(Clone, Debug, Default)]
pub struct NewAsset {
    /// The name it gives the file.
    pub name: String,
    /// Media type.
    pub content_type: String,
    /// Labels.
    pub tags: Vec<String>,
    /// What its owner notes about it.
    pub notes: Map<String, Json>,
    /// Seconds until it may be thrown away.
    pub expires_in: Option<u64>,
}

/// A result of a job.
#[derive(Clone, Copy, Debug)]
pub struct OutputFile<'a> {
    /// The job.
    pub job_id: &'a str,
    /// The folder with the file.
    pub kind: Kind,
    /// The subfolder in it.
    pub subfolder: &'a str,
    /// The file.
    pub filename: &'a str,
    /// Media type.
    pub content_type: &'a str,
}

#[derive(Debug, Default)]
struct State {
    by_id: HashMap<String, Arc<Asset>>,
    /// One record for each content that is known by hash.
    by_hash: HashMap<String, Arc<Asset>>,
    /// Ids of results, oldest first.
    outputs: VecDeque<String>,
}

impl State {
    fn insert(&mut self, asset: &Arc<Asset>) {
        if let Some(hash) = &asset.hash {
            self.by_hash.entry(hash.clone()).or_insert_with(|| asset.clone());
        }
        self.by_id.insert(asset.id.clone(), asset.clone());
    }

    /// Forgets a record; whether no other record needs its file.
    fn remove(&mut self, id: &str) -> Option<(Arc<Asset>, bool)> {
        let asset = self.by_id.remove(id)?;
        let twin = self.by_id.values().find(|other| other.hash.is_some() && other.hash == asset.hash);
        let (twin, is_last) = (twin.cloned(), twin.is_none());
        if let Some(hash) = &asset.hash {
            match twin {
                Some(twin) => self.by_hash.insert(hash.clone(), twin),
                None => self.by_hash.remove(hash),
            };
        }
        Some((asset, is_last))
    }
}

/// All assets of a server.
#[derive(Debug)]
pub struct AssetStore {
    folders: Arc<Folders>,
    state: Mutex<State>,
    log: Mutex<()>,
}

/// Milliseconds since 1970, now.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn to_line(asset: &Asset) -> Json {
    json!({
        "id": asset.id, "hash": asset.hash, "size": asset.size, "content_type": asset.content_type,
        "name": asset.name, "kind": asset.kind.name(), "subfolder": asset.subfolder, "filename": asset.filename,
        "tags": asset.tags, "notes": asset.notes, "job_id": asset.job_id, "created_ms": asset.created_ms, "expires_ms": asset.expires_ms,
    })
}

fn from_line(line: &Json) -> Option<Asset> {
    let text = |key: &str| line[key].as_str().map(str::to_owned);
    Some(Asset {
        id: text("id")?,
        hash: text("hash"),
        size: line["size"].as_u64()?,
        content_type: text("content_type")?,
        name: text("name")?,
        kind: Kind::from_name(line["kind"].as_str()?)?,
        subfolder: text("subfolder")?,
        filename: text("filename")?,
        tags: line["tags"].as_array()?.iter().filter_map(|t| Some(t.as_str()?.to_owned())).collect(),
        notes: line["notes"].as_object().cloned().unwrap_or_default(),
        job_id: text("job_id"),
        created_ms: line["created_ms"].as_u64()?,
        expires_ms: line["expires_ms"].as_u64(),
    })
}

/// `blake3:<hex>` of a file.
///
/// # Errors
/// If it can't be read.
pub fn hash_file(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path)?)?;
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

/// Whether a text has the form `blake3:<64 hex digits>`.
pub fn is_hash(text: &str) -> bool {
    text.strip_prefix("blake3:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The ending of a stored file: the client's if it is harmless, else that of the media type.
fn ending(name: &str, content_type: &str) -> String {
    let given = name.rsplit('/').next().and_then(|n| n.rsplit_once('.')).map_or("", |(_, ending)| ending);
    let is_harmless =
        !given.is_empty() && given.len() <= MAX_ENDING && given.bytes().all(|b| b.is_ascii_alphanumeric());
    if is_harmless {
        return given.to_ascii_lowercase();
    }
    match content_type {
        "image/png" => "png",
        "image/jpeg" => "jpg",
        "image/webp" => "webp",
        "image/gif" => "gif",
        _ => "bin",
    }
    .to_owned()
}

impl AssetStore {
    /// The assets of these folders, with the records of earlier runs.
    ///
    /// # Errors
    /// If the list of records is there but can't be read.
    pub fn open(folders: Arc<Folders>) -> io::Result<Self> {
        let store = Self { folders, state: Mutex::default(), log: Mutex::default() };
        let text = match std::fs::read_to_string(store.log_path()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(store),
            Err(error) => return Err(error),
        };
        let mut state = store.state();
        for line in text.lines() {
            // A line cut off by a crash is no record.
            let Ok(line) = serde_json::from_str::<Json>(line) else { continue };
            if let Some(id) = line["deleted"].as_str() {
                state.remove(id);
            } else if let Some(asset) = from_line(&line) {
                state.insert(&Arc::new(asset));
            }
        }
        drop(state);
        Ok(store)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log_path(&self) -> PathBuf {
        self.folders.user().join("assets.jsonl")
    }

    fn append(&self, line: &Json) -> io::Result<()> {
        let _order = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        file.write_all(format!("{line}\n").as_bytes())
    }

    fn record(&self, of: &NewAsset, hash: String, size: u64, place: (Kind, String, String)) -> Asset {
        let created_ms = now_ms();
        let (kind, subfolder, filename) = place;
        Asset {
            id: uuid::Uuid::new_v4().to_string(),
            hash: Some(hash),
            size,
            content_type: of.content_type.clone(),
            name: of.name.clone(),
            kind,
            subfolder,
            filename,
            tags: of.tags.clone(),
            notes: of.notes.clone(),
            job_id: None,
            created_ms,
            expires_ms: of.expires_in.map(|seconds| created_ms.saturating_add(seconds.saturating_mul(1000))),
        }
    }

    /// Takes over an uploaded file of that hash; the record, and whether the content is new.
    ///
    /// # Errors
    /// If the file can't be stored.
    pub fn add(&self, staged: NamedTempFile, hash: &str, new: &NewAsset) -> io::Result<(Asset, bool)> {
        if let Some(asset) = self.mint(hash, new)? {
            return Ok((asset, false));
        }
        let size = staged.as_file().metadata()?.len();
        let hex = hash.strip_prefix("blake3:").unwrap_or(hash);
        let filename = format!("{hex}.{}", ending(&new.name, &new.content_type));
        let folder = self.folders.root(Kind::Input).join(FOLDER);
        std::fs::create_dir_all(&folder)?;
        let target = folder.join(&filename);
        match staged.persist(&target) {
            Ok(_) => {}
            Err(error) if error.error.kind() == io::ErrorKind::CrossesDevices => {
                let mut copy = NamedTempFile::new_in(&folder)?;
                io::copy(&mut error.file.reopen()?, copy.as_file_mut())?;
                copy.persist(&target).map_err(|e| e.error)?;
            }
            Err(error) => return Err(error.error),
        }
        let asset = self.record(new, hash.to_owned(), size, (Kind::Input, FOLDER.to_owned(), filename));
        self.append(&to_line(&asset))?;
        self.state().insert(&Arc::new(asset.clone()));
        Ok((asset, true))
    }

    /// A new record over content that is there already; `None` if it is not.
    ///
    /// # Errors
    /// If the record can't be written down.
    pub fn mint(&self, hash: &str, new: &NewAsset) -> io::Result<Option<Asset>> {
        let Some(known) = self.state().by_hash.get(hash).cloned() else { return Ok(None) };
        if !self.path(&known).is_ok_and(|path| path.is_file()) {
            self.state().by_hash.remove(hash);
            return Ok(None);
        }
        let mut new = new.clone();
        if new.content_type.is_empty() {
            new.content_type.clone_from(&known.content_type);
        }
        if new.name.is_empty() {
            new.name.clone_from(&known.name);
        }
        let place = (known.kind, known.subfolder.clone(), known.filename.clone());
        let asset = self.record(&new, hash.to_owned(), known.size, place);
        self.append(&to_line(&asset))?;
        self.state().insert(&Arc::new(asset.clone()));
        Ok(Some(asset))
    }

    /// Whether content of that hash is there.
    pub fn has(&self, hash: &str) -> bool {
        let known = self.state().by_hash.get(hash).cloned();
        known.is_some_and(|asset| self.path(&asset).is_ok_and(|path| path.is_file()))
    }

    /// The record of that id.
    pub fn get(&self, id: &str) -> Option<Asset> {
        self.state().by_id.get(id).map(|asset| (**asset).clone())
    }

    /// All records, newest first.
    pub fn all(&self) -> Vec<Asset> {
        let mut all: Vec<Asset> = self.state().by_id.values().map(|asset| (**asset).clone()).collect();
        all.sort_by(|a, b| b.created_ms.cmp(&a.created_ms).then_with(|| a.id.cmp(&b.id)));
        all
    }

    /// The record of a job's result, made on first sight. Its id follows from what it
    /// names, so that it is the same each time. `None` if there is no such file.
    pub fn output(&self, file: OutputFile<'_>) -> Option<Asset> {
        let name = format!("{}\n{}\n{}\n{}", file.job_id, file.kind.name(), file.subfolder, file.filename);
        let digest = blake3::hash(name.as_bytes());
        let mut bytes = [0_u8; 16];
        bytes.copy_from_slice(digest.as_bytes().get(..16)?);
        let id = uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string();
        if let Some(known) = self.get(&id) {
            return Some(known);
        }
        let path = self.folders.resolve(file.kind, file.subfolder, file.filename).ok()?;
        let facts = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let asset = Asset {
            id: id.clone(),
            hash: None,
            size: facts.len(),
            content_type: file.content_type.to_owned(),
            name: file.filename.to_owned(),
            kind: file.kind,
            subfolder: file.subfolder.to_owned(),
            filename: file.filename.to_owned(),
            tags: vec![file.kind.name().to_owned()],
            notes: Map::new(),
            job_id: Some(file.job_id.to_owned()),
            created_ms: now_ms(),
            expires_ms: None,
        };
        let mut state = self.state();
        state.outputs.push_back(id);
        if state.outputs.len() > OUTPUT_CAP
            && let Some(oldest) = state.outputs.pop_front()
        {
            state.remove(&oldest);
        }
        state.insert(&Arc::new(asset.clone()));
        Some(asset)
    }

    /// The record with its hash, which is computed if it is not known yet.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn with_hash(&self, mut asset: Asset) -> io::Result<Asset> {
        if asset.hash.is_none() {
            let path = self.path(&asset).map_err(io::Error::other)?;
            asset.hash = Some(hash_file(&path)?);
            self.state().insert(&Arc::new(asset.clone()));
        }
        Ok(asset)
    }

    /// Changes a record; what it is then, `None` if there is no such record. What names the
    /// content stays as it is.
    ///
    /// # Errors
    /// If the change can't be written down.
    pub fn update(&self, id: &str, change: impl FnOnce(&mut Asset)) -> io::Result<Option<Asset>> {
        let mut state = self.state();
        let Some(known) = state.by_id.get(id) else { return Ok(None) };
        let mut wanted = Asset::clone(known);
        change(&mut wanted);
        let asset =
            Asset { name: wanted.name, tags: wanted.tags, notes: wanted.notes, ..Asset::clone(known) };
        if asset.job_id.is_none() {
            self.append(&to_line(&asset))?;
        }
        state.insert(&Arc::new(asset.clone()));
        Ok(Some(asset))
    }

    /// The file of an asset.
    ///
    /// # Errors
    /// [`PathError`] if it would lie outside of its folder.
    pub fn path(&self, asset: &Asset) -> Result<PathBuf, PathError> {
        self.folders.resolve(asset.kind, &asset.subfolder, &asset.filename)
    }

    /// The name under which a node finds the file: `assets/x.png`, or `x.png [output]`.
    pub fn node_name(asset: &Asset) -> String {
        let folder = if asset.subfolder.is_empty() { String::new() } else { format!("{}/", asset.subfolder) };
        match asset.kind {
            Kind::Input => format!("{folder}{}", asset.filename),
            other => format!("{folder}{} [{}]", asset.filename, other.name()),
        }
    }

    /// Forgets a record. An upload's file goes with the last record over it;
    /// results stay. `false` if there is no such record.
    ///
    /// # Errors
    /// If that can't be written down.
    pub fn delete(&self, id: &str) -> io::Result<bool> {
        let Some((asset, is_last)) = self.state().remove(id) else { return Ok(false) };
        let is_upload = asset.kind == Kind::Input && asset.subfolder == FOLDER;
        if asset.job_id.is_none() {
            self.append(&json!({"deleted": id}))?;
        }
        if is_upload
            && is_last
            && let Ok(path) = self.path(&asset)
        {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::FolderOptions;

    fn store(base: &Path) -> AssetStore {
        let options = FolderOptions { base: base.to_owned(), ..FolderOptions::default() };
        AssetStore::open(Arc::new(Folders::open(&options).unwrap())).unwrap()
    }

    fn staged(store: &AssetStore, bytes: &[u8]) -> (NamedTempFile, String) {
        let mut file = NamedTempFile::new_in(store.folders.root(Kind::Temp)).unwrap();
        file.write_all(bytes).unwrap();
        let hash = hash_file(file.path()).unwrap();
        (file, hash)
    }

    fn named(name: &str) -> NewAsset {
        NewAsset { name: name.to_owned(), content_type: "image/png".to_owned(), ..NewAsset::default() }
    }

    #[test]
    fn the_same_bytes_are_stored_once_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let assets = store(dir.path());
        let (file, hash) = staged(&assets, b"abc");
        assert_eq!(hash, "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85");
        let (first, is_new) = assets.add(file, &hash, &named("photo.PNG")).unwrap();
        assert!(is_new && first.filename.ends_with(".png") && first.size == 3);
        let (file, _) = staged(&assets, b"abc");
        let (second, is_new) = assets.add(file, &hash, &named("other.png")).unwrap();
        assert!(!is_new && second.id != first.id && second.filename == first.filename);
        assert_eq!(AssetStore::node_name(&first), format!("assets/{}", first.filename));
        drop(assets);
        let assets = store(dir.path());
        assert_eq!(assets.get(&first.id), Some(first.clone()));
        assert!(assets.delete(&first.id).unwrap());
        assert!(assets.has(&hash), "another record needs the file");
        assert!(assets.delete(&second.id).unwrap());
        assert!(!assets.has(&hash) && !assets.path(&first).unwrap().exists());
        assert!(!assets.delete(&second.id).unwrap());
        assert_eq!(store(dir.path()).all(), []);
    }

    #[test]
    fn changes_survive_a_restart_and_leave_the_content_alone() {
        let dir = tempfile::tempdir().unwrap();
        let assets = store(dir.path());
        let (file, hash) = staged(&assets, b"abc");
        let (asset, _) = assets.add(file, &hash, &named("photo.png")).unwrap();
        let change = |asset: &mut Asset| {
            asset.name = "better.png".to_owned();
            asset.tags.push("red".to_owned());
            asset.notes.insert("stars".to_owned(), 5.into());
            asset.filename = "../elsewhere".to_owned();
        };
        let changed = assets.update(&asset.id, change).unwrap().unwrap();
        assert_eq!(
            (changed.name.as_str(), changed.filename.as_str()),
            ("better.png", asset.filename.as_str())
        );
        assert_eq!(assets.update("none", |_| {}).unwrap(), None);
        assert_eq!(store(dir.path()).get(&asset.id), Some(changed));
    }

    #[test]
    fn results_have_the_same_id_each_time_and_a_hash_on_demand() {
        let dir = tempfile::tempdir().unwrap();
        let assets = store(dir.path());
        std::fs::write(dir.path().join("output/a.png"), b"abc").unwrap();
        let file = |filename| OutputFile {
            job_id: "j",
            kind: Kind::Output,
            subfolder: "",
            filename,
            content_type: "image/png",
        };
        let one = assets.output(file("a.png")).unwrap();
        assert_eq!(assets.output(file("a.png")).unwrap().id, one.id);
        assert!(assets.output(file("none.png")).is_none());
        assert!(assets.output(file("../a.png")).is_none());
        let hash = assets.with_hash(one.clone()).unwrap().hash.unwrap();
        let copy = assets.mint(&hash, &NewAsset::default()).unwrap().unwrap();
        assert_eq!(AssetStore::node_name(&copy), "a.png [output]");
        assert!(assets.delete(&one.id).unwrap() && dir.path().join("output/a.png").exists());
        assert!(is_hash(&hash) && !is_hash("blake3:xyz") && !is_hash(&hash[7..]));
    }
}
