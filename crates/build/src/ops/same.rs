//! Whether a step made again what it made before.

use std::collections::HashMap;
use std::os::fd::AsFd;

use kiln_layer::{Entry, EntryKind, ScanOptions, is_opaque, is_whiteout, scan};
use kiln_oci::SnapshotId;
use kiln_snapshotter::{Form, Snapshotter};

use crate::BuildCancel;
use crate::toolkit::compare::{FileComparer, metadata};

/// Whether two snapshots that stand on the same files change them alike. Times do not count, as in keys.
/// What cannot be compared counts as different.
///
/// Costs a walk of both; files are read only when all else is the same. Backends that keep whole trees
/// are not asked to walk them.
pub(super) fn same_changes(
    snapshots: &dyn Snapshotter,
    earlier: &SnapshotId,
    now: &SnapshotId,
    cancel: &BuildCancel,
) -> bool {
    compare(snapshots, earlier, now, cancel).unwrap_or(false)
}

fn compare(
    snapshots: &dyn Snapshotter,
    earlier: &SnapshotId,
    now: &SnapshotId,
    cancel: &BuildCancel,
) -> Option<bool> {
    let (one, other) = (snapshots.open_changes(earlier).ok()?, snapshots.open_changes(now).ok()?);
    let (Form::OverlayUpper, Form::OverlayUpper) = (&one.form, &other.form) else { return None };
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
    let entries = scan(one.dir.as_fd(), b"", &options).ok()?;
    let others = scan(other.dir.as_fd(), b"", &options).ok()?;
    let undecided = same_metadata(&entries, &others)?;
    let mut files = FileComparer::new(cancel);
    for path in undecided {
        if !files.same((one.dir.as_fd(), other.dir.as_fd()), path).ok()? {
            return Some(false);
        }
    }
    Some(true)
}

/// The files whose content is to be compared; `None`: the lists differ already.
fn same_metadata<'a>(entries: &'a [Entry], others: &[Entry]) -> Option<Vec<&'a [u8]>> {
    if entries.len() != others.len() {
        return None;
    }
    let mut undecided = Vec::new();
    let (mut links, mut other_links) = (HashMap::new(), HashMap::new());
    for (at, (one, other)) in entries.iter().zip(others).enumerate() {
        let (differences, unread) = metadata(one, other);
        let same = one.path == other.path
            && differences.is_empty()
            && is_opaque(one) == is_opaque(other)
            && is_whiteout(one) == is_whiteout(other)
            && first_link(&mut links, one, at) == first_link(&mut other_links, other, at);
        if !same {
            return None;
        }
        if unread {
            undecided.push(one.path.as_slice());
        }
    }
    Some(undecided)
}

/// Where the first name of a file stands that has several, and where any other stands itself.
fn first_link(known: &mut HashMap<(u64, u64), usize>, entry: &Entry, at: usize) -> usize {
    match &entry.kind {
        EntryKind::File { inode, nlink: 2.., .. } => *known.entry(*inode).or_insert(at),
        _ => at,
    }
}
