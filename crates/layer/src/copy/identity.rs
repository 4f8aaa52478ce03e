//! What copied entries will be, told before they are copied.

use std::collections::{HashMap, HashSet};

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
/// Bytes that are hashed at once.
const PIECE: usize = 64 << 10;

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
        fields.clear();
        self.describe(entry, Some(entry.mtime), fields);
        Identity::Known(blake3::hash(fields).into())
    }

    /// Digest of all that the entries become and where, times apart: on the same files below, copies of equal parts
    /// make the same. `None`: nobody knows the content of one of them.
    pub fn digest(&self) -> Option<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        let mut fields = Vec::new();
        let mut links: HashMap<(u64, u64), usize> = HashMap::new();
        for (nth, entry) in self.entries.iter().enumerate() {
            if fields.len() > PIECE {
                hasher.update(&fields);
                fields.clear();
            }
            let mut field = framed(&mut fields);
            match &entry.kind {
                EntryKind::Socket => continue,
                EntryKind::File { content: None, .. } => return None,
                EntryKind::Dir if self.below(entry).is_empty() => {
                    field(b"top");
                    field(&self.destination_of(entry));
                    continue;
                }
                EntryKind::File { inode, nlink: 2.., .. } => {
                    if let Some(first) = links.get(inode) {
                        field(b"one more name");
                        field(&(*first as u64).to_le_bytes());
                        field(&self.destination_of(entry));
                        continue;
                    }
                    links.insert(*inode, nth);
                }
                _ => {}
            }
            field(b"entry");
            let shown = entry.xattrs.keys().filter(|name| !is_private_xattr(name)).count();
            field(&(shown as u64).to_le_bytes());
            drop(field);
            self.describe(entry, None, &mut fields);
        }
        hasher.update(&fields);
        Some(hasher.finalize().into())
    }

    /// All that an entry becomes.
    fn describe(&self, entry: &Entry, mtime: Option<Timestamp>, fields: &mut Vec<u8>) {
        let mut field = framed(fields);
        let ((uid, gid), mode) = given(entry, self.owner, self.mode);
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
        if let Some(mtime) = mtime {
            field(&mtime.secs.to_le_bytes());
            field(&mtime.nanos.to_le_bytes());
        }
        for (name, value) in entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name)) {
            field(name);
            field(value);
        }
    }
}

/// Adds fields, each with its length in front.
fn framed(fields: &mut Vec<u8>) -> impl FnMut(&[u8]) {
    move |bytes| {
        fields.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        fields.extend_from_slice(bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> Entry {
        Entry {
            path: path.into(),
            kind: EntryKind::File { size: 1, content: Some([1; 32]), inode: (1, 2), nlink: 1 },
            mode: 0o644,
            uid: 3,
            gid: 4,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            xattrs: [].into(),
        }
    }

    fn of<'a>(entries: &'a [Entry], strip: &'a str, destination: &str) -> Part<'a> {
        let destination = destination.as_bytes().to_vec();
        Part { entries, passed: None, strip: strip.as_bytes(), destination, owner: None, mode: None }
    }

    #[test]
    fn a_digest_is_of_what_is_made_whatever_it_was_made_of() {
        let plain = file("a/x");
        let digest = of(std::slice::from_ref(&plain), "a/x", "d/x").digest();
        assert!(digest.is_some());
        let mut other = file("b/y");
        other.mtime.secs = 9;
        other.ctime.secs = 9;
        other.kind = EntryKind::File { size: 1, content: Some([1; 32]), inode: (7, 7), nlink: 1 };
        assert_eq!(of(&[other.clone()], "b/y", "/d/x").digest(), digest);
        // A mode or an owner that it would have anyway.
        other.mode = 0o600;
        other.uid = 0;
        let change = |bits: u32, _: bool| bits | 0o044;
        let (entries, strip) = (&[other][..], &b"b/y"[..]);
        let given = Part {
            entries,
            passed: None,
            strip,
            destination: b"d/x".to_vec(),
            owner: Some((3, 4)),
            mode: Some(&change),
        };
        assert_eq!(given.digest(), digest);
    }

    #[test]
    fn all_that_is_made_is_in_the_digest() {
        let plain = file("x");
        let digest = |entry: &Entry, destination| of(std::slice::from_ref(entry), "x", destination).digest();
        type Change = fn(&mut Entry);
        let changes: [Change; 7] = [
            |entry| entry.mode = 0o755,
            |entry| entry.uid = 0,
            |entry| entry.gid = 0,
            |entry| drop(entry.xattrs.insert(b"user.a".to_vec(), b"1".to_vec())),
            |entry| entry.kind = EntryKind::File { size: 1, content: Some([2; 32]), inode: (1, 2), nlink: 1 },
            |entry| entry.kind = EntryKind::Symlink { target: b"x".to_vec() },
            |entry| entry.kind = EntryKind::Fifo,
        ];
        let mut seen = HashSet::from([digest(&plain, "x"), digest(&plain, "y")]);
        for change in changes {
            let mut changed = plain.clone();
            change(&mut changed);
            seen.insert(digest(&changed, "x"));
        }
        assert_eq!(seen.len(), 2 + changes.len());
        let unread =
            Entry { kind: EntryKind::File { size: 1, content: None, inode: (1, 2), nlink: 1 }, ..plain };
        assert_eq!(digest(&unread, "x"), None);
    }

    #[test]
    fn which_files_are_one_and_which_directories_are_passed_by_is_in_the_digest() {
        let linked = |path: &str, inode: u64| Entry {
            kind: EntryKind::File { size: 1, content: Some([1; 32]), inode: (1, inode), nlink: 2 },
            ..file(path)
        };
        let digest = |entries: &[Entry]| of(entries, "", "").digest();
        let joined = digest(&[linked("a", 5), linked("b", 5)]);
        assert_eq!(joined, digest(&[linked("a", 8), linked("b", 8)]));
        assert_ne!(joined, digest(&[linked("a", 5), linked("b", 6)]));
        assert_eq!(digest(&[linked("a", 5), linked("b", 6)]), digest(&[file("a"), file("b")]));
        let dir = [Entry { kind: EntryKind::Dir, ..file("a") }];
        let passed = HashSet::from([b"a".to_vec()]);
        let part = of(&dir, "", "");
        assert_ne!(part.digest(), Part { passed: Some(&passed), ..of(&dir, "", "") }.digest());
        // Of the directory whose contents are copied that is all.
        assert_eq!(of(&dir, "a", "d").digest(), {
            let other = [Entry { mode: 0o700, ..dir[0].clone() }];
            of(&other, "a", "d").digest()
        });
    }
}
