//! `kiln layer show`: which layer put a file there, and what later layers waste.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;

use kiln_content::ImageRecord;
use kiln_layer::{Entry, EntryKind, beneath};

use super::ToolkitError;
use super::compare::{Aspect, Comparer, metadata};
use super::layers::{LayerInfo, layers};
use super::tree::{Changes, Dirs, Event, Node, Stack, Tree, by_component};
use crate::{BuildCancel, Engine};

/// What the layers of an image do, to all of it or below a path.
#[derive(Debug)]
pub struct ShowReport {
    /// The layers, lowest first, each with what it does.
    pub layers: Vec<(LayerInfo, Summary)>,
    /// Files that take space and are not seen, most wasteful first.
    pub waste: Vec<Waste>,
    /// The path that was asked for.
    pub path: Option<PathReport>,
}

/// What a layer has, below the path that was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files, links and devices; directories do not count.
    pub files: u64,
    /// Their bytes. Of hard links one counts.
    pub bytes: u64,
    /// Files, links and devices of lower layers that it hides or replaces.
    pub hides: u64,
    /// Bytes of its own that later layers hide.
    pub wasted_bytes: u64,
}

/// A file whose bytes nobody sees.
#[derive(Debug, Clone)]
pub struct Waste {
    /// Without a leading slash.
    pub path: Vec<u8>,
    /// Bytes of its content.
    pub bytes: u64,
    /// Number of the layer that has it.
    pub layer: usize,
    /// Number of the layer that hides it.
    pub by: usize,
    /// How.
    pub kind: WasteKind,
}

/// How a file came to be wasted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WasteKind {
    /// Removed, alone or with its directory.
    Deleted,
    /// Something else stands there.
    Overwritten,
    /// The same bytes again: a `chmod`, `chown` or `touch` of its own, or a copy that changed nothing.
    SameContent,
}

/// The story of one path.
#[derive(Debug)]
pub struct PathReport {
    /// Without a leading slash; links on the way to it followed inside the image.
    pub path: Vec<u8>,
    /// What is there in the end; `None`: nothing.
    pub now: Option<Place>,
    /// What the layers did to it, lowest first.
    pub steps: Vec<(usize, Step)>,
}

/// What stands at a path, and from which layer.
#[derive(Debug, Clone)]
pub struct Place {
    /// Number of the layer.
    pub layer: usize,
    /// What it is; its path is empty.
    pub entry: Rc<Entry>,
}

/// What a layer did to a path.
#[derive(Debug, Clone)]
pub enum Step {
    /// It is there for the first time, or again.
    Added(Rc<Entry>),
    /// The layer has it anew; what has changed, nothing perhaps.
    Changed(Rc<Entry>, Vec<Aspect>),
    /// It is not there any more.
    Deleted,
}

/// Tells what the layers of `image` do at and below `path` (`None`: everywhere).
///
/// Reads the metadata of all layers, and of wasted files those that a file of the same size hides.
///
/// # Errors
/// [`ToolkitError::NoPath`] when no layer has anything there.
pub fn show(
    engine: &Engine,
    image: &ImageRecord,
    path: Option<&[u8]>,
    cancel: &BuildCancel,
) -> Result<ShowReport, ToolkitError> {
    let infos = layers(engine, image)?;
    let asked = match path {
        Some(path) => Some(real_name(engine, image, path)?),
        None => None,
    };
    let mut watch = Watch::new(asked.clone().unwrap_or_default(), infos.len());
    let mut stack = Stack { layers: Vec::new(), tree: Tree::default() };
    for (nth, info) in infos.iter().enumerate() {
        let changes = Changes::read(engine, &info.snapshot, cancel)?;
        stack.tree.apply(nth, changes, &mut |event| watch.see(nth, &event));
        stack.layers.push(info.snapshot.clone());
    }
    let Watch { summaries, hidden, steps, .. } = watch;
    let mut comparer = Comparer::new(Dirs::new(engine), cancel);
    let waste = waste(&mut comparer, &stack, hidden)?;
    let path = match (path, asked) {
        (Some(_), Some(path)) if path.is_empty() => None,
        (Some(written), Some(path)) => {
            if steps.is_empty() {
                return Err(ToolkitError::NoPath { path: written.into() });
            }
            let now = stack.tree.get(&path);
            let now = now.map(|node| Place { layer: node.layer + 1, entry: node.entry.clone() });
            let steps = told(&mut comparer, &stack, &path, steps)?;
            Some(PathReport { path, now, steps })
        }
        _ => None,
    };
    let mut layers: Vec<_> = infos.into_iter().zip(summaries).collect();
    for lost in &waste {
        layers[lost.layer - 1].1.wasted_bytes += lost.bytes;
    }
    Ok(ShowReport { layers, waste, path })
}

/// `path` with the links on the way to its last name followed inside the image.
fn real_name(engine: &Engine, image: &ImageRecord, path: &[u8]) -> Result<Vec<u8>, ToolkitError> {
    let Some(top) = &image.snapshot else { return Err(ToolkitError::NoPath { path: path.into() }) };
    let view = engine.snapshots.open_view(top)?;
    real_parent(view.as_fd(), path)
}

