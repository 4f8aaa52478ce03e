//! What makes one tree into another, as a layer.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering as Memory;

use rustix::fs::FileType;

use super::{DiffError, DiffOptions, TreeForm, Writer, Written, hiding};
use crate::hashing::{HashedOut, PIECE};
use crate::index::{Entry, EntryKind, mtime};
use crate::node::{self, is_private_xattr};
use crate::path::{self, EntryPath};
use crate::walk::{Found, Walk};

/// Writes as a tar what makes the tree below `lower` into the one below `upper`, both of them
/// complete: `options.form` does not count.
///
/// Like [`diff`](super::diff) of an upperdir, but a directory that was made anew is told by what is
/// missing in it. A file is unchanged when nothing that a layer keeps of it has changed; its content
/// is compared where all else is equal, so this costs reading both trees. Files with several links
/// are written when any of their names has come or gone.
///
/// # Errors
/// Those of [`diff`](super::diff).
pub fn diff_trees(
    lower: BorrowedFd<'_>,
    upper: BorrowedFd<'_>,
    out: impl Write,
    options: &DiffOptions<'_>,
) -> Result<Written, DiffError> {
    let changed_links = changed_links(lower, upper)?;
    let options = DiffOptions { form: TreeForm::Plain, ..*options };
    let mut trees = Trees {
        writer: Writer::new(HashedOut::new(out), &options),
        old: Walk::new(lower, b"")?,
        new: Walk::new(upper, b"")?,
        pending: Vec::new(),
        changed_links,
    };
    trees.old.next()?;
    trees.new.next()?;
    loop {
        if options.cancel.load(Memory::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let order = match (trees.old.current(), trees.new.current()) {
            (None, None) => return trees.writer.finish(),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => path::walk_order(old.path, new.path),
        };
        match order {
            Ordering::Less => trees.gone()?,
            Ordering::Greater => trees.come()?,
            Ordering::Equal => trees.compare()?,
        }
    }
}

struct Trees<'a, W: Write> {
    writer: Writer<'a, HashedOut<W>>,
    old: Walk,
    new: Walk,
    /// Unchanged directories above: written with the first change in them.
    pending: Vec<Entry>,
    /// First names of the new tree's files with several links that are not as they were.
    changed_links: HashSet<(u64, u64)>,
}

impl<W: Write> Trees<'_, W> {
    fn gone(&mut self) -> Result<(), DiffError> {
        let found = self.old.current().expect("the older entry is the lesser");
        let (parent, name) = path::split(found.path);
        let (marker, path) = (hiding(parent, name), found.path.to_vec());
        if name.starts_with(b".wh.") {
            return Err(DiffError::ReservedName { path: EntryPath(path) });
        }
        self.write_pending(&path)?;
        self.writer.marker(marker)?;
        self.old.next()?;
        Ok(())
    }

    fn come(&mut self) -> Result<(), DiffError> {
        let (entry, file) = self.writer.read(&mut self.new)?;
        self.write_pending(&entry.path)?;
        self.writer.write(&entry, file)?;
        self.new.next()?;
        Ok(())
    }

    fn compare(&mut self) -> Result<(), DiffError> {
        let both = "both have the same path";
        let (old, new) = (self.old.current().expect(both), self.new.current().expect(both));
        let is_dir = |found: &Found<'_>| node::kind(&found.stat) == FileType::Directory;
        let may_be_same =
            may_be_same(&old, &new) && !self.changed_links.contains(&(new.stat.st_dev, new.stat.st_ino));
        // A directory that is there no more is hidden by what stands in its place.
        let look_closer = may_be_same || is_dir(&old) && is_dir(&new);
        let (entry, file) = self.writer.read(&mut self.new)?;
        let same = look_closer && {
            let (before, content) = self.writer.read(&mut self.old)?;
            may_be_same && is_same(&before, content, &entry, file.as_ref())?
        };
        if !same {
            self.write_pending(&entry.path)?;
            self.writer.write(&entry, file)?;
        } else if entry.kind == EntryKind::Dir && !entry.path.is_empty() {
            self.pending.push(entry);
        }
        self.old.next()?;
        self.new.next()?;
        Ok(())
    }

    /// Writes the unchanged directories above `path`.
    fn write_pending(&mut self, path: &[u8]) -> Result<(), DiffError> {
        for entry in std::mem::take(&mut self.pending) {
            if path::is_below(path, &entry.path) {
                self.writer.write(&entry, None)?;
            }
        }
        Ok(())
    }
}

