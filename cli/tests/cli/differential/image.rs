//! An image as lines of text, read from what `save` wrote, whoever saved it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use kiln_oci::Digest;
use serde_json::Value;

/// Config fields that two images of one Dockerfile must share. Times, history and layers differ.
const FIELDS: [&str; 12] = [
    "Cmd",
    "Entrypoint",
    "Env",
    "ExposedPorts",
    "Healthcheck",
    "Labels",
    "OnBuild",
    "Shell",
    "StopSignal",
    "User",
    "Volumes",
    "WorkingDir",
];

/// Path or config field to its description; see [`read`].
pub(crate) type Lines = BTreeMap<String, String>;

/// Reads a `docker save` archive: its layers one over the other, then its config.
///
/// Paths begin with `/` and are described as `type mode uid:gid content xattrs`; config fields stand
/// as JSON, left out when they are empty. Holds the whole archive in memory.
pub(crate) fn read(archive: &Path) -> Lines {
    let mut members = BTreeMap::new();
    let mut links = Vec::new();
    let mut tar = tar::Archive::new(File::open(archive).expect("the archive was just saved"));
    for entry in tar.entries().expect("an archive") {
        let mut entry = entry.expect("an archive");
        let name = text(&entry.path_bytes());
        if let Some(target) = entry.link_name_bytes() {
            links.push((name, text(&target)));
            continue;
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("an archive");
        members.insert(name, bytes);
    }
    let manifest: Value = serde_json::from_slice(&members["manifest.json"]).expect("a list of images");
    let image = &manifest[0];

    let mut tree = Tree::default();
    for layer in image["Layers"].as_array().expect("layers") {
        let name = layer.as_str().expect("a name");
        // The same layer twice is a link to its first copy, `../<id>/layer.tar`.
        let target =
            links.iter().find(|(link, _)| link == name).map(|(_, target)| target.trim_start_matches("../"));
        tree.apply(&members[target.unwrap_or(name)]);
    }
    let mut lines = tree.lines();
    let config: Value =
        serde_json::from_slice(&members[image["Config"].as_str().expect("a name")]).expect("a config");
    for field in FIELDS {
        lines.extend(config_line(field, &config["config"][field]));
    }
    lines
}

fn config_line(field: &str, value: &Value) -> Option<(String, String)> {
    let mut value = value.clone();
    if field == "Labels"
        && let Some(labels) = value.as_object_mut()
    {
        labels.retain(|name, _| !name.starts_with("io.buildah."));
    }
    let empty = match &value {
        Value::Null => true,
        Value::String(text) => text.is_empty() || (field == "WorkingDir" && text == "/"),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    (!empty).then(|| (field.to_owned(), value.to_string()))
}

/// What a name stands for. Names of one file share the number.
#[derive(Clone)]
struct Node {
    file: usize,
    line: String,
}

#[derive(Default)]
struct Tree {
    nodes: BTreeMap<String, Node>,
    files: usize,
}

impl Tree {
    fn apply(&mut self, layer: &[u8]) {
        // Whiteouts hide what lower layers have, never what their own layer brings.
        let mut own = BTreeSet::new();
        let mut tar = tar::Archive::new(Cursor::new(layer));
        for entry in tar.entries().expect("a layer") {
            let mut entry = entry.expect("a layer");
            let path = rooted(&entry.path_bytes());
            let (parent, name) = path.rsplit_once('/').expect("begins with a slash");
            if name == ".wh..wh..opq" {
                self.remove(parent, false, &own);
            } else if let Some(hidden) = name.strip_prefix(".wh.") {
                self.remove(&format!("{parent}/{hidden}"), true, &own);
            } else if path != "/" {
                let node = self.node(&mut entry);
                if !node.line.starts_with("dir ") {
                    self.remove(&path, true, &own);
                }
                self.make_parents(&path);
                own.insert(path.clone());
                self.nodes.insert(path, node);
            }
        }
    }

    fn remove(&mut self, path: &str, itself: bool, own: &BTreeSet<String>) {
        let inside = format!("{path}/");
        let goes = |name: &String| (itself && name == path) || name.starts_with(&inside);
        self.nodes.retain(|name, _| own.contains(name) || !goes(name));
    }

    fn make_parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/').filter(|(at, _)| *at > 0) {
            let parent = path[..at].to_owned();
            if !self.nodes.contains_key(&parent) {
                let node = self.number("dir 0755 0:0".to_owned());
                self.nodes.insert(parent, node);
            }
        }
    }

    fn number(&mut self, line: String) -> Node {
        self.files += 1;
        Node { file: self.files, line }
    }

    fn node<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Node {
        let target = entry.link_name_bytes().map(|target| target.into_owned());
        let header = entry.header().clone();
        let kind = header.entry_type();
        if kind.is_hard_link() {
            let target = rooted(&target.expect("a hard link names a file"));
            return self.nodes.get(&target).expect("a hard link follows its file").clone();
        }
        let mode = header.mode().expect("a number") & 0o7777;
        let mut line = match kind {
            kind if kind.is_dir() => format!("dir {mode:04o}"),
            kind if kind.is_symlink() => "link".to_owned(),
            kind if kind.is_fifo() => format!("fifo {mode:04o}"),
            kind if kind.is_character_special() => format!("char {mode:04o}"),
            kind if kind.is_block_special() => format!("block {mode:04o}"),
            _ => format!("file {mode:04o}"),
        };
        line += &format!(" {}:{}", header.uid().expect("a number"), header.gid().expect("a number"));
        if kind.is_symlink() {
            line += &format!(" -> {}", text(&target.expect("a symbolic link has a target")));
        } else if kind.is_character_special() || kind.is_block_special() {
            let number = |part: Result<Option<u32>, _>| part.ok().flatten().unwrap_or(0);
            line += &format!(" {}:{}", number(header.device_major()), number(header.device_minor()));
        } else if line.starts_with("file") {
            line += &content(entry);
        }
        line += &xattrs(entry);
        self.number(line)
    }

    fn lines(self) -> Lines {
        let mut first: BTreeMap<usize, String> = BTreeMap::new();
        for (path, node) in &self.nodes {
            first.entry(node.file).or_insert_with(|| path.clone());
        }
        let line = |(path, node): (String, Node)| {
            let same = &first[&node.file];
            let line = if *same == path { node.line } else { format!("same file as {same}") };
            (path, line)
        };
        self.nodes.into_iter().map(line).collect()
    }
}

/// Short text is shown, all else named by its digest.
fn content<R: Read>(entry: &mut tar::Entry<'_, R>) -> String {
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).expect("a layer");
    match std::str::from_utf8(&bytes) {
        Ok(text) if text.len() <= 400 => format!(" {text:?}"),
        _ => format!(" {} bytes {}", bytes.len(), Digest::of(&bytes)),
    }
}

fn xattrs<R: Read>(entry: &mut tar::Entry<'_, R>) -> String {
    let mut all = BTreeSet::new();
    for record in entry.pax_extensions().ok().flatten().into_iter().flatten().flatten() {
        let name = record.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr."));
        if let Some(name) = name {
            all.insert(format!(" {name}={}", record.value_bytes().escape_ascii()));
        }
    }
    all.into_iter().collect()
}

fn rooted(path: &[u8]) -> String {
    let path = text(path);
    let names = path.split('/').filter(|name| !name.is_empty() && *name != ".");
    let rooted: String = names.flat_map(|name| ["/", name]).collect();
    if rooted.is_empty() { "/".to_owned() } else { rooted }
}

fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}
