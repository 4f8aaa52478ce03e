//! What a solve tells the outside while it goes on.

use std::sync::Arc;
use std::time::Duration;

/// Which of a process's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One thing that happened to a vertex; `vertex` is its position in the list given to
/// [`solve`](crate::solve).
#[derive(Debug, Clone)]
pub enum Event {
    /// It is being executed.
    Started {
        /// Position of the vertex.
        vertex: usize,
    },
    /// Its result was there already.
    Cached {
        /// Position of the vertex.
        vertex: usize,
        /// Where from; `None`: it was near. See [`CacheStore::origin`](crate::CacheStore::origin).
        from: Option<Arc<str>>,
    },
    /// It printed something.
    Log {
        /// Position of the vertex.
        vertex: usize,
        /// Which output.
        stream: Stream,
        /// The bytes, as they came.
        bytes: Vec<u8>,
    },
    /// It finished.
    Completed {
        /// Position of the vertex.
        vertex: usize,
        /// Time from start to end.
        took: Duration,
    },
    /// It failed.
    Failed {
        /// Position of the vertex.
        vertex: usize,
        /// The error with its causes.
        message: String,
    },
    /// It was stopped because the solve ended early.
    Cancelled {
        /// Position of the vertex.
        vertex: usize,
    },
    /// Nothing at all happened for a while, and this vertex is one of those that others wait for.
    Quiet {
        /// Position of the vertex.
        vertex: usize,
        /// What it is about, and who waits for it: titles.
        waits: String,
    },
}

impl Event {
    /// Position of the vertex that it is about.
    pub fn vertex(&self) -> usize {
        match self {
            Self::Started { vertex }
            | Self::Cached { vertex, .. }
            | Self::Log { vertex, .. }
            | Self::Completed { vertex, .. }
            | Self::Failed { vertex, .. }
            | Self::Cancelled { vertex }
            | Self::Quiet { vertex, .. } => *vertex,
        }
    }

    /// The same of another vertex.
    pub(crate) fn at(&self, vertex: usize) -> Self {
        match self.clone() {
            Self::Started { .. } => Self::Started { vertex },
            Self::Cached { from, .. } => Self::Cached { vertex, from },
            Self::Log { stream, bytes, .. } => Self::Log { vertex, stream, bytes },
            Self::Completed { took, .. } => Self::Completed { vertex, took },
            Self::Failed { message, .. } => Self::Failed { vertex, message },
            Self::Cancelled { .. } => Self::Cancelled { vertex },
            Self::Quiet { waits, .. } => Self::Quiet { vertex, waits },
        }
    }
}

/// Where events go; called from one thread at a time, must not block for long.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;
