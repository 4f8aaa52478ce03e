//! Cache keys: "same result across builds".

use std::fmt;

use kiln_oci::Digest;
use sha2::{Digest as _, Sha256};

/// Names a result across builds: the op and what its inputs are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CacheKey(pub Digest);

impl CacheKey {
    /// The key of an op with these inputs. `kind` keeps kinds of keys apart; lengths are fixed, so
    /// no two lists of inputs hash alike.
    pub(crate) fn derive(kind: KeyKind, op: &Digest, inputs: &[Digest]) -> Self {
        let mut hash = Sha256::new();
        let (tag, position) = match kind {
            KeyKind::Definition => (1, None),
            KeyKind::Content => (2, None),
            KeyKind::Mark(position) => (3, Some(position as u64)),
            KeyKind::Slot => (4, None),
            KeyKind::Fresh => (5, None),
            KeyKind::BorrowedSlot => (6, None),
        };
        hash.update([tag]);
        hash.update(op.as_bytes());
        for input in inputs {
            hash.update(input.as_bytes());
        }
        if let Some(position) = position {
            hash.update(position.to_le_bytes());
        }
        Self(Digest::from_bytes(hash.finalize().into()))
    }
}

/// What a key stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KeyKind {
    /// A result: every input by its own key.
    Definition,
    /// A result: inputs that are read, by the digest of what is read.
    Content,
    /// That some result of the op had this input at this position, whatever the others were.
    Mark(usize),
    /// The last result of a step on these inputs, whatever the step was.
    Slot,
    /// A result that was made although there was one already.
    Fresh,
    /// The last result of a step on inputs of which some are borrowed: never compared with others.
    BorrowedSlot,
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
