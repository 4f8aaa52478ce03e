//! The asynchronous shell: carries out the core's commands and feeds the answers back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use kiln_oci::Digest;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::core::{Command, Core, Save};
use crate::{CacheKey, CacheStore, Cached, Cancellation, Event, EventSink, Op, Scope, VertexInput};

/// One solve.
pub struct Job<O: Op, C> {
    /// Ops with their inputs and the title under which they are remembered; inputs first.
    pub vertices: Vec<(Arc<O>, Vec<VertexInput>, String)>,
    /// Whose output is wanted.
    pub target: usize,
    /// Results of earlier builds.
    pub cache: Arc<C>,
    /// Look results up; results are saved in any case.
    pub use_cache: bool,
    /// How many vertices run at once.
    pub parallelism: usize,
    /// Gives up.
    pub cancel: Arc<dyn Cancellation>,
    /// Where progress goes.
    pub events: EventSink,
}

/// Why a solve ended without a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SolveError<E: std::error::Error + 'static, S: std::error::Error + 'static> {
    /// The solve was given up.
    #[error("the build was cancelled")]
    Cancelled,
    /// A vertex failed.
    #[error("step {vertex} failed")]
    Vertex {
        /// Position of the vertex.
        vertex: usize,
        /// Its error.
        source: E,
    },
    /// The cache could not be read or written.
    #[error("the build cache failed")]
    Cache {
        /// Its error.
        source: S,
    },
    /// A vertex's code panicked: a bug in kiln.
    #[error("step {vertex} panicked: a bug in kiln")]
    Panicked {
        /// Position of the vertex.
        vertex: usize,
    },
    /// Nothing runs and nothing is done: a bug in the solver.
    #[error("the solver has nothing left to do and no result: a bug in kiln")]
    Stuck,
}

type Failure<O, C> = SolveError<<O as Op>::Error, <C as CacheStore<<O as Op>::Output>>::Error>;

enum Answer<O> {
    Digested { vertex: usize, input: usize, digest: Digest },
    Ran { vertex: usize, output: O, save: Option<Save> },
}

enum TaskError<E> {
    Op { vertex: usize, source: E },
    Panicked { vertex: usize },
}

type TaskResult<O> = Result<Answer<<O as Op>::Output>, TaskError<<O as Op>::Error>>;

