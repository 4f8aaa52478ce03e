//! Which keys will be looked up next, if those that are looked up now are found: for caches that are far,
//! where each question is a journey.

use std::collections::{HashMap, VecDeque};

use petgraph::Direction;
use petgraph::graph::NodeIndex;

use super::Core;
use crate::key::KeyKind;
use crate::{CacheKey, Identity};

impl<O: Clone> Core<O> {
    /// Marks of what `vertex` is being looked up with; see [`KeyKind::Mark`].
    pub(crate) fn present_marks(&self, vertex: usize) -> Vec<CacheKey> {
        self.marks(vertex)
    }

    /// Keys by definition of what stands on `asked` (vertices with the keys they are looked up by), as if each
    /// result were found under the key it would be saved under. At most `limit`; a guess may be wrong.
    pub(crate) fn next_keys(&self, asked: &[(usize, CacheKey)], limit: usize) -> Vec<CacheKey> {
        let mut known: HashMap<usize, CacheKey> = asked.iter().copied().collect();
        let mut open: VecDeque<usize> = asked.iter().map(|(vertex, _)| *vertex).collect();
        let mut next = Vec::new();
        while let Some(vertex) = open.pop_front() {
            let users = self.graph.neighbors_directed(NodeIndex::new(vertex), Direction::Outgoing);
            for user in users.map(NodeIndex::index) {
                let node = self.node(user);
                let Identity::Cached(op) = &node.identity else { continue };
                if known.contains_key(&user) || node.refresh || !node.asked {
                    continue;
                }
                let key_of = |&(input, _): &(usize, _)| {
                    known.get(&input).copied().or(self.node(input).provisional.key()).map(|key| key.0)
                };
                let Some(keys) = node.inputs.iter().map(key_of).collect::<Option<Vec<_>>>() else { continue };
                let key = CacheKey::derive(KeyKind::Definition, op, &keys);
                if next.len() == limit {
                    return next;
                }
                next.push(key);
                known.insert(user, key);
                open.push_back(user);
            }
        }
        next
    }
}
