//! What a step read of a tree: enough of every file to name those that differ later.
//!
//! ```text
//! entry = bytes shared with the path before, bytes of its own (both LEB128), those bytes,
//!         kind, mode, fingerprint of what is inside, fingerprint of owner and attributes
//! ```
//! Sorted by path. 50,000 files are about a megabyte, half of it after compression, and no path is
//! written twice as long as files of a directory stand together.

use std::cmp::Ordering;

use kiln_layer::{Entry, EntryKind, is_private_xattr};
use serde::{Deserialize, Serialize};

use crate::select::Selection;

const MAGIC: &[u8; 8] = b"kilnlst1";

/// Bytes behind each path: kind, mode, content, attributes.
const FIXED: usize = 1 + 2 + 8 + 4;

/// A list of files in the form that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing(Vec<u8>);

/// What is known of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    kind: u8,
    mode: u16,
    content: [u8; 8],
    attributes: [u8; 4],
}

/// How two lists of files differ.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileChanges {
    /// How many files differ.
    pub count: usize,
    /// How many there are now, directories that do not differ apart.
    pub of: usize,
    /// The first of them by name.
    pub first: Vec<FileChange>,
}

/// A file that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Its path below the root of the tree it is read from; bytes that are no text are replaced.
    pub path: String,
    /// What about it.
    pub what: Difference,
}

/// What about a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Difference {
    /// It was not there.
    Added,
    /// It is not there any more.
    Removed,
    /// It was a directory and is a file, say.
    Type,
    /// What is inside, or where a link points.
    Content,
    /// Its permission bits, and nothing else.
    Mode,
    /// Its owner or its extended attributes, and not what is inside.
    Attributes,
}

/// So many differing files are kept by name.
const FIRST: usize = 3;

impl Listing {
    /// Lists what was selected. Owners count unless `ignore_owner` is set, as in the digest of the same.
    pub(crate) fn of<'a>(selections: impl IntoIterator<Item = (&'a Selection, bool)>) -> Self {
        let mut files: Vec<(&[u8], Known)> = Vec::new();
        for (selection, ignore_owner) in selections {
            for found in &selection.matches {
                for entry in &found.entries {
                    // Of a copied directory only that it is one counts.
                    let is_top = !selection.whole && entry.path == found.path && entry.kind == EntryKind::Dir;
                    files.push((&entry.path, known(entry, ignore_owner, is_top)));
                }
            }
        }
        // Scans are sorted, so that this costs hardly more than a look.
        files.sort_by_key(|(path, _)| *path);
        files.dedup();
        let mut bytes = Vec::with_capacity(16 + files.len() * 32);
        bytes.extend_from_slice(MAGIC);
        let mut before: &[u8] = b"";
        for (path, known) in files {
            let shared = path.iter().zip(before).take_while(|(one, other)| one == other).count();
            number(&mut bytes, shared);
            number(&mut bytes, path.len() - shared);
            bytes.extend_from_slice(&path[shared..]);
            bytes.push(known.kind);
            bytes.extend_from_slice(&known.mode.to_le_bytes());
            bytes.extend_from_slice(&known.content);
            bytes.extend_from_slice(&known.attributes);
            before = path;
        }
        Self(bytes)
    }

    /// What [`Listing::bytes`] gave; `None`: it is of another version.
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        bytes.starts_with(MAGIC).then_some(Self(bytes))
    }

    /// The form that is kept; the same for the same files.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A name for these bytes: what a list is kept under.
    pub(crate) fn name_of(bytes: &[u8]) -> String {
        blake3::hash(bytes).to_hex()[..32].to_owned()
    }

    /// How `self` differs from `earlier`.
    pub(crate) fn changes(&self, earlier: &Self) -> FileChanges {
        let (mut now, mut before) = (Cursor::new(self), Cursor::new(earlier));
        let mut changes = FileChanges::default();
        loop {
            let order = match (now.known, before.known) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(_), Some(_)) => now.path.cmp(&before.path),
            };
            let new = now.known.filter(|_| order.is_le());
            let old = before.known.filter(|_| order.is_ge());
            if new != old {
                let what = match (new, old) {
                    (_, None) => Difference::Added,
                    (None, _) => Difference::Removed,
                    (Some(new), Some(old)) if new.kind != old.kind => Difference::Type,
                    (Some(new), Some(old)) if new.content != old.content => Difference::Content,
                    (Some(new), Some(old)) if new.mode != old.mode => Difference::Mode,
                    _ => Difference::Attributes,
                };
                changes.count += 1;
                if changes.first.len() < FIRST {
                    let path = if new.is_some() { &now.path } else { &before.path };
                    let path = String::from_utf8_lossy(path).into_owned();
                    changes.first.push(FileChange { path, what });
                }
            }
            // A directory counts only where it differs.
            changes.of += usize::from(new.is_some_and(|new| new.kind != b'd' || Some(new) != old));
            if order.is_le() {
                now.advance();
            }
            if order.is_ge() {
                before.advance();
            }
        }
        changes
    }
}

