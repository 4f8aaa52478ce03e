//! The ops' implementations: what the solver runs.

mod copy;
mod earlier;
mod exec;
mod file;
mod gather;
mod hash_states;
mod kept;
mod merge;
mod same;

pub(crate) use self::exec::{ShellJob, ShellTree, StepResources};
pub(crate) use self::gather::Gathered;
pub(crate) use self::hash_states::StatesFile;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_content::CacheRecord;
use kiln_llb as llb;
use kiln_oci::{Digest, SnapshotId};
use kiln_solver::{CacheKey, Cost, Identity, InputUse, Op, Scope, Stream, VertexInput};

use crate::attest::{Found, of_git};
use crate::cancel::BuildCancel;
use crate::engine::now_unix;
use crate::layers::{Layers, UnderWay};
use crate::registry::Unpulled;
use crate::remote_cache::Borrowed;
use crate::select::{Place, Selection, select};
use crate::source::{Fetcher, SourceOptions};
use crate::tree::{Tree, not_here};
use crate::why::{Listing, Why};
use crate::{BuildError, Engine, OpError};

/// What every op of one build shares.
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) layers: Layers,
    /// Trees behind local sources, by name.
    pub(crate) contexts: BTreeMap<String, Tree>,
    /// Images that the build stands on and that are pulled when they are read.
    pub(crate) unpulled: Unpulled,
    /// How trees from outside are fetched.
    pub(crate) sources: SourceOptions,
    pub(crate) cancel: BuildCancel,
    pub(crate) steps: StepResources,
    /// Where the store keeps what is borrowed; `None`: nothing is.
    pub(crate) borrowed: Option<Borrowed>,
    /// Finds out why steps run; `None`: nobody asks.
    pub(crate) why: Option<Arc<Why>>,
    /// What came from outside.
    pub(crate) found: Found,
}

/// A vertex of the definition, ready to be solved.
pub(crate) struct BuildOp {
    op: llb::Op,
    shared: Arc<Shared>,
    /// What a copy selected while its key was made, one place an action, for the run after it.
    selections: Mutex<Vec<Option<Arc<Selection>>>>,
    /// What an exec's mounts show of its inputs, with whether owners count: found while its key was made.
    shown: Mutex<Vec<(usize, Arc<Selection>, bool)>>,
    /// Its place among the vertices.
    vertex: usize,
    /// As the user wrote it.
    title: String,
    /// Results of earlier builds do not count.
    refresh: bool,
    /// A command that is run in the place of what the vertex does, for whoever asked for it.
    shell: Option<Arc<ShellJob>>,
    /// It makes nothing, and hands on what others made.
    gathers: Option<Arc<Gathered>>,
}

impl BuildOp {
    /// An op for `vertex`.
    pub(crate) fn new(vertex: &llb::Vertex, shared: &Arc<Shared>) -> Self {
        let actions = if let llb::Op::File(file) = &vertex.op { file.actions.len() } else { 0 };
        let selections = Mutex::new(vec![None; actions]);
        let (op, shared) = (vertex.op.clone(), shared.clone());
        let (vertex, title, refresh) = (0, String::new(), false);
        let shown = Mutex::default();
        Self { op, shared, selections, shown, vertex, title, refresh, shell: None, gathers: None }
    }

    /// An op that has the inputs of `vertex` and runs a command on them. It is the target of its solve:
    /// its output is nothing.
    pub(crate) fn with_shell(vertex: &llb::Vertex, shared: &Arc<Shared>, shell: Arc<ShellJob>) -> Self {
        Self { shell: Some(shell), ..Self::new(vertex, shared) }
    }

    /// How `vertex` uses its inputs: what a copy reads or a step mounts counts by content, all else
    /// by key.
    pub(crate) fn inputs(vertex: &llb::Vertex) -> Vec<VertexInput> {
        let inputs = vertex.inputs.iter().enumerate();
        let used = |(position, id): (usize, &llb::VertexId)| VertexInput {
            vertex: id.0,
            usage: Self::usage(&vertex.op, position),
        };
        inputs.map(used).collect()
    }

