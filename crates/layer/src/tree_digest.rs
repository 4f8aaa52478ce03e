//! The digest of a tree: equal when a copy of the tree would be.

use std::collections::{HashMap, hash_map};

use kiln_oci::Digest;

use crate::copy::TopDir;
use crate::index::{Entry, EntryKind};
use crate::node::is_private_xattr;
use crate::path;

/// Digest of what `entries` are, with `strip` removed from their paths.
///
/// Covers path, kind, mode, owner (unless `ignore_owner`), size, content, link target, device
/// numbers, which files are hard links of one another, and extended attributes other than
/// `trusted.*`, overlay's and SELinux's. Times and inodes do not count. Sockets do not either:
/// nothing copies them. Of the directory at `strip` itself only that it is one counts, unless `top` says
/// that it becomes one like it.
pub fn tree_digest(entries: &[Entry], strip: &[u8], ignore_owner: bool, top: TopDir) -> Digest {
    let mut fields = Fields { hash: blake3::Hasher::new(), waiting: Vec::with_capacity(2 * PIECE) };
    fields.bytes(b"kiln tree 3");
    let mut links: HashMap<(u64, u64), u64> = HashMap::new();
    let copied = entries.iter().filter(|entry| entry.kind != EntryKind::Socket);
    for (position, entry) in copied.enumerate() {
        let (tag, numbers, text): (u8, [u64; 2], &[u8]) = match &entry.kind {
            EntryKind::File { size, content, .. } => {
                (b'f', [*size, u64::from(content.is_some())], content.as_ref().map_or(&b""[..], |hash| hash))
            }
            EntryKind::Dir => (b'd', [0, 0], b""),
            EntryKind::Symlink { target } => (b'l', [0, 0], target),
            EntryKind::Char { major, minor } => (b'c', [(*major).into(), (*minor).into()], b""),
            EntryKind::Block { major, minor } => (b'b', [(*major).into(), (*minor).into()], b""),
            EntryKind::Fifo => (b'p', [0, 0], b""),
            EntryKind::Socket => continue,
        };
        fields.pass_on(PIECE);
        let relative = path::strip(&entry.path, strip);
        fields.bytes(relative);
        fields.bytes(&[tag]);
        if entry.kind == EntryKind::Dir && relative.is_empty() && top == TopDir::Contents {
            continue;
        }
        if let EntryKind::File { inode, nlink: 2.., .. } = &entry.kind {
            match links.entry(*inode) {
                hash_map::Entry::Vacant(first) => drop(first.insert(position as u64)),
                hash_map::Entry::Occupied(first) => {
                    fields.bytes(b"=");
                    fields.number(*first.get());
                    continue;
                }
            }
        }
        let (uid, gid) = if ignore_owner { (0, 0) } else { (entry.uid, entry.gid) };
        for number in [entry.mode.into(), uid.into(), gid.into(), numbers[0], numbers[1]] {
            fields.number(number);
        }
        fields.bytes(text);
        let counted = |name: &[u8]| !name.starts_with(b"trusted.") && !is_private_xattr(name);
        let xattrs = || entry.xattrs.iter().filter(|(name, _)| counted(name));
        fields.number(xattrs().count() as u64);
        for (name, value) in xattrs() {
            fields.bytes(name);
            fields.bytes(value);
        }
    }
    fields.pass_on(0);
    Digest::of(fields.hash.finalize().as_bytes())
}

/// Hashed at once: BLAKE3 is several times faster on many of its chunks than on one.
const PIECE: usize = 64 << 10;

/// Length in front of every field: no two different lists of fields are the same bytes.
struct Fields {
    hash: blake3::Hasher,
    waiting: Vec<u8>,
}

