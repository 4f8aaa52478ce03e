//! Several layers become one: what they make of the base, and nothing of what they did on the way.
//!
//! The new layer is made as a RUN makes one, by changing the base's tree until it is the wanted one;
//! so a `chmod` or `chown` of a file ends in the entry of that file, whichever layer made it.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use kiln_layer::{CopyRequest, Entry, EntryKind, ScanOptions, beneath};
use kiln_oci::SnapshotId;
use kiln_snapshotter::OpenOptions;
use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use super::ToolkitError;
use super::compare::Aspect;
use super::diff::{Kind, differences};
use super::tree::{Stack, by_component};
use crate::{BuildCancel, Engine};

/// A snapshot on `base` (`None`: on nothing) with the tree of the last of `chain`, times and hard links
/// included. `chain` begins with the base's own.
pub(crate) fn squash(
    engine: &Engine,
    base: &[SnapshotId],
    own: &[SnapshotId],
    cancel: &BuildCancel,
) -> Result<SnapshotId, ToolkitError> {
    let Some(top) = own.last().or(base.last()) else {
        return Ok(engine.prepare(None)?.commit()?);
    };
    let active = engine.prepare(base.last())?;
    let root = engine.snapshots.open_active(active.key(), &OpenOptions::default())?;
    let view = engine.snapshots.open_view(top)?;
    let entries = if base.is_empty() {
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
        kiln_layer::scan(view.as_fd(), b"", &options)?
    } else {
        let lower = Stack::read(engine, base, cancel)?;
        let copy = Stack { layers: lower.layers.clone(), tree: lower.tree.clone() };
        let upper = copy.with(engine, own, cancel)?;
        let changes = Changes::find(engine, &lower, &upper, cancel)?;
        changes.remove(root.as_fd(), cancel)?;
        changes.entries
    };
    kiln_layer::copy(&CopyRequest::tree(view.as_fd(), &entries, root.as_fd(), cancel.flag()))?;
    drop((root, view));
    Ok(active.commit()?)
}

/// What makes one tree into another.
struct Changes {
    /// Paths to remove, sorted, with whether they are directories.
    gone: Vec<(Vec<u8>, bool)>,
    /// What to put there, sorted; with the directories on the way, for the sake of their times.
    entries: Vec<Entry>,
}

impl Changes {
    fn find(
        engine: &Engine,
        lower: &Stack,
        upper: &Stack,
        cancel: &BuildCancel,
    ) -> Result<Self, ToolkitError> {
        let mut gone = Vec::new();
        let mut wanted: HashSet<Vec<u8>> = HashSet::new();
        let mut linked = HashSet::new();
        let is_dir = |entry: &Entry| entry.kind == EntryKind::Dir;
        for difference in differences(engine, lower, upper, true, cancel)? {
            let path = difference.path;
            // The time of the directory that it is in changes as well.
            wanted.extend(parents(&path).map(<[u8]>::to_vec));
            let after = match difference.kind {
                Kind::Deleted(entry) => {
                    gone.push((path, is_dir(&entry)));
                    continue;
                }
                Kind::Added(entry) => entry,
                Kind::Changed { before, after, aspects } => {
                    if aspects.contains(&Aspect::Type) {
                        gone.push((path.clone(), is_dir(&before)));
                    }
                    after
                }
            };
            if let EntryKind::File { inode, nlink: 2.., .. } = &after.kind {
                linked.insert(*inode);
            }
            wanted.insert(path);
        }
        let mut entries = Vec::new();
        for (path, node) in upper.tree.iter() {
            // All names of a file that has several, though some be as they were.
            let is_linked = || match &node.entry.kind {
                EntryKind::File { inode, nlink: 2.., .. } => linked.contains(inode),
                _ => false,
            };
            if wanted.contains(path) || is_linked() {
                entries.push(node.at(path));
            }
        }
        entries.sort_by(|a, b| by_component(&a.path, &b.path));
        Ok(Self { gone, entries })
    }

    /// Removes from the tree at `root` what shall not be there, what is in directories first.
    fn remove(&self, root: BorrowedFd<'_>, cancel: &BuildCancel) -> Result<(), ToolkitError> {
        for (path, is_dir) in self.gone.iter().rev() {
            if cancel.flag().load(std::sync::atomic::Ordering::Relaxed) {
                return Err(ToolkitError::Cancelled);
            }
            let (parent, name) = beneath::open_parent(root, path)
                .map_err(|source| ToolkitError::Open { path: path.as_slice().into(), source })?;
            let flags = if *is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            match unlinkat(parent, name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    let source = io::Error::from(errno);
                    return Err(ToolkitError::Remove { path: path.as_slice().into(), source });
                }
            }
        }
        Ok(())
    }
}

/// The directories that `path` is in, without the root.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at])
}