/// Whether `stat(2)` says nothing against it.
pub(super) fn may_be_same(old: &Found<'_>, new: &Found<'_>) -> bool {
    let key = |found: &Found<'_>| {
        let stat = &found.stat;
        let size = if node::kind(stat) == FileType::RegularFile { stat.st_size } else { 0 };
        (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev, size, mtime(stat))
    };
    key(old) == key(new)
}

/// Whether also attributes, target and content are the same. Leaves `new` at its beginning.
pub(super) fn is_same(
    old: &Entry,
    content: Option<File>,
    new: &Entry,
    new_content: Option<&File>,
) -> Result<bool, DiffError> {
    let kept = |entry: &Entry| -> Vec<(Vec<u8>, Vec<u8>)> {
        let kept = entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name));
        kept.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    // On record, as stat(2) says the same of both.
    if (old.uid, old.gid) != (new.uid, new.gid) || kept(old) != kept(new) {
        return Ok(false);
    }
    match (&old.kind, &new.kind) {
        (EntryKind::Symlink { target: old }, EntryKind::Symlink { target: new }) => Ok(old == new),
        (EntryKind::File { .. }, EntryKind::File { .. }) => match (content, new_content) {
            (Some(mut old_content), Some(new_content)) => {
                same_content(&mut old_content, new_content, &new.path)
            }
            // One of them was written already: another name of a file that has changed.
            _ => Ok(false),
        },
        _ => Ok(true),
    }
}

fn same_content(old: &mut File, new: &File, path: &[u8]) -> Result<bool, DiffError> {
    use std::os::unix::fs::FileExt;
    let failed = |source| DiffError::Host { call: "read", path: path.into(), source };
    let (mut left, mut right) = (vec![0; PIECE / 4], vec![0; PIECE / 4]);
    let mut at = 0;
    loop {
        let length = old.read(&mut left).map_err(failed)?;
        if length == 0 {
            return Ok(true);
        }
        match new.read_exact_at(&mut right[..length], at) {
            Ok(()) if left[..length] == right[..length] => at += length as u64,
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Files of the new tree with several names, in it or in the old one, that are not names of one file in both.
fn changed_links(lower: BorrowedFd<'_>, upper: BorrowedFd<'_>) -> Result<HashSet<(u64, u64)>, DiffError> {
    let mut old = links(lower, |_, links| links > 1)?;
    old.retain(|_, names| names.len() > 1);
    let old: HashMap<&[u8], &Vec<Vec<u8>>> =
        old.values().flat_map(|names| names.iter().map(move |name| (name.as_slice(), names))).collect();
    // One name that was copied up alone is a file of its own now, with one link.
    let new = links(upper, |path, links| links > 1 || old.contains_key(path))?;
    let is_changed = |names: &Vec<Vec<u8>>| match old.get(names[0].as_slice()) {
        Some(before) => *before != names,
        // The other names of a single one are in other layers: two copies may have a file in common.
        None => names.len() > 1,
    };
    Ok(new.into_iter().filter(|(_, names)| is_changed(names)).map(|(inode, _)| inode).collect())
}

/// Names by inode, in order.
type Links = HashMap<(u64, u64), Vec<Vec<u8>>>;

/// The names of every file that `wanted` takes, by path and number of links.
fn links(root: BorrowedFd<'_>, wanted: impl Fn(&[u8], u64) -> bool) -> Result<Links, DiffError> {
    let mut links = Links::new();
    let mut walk = Walk::new(root, b"")?;
    while let Some(found) = walk.next()? {
        match node::kind(&found.stat) {
            FileType::Directory => drop(walk.enter()?),
            FileType::RegularFile if wanted(found.path, found.stat.st_nlink) => {
                let inode = (found.stat.st_dev, found.stat.st_ino);
                links.entry(inode).or_default().push(found.path.to_vec());
            }
            _ => {}
        }
    }
    Ok(links)
}