/// The path that `path` stands for when the last name, should it be a link's, means the link.
pub(crate) fn real_parent(root: std::os::fd::BorrowedFd<'_>, path: &[u8]) -> Result<Vec<u8>, ToolkitError> {
    let open = |source| ToolkitError::Follow { path: path.into(), source };
    let trimmed = path.iter().rposition(|&b| b != b'/').map_or(&b""[..], |last| &path[..=last]);
    let (above, name) = match trimmed.iter().rposition(|&b| b == b'/') {
        Some(at) => (&trimmed[..at], &trimmed[at + 1..]),
        None => (&b""[..], trimmed),
    };
    if matches!(name, b"" | b"." | b"..") {
        return beneath::real_path(root, path).map_err(open);
    }
    let above = beneath::real_path(root, above).map_err(open)?;
    Ok(if above.is_empty() { name.to_vec() } else { [&above[..], b"/", name].concat() })
}

/// A node that went out of sight.
struct Hidden {
    path: Vec<u8>,
    old: Node,
    by: usize,
    /// What took its place.
    instead: Option<Rc<Entry>>,
}

/// What one layer did to the path that was asked for, before files are compared.
enum Seen {
    Put { entry: Rc<Entry>, old: Option<Node> },
    Gone { old: Node },
}

/// Notes what happens at and below a path while layers are put on each other.
struct Watch {
    /// Empty: everywhere.
    below: Vec<u8>,
    summaries: Vec<Summary>,
    hidden: Vec<Hidden>,
    steps: Vec<(usize, Seen)>,
    /// Names that are still seen of files with several, by layer and inode.
    names: HashMap<(usize, (u64, u64)), u32>,
}

impl Watch {
    fn new(below: Vec<u8>, layers: usize) -> Self {
        Self {
            below,
            summaries: vec![Summary::default(); layers],
            hidden: Vec::new(),
            steps: Vec::new(),
            names: HashMap::new(),
        }
    }

    fn covers(&self, path: &[u8]) -> bool {
        let rest = path.strip_prefix(&self.below[..]);
        self.below.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }

    fn see(&mut self, layer: usize, event: &Event<'_>) {
        match event {
            Event::Put { path, entry, old } => {
                if *path == self.below {
                    // Hidden with its directory, and back in the same layer: that is a change.
                    let gone = match self.steps.last() {
                        Some((at, Seen::Gone { old })) if *at == layer => Some(old.clone()),
                        _ => None,
                    };
                    if gone.is_some() {
                        self.steps.pop();
                    }
                    let old = old.cloned().or(gone);
                    self.steps.push((layer, Seen::Put { entry: (*entry).clone(), old }));
                }
                // Counted wherever they are: the last name decides whether the bytes are seen.
                let first = match &entry.kind {
                    EntryKind::File { inode, nlink: 2.., .. } => {
                        let names = self.names.entry((layer, *inode)).or_default();
                        *names += 1;
                        *names == 1
                    }
                    _ => true,
                };
                if self.covers(path) && entry.kind != EntryKind::Dir {
                    let summary = &mut self.summaries[layer];
                    summary.files += 1;
                    if let EntryKind::File { size, .. } = &entry.kind
                        && first
                    {
                        summary.bytes += size;
                    }
                }
            }
            Event::Hidden { path, old, by } => {
                if *path == self.below && by.is_none() {
                    self.steps.push((layer, Seen::Gone { old: (*old).clone() }));
                }
                let last = match &old.entry.kind {
                    EntryKind::File { inode, nlink: 2.., .. } => {
                        let names = self.names.entry((old.layer, *inode)).or_insert(1);
                        *names = names.saturating_sub(1);
                        *names == 0
                    }
                    _ => true,
                };
                if !self.covers(path) || old.is_dir() {
                    return;
                }
                self.summaries[layer].hides += 1;
                if matches!(old.entry.kind, EntryKind::File { size: 1.., .. }) && last {
                    let (path, old) = (path.to_vec(), (*old).clone());
                    self.hidden.push(Hidden { path, old, by: layer, instead: by.cloned() });
                }
            }
        }
    }
}

fn waste(
    comparer: &mut Comparer<'_>,
    stack: &Stack,
    hidden: Vec<Hidden>,
) -> Result<Vec<Waste>, ToolkitError> {
    let mut waste = Vec::with_capacity(hidden.len());
    for Hidden { path, old, by, instead } in hidden {
        let EntryKind::File { size: bytes, .. } = old.entry.kind else { continue };
        let kind = match instead {
            None => WasteKind::Deleted,
            Some(entry) => {
                let is_same = match &entry.kind {
                    EntryKind::File { size, .. } if *size == bytes => {
                        let new = Node { layer: by, entry };
                        comparer.same_content(&path, stack, &old, stack, &new)?
                    }
                    _ => false,
                };
                if is_same { WasteKind::SameContent } else { WasteKind::Overwritten }
            }
        };
        waste.push(Waste { path, bytes, layer: old.layer + 1, by: by + 1, kind });
    }
    waste.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| by_component(&a.path, &b.path)));
    Ok(waste)
}

fn told(
    comparer: &mut Comparer<'_>,
    stack: &Stack,
    path: &[u8],
    seen: Vec<(usize, Seen)>,
) -> Result<Vec<(usize, Step)>, ToolkitError> {
    let mut steps = Vec::with_capacity(seen.len());
    for (layer, seen) in seen {
        let step = match seen {
            Seen::Gone { .. } => Step::Deleted,
            Seen::Put { entry, old: None } => Step::Added(entry),
            Seen::Put { entry, old: Some(old) } => {
                let (mut aspects, undecided) = metadata(&old.entry, &entry);
                let new = Node { layer, entry };
                if undecided && !comparer.same_content(path, stack, &old, stack, &new)? {
                    aspects.insert(0, Aspect::Content);
                }
                Step::Changed(new.entry, aspects)
            }
        };
        steps.push((layer + 1, step));
    }
    Ok(steps)
}
