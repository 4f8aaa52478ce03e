//! What a copy made the last time: a copy with few changed files links to the others (`docs/adr/0020`).
//!
//! ```text
//! state/copies/<instruction and source>: magic, length of the name, the layer's snapshot by name,
//!                                        a digest of 32 bytes for each file, BLAKE3 of all that
//! ```
//! Advice only: what cannot be read is not known, and what is not known is copied.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_layer::Earlier;
use kiln_oci::{Digest, SnapshotId};
use kiln_snapshotter::{Changes, Form};

use super::hash_states::StatesFile;
use crate::tree::Tree;
use crate::{Engine, builds};

const MAGIC: &[u8; 8] = b"kilncpy1";
const DIGEST: usize = 32;
/// Fewer files are copied before a list of them is read.
const FEWEST: usize = 64;
/// Copies that are remembered; 50,000 files are 1.6 MB.
const KEPT: usize = 32;

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

    /// Its layer and the files in that; `None`: there was none, or its layer is gone.
    pub(super) fn open(&self, engine: &Engine) -> Option<(SnapshotId, Earlier)> {
        let (id, known) = decode(&fs::read(&self.0).ok()?)?;
        // Held first: garbage collection does not take it any more, or has taken it.
        engine.store.hold_snapshot(&id).ok()?;
        match engine.snapshots.open_changes(&id).ok()? {
            Changes { dir, form: Form::OverlayUpper } => Some((id, Earlier::new(dir, known))),
            Changes { form: Form::Tree { .. }, .. } => None,
        }
    }

    /// Puts it on record that `id` has these files.
    pub(super) fn save(&self, id: &SnapshotId, made: &[[u8; DIGEST]]) {
        // A disk without room is no reason to fail.
        let _ = self.write(&encode(id, made));
    }

    fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        // Of two builds that end at once one forgets. Half a file is not believed.
        builds::replace(&self.0, bytes)?;
        let dir = self.0.parent().expect("it is below state");
        forget_oldest(dir)
    }
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

fn encode(id: &SnapshotId, made: &[[u8; DIGEST]]) -> Vec<u8> {
    let name = id.as_str().as_bytes();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + name.len() + (made.len() + 1) * DIGEST);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(name.len() as u64).to_le_bytes());
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(made.as_flattened());
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// `None` for anything but a whole file of this version.
fn decode(bytes: &[u8]) -> Option<(SnapshotId, Vec<[u8; DIGEST]>)> {
    let (body, checksum) = bytes.split_last_chunk::<DIGEST>()?;
    if blake3::hash(body) != *checksum {
        return None;
    }
    let (length, rest) = body.strip_prefix(MAGIC)?.split_first_chunk()?;
    let (name, made) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let (made, []) = made.as_chunks::<DIGEST>() else { return None };
    Some((std::str::from_utf8(name).ok()?.parse().ok()?, made.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_does_not() {
        let id: SnapshotId = "snapshot-1".parse().unwrap();
        for made in [vec![], vec![[1; DIGEST], [2; DIGEST]]] {
            let whole = encode(&id, &made);
            assert_eq!(decode(&whole), Some((id.clone(), made)));
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                assert_eq!(decode(&damaged), None, "byte {at}");
                assert_eq!(decode(&whole[..at]), None, "cut at {at}");
            }
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
