//! Where vertices came from; outside every digest, so moving a line keeps the cache.

use std::collections::BTreeMap;

use crate::VertexId;

/// Lines of a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// First line, counted from 1.
    pub first_line: usize,
    /// Last line, counted from 1.
    pub last_line: usize,
}

/// What to show for each vertex.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceMap {
    entries: BTreeMap<VertexId, (String, Option<Location>)>,
}

impl SourceMap {
    /// Names a vertex: `[build 2/5] RUN make`. The first name of a shared vertex stays.
    pub fn insert(&mut self, vertex: VertexId, title: String, location: Option<Location>) {
        self.entries.entry(vertex).or_insert((title, location));
    }

    /// What to show for `vertex` in progress lines; empty for one nobody named.
    pub fn title(&self, vertex: VertexId) -> &str {
        self.entries.get(&vertex).map_or("", |(title, _)| title)
    }

    /// Its lines in the Dockerfile; `None` for internal steps.
    pub fn location(&self, vertex: VertexId) -> Option<&Location> {
        self.entries.get(&vertex).and_then(|(_, location)| location.as_ref())
    }
}
