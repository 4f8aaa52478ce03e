//! How far the hash of a large copy's layer had come on the way: the next copy's tar may begin with the same
//! files (`docs/adr/0029-hashes-go-on.md`).
//!
//! ```text
//! state/hash-states/<as in state/copies>: magic, length of the name, the layer's snapshot by name,
//!                                         the states, BLAKE3 of all that
//! ```
//! Advice only: what cannot be read is not known, and what is not known is hashed.

use std::fs;
use std::path::PathBuf;

use kiln_content::Store;
use kiln_layer::HashStates;
use kiln_oci::SnapshotId;

use super::earlier::forget_oldest;
use crate::builds;

const MAGIC: &[u8; 8] = b"kilnhsh1";
const DIGEST: usize = 32;

/// Where the states of an instruction's last copy are on record.
pub(crate) struct StatesFile(pub(super) PathBuf);

impl StatesFile {
    /// Those of `id`, which the files of the next copy are linked to; `None`: they are another layer's, or
    /// there are none.
    pub(super) fn read(&self, store: &Store, id: &SnapshotId) -> Option<HashStates> {
        let (of, states) = decode(&fs::read(&self.0).ok()?)?;
        // The record of a layer goes when it is found damaged, or may not have reached the disk.
        let record = store.layer(id).ok()??;
        (of == *id && states.diff_id() == record.diff_id).then_some(states)
    }

    /// Puts the states of `id` on record.
    pub(crate) fn save(&self, id: &SnapshotId, states: &HashStates) {
        // A disk without room is no reason to fail. Half a file is not believed.
        let _ = builds::replace(&self.0, &encode(id, states))
            .and_then(|()| forget_oldest(self.0.parent().expect("it is below state")));
    }
}

fn encode(id: &SnapshotId, states: &HashStates) -> Vec<u8> {
    let name = id.as_str().as_bytes();
    let length = (name.len() as u64).to_le_bytes();
    let mut bytes = [&MAGIC[..], &length, name, &states.to_bytes()].concat();
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}

/// `None` for anything but a whole file of this version.
fn decode(bytes: &[u8]) -> Option<(SnapshotId, HashStates)> {
    let (body, checksum) = bytes.split_last_chunk::<DIGEST>()?;
    if blake3::hash(body) != *checksum {
        return None;
    }
    let (length, rest) = body.strip_prefix(MAGIC)?.split_first_chunk()?;
    let (name, states) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    Some((std::str::from_utf8(name).ok()?.parse().ok()?, HashStates::from_bytes(states)?))
}

#[cfg(test)]
mod tests;
