//! A plan's steps, solved.

use std::num::NonZeroUsize;
use std::sync::Arc;

use kiln_frontend::Lowered;
use kiln_llb::VertexId;
use kiln_solver::{EventSink, Job, Limits, SolveError};

use crate::build::{Plan, Progress};
use crate::dockerfile::Dockerfile;
use crate::last_build::FailedStep;
use crate::ops::{BuildOp, Gathered, ShellJob};
use crate::step_costs;
use crate::tree::Tree;
use crate::{BuildError, OpError};

/// A solve without a result.
pub(crate) struct Unsolved {
    pub(crate) source: BuildError,
    /// The step that failed, if one did.
    pub(crate) failed: Option<Box<FailedStep>>,
}

impl From<BuildError> for Unsolved {
    fn from(source: BuildError) -> Self {
        Self { source, failed: None }
    }
}

/// Solves for all `targets` at once.
pub(crate) async fn solve_all(
    plan: &Plan,
    targets: &[Option<VertexId>],
    progress: Arc<dyn Progress>,
) -> Result<Vec<Tree>, Unsolved> {
    let mut wanted: Vec<VertexId> = targets.iter().flatten().copied().collect();
    wanted.sort_unstable();
    wanted.dedup();
    let trees = match wanted.as_slice() {
        [] => Vec::new(),
        [only] => vec![solve(plan, Some(*only), None, progress).await?],
        several => {
            let gathered = Arc::new(Gathered::default());
            solve_for(plan, Goal::All(several, gathered.clone()), progress).await?;
            gathered.take()
        }
    };
    let of = |target: &VertexId| wanted.binary_search(target).ok().and_then(|at| trees.get(at).cloned());
    Ok(targets.iter().map(|target| target.as_ref().and_then(of).unwrap_or(Tree::Empty)).collect())
}

/// Solves for `target`; `None`: for nothing. With `shell`, the target runs that instead.
pub(crate) async fn solve(
    plan: &Plan,
    target: Option<VertexId>,
    shell: Option<Arc<ShellJob>>,
    progress: Arc<dyn Progress>,
) -> Result<Tree, Unsolved> {
    let Some(target) = target else { return Ok(Tree::Empty) };
    solve_for(plan, Goal::One(target, shell), progress).await
}

/// What is wanted of a solve.
enum Goal<'a> {
    /// One tree; or a shell in the place of what makes it.
    One(VertexId, Option<Arc<ShellJob>>),
    /// All of these trees.
    All(&'a [VertexId], Arc<Gathered>),
}

async fn solve_for(plan: &Plan, goal: Goal<'_>, progress: Arc<dyn Progress>) -> Result<Tree, Unsolved> {
    let Plan { lowered, dockerfile, shared, cache, .. } = plan;
    let ids = || (0..lowered.definition.vertices().len()).map(VertexId);
    let titles: Vec<String> = ids().map(|id| lowered.source_map.title(id).to_owned()).collect();
    for (id, vertex) in ids().zip(lowered.definition.vertices()) {
        // Refused before anything runs, and even if the step's result is there already.
        shared.steps.check(&vertex.op).map_err(|error| step_error(lowered, dockerfile, id, error))?;
    }
    progress.plan(&titles);
    let vertices = lowered.definition.vertices().iter().zip(&titles);
    let why = shared.why.clone();
    let count = titles.len();
    let events: EventSink = Arc::new(move |event| {
        // The step that waits for all targets is nobody's business.
        if event.vertex() >= count {
            return;
        }
        if let Some(why) = &why {
            why.event(&event);
        }
        progress.event(event);
    });
    let op = |id: VertexId, vertex| match &goal {
        Goal::One(target, Some(shell)) if id == *target => BuildOp::with_shell(vertex, shared, shell.clone()),
        _ => BuildOp::new(vertex, shared),
    };
    let mut vertices: Vec<_> = ids()
        .zip(vertices)
        .map(|(id, (vertex, title))| {
            op(id, vertex).planned(vertex, id, title, plan.again.reason(id.0).is_some())
        })
        .collect();
    let target = match &goal {
        Goal::One(target, _) => target.0,
        Goal::All(targets, gathered) => {
            vertices.push(BuildOp::gathering(targets, count, shared, gathered.clone()));
            count
        }
    };
    let job = Job { vertices, target, cache: cache.clone(), cancel: Arc::new(shared.cancel.clone()), events };
    // Steps that only wait are many: the kernel shares processors better than a limit does.
    let many = std::thread::available_parallelism().map_or(4, usize::from).max(4) * 8;
    let limits = Limits {
        jobs: plan.jobs.map_or(many, NonZeroUsize::get),
        memory_bytes: step_costs::free_memory_bytes(),
    };
    kiln_solver::solve(job, limits).await.map_err(|error| match error {
        SolveError::Cancelled => BuildError::Cancelled.into(),
        SolveError::Vertex { vertex: _, source: OpError::Build(inner) }
            if matches!(*inner, BuildError::Store(_)) =>
        {
            Unsolved::from(*inner)
        }
        SolveError::Vertex { vertex, source: OpError::Build(inner) }
            if matches!(*inner, BuildError::Pull { .. } | BuildError::NoImage { .. }) =>
        {
            Unsolved::from(base_error(plan, VertexId(vertex), *inner))
        }
        SolveError::Vertex { vertex, source } => {
            let op = lowered.definition.vertices()[vertex].op.digest();
            let title = titles[vertex].clone();
            let failed = FailedStep { op, title, snapshot: shared.steps.kept(&op) };
            let source = step_error(lowered, dockerfile, VertexId(vertex), source);
            Unsolved { source, failed: Some(Box::new(failed)) }
        }
        SolveError::Cache { source } => source.into(),
        other => BuildError::Bug { what: other.to_string() }.into(),
    })
}

/// A base image that was found and could not be had when a step needed it: the error says for which line, and what
/// pins it.
fn base_error(plan: &Plan, vertex: VertexId, mut error: BuildError) -> BuildError {
    let Plan { lowered, dockerfile, pins, .. } = plan;
    if let BuildError::Pull { at, .. } | BuildError::NoImage { at, .. } = &mut error {
        *at = lowered.source_map.location(vertex).map(|location| (dockerfile.clone(), location.clone()));
    }
    if let BuildError::Pull { reference, locked, .. } = &mut error {
        *locked = pins.file_behind(reference);
    }
    error
}

pub(crate) fn step_error(
    lowered: &Lowered,
    dockerfile: &Arc<Dockerfile>,
    vertex: VertexId,
    source: OpError,
) -> BuildError {
    let at = lowered.source_map.location(vertex).map(|location| (dockerfile.clone(), location.clone()));
    let title = lowered.source_map.title(vertex).to_owned();
    BuildError::Step { title, at, source: Box::new(source) }
}