/// Goes through a list. Ends early where bytes are damaged.
struct Cursor<'a> {
    rest: &'a [u8],
    /// Of the file that it stands at.
    path: Vec<u8>,
    /// `None` at the end.
    known: Option<Known>,
}

impl<'a> Cursor<'a> {
    /// At the first file.
    fn new(list: &'a Listing) -> Self {
        let rest = list.0.strip_prefix(MAGIC).unwrap_or_default();
        let mut cursor = Self { rest, path: Vec::new(), known: None };
        cursor.advance();
        cursor
    }

    fn advance(&mut self) {
        self.known = self.read();
    }

    fn read(&mut self) -> Option<Known> {
        let (shared, own) = (take_number(&mut self.rest)?, take_number(&mut self.rest)?);
        if shared > self.path.len() {
            return None;
        }
        self.path.truncate(shared);
        self.path.extend_from_slice(self.rest.split_off(..own)?);
        let fixed = self.rest.split_off(..FIXED)?;
        Some(Known {
            kind: fixed[0],
            mode: u16::from_le_bytes([fixed[1], fixed[2]]),
            content: fixed[3..11].try_into().ok()?,
            attributes: fixed[11..].try_into().ok()?,
        })
    }
}

fn known(entry: &Entry, ignore_owner: bool, is_top: bool) -> Known {
    let mut device = [0; 8];
    let (kind, content) = match &entry.kind {
        EntryKind::File { content, .. } => (b'f', first(content.as_ref().map_or(&[0; 8][..], |hash| hash))),
        EntryKind::Dir => (b'd', [0; 8]),
        EntryKind::Symlink { target } => (b'l', first(blake3::hash(target).as_bytes())),
        EntryKind::Char { major, minor } | EntryKind::Block { major, minor } => {
            device[..4].copy_from_slice(&major.to_le_bytes());
            device[4..].copy_from_slice(&minor.to_le_bytes());
            (if matches!(entry.kind, EntryKind::Char { .. }) { b'c' } else { b'b' }, device)
        }
        EntryKind::Fifo => (b'p', [0; 8]),
        EntryKind::Socket => (b's', [0; 8]),
    };
    if is_top {
        return Known { kind, mode: 0, content, attributes: [0; 4] };
    }
    let owner = if ignore_owner { (0, 0) } else { (entry.uid, entry.gid) };
    let counted = |name: &[u8]| !name.starts_with(b"trusted.") && !is_private_xattr(name);
    let xattrs = || entry.xattrs.iter().filter(|(name, _)| counted(name));
    let mut attributes = [0; 4];
    if owner != (0, 0) || xattrs().next().is_some() {
        let mut hash = blake3::Hasher::new();
        hash.update(&owner.0.to_le_bytes()).update(&owner.1.to_le_bytes());
        for (name, value) in xattrs() {
            for field in [name, value] {
                hash.update(&(field.len() as u64).to_le_bytes()).update(field);
            }
        }
        attributes.copy_from_slice(&hash.finalize().as_bytes()[..4]);
    }
    Known { kind, mode: u16::try_from(entry.mode & 0o7777).unwrap_or(0), content, attributes }
}

