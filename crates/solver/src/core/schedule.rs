//! Whose turn it is to run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use petgraph::stable_graph::NodeIndex;

use super::node::State;
use super::{Command, Core};
use crate::Cost;

/// What may run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Vertices.
    pub jobs: usize,
    /// What all of them may need by what they needed before; one alone may need more.
    pub memory_bytes: u64,
}

/// Vertices that wait for a place, the one with the longest way to its target first.
#[derive(Debug)]
pub(super) struct Ready {
    limits: Limits,
    waiting: BinaryHeap<(u64, Reverse<u64>, usize, u64)>,
    sequence: u64,
    running: usize,
    memory_bytes: u64,
}

impl Ready {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, waiting: BinaryHeap::new(), sequence: 0, running: 0, memory_bytes: 0 }
    }

    /// Whoever came first stands first among equals.
    pub(super) fn push(&mut self, vertex: usize, priority: u64, cost: Cost) {
        self.sequence += 1;
        self.waiting.push((priority, Reverse(self.sequence), vertex, cost.peak_memory_bytes));
    }

    /// The next that fits. What does not fit is not overtaken: it would wait for ever.
    fn next(&mut self, is_waiting: impl Fn(usize) -> bool + Copy) -> Option<usize> {
        loop {
            let &(_, _, vertex, memory_bytes) = self.waiting.peek()?;
            if !is_waiting(vertex) {
                self.waiting.pop();
                continue;
            }
            let total_bytes = self.memory_bytes.saturating_add(memory_bytes);
            let fits = self.running == 0 || total_bytes <= self.limits.memory_bytes;
            if self.running >= self.limits.jobs.max(1) || !fits {
                return None;
            }
            self.waiting.pop();
            self.running += 1;
            self.memory_bytes = total_bytes;
            return Some(vertex);
        }
    }

    pub(super) fn ended(&mut self, memory_bytes: u64) {
        self.running -= 1;
        self.memory_bytes = self.memory_bytes.saturating_sub(memory_bytes);
    }
}

impl<O: Clone> Core<O> {
    /// Runs what there is room for.
    pub(super) fn dispatch(&mut self) {
        let Self { graph, ready, .. } = self;
        let mut chosen = Vec::new();
        let is_ready = |vertex: usize| {
            let node = graph.node_weight(NodeIndex::new(vertex));
            node.is_some_and(|node| matches!(node.state, State::Ready { .. }))
        };
        while let Some(vertex) = ready.next(is_ready) {
            chosen.push(vertex);
        }
        for vertex in chosen {
            let node = self.node_mut(vertex);
            let State::Ready { save, keys, inputs } = &mut node.state else { continue };
            let (save, keys, inputs) = (save.take(), *keys, std::mem::take(inputs));
            node.state = State::Running { keys };
            self.command(vertex, Command::Run { vertex, inputs, save });
        }
    }

    /// A run ended.
    pub(super) fn leave_slot(&mut self, vertex: usize) {
        let node = self.node(vertex);
        if matches!(node.state, State::Running { .. }) {
            let bytes = node.cost.peak_memory_bytes;
            self.ready.ended(bytes);
        }
    }
}
