//! What copied entries will be, told before they are copied.

use std::collections::HashSet;

use rayon::prelude::*;

use super::{ModeChange, shown_xattrs};
use crate::index::{Entry, EntryKind, Timestamp};
use crate::node::is_private_xattr;
use crate::path;

/// One match of a copy: its entries, and what becomes of them. The fields are those of [`CopyRequest`].
pub struct Part<'a> {
    /// The selected entries, in the order of a scan.
    pub entries: &'a [Entry],
    /// Directories that were not selected themselves.
    pub passed: Option<&'a HashSet<Vec<u8>>>,
    /// Prefix removed from the entries' paths.
    pub strip: &'a [u8],
    /// Where the entry equal to `strip` lands.
    pub destination: Vec<u8>,
    /// Owner of everything that is made.
    pub owner: Option<(u32, u32)>,
    /// Permission bits out of an entry's own.
    pub mode: Option<&'a ModeChange<'a>>,
}

/// What an entry will be when it is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// Digest of all that it is: path, kind, content, mode, owner, time, attributes. What copies of one
    /// instruction on the same files below make of equal ones is the same.
    Known([u8; 32]),
    /// It is made, but that does not say all: it is one of several hard links, or nobody knows its content.
    Unknown,
    /// The directory whose contents are copied: it is the destination.
    Top,
    /// Nothing is made of it.
    Nothing,
}

impl Identity {
    /// The digest, where there is one.
    pub fn known(&self) -> Option<[u8; 32]> {
        if let Self::Known(digest) = self { Some(*digest) } else { None }
    }

    /// Whether an entry of its own is made.
    pub(super) fn is_made(self) -> bool {
        matches!(self, Self::Known(_) | Self::Unknown)
    }
}

/// Entries that one thread looks at before others help.
const ALONE: usize = 1_000;

impl Part<'_> {
    /// What each of the entries will be. Many of them are shared out among all processors.
    pub fn identities(&self) -> Vec<Identity> {
        if self.entries.len() <= ALONE {
            let mut fields = Vec::new();
            return self.entries.iter().map(|entry| self.identity(entry, &mut fields)).collect();
        }
        let entries = self.entries.par_iter().with_min_len(ALONE);
        entries.map_init(Vec::new, |fields, entry| self.identity(entry, fields)).collect()
    }

    pub(super) fn destination_of(&self, entry: &Entry) -> Vec<u8> {
        destination_of(&self.destination, self.strip, entry)
    }

    /// Path below the matched directory; empty for itself.
    pub(super) fn below<'e>(&self, entry: &'e Entry) -> &'e [u8] {
        path::strip(&entry.path, self.strip)
    }

    /// `fields` is memory that is used again.
    fn identity(&self, entry: &Entry, fields: &mut Vec<u8>) -> Identity {
        match entry.kind {
            EntryKind::Socket => return Identity::Nothing,
            EntryKind::Dir if self.below(entry).is_empty() => return Identity::Top,
            EntryKind::File { content: None, .. } | EntryKind::File { nlink: 2.., .. } => {
                return Identity::Unknown;
            }
            _ => {}
        }
        let ((uid, gid), mode) = given(entry, self.owner, self.mode);
        fields.clear();
        let mut field = |bytes: &[u8]| {
            fields.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            fields.extend_from_slice(bytes);
        };
        field(&self.destination_of(entry));
        match &entry.kind {
            EntryKind::File { size, content, .. } => {
                field(b"file");
                field(content.as_ref().map_or(&[], |content| &content[..]));
                field(&size.to_le_bytes());
            }
            EntryKind::Dir => {
                field(b"directory");
                // Of one that is only passed by, and is there already, less is changed.
                let is_passed = self.passed.is_some_and(|passed| passed.contains(&entry.path));
                field(&[u8::from(is_passed)]);
            }
            EntryKind::Symlink { target } => {
                field(b"link");
                field(target);
            }
            EntryKind::Char { major, minor } => device(&mut field, b"character device", (*major, *minor)),
            EntryKind::Block { major, minor } => device(&mut field, b"block device", (*major, *minor)),
            EntryKind::Fifo => field(b"fifo"),
            EntryKind::Socket => {}
        }
        field(&mode.to_le_bytes());
        field(&uid.to_le_bytes());
        field(&gid.to_le_bytes());
        field(&entry.mtime.secs.to_le_bytes());
        field(&entry.mtime.nanos.to_le_bytes());
        for (name, value) in entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name)) {
            field(name);
            field(value);
        }
        Identity::Known(blake3::hash(fields).into())
    }
}

fn device(field: &mut impl FnMut(&[u8]), kind: &[u8], (major, minor): (u32, u32)) {
    field(kind);
    field(&major.to_le_bytes());
    field(&minor.to_le_bytes());
}

/// Where an entry lands.
pub(super) fn destination_of(destination: &[u8], strip: &[u8], entry: &Entry) -> Vec<u8> {
    let destination = &destination[destination.iter().take_while(|&&b| b == b'/').count()..];
    let destination = destination.strip_suffix(b"/").unwrap_or(destination);
    path::join(destination, path::strip(&entry.path, strip))
}

/// A file as it is when it was made at `path`, for whoever hashes its layer.
pub(super) fn made_of(
    entry: &Entry,
    path: &[u8],
    owner: Option<(u32, u32)>,
    mode: Option<&ModeChange<'_>>,
) -> Entry {
    let ((uid, gid), mode) = given(entry, owner, mode);
    Entry {
        path: path.to_vec(),
        kind: entry.kind.clone(),
        mode: mode & 0o7777,
        uid,
        gid,
        mtime: entry.mtime,
        ctime: Timestamp::default(),
        xattrs: shown_xattrs(entry),
    }
}

/// Owner and mode that an entry gets.
pub(super) fn given(
    entry: &Entry,
    owner: Option<(u32, u32)>,
    mode: Option<&ModeChange<'_>>,
) -> ((u32, u32), u32) {
    let is_dir = entry.kind == EntryKind::Dir;
    let mode = mode.map_or(entry.mode, |change| change(entry.mode, is_dir));
    (owner.unwrap_or((entry.uid, entry.gid)), mode)
}
