//! What a tar has in common with an earlier one: members that need not be read and hashed again.

use super::states::{Chain, HashStates};
use super::{DiffOptions, Writer};
use crate::index::Entry;

/// Compares what comes with the earlier tar, and keeps what came since the last state of that.
pub(super) struct Prefix<'o> {
    /// Knows what the tar's members would be.
    writer: Writer<'o, Chain>,
    earlier: HashStates,
    /// States that were reached: the first ones.
    reached: usize,
    /// The chain at the last of them.
    chain: Chain,
    /// What came since.
    pending: Vec<Entry>,
}

/// Where the tars part, as far as can be told.
pub(super) struct Parting {
    /// The earlier tar's states, with the first `reached` of them reached.
    pub(super) earlier: HashStates,
    pub(super) reached: usize,
    /// The chain there.
    pub(super) chain: Chain,
    /// What is to be written behind it.
    pub(super) pending: Vec<Entry>,
}

impl<'o> Prefix<'o> {
    pub(super) fn new(earlier: HashStates, options: &'o DiffOptions<'o>) -> Self {
        let writer = Writer::new(Chain::new(), options);
        Self { writer, earlier, reached: 0, chain: Chain::new(), pending: Vec::new() }
    }

    /// Takes what comes next; whether the tars may go on to be the same. `None`: it cannot be in a tar.
    pub(super) fn take(&mut self, entry: Entry) -> Option<bool> {
        self.writer.write(&entry, None).ok()?;
        self.pending.push(entry);
        let Some(next) = self.earlier.get(self.reached) else { return Some(false) };
        if self.writer.entries < next.entries {
            return Some(true);
        }
        let is_same = self.writer.entries == next.entries && self.writer.out.digest() == Some(next.chain);
        if is_same {
            self.reached += 1;
            self.chain = self.writer.out.clone();
            self.pending.clear();
        }
        Some(is_same)
    }

    pub(super) fn part(self) -> Parting {
        let Self { writer: _, earlier, reached, chain, pending } = self;
        Parting { earlier, reached, chain, pending }
    }
}

#[cfg(test)]
mod tests;
