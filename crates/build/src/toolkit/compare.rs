//! Whether two entries, and the files behind them, are the same.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use kiln_layer::{Entry, EntryKind, beneath, is_private_xattr};
use rustix::fs::OFlags;

use super::ToolkitError;
use super::tree::{Dirs, Node, Stack};
use crate::BuildCancel;

/// What two entries of one path differ in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aspect {
    /// One is a directory, the other a file.
    Type,
    /// Bytes of a file.
    Content,
    /// Permission, setuid, setgid and sticky bits.
    Mode,
    /// User or group.
    Owner,
    /// Extended attributes, file capabilities and ACLs among them.
    Xattrs,
    /// Where a symbolic link points.
    Target,
    /// Numbers of a device.
    Device,
}

impl Aspect {
    /// One word for it, the same in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Aspect::Type => "type",
            Aspect::Content => "content",
            Aspect::Mode => "mode",
            Aspect::Owner => "owner",
            Aspect::Xattrs => "xattrs",
            Aspect::Target => "target",
            Aspect::Device => "device",
        }
    }
}

/// What two entries differ in as far as that can be told without reading files; and whether they are
/// files of one size whose content is still to be compared.
pub(crate) fn metadata(one: &Entry, other: &Entry) -> (Vec<Aspect>, bool) {
    use EntryKind::{Block, Char, File, Symlink};
    let mut found = Vec::new();
    let mut undecided = false;
    match (&one.kind, &other.kind) {
        (File { size: a, inode: here, .. }, File { size: b, inode: there, .. }) => {
            if a != b {
                found.push(Aspect::Content);
            } else {
                undecided = *a > 0 && here != there;
            }
        }
        (Symlink { target: a }, Symlink { target: b }) if a != b => found.push(Aspect::Target),
        (Char { .. }, Char { .. }) | (Block { .. }, Block { .. }) if one.kind != other.kind => {
            found.push(Aspect::Device);
        }
        (a, b) if std::mem::discriminant(a) != std::mem::discriminant(b) => found.push(Aspect::Type),
        _ => {}
    }
    // Links have no permissions of their own.
    let is_link = |entry: &Entry| matches!(entry.kind, Symlink { .. });
    if one.mode != other.mode && !is_link(one) && !is_link(other) {
        found.push(Aspect::Mode);
    }
    if (one.uid, one.gid) != (other.uid, other.gid) {
        found.push(Aspect::Owner);
    }
    if !shown_xattrs(one).eq(shown_xattrs(other)) {
        found.push(Aspect::Xattrs);
    }
    (found, undecided)
}

fn shown_xattrs(entry: &Entry) -> impl Iterator<Item = (&Vec<u8>, &Vec<u8>)> {
    entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name))
}

/// Compares the bytes of files.
pub(crate) struct FileComparer<'a> {
    cancel: &'a BuildCancel,
    buffers: [Vec<u8>; 2],
}

impl<'a> FileComparer<'a> {
    pub(crate) fn new(cancel: &'a BuildCancel) -> Self {
        Self { cancel, buffers: [vec![0; 256 << 10], vec![0; 256 << 10]] }
    }

    /// Whether the files at `path` below two roots have the same bytes; stops at the first that
    /// differs.
    pub(crate) fn same(
        &mut self,
        (one, other): (BorrowedFd<'_>, BorrowedFd<'_>),
        path: &[u8],
    ) -> Result<bool, ToolkitError> {
        let mut files = [open(one, path)?, open(other, path)?];
        let failed = |source| ToolkitError::Open {
            path: path.into(),
            source: beneath::BeneathError::Host { call: "read", path: path.into(), source },
        };
        let [first, second] = &mut self.buffers;
        loop {
            if self.cancel.flag().load(Ordering::Relaxed) {
                return Err(ToolkitError::Cancelled);
            }
            let read = fill(&mut files[0], first).map_err(failed)?;
            if fill(&mut files[1], second).map_err(failed)? != read || first[..read] != second[..read] {
                return Ok(false);
            }
            if read < first.len() {
                return Ok(true);
            }
        }
    }
}

/// Compares nodes of two stacks, files and all; reads only what can be told in no other way.
pub(crate) struct Comparer<'a> {
    dirs: Dirs<'a>,
    files: FileComparer<'a>,
}

impl<'a> Comparer<'a> {
    pub(crate) fn new(dirs: Dirs<'a>, cancel: &'a BuildCancel) -> Self {
        Self { dirs, files: FileComparer::new(cancel) }
    }

    /// What the nodes at `path` differ in. Times do not count.
    pub(crate) fn compare(
        &mut self,
        path: &[u8],
        (one, a): (&Stack, &Node),
        (other, b): (&Stack, &Node),
    ) -> Result<Vec<Aspect>, ToolkitError> {
        if self.files.cancel.flag().load(Ordering::Relaxed) {
            return Err(ToolkitError::Cancelled);
        }
        // One snapshot has one thing at a path.
        if one.origin(a) == other.origin(b) {
            return Ok(Vec::new());
        }
        let (mut found, undecided) = metadata(&a.entry, &b.entry);
        if undecided && !self.same_content(path, one, a, other, b)? {
            found.insert(0, Aspect::Content);
        }
        Ok(found)
    }

    /// Whether two files of one size have the same bytes.
    pub(crate) fn same_content(
        &mut self,
        path: &[u8],
        one: &Stack,
        a: &Node,
        other: &Stack,
        b: &Node,
    ) -> Result<bool, ToolkitError> {
        let roots = (self.dirs.get(one.origin(a))?, self.dirs.get(other.origin(b))?);
        self.files.same((roots.0.as_fd(), roots.1.as_fd()), path)
    }
}

fn open(root: BorrowedFd<'_>, path: &[u8]) -> Result<File, ToolkitError> {
    // NONBLOCK: nothing but a file may be there, and nothing else may hold us.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = beneath::open_file(root, path, flags);
    Ok(opened.map_err(|source| ToolkitError::Open { path: path.into(), source })?.into())
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
