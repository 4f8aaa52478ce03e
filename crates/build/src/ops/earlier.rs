//! What a copy made the last time that it made everything: a copy with few changed files stands in front of
//! that (`docs/adr/0028`), and one with more links to what is the same (`docs/adr/0020`).
//!
//! ```text
//! state/copies/<instruction and source>: magic, how trees are marked, how many entries were made, length of
//!                                        the name, the layer's snapshot by name, a digest of 32 bytes for
//!                                        each entry that has one, BLAKE3 of all that
//! ```
//! Numbers are little-endian, of 8 bytes; the second is of one. Advice only: what cannot be read is not known,
//! and what is not known is copied.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln_layer::{Earlier, Entry, Identity, Part, Whole, changed, made, marking};
use kiln_oci::{Digest, SnapshotId};
use kiln_snapshotter::{Changes, Form, Needs};

use super::hash_states::StatesFile;
use super::kept::Below;
use crate::tree::Tree;
use crate::{Engine, builds};

const MAGIC: &[u8; 8] = b"kilncpy2";
const DIGEST: usize = 32;
/// In the place of a number of entries that nobody can tell.
const UNCOUNTED: u64 = u64::MAX;
/// Fewer files are copied before a list of them is read.
const FEWEST: usize = 64;
/// Copies that are remembered; 50,000 files are 1.6 MB.
const KEPT: usize = 32;
/// A delta has no more entries than this part of the copy: with more, links are as cheap, and the next
/// copies have less to make again.
const LARGEST_PART: usize = 16;
/// Nor more than so many.
const MOST: usize = 4096;
/// So many of a stack's layers may be deltas. Each takes a place more of the kernel's 500.
const DELTAS: usize = 16;

/// Where the last copy of an instruction from one context, or from a stage, is on record.
pub(super) struct LastCopy(PathBuf);

impl LastCopy {
    /// For so many files of `from`; `None`: they are too few, or their layer is no directory of changes.
    pub(super) fn of(engine: &Engine, op: &Digest, from: &Tree, files: usize) -> Option<Self> {
        let source = match from {
            Tree::Context(context) => context.name(),
            Tree::Snapshot(_) => "a stage",
            Tree::Empty | Tree::Far(_) => return None,
        };
        let name = Digest::of(format!("{op} {source}").as_bytes()).hex();
        (files >= FEWEST).then(|| Self(engine.store.root().join("state/copies").join(&name[..32])))
    }

    /// Where the states of its layer's hash are.
    pub(super) fn states_file(&self) -> StatesFile {
        let state = self.0.parent().and_then(Path::parent).expect("it is in a directory below state");
        StatesFile(state.join("hash-states").join(self.0.file_name().expect("it has a name")))
    }

    /// What it made; `None`: there was none, or its layer is gone, or nobody vouches for that any more.
    pub(super) fn open(&self, engine: &Engine) -> Option<FullCopy> {
        let Record { id, entries, known } = decode(&fs::read(&self.0).ok()?)?;
        // Held first: garbage collection does not take it any more, or has taken it.
        engine.store.hold_snapshot(&id).ok()?;
        // The record of a layer goes when it is found damaged, or may not have reached the disk.
        engine.store.layer(&id).ok()??;
        // What is itself a delta has other files than these.
        let Needs { parent, full: None } = engine.snapshots.needs(&id).ok()? else { return None };
        match engine.snapshots.open_changes(&id).ok()? {
            Changes { dir, form: Form::OverlayUpper } => Some(FullCopy { id, parent, dir, entries, known }),
            Changes { form: Form::Tree { .. }, .. } => None,
        }
    }

