//! What vertices hand to each other.

use std::sync::Arc;

use kiln_oci::SnapshotId;

use crate::BuildError;
use crate::context::Context;
use crate::remote_cache::FarResult;

/// A vertex's output: a handle on a file tree.
#[derive(Debug, Clone)]
pub(crate) enum Tree {
    /// No files at all.
    Empty,
    /// A committed snapshot with everything below it.
    Snapshot(SnapshotId),
    /// A result on another machine: it becomes a snapshot before anybody reads it.
    Far(Arc<FarResult>),
    /// A directory of the client.
    Context(Arc<Context>),
}

impl Tree {
    /// The snapshot to build on; `None` for an empty tree.
    pub(crate) fn snapshot(&self) -> Option<&SnapshotId> {
        match self {
            Tree::Snapshot(id) => Some(id),
            Tree::Empty | Tree::Far(_) | Tree::Context(_) => None,
        }
    }
}

/// Why nobody reads a [`Tree::Far`]: the solver fetches whatever is wanted first.
pub(crate) fn not_here() -> BuildError {
    BuildError::Bug { what: "a result on another machine was read".to_owned() }
}
