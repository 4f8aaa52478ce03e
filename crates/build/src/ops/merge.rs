//! `COPY --link`: the files of one tree on top of another.

use kiln_llb as llb;

use super::BuildOp;
use crate::tree::{Tree, not_here};
use crate::{BuildError, OpError};

impl BuildOp {
    /// Stacks the layer on the base; no file is read or copied.
    pub(super) fn run_merge(&self, merge: &llb::Merge, inputs: &[Tree]) -> Result<Tree, OpError> {
        let base = match merge.base.map(|index| &inputs[index.0]) {
            None | Some(Tree::Empty) => None,
            Some(Tree::Snapshot(base)) => Some(base),
            Some(Tree::Context(_)) => return Err(unmounted()),
            Some(Tree::Far(_)) => return Err(not_here().into()),
        };
        let layer = match &inputs[merge.layer.0] {
            Tree::Empty => return Ok(base.cloned().map_or(Tree::Empty, Tree::Snapshot)),
            Tree::Snapshot(layer) => layer,
            Tree::Context(_) => return Err(unmounted()),
            Tree::Far(_) => return Err(not_here().into()),
        };
        let Some(base) = base else { return Ok(Tree::Snapshot(layer.clone())) };
        let engine = &self.shared.engine;
        let mut top = base.clone();
        for changes in engine.snapshots.chain(layer)? {
            top = engine.prepare(Some(&top))?.commit_layer(&changes)?;
            self.shared.layers.start_as(&top, &changes);
        }
        Ok(Tree::Snapshot(top))
    }
}

fn unmounted() -> OpError {
    BuildError::Bug { what: "a merge of a build context".to_owned() }.into()
}
