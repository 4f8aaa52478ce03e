//! States of a layer's hash on the way: a tar that begins like an earlier one is hashed from there
//! (`docs/adr/0029-hashes-go-on.md`).

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;

use kiln_oci::{DiffId, Digest, Sha256State, Sha256Writer};

use super::{DiffError, END, Output};
use crate::tar_write::{BLOCK, Header, VERSION};

/// Bytes of a tar from one state to the next, or more where a file does not end sooner. What has changed is
/// hashed from the last state in front of it.
pub(super) const INTERVAL_BYTES: u64 = 4 << 20;
/// Of a longer tar every second state is forgotten, until it has no more.
const MOST: usize = 256;
/// Bytes of members that are hashed together.
const PIECE: usize = 16 << 10;
/// A state as bytes.
const LENGTH: usize = 8 + 8 + 32 + Sha256State::LENGTH;

/// The hash of a layer's tar on the way: its states at the ends of some members, and in front of the end.
///
/// A state counts for another tar that begins with the same members. Which members those are is told by a
/// [`Chain`] over all that goes into them. They are advice, and come back as bytes: what can be told of a
/// set that is not what was kept, [`HashStates::from_bytes`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashStates {
    diff_id: DiffId,
    /// Not empty. The last one is that behind all members.
    states: Vec<HashState>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HashState {
    /// Members so far.
    pub(super) entries: u64,
    /// Their bytes.
    pub(super) size_bytes: u64,
    /// What they are.
    pub(super) chain: [u8; 32],
    pub(super) sha256: Sha256State,
}

impl HashStates {
    /// `None`: there are none.
    pub(super) fn new(diff_id: DiffId, mut states: Vec<HashState>) -> Option<Self> {
        while states.len() > MOST {
            // The last one stays.
            let mut behind = states.len();
            states.retain(|_| {
                behind -= 1;
                behind.is_multiple_of(2)
            });
        }
        (!states.is_empty()).then_some(Self { diff_id, states })
    }

    /// The diff ID of the tar.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    pub(super) fn get(&self, nth: usize) -> Option<&HashState> {
        self.states.get(nth)
    }

    /// The first `count`.
    pub(super) fn into_first(mut self, count: usize) -> Vec<HashState> {
        self.states.truncate(count);
        self.states
    }

    /// For [`HashStates::from_bytes`] of this or a later process.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(36 + self.states.len() * LENGTH);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(self.diff_id.0.as_bytes());
        for HashState { entries, size_bytes, chain, sha256 } in &self.states {
            bytes.extend_from_slice(&entries.to_le_bytes());
            bytes.extend_from_slice(&size_bytes.to_le_bytes());
            bytes.extend_from_slice(chain);
            bytes.extend_from_slice(sha256.as_bytes());
        }
        bytes
    }

    /// `None` for what is no set of states, was kept by a kiln that writes other tars, or does not lead to
    /// the diff ID that it names.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (diff_id, rest) = rest.split_first_chunk()?;
        let (states, []) = rest.as_chunks::<LENGTH>() else { return None };
        let states = states.iter().map(HashState::from_bytes).collect::<Option<Vec<_>>>()?;
        let known = Self { diff_id: DiffId(Digest::from_bytes(*diff_id)), states };
        (u32::from_le_bytes(*version) == VERSION && known.is_sound()).then_some(known)
    }

    fn is_sound(&self) -> bool {
        let is_behind = |one: &HashState, next: &HashState| {
            one.entries < next.entries && one.size_bytes < next.size_bytes
        };
        let has_room = |state: &HashState| {
            let blocks = state.size_bytes / BLOCK as u64;
            state.size_bytes.is_multiple_of(BLOCK as u64) && (1..=blocks).contains(&state.entries)
        };
        let Some(last) = self.states.last() else { return false };
        // The hash counts its bytes; a crate that keeps its states otherwise ends somewhere else.
        let mut end = Sha256Writer::resume(io::sink(), &last.sha256, last.size_bytes);
        self.states.is_sorted_by(is_behind)
            && self.states.iter().all(has_room)
            && end.write_all(&END).is_ok()
            && end.finish().1 == self.diff_id.0
    }
}

impl HashState {
    fn from_bytes(bytes: &[u8; LENGTH]) -> Option<Self> {
        let (entries, rest) = bytes.split_first_chunk()?;
        let (size_bytes, rest) = rest.split_first_chunk()?;
        let (chain, sha256) = rest.split_first_chunk()?;
        Some(Self {
            entries: u64::from_le_bytes(*entries),
            size_bytes: u64::from_le_bytes(*size_bytes),
            chain: *chain,
            sha256: Sha256State::from_bytes(sha256)?,
        })
    }
}

/// A digest of what members are: all that their headers are made of, and the digests of their content.
///
/// A tar is a function of that. So of two tars that have the same chain after so many members the bytes up
/// to there are the same.
#[derive(Clone)]
pub(super) struct Chain {
    hash: blake3::Hasher,
    /// The last members, which are not hashed yet: together that is several times faster.
    waiting: Vec<u8>,
    /// Whether all content was known so far.
    is_known: bool,
}

impl Chain {
    pub(super) fn new() -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&VERSION.to_le_bytes());
        Self { hash, waiting: Vec::new(), is_known: true }
    }

    pub(super) fn add(&mut self, header: &Header<'_>, content: Option<&[u8; 32]>) {
        // Each field by name: one that is new has its place here.
        let Header { path, flag, link, mode, uid, gid, size, mtime, device, xattrs } = header;
        let waiting = &mut self.waiting;
        let field = |waiting: &mut Vec<u8>, bytes: &[u8]| {
            waiting.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            waiting.extend_from_slice(bytes);
        };
        field(waiting, path);
        field(waiting, link);
        waiting.push(*flag);
        for number in [*mode, *uid, *gid, mtime.nanos, device.0, device.1] {
            waiting.extend_from_slice(&number.to_le_bytes());
        }
        waiting.extend_from_slice(&mtime.secs.to_le_bytes());
        waiting.extend_from_slice(&size.to_le_bytes());
        waiting.extend_from_slice(&(xattrs.len() as u64).to_le_bytes());
        for (name, value) in *xattrs {
            field(waiting, name);
            field(waiting, value);
        }
        if *size > 0 {
            self.is_known &= content.is_some();
            waiting.extend_from_slice(content.unwrap_or(&[0; 32]));
        }
        if waiting.len() >= PIECE {
            self.hash.update(waiting);
            waiting.clear();
        }
    }

    /// `None`: the content of some file is not known.
    pub(super) fn digest(&self) -> Option<[u8; 32]> {
        self.is_known.then(|| self.hash.clone().update(&self.waiting).finalize().into())
    }
}

/// Nothing but what members are.
impl Output for Chain {
    fn header(&mut self, header: &Header<'_>, content: Option<&[u8; 32]>) -> io::Result<()> {
        self.add(header, content);
        Ok(())
    }

    fn content(&mut self, _: &[u8], _: File, _: u64, _: &AtomicBool) -> Result<(), DiffError> {
        Ok(())
    }
}

impl Write for Chain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
