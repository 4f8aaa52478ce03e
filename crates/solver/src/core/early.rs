//! What is wanted before its turn, so that independent stages run side by side although their copies
//! stand on each other.
//!
//! Nothing is wanted here that would not be wanted anyway, only later. A *mark* says that some result of
//! an op had a certain input at a certain place. Where it is missing, no lookup with this input can find
//! anything: what follows from a miss may start while other inputs are still unknown.

use super::node::{Provisional, State};
use super::{Command, Core};
use crate::{Identity, InputUse};

impl<O: Clone> Core<O> {
    /// An input of a vertex that waits for others is known: what it tells.
    pub(super) fn doubt(&mut self, vertex: usize, position: usize) {
        let node = self.node(vertex);
        let (input, usage) = node.inputs[position];
        if !node.is_open() || node.mark_asked[position] {
            return;
        }
        let input = self.node(input);
        match input.provisional {
            Provisional::Open => {}
            // The key by definition needs all inputs' keys.
            Provisional::Never if usage == InputUse::Content => self.lose_fast(vertex),
            Provisional::Never => {}
            Provisional::Key(_) => {
                // Whatever is there already can wait for its turn.
                let has_to_run = matches!(input.state, State::Missed { .. });
                if has_to_run && matches!(input.identity, Identity::Cached(_)) {
                    self.doubtful.push((vertex, position));
                }
            }
        }
    }

    /// Asks for marks where keys are still missing; false: there was nothing to ask.
    pub(super) fn ask_marks(&mut self) -> bool {
        let before = self.lookups;
        for (vertex, position) in std::mem::take(&mut self.doubtful) {
            let Some(node) = self.known_node(vertex) else { continue };
            // What nobody asks for comes again when somebody does.
            if !node.is_open() || !node.asked || node.mark_asked[position] {
                continue;
            }
            let (input, usage) = node.inputs[position];
            if usage == InputUse::Content && matches!(node.state, State::Content { .. }) {
                // Read in any case.
                continue;
            }
            if let Some(key) = self.node(input).provisional.key() {
                let key = self.mark(vertex, position, key);
                self.node_mut(vertex).mark_asked[position] = true;
                self.command(vertex, Command::Mark { vertex, input: position, key });
            }
        }
        self.lookups > before
    }

    /// No result of this vertex's op ever had this input.
    pub(super) fn is_lost_by(&mut self, vertex: usize, position: usize) {
        if !self.node(vertex).is_open() {
            return;
        }
        match self.node(vertex).inputs[position].1 {
            InputUse::Content => self.lose_fast(vertex),
            InputUse::Definition => self.lose(vertex),
        }
    }

    fn lose_fast(&mut self, vertex: usize) {
        let node = self.node_mut(vertex);
        if node.is_open() && !std::mem::replace(&mut node.fast_lost, true) {
            self.work.push(vertex);
        }
    }

    /// The vertex will have a new key, and so will all that stands on it.
    fn lose(&mut self, vertex: usize) {
        let mut open = vec![vertex];
        while let Some(vertex) = open.pop() {
            let node = self.node_mut(vertex);
            if !node.is_open() || std::mem::replace(&mut node.lost, true) {
                continue;
            }
            self.lose_fast(vertex);
            self.work.push(vertex);
            self.each_user(vertex, |core, user, position| match core.node(user).inputs[position].1 {
                InputUse::Definition => open.push(user),
                InputUse::Content => core.lose_fast(user),
            });
        }
    }

    /// Wants what will be wanted once the vertex's lookups have failed.
    pub(super) fn want_early(&mut self, vertex: usize) {
        let node = self.node(vertex);
        if !node.asked || !node.is_open() {
            return;
        }
        let (is_read, is_made) = (node.fast_lost, node.lost && node.wanted);
        if is_read {
            self.want_reads(vertex);
        }
        if is_made {
            self.want_inputs(vertex);
        }
    }
}