impl Fields {
    fn number(&mut self, number: u64) {
        self.waiting.extend_from_slice(&number.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.waiting.extend_from_slice(bytes);
    }

    /// Hashes what waits, if it is so much.
    fn pass_on(&mut self, least: usize) {
        if self.waiting.len() >= least {
            self.hash.update(&self.waiting);
            self.waiting.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Timestamp;

    fn file(path: &str, uid: u32) -> Entry {
        Entry {
            path: path.into(),
            kind: EntryKind::File { size: 1, content: Some([1; 32]), inode: (1, 2), nlink: 1 },
            mode: 0o644,
            uid,
            gid: 0,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            xattrs: [].into(),
        }
    }

    fn digest(entries: &[Entry], strip: &str, ignore_owner: bool) -> Digest {
        tree_digest(entries, strip.as_bytes(), ignore_owner, TopDir::Contents)
    }

    #[test]
    fn times_inodes_and_private_attributes_do_not_count() {
        let plain = file("a/x", 0);
        let mut other = plain.clone();
        other.mtime.secs = 9;
        other.ctime.secs = 9;
        other.kind = EntryKind::File { size: 1, content: Some([1; 32]), inode: (7, 7), nlink: 3 };
        for name in ["trusted.any", "user.overlay.opaque", "security.selinux"] {
            other.xattrs.insert(name.into(), b"y".to_vec());
        }
        assert_eq!(digest(&[plain], "a", false), digest(&[other], "a", false));
    }

    #[test]
    fn the_stripped_prefix_does_not_count_and_the_owner_only_when_asked() {
        assert_eq!(digest(&[file("a/x", 0)], "a", false), digest(&[file("b/x", 0)], "b", false));
        assert_eq!(digest(&[file("x", 1)], "", true), digest(&[file("x", 0)], "", true));
        assert_ne!(digest(&[file("x", 1)], "", false), digest(&[file("x", 0)], "", false));
    }

    #[test]
    fn mode_content_and_attributes_count() {
        let plain = file("x", 0);
        let mut mode = plain.clone();
        mode.mode = 0o755;
        let mut content = plain.clone();
        content.kind = EntryKind::File { size: 1, content: Some([2; 32]), inode: (1, 2), nlink: 1 };
        let mut xattr = plain.clone();
        xattr.xattrs.insert(b"user.a".to_vec(), b"1".to_vec());
        let base = digest(&[plain], "", false);
        for changed in [mode, content, xattr] {
            assert_ne!(digest(&[changed], "", false), base);
        }
    }

    #[test]
    fn hard_links_count_by_which_files_they_join() {
        let linked = |path: &str, inode: u64| Entry {
            kind: EntryKind::File { size: 1, content: Some([1; 32]), inode: (1, inode), nlink: 2 },
            ..file(path, 0)
        };
        let digest = |entries: &[Entry]| digest(entries, "", false);
        let joined = digest(&[linked("a", 5), linked("b", 5)]);
        assert_eq!(joined, digest(&[linked("a", 8), linked("b", 8)]));
        assert_ne!(joined, digest(&[linked("a", 5), linked("b", 6)]));
        // The other link of each is somewhere else: they are two files, as two copies are.
        assert_eq!(digest(&[linked("a", 5), linked("b", 6)]), digest(&[file("a", 0), linked("b", 6)]));
    }

    #[test]
    fn the_directory_whose_contents_are_meant_counts_without_its_metadata() {
        let dir = |mode: u32| Entry { kind: EntryKind::Dir, mode, ..file("a", mode) };
        let below = file("a/x", 0);
        let digest = |top: Entry, strip: &str| digest(&[top, below.clone()], strip, false);
        assert_eq!(digest(dir(0o700), "a"), digest(dir(0o755), "a"));
        assert_ne!(digest(dir(0o700), ""), digest(dir(0o755), ""));
        let itself = |mode: u32| tree_digest(&[dir(mode), below.clone()], b"a", false, TopDir::Itself);
        assert_ne!(itself(0o700), itself(0o755));
    }

    #[test]
    fn each_entry_of_many_counts_wherever_it_stands() {
        let many: Vec<Entry> = (0..2000).map(|nth| file(&format!("dir/file{nth:05}"), 0)).collect();
        let whole = digest(&many, "", false);
        for nth in [0, 1, 700, 1500, 1999] {
            let mut other = many.clone();
            other[nth].mode = 0o600;
            assert_ne!(digest(&other, "", false), whole, "{nth}");
            other.remove(nth);
            assert_ne!(digest(&other, "", false), whole, "without {nth}");
        }
        assert_eq!(digest(&many.clone(), "", false), whole);
    }
}
