//! The files among a job's outputs.
//!
//! A node's `ui` data is `{"images": [{filename, subfolder, type}], "text": […], …}`;
//! lists of objects with a file name are files, whatever they are called.

use hyper::HeaderMap;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value as Json, json};

use super::download;
use crate::files::Kind;

/// Lists whose files can be shown.
const SHOWN: &[&str] = &["images", "video", "audio"];
/// Endings of three-dimensional models, which can be shown too.
const MODELS: &[&str] = &["obj", "fbx", "gltf", "glb"];

/// One file that a node gave.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OutputFile {
    /// The node.
    pub(super) node_id: String,
    /// The name of the list: `images`, …
    pub(super) media: String,
    /// The folder with the file.
    pub(super) kind: Kind,
    /// The subfolder in it.
    pub(super) subfolder: String,
    /// The file.
    pub(super) filename: String,
    /// The whole object.
    pub(super) item: Map<String, Json>,
}

impl OutputFile {
    fn new(node_id: &str, media: &str, item: &Map<String, Json>) -> Option<Self> {
        let text = |key: &str| item.get(key).and_then(Json::as_str);
        Some(Self {
            node_id: node_id.to_owned(),
            media: media.to_owned(),
            kind: Kind::from_name(text("type").unwrap_or("output"))?,
            subfolder: text("subfolder").unwrap_or_default().to_owned(),
            filename: text("filename")?.to_owned(),
            item: item.clone(),
        })
    }

    /// Media type, by the file's name.
    pub(super) fn content_type(&self) -> &'static str {
        download::content_type(&self.filename, &HeaderMap::new()).0
    }

    /// Comfy API v2's word for what it is.
    pub(super) fn sort(&self) -> &'static str {
        match self.content_type().split('/').next() {
            Some("image") => "image",
            Some("video") => "video",
            Some("audio") => "audio",
            _ if self.filename.ends_with(".latent") => "latent",
            _ if self.filename.ends_with(".txt") => "text",
            _ => "file",
        }
    }

    fn is_shown(&self) -> bool {
        let format = self.item.get("format").and_then(Json::as_str).unwrap_or_default();
        let ending = self.filename.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase()).unwrap_or_default();
        SHOWN.contains(&self.media.as_str())
            || format.starts_with("video/")
            || format.starts_with("audio/")
            || MODELS.contains(&ending.as_str())
    }

    /// Where `/view` shows it, without the server's address.
    pub(super) fn view_path(&self) -> String {
        let escape = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let (file, folder) = (escape(&self.filename), escape(&self.subfolder));
        format!("/view?filename={file}&subfolder={folder}&type={}", self.kind.name())
    }

    /// As the newest web page wants it in a list of jobs.
    fn preview(&self) -> Json {
        let mut item = self.item.clone();
        item.insert("nodeId".to_owned(), json!(self.node_id));
        item.insert("mediaType".to_owned(), json!(self.media));
        Json::Object(item)
    }
}

/// The files of all nodes, in order.
pub(super) fn files(outputs: &Map<String, Json>) -> Vec<OutputFile> {
    let lists = outputs.iter().filter_map(|(node, ui)| Some((node, ui.as_object()?)));
    lists.flat_map(|(node, ui)| files_of(node, ui)).collect()
}

/// The files of one node.
pub(super) fn files_of(node: &str, ui: &Map<String, Json>) -> Vec<OutputFile> {
    let lists = ui.iter().filter_map(|(media, list)| Some((media, list.as_array()?)));
    lists
        .flat_map(|(media, list)| {
            list.iter().filter_map(|item| OutputFile::new(node, media, item.as_object()?))
        })
        .collect()
}

/// How many outputs there are, how many of them can be shown, and the one to show.
pub(super) fn summary(outputs: &Map<String, Json>) -> (usize, usize, Json) {
    let files = files(outputs);
    let shown: Vec<&OutputFile> = files.iter().filter(|file| file.is_shown()).collect();
    let best = shown.iter().find(|file| file.kind == Kind::Output).or_else(|| shown.first());
    (files.len(), shown.len(), best.map_or(Json::Null, |file| file.preview()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_among_other_data() {
        let outputs = json!({
            "5": {"text": ["a"], "animated": [false]},
            "8": {"images": [{"filename": "t.png", "subfolder": "", "type": "temp"}]},
            "9": {"images": [{"filename": "a b.png", "subfolder": "x", "type": "output"}], "latents": [
                  {"filename": "l.latent", "subfolder": "", "type": "output"}]},
        });
        let outputs = outputs.as_object().unwrap();
        let files = files(outputs);
        let names: Vec<_> = files.iter().map(|f| (f.filename.as_str(), f.sort())).collect();
        assert_eq!(names, [("t.png", "image"), ("a b.png", "image"), ("l.latent", "latent")]);
        assert_eq!(files[1].view_path(), "/view?filename=a%20b%2Epng&subfolder=x&type=output");
        let (count, shown, preview) = summary(outputs);
        assert_eq!((count, shown), (3, 2));
        assert_eq!(
            preview,
            json!({"filename": "a b.png", "subfolder": "x", "type": "output", "nodeId": "9", "mediaType": "images"})
        );
        assert_eq!(summary(&Map::new()), (0, 0, Json::Null));
    }
}
