//! `kiln shell`: a build is asked for once more, up to a step, and a command runs in its place.
//!
//! Everything the step stands on comes from the cache, or is made anew where that is gone or an input
//! has changed. Secrets and agents are asked for anew: they are nowhere noted down.

use std::sync::Arc;

use kiln_executor::Exit;
use kiln_llb::{Op, Vertex, VertexId};
use kiln_oci::{Digest, SnapshotId};

use crate::build::{Plan, plan};
use crate::ops::{ShellJob, ShellTree};
use crate::solve::solve;
use crate::{BuildCancel, BuildError, BuildRequest, Engine, FailedStep, NoCache, Progress};

/// A command to run in the place of a step.
#[derive(Debug, Clone)]
pub struct ShellRequest {
    /// Which step.
    pub step: ShellStep,
    /// On what the step stands on, not on what it leaves.
    pub before: bool,
    /// Program and arguments; empty: a shell.
    pub command: Vec<String>,
    /// It gets a terminal that is joined to this process's; else this process's standard streams.
    pub terminal: bool,
}

/// A step of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShellStep {
    /// The one that failed.
    Failed(FailedStep),
    /// The one with this number.
    Number(StepNumber),
}

/// A step as the progress shows it: `[build 2/3]` is number 2 of `build`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepNumber {
    /// Its stage; `None`: the one that is built.
    pub stage: Option<String>,
    /// Its number.
    pub number: usize,
}

impl std::str::FromStr for StepNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (stage, number) = match text.rsplit_once(':') {
            Some((stage, number)) => (Some(stage.to_owned()), number),
            None => (None, text),
        };
        let number = number.parse().ok().filter(|number| *number > 0);
        let number = number.ok_or_else(|| format!("{text:?} is no step such as 2 or STAGE:2"))?;
        Ok(Self { stage, number })
    }
}

impl std::fmt::Display for StepNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.stage {
            Some(stage) => write!(f, "{stage}:{}", self.number),
            None => write!(f, "{}", self.number),
        }
    }
}

/// Runs a command where a step has been, or would be: with its mounts, environment, user, limits and
/// network. Nothing that it writes is kept, but to cache mounts. How it ended, and whether it saw what
/// the step had left: the files of a failed step may be gone.
///
/// # Errors
/// [`BuildError::NoStep`], [`BuildError::NothingBefore`]; those of [`build`](crate::build()) when a
/// step in front fails; [`OpError::NoShell`](crate::OpError::NoShell) in [`BuildError::Step`].
pub async fn shell(
    engine: &Engine,
    request: &BuildRequest,
    wanted: &ShellRequest,
    progress: Arc<dyn Progress>,
    cancel: &BuildCancel,
) -> Result<(Exit, ShellState), BuildError> {
    // What earlier builds have made is what is asked for, cache mounts included.
    let lock = request.lock.reading();
    let request = BuildRequest { no_cache: NoCache::default(), origin: None, lock, ..request.clone() };
    let plan = plan(engine, &request, &progress, cancel)?;
    let (id, vertex) = find(&plan, &wanted.step)?;
    let kept = match &wanted.step {
        ShellStep::Failed(FailedStep { snapshot: Some(id), .. }) => hold(engine, id)?,
        _ => None,
    };
    let (tree, state) = match (&wanted.step, kept) {
        _ if wanted.before => {
            if vertex.op.base().is_none() && !matches!(vertex.op, Op::Exec(_)) {
                let title = plan.lowered.source_map.title(id).to_owned();
                return Err(BuildError::NothingBefore { title });
            }
            (ShellTree::Before, ShellState::Asked)
        }
        (ShellStep::Failed(_), Some(kept)) => (ShellTree::Of(Some(kept)), ShellState::Asked),
        (ShellStep::Failed(failed), None) => {
            let gone = if failed.snapshot.is_some() { ShellState::Gone } else { ShellState::Unchanged };
            (ShellTree::Before, gone)
        }
        (ShellStep::Number(_), _) => {
            let after = solve(&plan, Some(id), None, progress.clone()).await;
            (ShellTree::Of(after.map_err(|unsolved| unsolved.source)?.snapshot().cloned()), ShellState::Asked)
        }
    };
    let job = Arc::new(ShellJob::new(tree, wanted.command.clone(), wanted.terminal));
    let solved = solve(&plan, Some(id), Some(job.clone()), progress).await;
    solved.map_err(|unsolved| unsolved.source)?;
    let ended = job.ended().ok_or_else(|| BuildError::Bug { what: "a shell that never ran".to_owned() })?;
    Ok((ended, state))
}

/// What a command has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShellState {
    /// What was asked for.
    Asked,
    /// The step had written nothing when it failed: what it stands on.
    Unchanged,
    /// What the step had left is gone: what it stands on.
    Gone,
}