/// Solves `job`: the target's output, with everything that had to run run and saved.
///
/// After the first failure the rest is cancelled and awaited; nothing runs on when this returns.
///
/// # Errors
/// See [`SolveError`]; the first failure wins.
pub async fn solve<O, C>(job: Job<O, C>) -> Result<O::Output, Failure<O, C>>
where
    O: Op,
    C: CacheStore<O::Output> + 'static,
{
    let graph: Vec<_> = job.vertices.iter().map(|(op, inputs, _)| (op.identity(), inputs.clone())).collect();
    let mut core = Core::new(&graph, job.target, job.use_cache);
    let mut tasks: JoinSet<TaskResult<O>> = JoinSet::new();
    let permits = Arc::new(Semaphore::new(job.parallelism.max(1)));
    let mut commands: VecDeque<Command<O::Output>> = core.start().into();
    let mut failure: Option<Failure<O, C>> = None;

    loop {
        while let Some(command) = commands.pop_front() {
            if failure.is_some() {
                continue;
            }
            match command {
                Command::Lookup { vertex, key } => match job.cache.lookup(&key) {
                    Ok(hit) => {
                        if hit.is_some() {
                            (job.events)(Event::Cached { vertex });
                        }
                        commands.extend(core.found(vertex, hit));
                    }
                    Err(source) => fail(&mut failure, &*job.cancel, SolveError::Cache { source }),
                },
                Command::Digest { vertex, input, output } => {
                    let (op, runner) = (job.vertices[vertex].0.clone(), Runner::of(&job, vertex));
                    tasks.spawn(async move {
                        let work = move || runner.scoped(|scope| op.content(input, &output, scope));
                        match tokio::task::spawn_blocking(work).await {
                            Ok(Ok(digest)) => Ok(Answer::Digested { vertex, input, digest }),
                            Ok(Err(source)) => Err(TaskError::Op { vertex, source }),
                            Err(_) => Err(TaskError::Panicked { vertex }),
                        }
                    });
                }
                Command::Run { vertex, inputs, save } => {
                    let (op, runner) = (job.vertices[vertex].0.clone(), Runner::of(&job, vertex));
                    let permits = permits.clone();
                    tasks.spawn(async move {
                        let _permit = permits.acquire_owned().await;
                        match tokio::task::spawn_blocking(move || runner.run(&*op, &inputs)).await {
                            Ok(Ok(output)) => Ok(Answer::Ran { vertex, output, save }),
                            Ok(Err(source)) => Err(TaskError::Op { vertex, source }),
                            Err(_) => Err(TaskError::Panicked { vertex }),
                        }
                    });
                }
            }
        }
        if failure.is_none()
            && let Some(output) = core.result()
        {
            return Ok(output.clone());
        }
        let Some(joined) = tasks.join_next().await else {
            return Err(failure.unwrap_or(SolveError::Stuck));
        };
        match joined {
            Ok(Ok(Answer::Digested { vertex, input, digest })) => {
                commands.extend(core.digested(vertex, input, digest));
            }
            Ok(Ok(Answer::Ran { vertex, output, save })) => {
                if let Err(source) = remember(&job, vertex, &output, save) {
                    fail(&mut failure, &*job.cancel, SolveError::Cache { source });
                }
                commands.extend(core.ran(vertex, output));
            }
            Ok(Err(TaskError::Op { .. })) if job.cancel.is_cancelled() && failure.is_none() => {
                failure = Some(SolveError::Cancelled);
            }
            Ok(Err(TaskError::Op { vertex, source })) => {
                fail(&mut failure, &*job.cancel, SolveError::Vertex { vertex, source });
            }
            Ok(Err(TaskError::Panicked { vertex })) => {
                fail(&mut failure, &*job.cancel, SolveError::Panicked { vertex });
            }
            Err(_) => fail(&mut failure, &*job.cancel, SolveError::Stuck),
        }
    }
}

/// The first failure stays; everything else is asked to stop.
fn fail<E>(failure: &mut Option<E>, cancel: &dyn Cancellation, error: E) {
    cancel.cancel();
    failure.get_or_insert(error);
}

fn remember<O, C>(
    job: &Job<O, C>,
    vertex: usize,
    output: &O::Output,
    save: Option<Save>,
) -> Result<(), C::Error>
where
    O: Op,
    C: CacheStore<O::Output>,
{
    let Some(Save { canonical, keys }) = save else { return Ok(()) };
    let keys: Vec<CacheKey> = keys;
    job.cache.save(&keys, &Cached { canonical, output: output.clone() }, &job.vertices[vertex].2)
}

/// What a blocking task needs to know of the job.
struct Runner {
    vertex: usize,
    cancel: Arc<dyn Cancellation>,
    events: EventSink,
}

impl Runner {
    fn of<O: Op, C>(job: &Job<O, C>, vertex: usize) -> Self {
        Self { vertex, cancel: job.cancel.clone(), events: job.events.clone() }
    }

    fn scoped<T>(&self, work: impl FnOnce(&Scope<'_>) -> T) -> T {
        let vertex = self.vertex;
        let log = |stream, bytes: &[u8]| {
            (self.events)(Event::Log { vertex, stream, bytes: bytes.to_vec() });
        };
        work(&Scope { cancel: &*self.cancel, log: &log })
    }

    fn run<O: Op>(&self, op: &O, inputs: &[O::Output]) -> Result<O::Output, O::Error> {
        let vertex = self.vertex;
        (self.events)(Event::Started { vertex });
        let started = Instant::now();
        let result = self.scoped(|scope| op.run(inputs, scope));
        (self.events)(match &result {
            Ok(_) => Event::Completed { vertex, took: started.elapsed() },
            Err(_) if self.cancel.is_cancelled() => Event::Cancelled { vertex },
            Err(error) => Event::Failed { vertex, message: chain(error) },
        });
        result
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
