//! Cache keys: "same result across builds".

use std::fmt;

use kiln_oci::Digest;
use sha2::{Digest as _, Sha256};

/// Names a result across builds: the op and what its inputs are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CacheKey(pub Digest);

impl CacheKey {
    /// The key of an op with these inputs. `tag` keeps kinds of keys apart; lengths are fixed, so
    /// no two lists of inputs hash alike.
    pub(crate) fn derive(tag: KeyKind, op: &Digest, inputs: &[Digest]) -> Self {
        let mut hash = Sha256::new();
        hash.update([tag as u8]);
        hash.update(op.as_bytes());
        for input in inputs {
            hash.update(input.as_bytes());
        }
        Self(Digest::from_bytes(hash.finalize().into()))
    }
}

/// How the inputs entered a key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KeyKind {
    /// Every input by its own key.
    Definition = 1,
    /// Inputs that are read, by the digest of what is read.
    Content = 2,
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
