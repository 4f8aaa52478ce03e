//! The ops' implementations: what the solver runs.

mod exec;
mod file;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_llb as llb;
use kiln_oci::{Digest, SnapshotId};
use kiln_solver::{Identity, InputUse, Op, Scope, VertexInput};

use crate::cancel::BuildCancel;
use crate::context::Context;
use crate::layers::Layers;
use crate::select::{Place, Selection, select};
use crate::tree::Tree;
use crate::{BuildError, Engine, OpError};

/// What every op of one build shares.
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) layers: Layers,
    pub(crate) context: Option<Arc<Context>>,
    pub(crate) cancel: BuildCancel,
}

/// A vertex of the definition, ready to be solved.
pub(crate) struct BuildOp {
    op: llb::Op,
    shared: Arc<Shared>,
    /// What a copy selected while its key was made, one place an input, for the run after it.
    selections: Mutex<Vec<Option<Arc<Selection>>>>,
}

impl BuildOp {
    /// An op for `vertex`.
    pub(crate) fn new(vertex: &llb::Vertex, shared: &Arc<Shared>) -> Self {
        let selections = Mutex::new(vec![None; vertex.inputs.len()]);
        Self { op: vertex.op.clone(), shared: shared.clone(), selections }
    }

    /// How `vertex` uses its inputs: what a copy reads counts by content, all else by key.
    pub(crate) fn inputs(vertex: &llb::Vertex) -> Vec<VertexInput> {
        let read = |position: usize| match &vertex.op {
            llb::Op::File(file) => file
                .actions
                .iter()
                .any(|action| matches!(action, llb::FileAction::Copy(copy) if copy.from.0 == position)),
            llb::Op::Source(_) | llb::Op::Exec(_) | llb::Op::Merge(_) => false,
        };
        let usage = |position| if read(position) { InputUse::Content } else { InputUse::Definition };
        let inputs = vertex.inputs.iter().enumerate();
        inputs.map(|(position, id)| VertexInput { vertex: id.0, usage: usage(position) }).collect()
    }

    /// All copies that read from `input`, as one list of sources.
    fn sources(&self, input: usize) -> Vec<String> {
        let llb::Op::File(file) = &self.op else { return Vec::new() };
        let copies = file.actions.iter().filter_map(|action| match action {
            llb::FileAction::Copy(copy) if copy.from.0 == input => Some(copy),
            llb::FileAction::Copy(_) | llb::FileAction::Mkdir(_) | llb::FileAction::Mkfile(_) => None,
        });
        copies.flat_map(|copy| copy.sources.clone()).collect()
    }

    /// What the copies from `input` mean in `tree`; scanned once.
    fn selection(&self, input: usize, tree: &Tree) -> Result<Arc<Selection>, OpError> {
        let known = || self.selections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(selection) = &known()[input] {
            return Ok(selection.clone());
        }
        let sources = self.sources(input);
        let cancel = self.shared.cancel.flag();
        let selection = match tree {
            Tree::Context(context) => {
                let (root, ignore) = (context.root(), Some(context.ignore()));
                select(&Place { root, ignore, digests: Some(context.digests()), cancel }, &sources)?
            }
            Tree::Snapshot(id) => {
                let root = self.shared.engine.snapshots.open_view(id)?;
                select(&Place { root: root.as_fd(), ignore: None, digests: None, cancel }, &sources)?
            }
            Tree::Empty => {
                let source = sources.into_iter().next().unwrap_or_default();
                let place = "the source stage, which has no files".to_owned();
                return Err(OpError::NoSource { path: source, place, ignored_by: None, similar: None });
            }
        };
        let selection = Arc::new(selection);
        known()[input] = Some(selection.clone());
        Ok(selection)
    }

    /// Commits `active` and starts to hash it.
    fn commit(&self, active: crate::engine::Active) -> Result<Tree, BuildError> {
        let id: SnapshotId = active.commit()?;
        self.shared.layers.start(&id);
        Ok(Tree::Snapshot(id))
    }
}

impl Op for BuildOp {
    type Output = Tree;
    type Error = OpError;

    fn identity(&self) -> Identity {
        match &self.op {
            llb::Op::Source(llb::Source::Image(_)) => Identity::Source(self.op.digest()),
            llb::Op::Source(llb::Source::Local(_) | llb::Source::Http(_) | llb::Source::Git(_)) => {
                Identity::Unknown
            }
            llb::Op::Exec(_) | llb::Op::File(_) | llb::Op::Merge(_) => Identity::Cached(self.op.digest()),
        }
    }

    fn content(&self, input: usize, output: &Tree, _scope: &Scope<'_>) -> Result<Digest, OpError> {
        let ignore_owner = matches!(output, Tree::Context(_));
        Ok(self.selection(input, output)?.digest(ignore_owner))
    }

    fn run(&self, inputs: &[Tree], scope: &Scope<'_>) -> Result<Tree, OpError> {
        match &self.op {
            llb::Op::Source(llb::Source::Image(image)) => {
                let record = self.shared.engine.store.image(&image.config)?;
                let record = record.ok_or_else(|| BuildError::NoImage {
                    reference: Box::new(image.reference.clone()),
                    at: None,
                    stages: None,
                })?;
                Ok(record.snapshot.map_or(Tree::Empty, Tree::Snapshot))
            }
            llb::Op::Source(llb::Source::Local(_)) => {
                let context = self.shared.context.clone();
                Ok(context.map_or(Tree::Empty, Tree::Context))
            }
            llb::Op::Source(llb::Source::Http(_) | llb::Source::Git(_)) | llb::Op::Merge(_) => {
                Err(BuildError::Bug { what: "an op without an implementation".to_owned() }.into())
            }
            llb::Op::Exec(exec) => self.run_exec(exec, inputs, scope),
            llb::Op::File(file) => self.run_file(file, inputs),
        }
    }
}
