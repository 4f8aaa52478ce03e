//! A vertex that waits for all targets of a build for several platforms: a solve has one target.

use std::sync::{Arc, Mutex, PoisonError};

use kiln_llb as llb;
use kiln_solver::{Cost, InputUse, Vertex, VertexInput};

use super::{BuildOp, Shared};
use crate::tree::Tree;

/// The trees of all targets, in their order.
#[derive(Default)]
pub(crate) struct Gathered(Mutex<Vec<Tree>>);

impl Gathered {
    pub(super) fn put(&self, trees: &[Tree]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = trees.to_vec();
    }

    /// What there is; empty before the solve is over.
    pub(crate) fn take(&self) -> Vec<Tree> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BuildOp {
    /// The vertex at `place` that waits for `targets`. It has no key, and nothing of it is kept.
    pub(crate) fn gathering(
        targets: &[llb::VertexId],
        place: usize,
        shared: &Arc<Shared>,
        gathered: Arc<Gathered>,
    ) -> Vertex<Self> {
        let inputs = targets.iter().map(|id| VertexInput { vertex: id.0, usage: InputUse::Definition });
        // What it is does not matter: nobody looks.
        let op = llb::Op::Merge(llb::Merge { base: None, layer: llb::InputIndex(0) });
        let vertex = llb::Vertex { op, inputs: targets.to_vec() };
        Vertex {
            inputs: inputs.collect(),
            op: Arc::new(Self { vertex: place, gathers: Some(gathered), ..Self::new(&vertex, shared) }),
            title: "all platforms".to_owned(),
            refresh: false,
            lineage: None,
            cost: Cost::default(),
        }
    }
}