/// Protects the files of a failed step; `None`: they are gone.
fn hold(engine: &Engine, id: &SnapshotId) -> Result<Option<SnapshotId>, BuildError> {
    engine.store.hold_snapshot(id)?;
    Ok(engine.snapshots.contains(id).then(|| id.clone()))
}

fn find<'a>(plan: &'a Plan, step: &ShellStep) -> Result<(VertexId, &'a Vertex), BuildError> {
    let vertices = plan.lowered.definition.vertices();
    let title = |at: usize| plan.lowered.source_map.title(VertexId(at));
    let digest = |at: usize| -> Digest { vertices[at].op.digest() };
    let found = match step {
        ShellStep::Failed(failed) => {
            let is_it = |at: &usize| digest(*at) == failed.op;
            // Of a build for several platforms there may be one for each.
            let titled = (0..vertices.len()).find(|at| is_it(at) && title(*at) == failed.title);
            titled.or_else(|| (0..vertices.len()).find(is_it))
        }
        ShellStep::Number(wanted) => {
            let built = plan.lowered.result.and_then(|id| stage_of(title(id.0))).map(|(stage, _)| stage);
            let stage = wanted.stage.as_deref().or(built).unwrap_or_default();
            let of = |at: &usize| {
                stage_of(title(*at)).is_some_and(|(name, number)| {
                    number == wanted.number && (name == stage || without_platform(name) == stage)
                })
            };
            // The last of those that make one step.
            (0..vertices.len()).rfind(of)
        }
    };
    let missing = || {
        let what = match step {
            ShellStep::Failed(failed) => format!("`{}`", failed.title),
            ShellStep::Number(number) => number.to_string(),
        };
        let numbered = (0..vertices.len()).map(title).filter(|title| stage_of(title).is_some());
        BuildError::NoStep { what, steps: numbered.map(str::to_owned).collect() }
    };
    let at = found.ok_or_else(missing)?;
    Ok((VertexId(at), &vertices[at]))
}

/// Stage and number of a title such as `[build  2/13] RUN make`.
pub(crate) fn stage_of(title: &str) -> Option<(&str, usize)> {
    let (label, _) = title.strip_prefix('[')?.split_once("] ")?;
    let (front, total) = label.rsplit_once('/')?;
    total.parse::<usize>().ok()?;
    let (stage, number) = front.rsplit_once(' ').unwrap_or(("", front));
    Some((stage.trim_end(), number.parse().ok()?))
}

/// A stage as the Dockerfile calls it: titles of a build for several platforms say for which one it is.
pub(crate) fn without_platform(stage: &str) -> &str {
    let (first, rest) = stage.split_once(' ').unwrap_or((stage, ""));
    if first.contains('/') { rest.trim_start() } else { stage }
}

/// Whether a title's stage is the one that somebody calls `name`, with its platform or without.
pub(crate) fn is_stage(stage: &str, name: &str) -> bool {
    stage.eq_ignore_ascii_case(name) || without_platform(stage).eq_ignore_ascii_case(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_the_same_for_every_platform() {
        let stage = |title| stage_of(title).map(|(stage, _)| stage);
        assert_eq!(stage("[linux/arm/v7 build 2/3] RUN make"), Some("linux/arm/v7 build"));
        assert_eq!(stage("[linux/arm64 2/3] RUN make"), Some("linux/arm64"));
        assert!(
            is_stage("linux/arm/v7 build", "Build") && is_stage("linux/arm/v7 build", "linux/arm/v7 build")
        );
        assert!(
            is_stage("linux/arm64", "") && is_stage("build", "build") && !is_stage("linux/arm64", "build")
        );
    }

    #[test]
    fn steps_are_known_by_stage_and_number() {
        assert_eq!(stage_of("[2/3] RUN make"), Some(("", 2)));
        assert_eq!(stage_of("[build  2/13] RUN make [x] y"), Some(("build", 2)));
        assert_eq!(stage_of("[stage-1 12/13] RUN make"), Some(("stage-1", 12)));
        for other in ["[internal] load build context", "RUN make", "[a/b] x", "[x] 1/2] y"] {
            assert_eq!(stage_of(other), None, "{other}");
        }
    }

    #[test]
    fn step_numbers_are_read() {
        let number = |stage: Option<&str>, number| StepNumber { stage: stage.map(str::to_owned), number };
        assert_eq!("2".parse(), Ok(number(None, 2)));
        assert_eq!("build:12".parse(), Ok(number(Some("build"), 12)));
        for wrong in ["", "0", "x", "build:", "2:build", "-1"] {
            assert!(wrong.parse::<StepNumber>().is_err(), "{wrong}");
        }
    }
}
