//! The layers of an image, one on the other, as the tree that a container would see.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use kiln_layer::{Entry, EntryKind, ScanOptions, is_opaque, is_whiteout, scan};
use kiln_oci::SnapshotId;
use kiln_snapshotter::Form;

use super::ToolkitError;
use super::compare::{FileComparer, metadata};
use crate::{BuildCancel, Engine};

/// Something that stands in a tree, and the layer it is from.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Position of the layer; 0 is the lowest.
    pub(crate) layer: usize,
    /// What it is. Its path is empty: that is the node's key.
    pub(crate) entry: Rc<Entry>,
}

impl Node {
    pub(crate) fn is_dir(&self) -> bool {
        self.entry.kind == EntryKind::Dir
    }

    /// The entry with its path, as a scan would give it.
    pub(crate) fn at(&self, path: &[u8]) -> Entry {
        Entry { path: path.to_vec(), ..(*self.entry).clone() }
    }
}

/// What happens while a layer is put on a tree.
pub(crate) enum Event<'e> {
    /// The layer has this. Directories of the lower layers stay below one.
    Put { path: &'e [u8], entry: &'e Rc<Entry>, old: Option<&'e Node> },
    /// What a lower layer has at this path is not seen any more. `by` is what the layer has there
    /// instead; `None`: nothing.
    Hidden { path: &'e [u8], old: &'e Node, by: Option<&'e Rc<Entry>> },
}

/// What one snapshot adds and hides, as overlayfs keeps it, a directory before what is in it.
pub(crate) struct Changes {
    entries: Vec<Entry>,
}

impl Changes {
    /// Reads what `id` alone adds and hides. Costs a `stat` and a `listxattr` an entry, and reads no
    /// content; but where snapshots are whole trees, it costs reading two of them.
    pub(crate) fn read(engine: &Engine, id: &SnapshotId, cancel: &BuildCancel) -> Result<Self, ToolkitError> {
        let changes = engine.snapshots.open_changes(id)?;
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
        let entries = scan(changes.dir.as_fd(), b"", &options)?;
        let Form::Tree { parent: Some(parent) } = changes.form else { return Ok(Self { entries }) };
        let lower = scan(parent.as_fd(), b"", &options)?;
        Self::between((parent.as_fd(), lower), (changes.dir.as_fd(), entries), cancel)
    }

    /// What makes the first of two whole trees into the second.
    fn between(
        (lower_root, lower): (BorrowedFd<'_>, Vec<Entry>),
        (upper_root, upper): (BorrowedFd<'_>, Vec<Entry>),
        cancel: &BuildCancel,
    ) -> Result<Self, ToolkitError> {
        let mut old: BTreeMap<Vec<u8>, Entry> =
            lower.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
        let mut files = FileComparer::new(cancel);
        let mut entries = Vec::new();
        for entry in upper {
            if let Some(old) = old.remove(&entry.path) {
                let (aspects, undecided) = metadata(&old, &entry);
                let is_same = aspects.is_empty()
                    && old.mtime == entry.mtime
                    && (!undecided || files.same((lower_root, upper_root), &entry.path)?);
                if is_same {
                    continue;
                }
            }
            entries.push(entry);
        }
        let whiteout = EntryKind::Char { major: 0, minor: 0 };
        entries.extend(old.into_values().map(|entry| Entry { kind: whiteout.clone(), ..entry }));
        Ok(Self { entries })
    }
}

/// A tree of several layers. Costs about 300 bytes an entry; a clone shares the entries.
#[derive(Clone, Default)]
pub(crate) struct Tree {
    /// By path, without a leading slash. The root itself is not in it: layers as tars do not have it.
    nodes: BTreeMap<Rc<[u8]>, Node>,
}

impl Tree {
    pub(crate) fn get(&self, path: &[u8]) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// All paths, as bytes sort: not in the order of a scan.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes.iter().map(|(path, node)| (&**path, node))
    }

    /// Puts a layer's changes on the tree and tells `on` of them.
    pub(crate) fn apply(&mut self, layer: usize, changes: Changes, on: &mut dyn FnMut(Event<'_>)) {
        for mut entry in changes.entries {
            let path: Rc<[u8]> = std::mem::take(&mut entry.path).into();
            if path.is_empty() {
                continue;
            }
            if is_whiteout(&entry) {
                self.hide_below(&path, on);
                if let Some(old) = self.nodes.remove(&path) {
                    on(Event::Hidden { path: &path, old: &old, by: None });
                }
                continue;
            }
            let is_dir = entry.kind == EntryKind::Dir;
            let opaque = is_opaque(&entry);
            let entry = Rc::new(entry);
            let old = self.nodes.remove(&path);
            let stays = is_dir && !opaque && old.as_ref().is_some_and(Node::is_dir);
            if !stays {
                self.hide_below(&path, on);
            }
            if let Some(old) = &old
                && !(is_dir && old.is_dir())
            {
                on(Event::Hidden { path: &path, old, by: Some(&entry) });
            }
            on(Event::Put { path: &path, entry: &entry, old: old.as_ref() });
            self.nodes.insert(path, Node { layer, entry });
        }
    }

    /// Removes everything below `path`.
    fn hide_below(&mut self, path: &[u8], on: &mut dyn FnMut(Event<'_>)) {
        let below: Vec<Rc<[u8]>> = self.below(path).map(|(path, _)| path.clone()).collect();
        for path in below {
            if let Some(old) = self.nodes.remove(&path) {
                on(Event::Hidden { path: &path, old: &old, by: None });
            }
        }
    }

    fn below(&self, path: &[u8]) -> impl Iterator<Item = (&Rc<[u8]>, &Node)> {
        // A slash is followed by a zero.
        let (first, last) = ([path, b"/"].concat(), [path, b"0"].concat());
        self.nodes.range::<[u8], _>((Bound::Excluded(&first[..]), Bound::Excluded(&last[..])))
    }
}

/// The layers of one image and the tree that they make.
pub(crate) struct Stack {
    /// Lowest first.
    pub(crate) layers: Vec<SnapshotId>,
    pub(crate) tree: Tree,
}

impl Stack {
    /// Reads all layers of `chain`, lowest first.
    pub(crate) fn read(
        engine: &Engine,
        chain: &[SnapshotId],
        cancel: &BuildCancel,
    ) -> Result<Self, ToolkitError> {
        Self { layers: Vec::new(), tree: Tree::default() }.with(engine, chain, cancel)
    }

    /// This stack with the layers of `more` on top.
    pub(crate) fn with(
        mut self,
        engine: &Engine,
        more: &[SnapshotId],
        cancel: &BuildCancel,
    ) -> Result<Self, ToolkitError> {
        for id in more {
            let changes = Changes::read(engine, id, cancel)?;
            self.tree.apply(self.layers.len(), changes, &mut |_| {});
            self.layers.push(id.clone());
        }
        Ok(self)
    }

    /// Which snapshot has what stands at a node.
    pub(crate) fn origin(&self, node: &Node) -> &SnapshotId {
        &self.layers[node.layer]
    }
}

/// The changes of snapshots, held open to read files out of them.
pub(crate) struct Dirs<'a> {
    engine: &'a Engine,
    open: BTreeMap<SnapshotId, Rc<OwnedFd>>,
}

impl<'a> Dirs<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Self {
        Self { engine, open: BTreeMap::new() }
    }

    /// The directory with the files of a snapshot's changes.
    pub(crate) fn get(&mut self, id: &SnapshotId) -> Result<Rc<OwnedFd>, ToolkitError> {
        if let Some(dir) = self.open.get(id) {
            return Ok(dir.clone());
        }
        let dir = Rc::new(self.engine.snapshots.open_changes(id)?.dir);
        self.open.insert(id.clone(), dir.clone());
        Ok(dir)
    }
}

/// The order of a scan: by component, so that a directory stands before what is in it.
pub(crate) fn by_component(one: &[u8], other: &[u8]) -> std::cmp::Ordering {
    one.split(|&b| b == b'/').cmp(other.split(|&b| b == b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_layer::Timestamp;

    fn entry(text: &str) -> Entry {
        let (path, kind) = match text.split_once(' ') {
            Some((path, "dir")) => (path, EntryKind::Dir),
            Some((path, "opaque")) => (path, EntryKind::Dir),
            Some((path, "gone")) => (path, EntryKind::Char { major: 0, minor: 0 }),
            _ => (text, EntryKind::File { size: 1, content: None, inode: (0, 0), nlink: 1 }),
        };
        let mut entry = Entry {
            path: path.as_bytes().to_vec(),
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            xattrs: BTreeMap::new(),
        };
        if text.ends_with("opaque") {
            entry.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        }
        entry
    }

    /// What stands in the tree, with its layer, and what was hidden on the way.
    #[track_caller]
    fn check(layers: &[&[&str]], expected: &[&str], hidden: &[&str]) {
        let (mut tree, mut seen) = (Tree::default(), Vec::new());
        let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
        for (layer, entries) in layers.iter().enumerate() {
            let entries = entries.iter().map(|text| entry(text)).collect();
            tree.apply(layer, Changes { entries }, &mut |event| {
                if let Event::Hidden { path, by, .. } = event {
                    seen.push(format!("{}{}", text(path), if by.is_some() { " replaced" } else { "" }));
                }
            });
        }
        let found: Vec<_> =
            tree.iter().map(|(path, node)| format!("{} {}", text(path), node.layer)).collect();
        assert_eq!(found, expected);
        assert_eq!(seen, hidden);
    }

    #[test]
    fn upper_files_replace_lower_ones_and_directories_merge() {
        check(
            &[&["d dir", "d/a", "d/b"], &["d dir", "d/b", "d/c"]],
            &["d 1", "d/a 0", "d/b 1", "d/c 1"],
            &["d/b replaced"],
        );
    }

    #[test]
    fn whiteouts_hide_whole_trees_and_no_neighbours() {
        check(
            &[&["d dir", "d/a", "d/e dir", "d/e/f", "d-x", "d0"], &["d gone", "nothing gone"]],
            &["d-x 0", "d0 0"],
            &["d/a", "d/e", "d/e/f", "d"],
        );
    }

    #[test]
    fn opaque_directories_hide_what_is_below_them() {
        check(&[&["d dir", "d/a"], &["d opaque", "d/b"]], &["d 1", "d/b 1"], &["d/a"]);
    }

    #[test]
    fn files_in_place_of_directories_and_back() {
        check(
            &[&["d dir", "d/a"], &["d"], &["d dir", "d/b"]],
            &["d 2", "d/b 2"],
            &["d/a", "d replaced", "d replaced"],
        );
    }

    #[test]
    fn order_is_that_of_a_scan() {
        let mut paths = ["a-b", "a/x", "a", "a/x/y", "a.b"];
        paths.sort_by(|one, other| by_component(one.as_bytes(), other.as_bytes()));
        assert_eq!(paths, ["a", "a/x", "a/x/y", "a-b", "a.b"]);
    }
}