    fn usage(op: &llb::Op, position: usize) -> InputUse {
        let is_read = match op {
            llb::Op::File(file) => file
                .actions
                .iter()
                .any(|action| matches!(action, llb::FileAction::Copy(copy) if copy.from.0 == position)),
            llb::Op::Exec(exec) => exec::input_use(exec, position) == InputUse::Content,
            llb::Op::Source(_) | llb::Op::Merge(_) => false,
        };
        if is_read { InputUse::Content } else { InputUse::Definition }
    }

    /// The vertex of a job: `vertex`, done by `self`. With `refresh`, results of earlier builds do not count.
    pub(crate) fn planned(
        self,
        vertex: &llb::Vertex,
        at: llb::VertexId,
        title: &str,
        refresh: bool,
    ) -> kiln_solver::Vertex<Self> {
        // What a process makes may be the same although it, or what it runs on, is written down differently.
        // So may what a copy makes; one that is made again is what its key says, and nothing else.
        let is_run = matches!(vertex.op, llb::Op::Exec(_)) && self.shell.is_none();
        let is_compared = is_run || (kept::is_copy(&vertex.op) && !refresh);
        let lineage = is_compared.then(|| Digest::of(format!("step {}", at.0).as_bytes()));
        let is_made = !matches!(vertex.op, llb::Op::Source(_));
        let cost = if is_made { self.shared.steps.costs().of(&vertex.op.digest()) } else { Cost::default() };
        kiln_solver::Vertex {
            inputs: Self::inputs(vertex),
            op: Arc::new(Self { vertex: at.0, title: title.to_owned(), refresh, ..self }),
            title: title.to_owned(),
            refresh,
            lineage,
            cost,
        }
    }

    /// All copies that read from `input`, with their places among the actions.
    fn copies(&self, input: usize) -> impl Iterator<Item = (usize, &llb::Copy)> {
        let actions = if let llb::Op::File(file) = &self.op { file.actions.as_slice() } else { &[] };
        actions.iter().enumerate().filter_map(move |(at, action)| match action {
            llb::FileAction::Copy(copy) if copy.from.0 == input => Some((at, copy)),
            llb::FileAction::Copy(_) | llb::FileAction::Mkdir(_) | llb::FileAction::Mkfile(_) => None,
        })
    }

    /// What `copy`, the action at `at`, means in `tree`; scanned once.
    fn selection(&self, at: usize, copy: &llb::Copy, tree: &Tree) -> Result<Arc<Selection>, OpError> {
        let known = || self.selections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(selection) = &known()[at] {
            return Ok(selection.clone());
        }
        let cancel = self.shared.cancel.flag();
        let selection = match tree {
            Tree::Context(context) => {
                let (root, ignore) = (context.root(), Some(context.ignore()));
                select(&Place { root, ignore, digests: Some(context.digests()), cancel }, copy)?
            }
            Tree::Snapshot(id) => {
                let root = self.shared.engine.snapshots.open_view(id)?;
                select(&Place { root: root.as_fd(), ignore: None, digests: None, cancel }, copy)?
            }
            Tree::Far(_) => return Err(not_here().into()),
            Tree::Empty => match copy.sources.iter().find(|source| !matches!(source.as_str(), "" | ".")) {
                None => Selection::default(),
                Some(source) => {
                    let place = "the source stage, which has no files".to_owned();
                    let path = source.clone();
                    return Err(OpError::NoSource { path, place, ignored_by: None, similar: None });
                }
            },
        };
        let selection = Arc::new(selection);
        known()[at] = Some(selection.clone());
        Ok(selection)
    }

    /// Does the work, and remembers what it took: time, and the bytes of memory that it says.
    fn measured(&self, work: impl FnOnce() -> Result<(Tree, u64), OpError>) -> Result<Tree, OpError> {
        let started = std::time::Instant::now();
        let (tree, peak_memory_bytes) = work()?;
        let steps = &self.shared.steps;
        steps.costs().note(&self.op.digest(), started.elapsed(), peak_memory_bytes);
        steps.note_run();
        Ok(tree)
    }