fn first(hash: &[u8]) -> [u8; 8] {
    hash.first_chunk().copied().unwrap_or_default()
}

fn number(bytes: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(rest: &mut &[u8]) -> Option<usize> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let byte = *rest.split_off_first()?;
        number |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_layer::Timestamp;

    use super::*;
    use crate::select::Match;

    fn entry(path: &str, kind: EntryKind, mode: u32) -> Entry {
        let time = Timestamp::default();
        Entry {
            path: path.into(),
            kind,
            mode,
            uid: 7,
            gid: 7,
            mtime: time,
            ctime: time,
            xattrs: BTreeMap::new(),
        }
    }

    fn file(path: &str, content: u8, mode: u32) -> Entry {
        let kind = EntryKind::File { size: 1, content: Some([content; 32]), inode: (0, 0), nlink: 1 };
        entry(path, kind, mode)
    }

    fn listing(entries: Vec<Entry>) -> Listing {
        let found =
            Match { named: Vec::new(), path: Vec::new(), entries, passed: std::collections::HashSet::new() };
        let selection = Selection { matches: vec![found], ..Selection::default() };
        Listing::of([(&selection, true)])
    }

    #[test]
    fn each_kind_of_difference_is_told_apart() {
        let link = |target: &str| entry("link", EntryKind::Symlink { target: target.into() }, 0o777);
        let before = listing(vec![
            entry("", EntryKind::Dir, 0o755),
            file("content", 1, 0o644),
            file("gone", 1, 0o644),
            link("a"),
            file("mode", 1, 0o644),
            file("same", 1, 0o644),
            file("type", 1, 0o644),
        ]);
        let mut attributes = file("xattr", 1, 0o644);
        let with = |mut entries: Vec<Entry>| {
            entries.push(entry("", EntryKind::Dir, 0o700));
            entries.push(file("same", 1, 0o644));
            listing(entries)
        };
        let now = with(vec![
            file("added", 1, 0o644),
            file("content", 2, 0o755),
            link("b"),
            file("mode", 1, 0o600),
            entry("type", EntryKind::Dir, 0o644),
        ]);
        let changes = now.changes(&before);
        assert_eq!((changes.count, changes.of), (6, 6));
        let told = |changes: &FileChanges| -> Vec<(String, Difference)> {
            changes.first.iter().map(|change| (change.path.clone(), change.what)).collect()
        };
        let expected =
            [("added", Difference::Added), ("content", Difference::Content), ("gone", Difference::Removed)];
        assert_eq!(told(&changes), expected.map(|(path, what)| (path.to_owned(), what)));
        let one = |now: Listing, before: Listing| told(&now.changes(&before)).pop();
        assert_eq!(
            one(listing(vec![link("b")]), listing(vec![link("a")])),
            Some(("link".into(), Difference::Content))
        );
        assert_eq!(
            one(listing(vec![file("x", 1, 0o755)]), listing(vec![file("x", 1, 0o644)])),
            Some(("x".into(), Difference::Mode))
        );
        let plain = listing(vec![attributes.clone()]);
        attributes.xattrs.insert(b"security.capability".to_vec(), b"1".to_vec());
        assert_eq!(one(listing(vec![attributes]), plain), Some(("xattr".into(), Difference::Attributes)));
        assert_eq!(now.changes(&now).count, 0);
    }

    #[test]
    fn damaged_lists_end_early_and_foreign_ones_are_none() {
        let whole = listing((0..300).map(|nth| file(&format!("dir/{nth:04}"), 1, 0o644)).collect());
        assert_eq!(Listing::from_bytes(whole.bytes().to_vec()), Some(whole.clone()));
        for end in 0..whole.bytes().len() {
            let cut = Listing(whole.bytes()[..end].to_vec());
            let mut cursor = Cursor::new(&cut);
            let mut count = 0;
            while cursor.known.is_some() {
                cursor.advance();
                count += 1;
            }
            assert!(count < 300, "{end} bytes");
        }
        assert_eq!(Listing::from_bytes(b"something else".to_vec()), None);
    }
}
