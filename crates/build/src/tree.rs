//! What vertices hand to each other.

use std::sync::Arc;

use kiln_oci::SnapshotId;

use crate::context::Context;

/// A vertex's output: a handle on a file tree.
#[derive(Debug, Clone)]
pub(crate) enum Tree {
    /// No files at all.
    Empty,
    /// A committed snapshot with everything below it.
    Snapshot(SnapshotId),
    /// A directory of the client.
    Context(Arc<Context>),
}

impl Tree {
    /// The snapshot to build on; `None` for an empty tree.
    pub(crate) fn snapshot(&self) -> Option<&SnapshotId> {
        match self {
            Tree::Snapshot(id) => Some(id),
            Tree::Empty | Tree::Context(_) => None,
        }
    }
}