    /// Lists what it reads of `input`; `None`: nobody has looked.
    fn listing(&self, input: usize) -> Option<Listing> {
        if let llb::Op::Exec(_) = &self.op {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let of_input = shown.iter().filter(|(of, _, _)| *of == input);
            let list: Vec<_> = of_input.map(|(_, selection, ignore)| (&**selection, *ignore)).collect();
            return (!list.is_empty()).then(|| Listing::of(list));
        }
        let known = self.selections.lock().unwrap_or_else(PoisonError::into_inner);
        let read =
            |(at, copy): (usize, &llb::Copy)| Some((known[at].clone()?, copy.owner != llb::Owner::Keep));
        let list: Vec<_> = self.copies(input).map(read).collect::<Option<_>>()?;
        Some(Listing::of(list.iter().map(|(selection, ignore)| (&**selection, *ignore))))
    }

    /// Brings trees from outside.
    fn fetcher<'a>(&'a self, log: &'a dyn Fn(&str)) -> Fetcher<'a> {
        let Shared { engine, sources, cancel, .. } = &*self.shared;
        Fetcher { engine, options: sources, cancel, log }
    }

    /// Commits `active` and starts to hash it.
    fn commit(&self, active: crate::engine::Active) -> Result<Tree, BuildError> {
        self.commit_hashed(active, None)
    }

    /// The same when its hash may be under way.
    fn commit_hashed(
        &self,
        active: crate::engine::Active,
        under_way: Option<UnderWay>,
    ) -> Result<Tree, BuildError> {
        let id: SnapshotId = active.commit()?;
        self.shared.layers.start(&id, under_way);
        Ok(Tree::Snapshot(id))
    }

    /// Digest of what the copies read of `input`.
    fn copied_content(&self, input: usize, output: &Tree) -> Result<Digest, OpError> {
        let mut digests = String::new();
        for (at, copy) in self.copies(input) {
            // Owners that are given anyway make no difference.
            let ignore_owner = copy.owner != llb::Owner::Keep;
            digests.push_str(&self.selection(at, copy, output)?.digest(ignore_owner).to_string());
        }
        Ok(Digest::of(digests.as_bytes()))
    }

    /// Where it says when this step last made what `snapshot` holds already.
    fn made_again(&self, snapshot: &SnapshotId) -> Digest {
        Digest::of(format!("made again {} {snapshot}", self.op.digest()).as_bytes())
    }

    /// Does what the vertex does.
    fn carry_out(&self, inputs: &[Tree], scope: &Scope<'_>) -> Result<Tree, OpError> {
        match &self.op {
            llb::Op::Source(llb::Source::Image(image)) => {
                let Shared { engine, unpulled, cancel, .. } = &*self.shared;
                let pulled = unpulled.pull(engine, &image.config, cancel, &|line| note(scope, line))?;
                let record =
                    pulled.map_or_else(|| engine.store.image(&image.config), |image| Ok(Some(image)))?;
                let record = record.ok_or_else(|| BuildError::NoImage {
                    reference: Box::new(image.reference.clone()),
                    at: None,
                    stages: None,
                    similar: None,
                })?;
                Ok(record.snapshot.map_or(Tree::Empty, Tree::Snapshot))
            }
            llb::Op::Source(llb::Source::Local(local)) => {
                Ok(self.shared.contexts.get(&local.name).cloned().unwrap_or(Tree::Empty))
            }
            llb::Op::Source(llb::Source::Http(http)) => {
                let found = self.fetcher(&|line| note(scope, line)).http(http)?;
                self.shared.found.note(self.vertex, ("sha256", found.content.hex()));
                Ok(Tree::Snapshot(found.snapshot))
            }
            llb::Op::Source(llb::Source::Git(git)) => {
                let found = self.fetcher(&|line| note(scope, line)).git(git)?;
                self.shared.found.note(self.vertex, of_git(&found.commit));
                Ok(Tree::Snapshot(found.snapshot))
            }
            llb::Op::Exec(exec) => self.measured(|| self.run_exec(exec, inputs, scope)),
            llb::Op::File(file) => self.measured(|| Ok((self.run_file(file, inputs, scope)?, 0))),
            llb::Op::Merge(merge) => self.measured(|| Ok((self.run_merge(merge, inputs)?, 0))),
        }
    }
}

/// A line about the step itself.
fn note(scope: &Scope<'_>, line: &str) {
    scope.log(Stream::Stderr, format!("{line}\n").as_bytes());
}

impl Op for BuildOp {
    type Output = Tree;
    type Error = OpError;

