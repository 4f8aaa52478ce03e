//! Whether two entries, and the files behind them, are the same.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

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

/// What two entries differ in as far as that can be told without reading files; `None` in the second
/// place: the content of two files of one size is still to be compared.
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

/// Compares nodes of two stacks, files and all; reads only what can be told in no other way.
pub(crate) struct Comparer<'a> {
    dirs: Dirs<'a>,
    cancel: &'a BuildCancel,
    buffers: [Vec<u8>; 2],
}

impl<'a> Comparer<'a> {
    pub(crate) fn new(dirs: Dirs<'a>, cancel: &'a BuildCancel) -> Self {
        Self { dirs, cancel, buffers: [vec![0; 256 << 10], vec![0; 256 << 10]] }
    }

    /// What the nodes at `path` differ in. Times do not count.
    pub(crate) fn compare(
        &mut self,
        path: &[u8],
        (one, a): (&Stack, &Node),
        (other, b): (&Stack, &Node),
    ) -> Result<Vec<Aspect>, ToolkitError> {
        if self.cancel.flag().load(std::sync::atomic::Ordering::Relaxed) {
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

    /// Whether two files of one size have the same bytes; stops at the first that differs.
    pub(crate) fn same_content(
        &mut self,
        path: &[u8],
        one: &Stack,
        a: &Node,
        other: &Stack,
        b: &Node,
    ) -> Result<bool, ToolkitError> {
        let mut files = [self.open(one, a, path)?, self.open(other, b, path)?];
        let failed = |source| ToolkitError::Open {
            path: path.into(),
            source: beneath::BeneathError::Host { call: "read", path: path.into(), source },
        };
        let [first, second] = &mut self.buffers;
        loop {
            if self.cancel.flag().load(std::sync::atomic::Ordering::Relaxed) {
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

    fn open(&mut self, stack: &Stack, node: &Node, path: &[u8]) -> Result<File, ToolkitError> {
        let dir = self.dirs.get(stack.origin(node))?;
        // NONBLOCK: nothing but a file may be there, and nothing else may hold us.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = beneath::open_file(dir.as_fd(), path, flags);
        Ok(opened.map_err(|source| ToolkitError::Open { path: path.into(), source })?.into())
    }
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