    /// Puts it on record that `id` has all of these entries, and directories on the way to them.
    pub(super) fn save(&self, id: &SnapshotId, parts: &[(Part<'_>, Vec<Identity>)]) {
        let entries = made(parts).unwrap_or(UNCOUNTED);
        let known = parts.iter().flat_map(|(_, all)| all.iter().filter_map(Identity::known)).collect();
        // A disk without room is no reason to fail.
        let _ = self.write(&encode(&Record { id: id.clone(), entries, known }));
    }

    /// Notes that it was used again.
    pub(super) fn touch(&self) {
        // It may be forgotten earlier.
        let _ = fs::File::open(&self.0).and_then(|file| file.set_modified(SystemTime::now()));
    }

    fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        // Of two builds that end at once one forgets. Half a file is not believed.
        builds::replace(&self.0, bytes)?;
        let dir = self.0.parent().expect("it is below state");
        forget_oldest(dir)
    }
}

/// A copy that made everything itself.
pub(super) struct FullCopy {
    pub(super) id: SnapshotId,
    /// What it stands on.
    parent: Option<SnapshotId>,
    /// The directory of its layer.
    dir: OwnedFd,
    entries: u64,
    known: Vec<[u8; DIGEST]>,
}

impl FullCopy {
    pub(super) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// The entries of each part that are to be copied in front of it; `None`: a copy on `base`, where `below` is
    /// found, is not what would be seen then, or making all of it is better.
    pub(super) fn delta(
        &self,
        engine: &Engine,
        base: Option<&SnapshotId>,
        below: Option<Below>,
        parts: &[(Part<'_>, Vec<Identity>)],
    ) -> Option<Vec<Vec<Entry>>> {
        // Which directories were there, and what they were like.
        let parent = self.parent.as_ref();
        if parent != base && Below::of(engine, parent, parts)? != below? {
            return None;
        }
        let all: usize = parts.iter().map(|(_, identities)| identities.len()).sum();
        let earlier = Whole { dir: self.dir.as_fd(), known: &self.known, entries: self.entries };
        let kept = changed(&earlier, parts, (all / LARGEST_PART).min(MOST))?;
        has_room_for_delta(engine, base)?.then_some(kept)
    }

    /// Its files, to be linked to.
    pub(super) fn into_earlier(self) -> Earlier {
        Earlier::new(self.dir, self.known)
    }
}

/// Whether one more delta may stand on `base`; `None`: nobody can tell.
pub(super) fn has_room_for_delta(engine: &Engine, base: Option<&SnapshotId>) -> Option<bool> {
    let chain = base.map_or(Ok(Vec::new()), |base| engine.snapshots.chain(base)).ok()?;
    let mut deltas = 0;
    for id in &chain {
        deltas += usize::from(engine.snapshots.needs(id).ok()?.full.is_some());
    }
    Some(deltas < DELTAS)
}

/// Leaves so many records in `dir` as are remembered.
pub(super) fn forget_oldest(dir: &Path) -> std::io::Result<()> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        all.push((entry.metadata()?.modified()?, entry.path()));
    }
    all.sort();
    all[..all.len().saturating_sub(KEPT)].iter().try_for_each(|(_, path)| fs::remove_file(path))
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    id: SnapshotId,
    entries: u64,
    known: Vec<[u8; DIGEST]>,
}

fn encode(record: &Record) -> Vec<u8> {
    let Record { id, entries, known } = record;
    let name = id.as_str().as_bytes();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 17 + name.len() + (known.len() + 1) * DIGEST);
    bytes.extend_from_slice(MAGIC);
    bytes.push(marking());
    bytes.extend_from_slice(&entries.to_le_bytes());
    bytes.extend_from_slice(&(name.len() as u64).to_le_bytes());
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(known.as_flattened());
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// `None` for anything but a whole file of this version, of trees that are marked as here.
fn decode(bytes: &[u8]) -> Option<Record> {
    let (body, checksum) = bytes.split_last_chunk::<DIGEST>()?;
    if blake3::hash(body) != *checksum {
        return None;
    }
    let rest = body.strip_prefix(MAGIC)?.strip_prefix(&[marking()])?;
    let (entries, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (name, known) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let (known, []) = known.as_chunks::<DIGEST>() else { return None };
    let id = std::str::from_utf8(name).ok()?.parse().ok()?;
    Some(Record { id, entries: u64::from_le_bytes(*entries), known: known.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_does_not() {
        let id: SnapshotId = "snapshot-1".parse().unwrap();
        for known in [vec![], vec![[1; DIGEST], [2; DIGEST]]] {
            let record = Record { id: id.clone(), entries: 7, known };
            let whole = encode(&record);
            assert_eq!(decode(&whole), Some(record));
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                assert_eq!(decode(&damaged), None, "byte {at}");
                assert_eq!(decode(&whole[..at]), None, "cut at {at}");
            }
        }
    }

    #[test]
    fn a_record_of_another_version_or_of_trees_that_are_marked_otherwise_says_nothing() {
        let record = Record { id: "s".parse().unwrap(), entries: 0, known: Vec::new() };
        for (at, other) in [(MAGIC.len() - 1, b'1'), (MAGIC.len(), 4)] {
            let mut bytes = encode(&record);
            bytes[at] = other;
            let body = bytes.len() - DIGEST;
            let checksum = *blake3::hash(&bytes[..body]).as_bytes();
            bytes[body..].copy_from_slice(&checksum);
            assert_eq!(decode(&bytes), None);
        }
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let place = |nth: usize| dir.path().join("copies").join(format!("{nth:03}"));
        let id: SnapshotId = "s".parse().unwrap();
        for nth in 0..KEPT + 3 {
            LastCopy(place(nth)).save(&id, &[]);
            let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(nth as u64);
            fs::File::open(place(nth)).unwrap().set_modified(long_ago).unwrap();
        }
        LastCopy(place(0)).save(&id, &[]);
        let kept: Vec<usize> = (0..KEPT + 3).filter(|&nth| place(nth).exists()).collect();
        assert_eq!((kept.len(), kept[0], kept[1]), (KEPT, 0, 4));
    }
}