    fn identity(&self) -> Identity {
        if self.shell.is_some() || self.gathers.is_some() {
            return Identity::Unknown;
        }
        match &self.op {
            llb::Op::Source(llb::Source::Image(_)) => Identity::Source(self.op.digest()),
            llb::Op::Source(llb::Source::Local(_) | llb::Source::Http(_) | llb::Source::Git(_)) => {
                Identity::Unknown
            }
            llb::Op::Exec(_) | llb::Op::File(_) | llb::Op::Merge(_) => Identity::Cached(self.op.digest()),
        }
    }

    fn identity_by_content(&self) -> Option<Digest> {
        self.op.digest_by_content()
    }

    fn is_too_old(&self, key: &CacheKey, found: &Tree) -> bool {
        let llb::Op::Exec(llb::Exec { cache_ttl: Some(ttl), .. }) = &self.op else { return false };
        let store = &self.shared.engine.store;
        let at_unix = match found {
            Tree::Snapshot(snapshot) => {
                let borrowed = self.shared.borrowed.map(|borrowed| borrowed.key(&key.0));
                let keys = [Some(key.0), borrowed, Some(self.made_again(snapshot))].into_iter().flatten();
                let records = keys.filter_map(|key| store.cache_get(&key).ok().flatten());
                records.filter(|made| made.snapshot == *snapshot).map(|made| made.created_unix).max()
            }
            Tree::Far(far) => Some(far.created_unix()),
            Tree::Empty | Tree::Context(_) => return false,
        };
        // What cannot be read says nothing.
        let at_unix = at_unix.unwrap_or(i64::MIN);
        let age = u64::try_from(now_unix().saturating_sub(at_unix)).unwrap_or(0);
        let is_too_old = Duration::from_secs(age) > *ttl;
        if let Some(why) = &self.shared.why
            && is_too_old
        {
            why.note_outdated(self.vertex, *ttl, at_unix);
        }
        is_too_old
    }

    fn content(&self, input: usize, output: &Tree, _scope: &Scope<'_>) -> Result<Digest, OpError> {
        let digest = match &self.op {
            llb::Op::Exec(exec) => self.shown_content(exec, input, output)?,
            _ => self.copied_content(input, output)?,
        };
        if let Some(why) = &self.shared.why {
            why.note_content(self.vertex, input, &digest);
        }
        Ok(digest)
    }

    fn run(&self, inputs: &[Tree], scope: &Scope<'_>) -> Result<Tree, OpError> {
        if let Some(shell) = &self.shell {
            return self.run_shell(shell, inputs, scope);
        }
        if let Some(gathered) = &self.gathers {
            gathered.put(inputs);
            return Ok(Tree::Empty);
        }
        let Some(why) = &self.shared.why else { return self.carry_out(inputs, scope) };
        let uses = |input| Self::usage(&self.op, input);
        let begun = why.begin(self.vertex, inputs, &uses, &|input| self.listing(input));
        let made = self.carry_out(inputs, scope);
        if let Some(begun) = begun
            && !(made.is_err() && scope.is_cancelled())
        {
            why.end(begun, made.as_ref().ok());
        }
        made
    }

    fn is_same(&self, earlier: &Tree, now: &Tree, _scope: &Scope<'_>) -> Result<bool, OpError> {
        let (Some(earlier), Some(now)) = (earlier.snapshot(), now.snapshot()) else { return Ok(false) };
        if kept::is_copy(&self.op) {
            // It took the layer that it would have made.
            return Ok(earlier == now);
        }
        let Shared { engine, cancel, .. } = &*self.shared;
        let is_same = same::same_changes(&*engine.snapshots, earlier, now, cancel);
        if is_same && matches!(&self.op, llb::Op::Exec(exec) if exec.cache_ttl.is_some()) {
            // The earlier result stays, with its time; that it was good now stands beside it.
            let key = self.made_again(earlier);
            let description = "made again".to_owned();
            let record = CacheRecord {
                canonical: key,
                snapshot: earlier.clone(),
                created_unix: now_unix(),
                description,
            };
            engine.store.cache_put(&[key], &record, true).map_err(BuildError::from)?;
        }
        Ok(is_same)
    }

    fn name(&self, output: &Tree) -> Digest {
        Digest::of(output.snapshot().map(ToString::to_string).unwrap_or_default().as_bytes())
    }
}

#[cfg(test)]
mod tests;
