//! The asynchronous shell: carries out the core's commands and feeds the answers back.
//!
//! One task owns the [`Core`]; everybody else sends it messages. Index reads are made by that task
//! itself, all that takes longer is made by [`task`] on threads of its own. What is looked up in one breath and
//! not found near is asked for far away as one question.

mod shared;
#[allow(clippy::duplicate_mod, reason = "tests compile it once more")]
mod task;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use self::task::{Ended, Question, Task, TaskError, VertexCancel};
use crate::core::{Command, Core, Fact, JobId, Limits, Plan, Wait};
use crate::{CacheKey, CacheStore, Cached, Cancellation, Event, EventSink, Op, Places, Vertex};

/// One solve.
pub struct Job<O: Op, C> {
    /// The steps, inputs before their users.
    pub vertices: Vec<Vertex<O>>,
    /// Whose output is wanted.
    pub target: usize,
    /// Results of earlier builds.
    pub cache: Arc<C>,
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
    /// A vertex failed that another job of the same solver ran for both; that job has the error.
    #[error("step {vertex} failed in another build that ran it for this one: {message}")]
    Elsewhere {
        /// Position of the vertex.
        vertex: usize,
        /// The error with its causes.
        message: String,
    },
    /// The cache does not answer.
    #[error("the build cache failed")]
    Cache {
        /// Its error.
        source: S,
    },
    /// An op panicked.
    #[error("step {vertex} panicked: a bug in kiln")]
    Panicked {
        /// Position of the vertex.
        vertex: usize,
    },
    /// Nothing runs and nothing is done: a bug in the solver.
    #[error("the solver has nothing left to do and no result: a bug in kiln ({waits})")]
    Stuck {
        /// What waits for what, by titles.
        waits: String,
    },
}

type Failure<O, C> = SolveError<<O as Op>::Error, <C as CacheStore<<O as Op>::Output>>::Error>;
type Outcome<O, C> = Result<<O as Op>::Output, Failure<O, C>>;

/// What reaches the task that owns the core.
enum Message<O: Op, C: CacheStore<O::Output>> {
    Start { job: Job<O, C>, reply: oneshot::Sender<Outcome<O, C>> },
    Told { number: usize, event: Event },
    Ended { number: usize, ended: Ended<O, C::Error> },
}

/// How many keys are guessed when a cache that is far is asked.
const AHEAD: usize = 256;

/// A lookup that found nothing near.
struct Far {
    vertex: usize,
    key: CacheKey,
    question: Question,
}

/// How often a solve that waits looks whether it was given up.
const TICK: Duration = Duration::from_millis(50);

/// How long nothing may happen before it is said what waits for what.
const QUIET: Duration = Duration::from_secs(60);

/// Messages on their way; a step that prints faster than they are taken waits.
const INBOX: usize = 1024;

/// Solves jobs; identical work of several runs once.
///
/// Must be made inside a tokio runtime with a clock. Dropping it lets jobs that were started go on.
pub struct Solver<O: Op, C: CacheStore<O::Output>> {
    inbox: mpsc::Sender<Message<O, C>>,
}

impl<O: Op, C: CacheStore<O::Output> + 'static> Solver<O, C> {
    /// A solver without jobs.
    pub fn new(limits: Limits) -> Self {
        Self::watched(limits, QUIET)
    }

    /// One that says what waits for what when nothing happened for `quiet`.
    fn watched(limits: Limits, quiet: Duration) -> Self {
        let (inbox, messages) = mpsc::channel(INBOX);
        // Blocking threads hold strong senders as long as they run, the task itself none.
        tokio::spawn(Driver::new(limits, inbox.downgrade()).run(messages, quiet));
        Self { inbox }
    }

    /// Solves `job`: the target's output, with everything that had to run run and saved.
    ///
    /// After the first failure the rest of the job is cancelled and awaited, except for what other jobs
    /// of this solver wait for. Dropping the future gives the job up.
    ///
    /// # Errors
    /// See [`SolveError`]; the first failure wins.
    pub async fn solve(&self, job: Job<O, C>) -> Result<O::Output, Failure<O, C>> {
        let (reply, outcome) = oneshot::channel();
        let stuck = || SolveError::Stuck { waits: "the solver is gone".to_owned() };
        self.inbox.send(Message::Start { job, reply }).await.map_err(|_| stuck())?;
        outcome.await.map_err(|_| stuck())?
    }
}

/// Solves one job alone; see [`Solver::solve`].
///
/// # Errors
/// See [`SolveError`]; the first failure wins.
pub async fn solve<O, C>(job: Job<O, C>, limits: Limits) -> Result<O::Output, Failure<O, C>>
where
    O: Op,
    C: CacheStore<O::Output> + 'static,
{
    Solver::new(limits).solve(job).await
}

/// A job that was started.
struct Started<O: Op, C: CacheStore<O::Output>> {
    job: Job<O, C>,
    /// What the core calls its vertices.
    numbers: Vec<usize>,
    reply: Option<oneshot::Sender<Outcome<O, C>>>,
    /// Set once it is over; it is told when nothing of it runs any more.
    outcome: Option<Outcome<O, C>>,
}

/// A task on a thread of its own.
struct Busy {
    cancel: Arc<VertexCancel>,
    tasks: usize,
    /// Vertices of other jobs that get its result: job and position.
    audience: Vec<(JobId, usize)>,
}

/// Why a vertex failed: the error for the first job that hears of it, what it says for the others.
struct Told<O: Op, C: CacheStore<O::Output>> {
    error: Option<TaskError<O::Error, C::Error>>,
    message: String,
}

/// What a command is answered with, if it is answered at once; else the job whose cache does not answer.
type Answer<O, C> =
    Result<Option<Fact<<O as Op>::Output>>, (JobId, <C as CacheStore<<O as Op>::Output>>::Error)>;

struct Driver<O: Op, C: CacheStore<O::Output>> {
    core: Core<O::Output>,
    jobs: BTreeMap<JobId, Started<O, C>>,
    /// Job and position of a vertex of the core.
    places: HashMap<usize, (JobId, usize)>,
    busy: HashMap<usize, Busy>,
    errors: HashMap<usize, Told<O, C>>,
    inbox: mpsc::WeakSender<Message<O, C>>,
}

impl<O: Op, C: CacheStore<O::Output> + 'static> Driver<O, C> {
    fn new(limits: Limits, inbox: mpsc::WeakSender<Message<O, C>>) -> Self {
        Self {
            core: Core::new(limits),
            jobs: BTreeMap::new(),
            places: HashMap::new(),
            busy: HashMap::new(),
            errors: HashMap::new(),
            inbox,
        }
    }

    async fn run(mut self, mut messages: mpsc::Receiver<Message<O, C>>, quiet: Duration) {
        let mut heard = tokio::time::Instant::now();
        loop {
            match tokio::time::timeout(TICK, messages.recv()).await {
                Ok(Some(message)) => {
                    heard = tokio::time::Instant::now();
                    self.take(message);
                }
                // Nobody can start a job any more, and nothing runs.
                Ok(None) => break,
                Err(_) if heard.elapsed() >= quiet => {
                    heard = tokio::time::Instant::now();
                    self.tell_waits();
                }
                Err(_) => {}
            }
            self.give_up_cancelled();
            self.give_up_stuck();
            self.tell_outcomes();
        }
    }

    fn take(&mut self, message: Message<O, C>) {
        match message {
            Message::Start { job, reply } => self.start(job, reply),
            Message::Told { number, event } => self.tell(number, &event),
            Message::Ended { number, ended } => {
                if let Some(busy) = self.busy.get_mut(&number) {
                    busy.tasks -= 1;
                    if busy.tasks == 0 {
                        self.busy.remove(&number);
                    }
                }
                let fact = match ended {
                    Ended::Digested { input, digest } => Fact::Digested { vertex: number, input, digest },
                    Ended::Asked { question: Question::Mark { input }, hit } => {
                        Fact::Marked { vertex: number, input, known: hit.is_some() }
                    }
                    Ended::Asked { question: Question::Result { key }, hit } => {
                        let is_old = hit.as_ref().is_some_and(|hit| self.found(number, &key, hit));
                        Fact::Found { vertex: number, hit, is_old }
                    }
                    Ended::Fetched { output } => Fact::Loaded { vertex: number, output },
                    Ended::Ran { canonical, output } => Fact::Ran { vertex: number, canonical, output },
                    Ended::Stopped { digesting } => Fact::Stopped { vertex: number, digesting },
                    Ended::Failed { error, message } => {
                        self.errors.insert(number, Told { error: Some(error), message });
                        Fact::Failed { vertex: number }
                    }
                };
                self.learn(fact);
            }
        }
    }

    fn start(&mut self, job: Job<O, C>, reply: oneshot::Sender<Outcome<O, C>>) {
        let plan = |vertex: &Vertex<O>| Plan {
            identity: vertex.op.identity(),
            by_content: vertex.op.identity_by_content(),
            inputs: vertex.inputs.clone(),
            refresh: vertex.refresh,
            lineage: vertex.lineage,
            cost: vertex.cost,
        };
        let plans: Vec<Plan> = job.vertices.iter().map(plan).collect();
        let (id, numbers, commands) = self.core.start(&plans, job.target);
        for (position, number) in numbers.iter().enumerate() {
            self.places.insert(*number, (id, position));
        }
        self.jobs.insert(id, Started { job, numbers, reply: Some(reply), outcome: None });
        self.carry_out(commands);
    }

    fn learn(&mut self, fact: Fact<O::Output>) {
        let commands = self.core.apply(fact);
        self.carry_out(commands);
    }

    fn carry_out(&mut self, commands: Vec<Command<O::Output>>) {
        // Index reads are answered on the spot.
        let mut open = std::collections::VecDeque::from(commands);
        let mut far = Vec::new();
        while let Some(command) = open.pop_front() {
            match self.carry_out_one(command, &mut far) {
                Ok(Some(fact)) => open.extend(self.core.apply(fact)),
                Ok(None) => {}
                Err((job, source)) => {
                    // A lookup stays without answer: nothing of the job goes on.
                    self.end(job, Err(SolveError::Cache { source }));
                    open.extend(self.core.apply(Fact::GivenUp { job }));
                }
            }
        }
        self.ask_far(far);
    }

    /// Tells that a result was found, unless it is too old: returns that. What is far is told its marks, for
    /// nobody saved them here.
    fn found(&self, number: usize, key: &CacheKey, hit: &Cached<O::Output>) -> bool {
        let Some((id, vertex)) = self.places.get(&number) else { return false };
        let Some(Started { job, .. }) = self.jobs.get(id) else { return false };
        if job.vertices[*vertex].op.is_too_old(key, &hit.output) {
            return true;
        }
        (job.events)(Event::Cached { vertex: *vertex, from: job.cache.origin(hit) });
        if job.cache.is_far(hit) {
            let marks = self.core.present_marks(number);
            let places = Places { keys: &[], replace: false, marks: &marks, slot: None };
            // Without marks steps may run that need not.
            let _ = job.cache.link(&places, hit, &job.vertices[*vertex].title);
        }
        false
    }

    /// Asks the caches of all jobs that have something far, on a thread each.
    fn ask_far(&mut self, far: Vec<Far>) {
        let mut by_job: BTreeMap<JobId, Vec<Far>> = BTreeMap::new();
        for asked in far {
            // Its job may have been given up since.
            if let Some((id, _)) = self.places.get(&asked.vertex) {
                by_job.entry(*id).or_default().push(asked);
            }
        }
        for (id, asked) in by_job {
            let results = asked.iter().filter(|asked| matches!(asked.question, Question::Result { .. }));
            let results: Vec<(usize, CacheKey)> = results.map(|asked| (asked.vertex, asked.key)).collect();
            let soon = self.core.next_keys(&results, AHEAD);
            let keys: Vec<CacheKey> = asked.iter().map(|asked| asked.key).collect();
            let tasks = asked.iter().filter_map(|asked| Some((self.task(asked.vertex)?, asked.question)));
            let tasks: Vec<_> = tasks.collect();
            let cache = self.jobs[&id].job.cache.clone();
            tokio::task::spawn_blocking(move || {
                let ask = std::panic::AssertUnwindSafe(|| cache.ask_far(&keys, &soon));
                // A cache that panics knows nothing.
                let mut answers = std::panic::catch_unwind(ask).unwrap_or_default().into_iter();
                for (task, question) in tasks {
                    task.answer(question, answers.next().flatten());
                }
            });
        }
    }

    fn carry_out_one(&mut self, command: Command<O::Output>, far: &mut Vec<Far>) -> Answer<O, C> {
        let of = |vertex: usize| {
            let (id, position) = self.places[&vertex];
            (id, position, &self.jobs[&id].job)
        };
        match command {
            Command::Lookup { vertex, key } => {
                let (id, _, job) = of(vertex);
                let hit = job.cache.lookup(&key).map_err(|error| (id, error))?;
                if hit.is_none() && job.cache.may_be_far(&key) {
                    far.push(Far { vertex, key, question: Question::Result { key } });
                    return Ok(None);
                }
                let is_old = hit.as_ref().is_some_and(|hit| self.found(vertex, &key, hit));
                return Ok(Some(Fact::Found { vertex, hit, is_old }));
            }
            Command::Mark { vertex, input, key } => {
                let (id, _, job) = of(vertex);
                let known = job.cache.lookup(&key).map_err(|error| (id, error))?.is_some();
                if !known && job.cache.may_be_far(&key) {
                    far.push(Far { vertex, key, question: Question::Mark { input } });
                    return Ok(None);
                }
                return Ok(Some(Fact::Marked { vertex, input, known }));
            }
            Command::Load { vertex, cached } => {
                let (id, _, job) = of(vertex);
                if job.cache.is_far(&cached) {
                    let cache = job.cache.clone();
                    if let Some(task) = self.task(vertex) {
                        tokio::task::spawn_blocking(move || task.fetch(&*cache, &cached));
                    }
                    return Ok(None);
                }
                let there = job.cache.load(&cached).map_err(|error| (id, error))?;
                return Ok(Some(Fact::Loaded { vertex, output: there.then_some(cached.output) }));
            }
            Command::Link { vertex, keys, marks, cached } => {
                let (id, position, job) = of(vertex);
                let places = Places { keys: &keys, replace: false, marks: &marks, slot: None };
                let title = &job.vertices[position].title;
                job.cache.link(&places, &cached, title).map_err(|error| (id, error))?;
            }
            Command::Digest { vertex, input, output } => {
                let op = of(vertex).2.vertices[of(vertex).1].op.clone();
                if let Some(task) = self.task(vertex) {
                    tokio::task::spawn_blocking(move || task.digest(&*op, input, &output));
                }
            }
            Command::Run { vertex, inputs, save } => {
                let (_, position, job) = of(vertex);
                let (op, cache) = (job.vertices[position].op.clone(), job.cache.clone());
                let title = job.vertices[position].title.clone();
                if let Some(task) = self.task(vertex) {
                    tokio::task::spawn_blocking(move || {
                        task.run(&*op, &*cache, &title, &inputs, save.as_deref());
                    });
                }
            }
            Command::Stop { vertex } => {
                if let Some(busy) = self.busy.get(&vertex) {
                    busy.cancel.stop();
                }
            }
            Command::Merged { vertex, with } => self.merged(vertex, with),
            Command::Finish { job, outcome } => {
                let outcome = outcome.map_err(|failed| self.failure(job, failed));
                self.end(job, outcome);
            }
        }
        Ok(None)
    }

    /// What a thread needs to know to work for `vertex`; `None`: there is nobody to answer to.
    fn task(&mut self, vertex: usize) -> Option<Task<O, C>> {
        let (id, position) = self.places[&vertex];
        let started = &self.jobs[&id];
        let busy = self.busy.entry(vertex).or_insert_with(|| Busy {
            cancel: Arc::new(VertexCancel::new(started.job.cancel.clone())),
            tasks: 0,
            audience: Vec::new(),
        });
        busy.tasks += 1;
        let inbox = self.inbox.upgrade()?;
        Some(Task { number: vertex, position, cancel: busy.cancel.clone(), inbox })
    }

    /// Tells the job of a vertex, and the others that get its result.
    fn tell(&self, number: usize, event: &Event) {
        let own = self.places.get(&number).copied();
        let others = self.busy.get(&number).map(|busy| busy.audience.as_slice()).unwrap_or_default();
        for (id, position) in own.iter().chain(others) {
            if let Some(started) = self.jobs.get(id) {
                (started.job.events)(event.at(*position));
            }
        }
    }

    fn merged(&mut self, vertex: usize, with: usize) {
        let ((id, position), (runner_id, _)) = (self.places[&vertex], self.places[&with]);
        let event = match self.busy.get_mut(&with) {
            Some(busy) if id != runner_id => {
                busy.cancel.adopt();
                busy.audience.push((id, position));
                Event::Started { vertex: position }
            }
            _ => Event::Cached { vertex: position, from: None },
        };
        (self.jobs[&id].job.events)(event);
    }

    fn failure(&mut self, job: JobId, failed: usize) -> Failure<O, C> {
        let (id, position) = self.places[&failed];
        let own = if id == job { position } else { self.position_behind(job, failed) };
        let Some(Told { error, message }) = self.errors.get_mut(&failed) else {
            return SolveError::Stuck { waits: "a step failed without an error".to_owned() };
        };
        match error.take() {
            Some(TaskError::Op(source)) => SolveError::Vertex { vertex: own, source },
            Some(TaskError::Cache(source)) => SolveError::Cache { source },
            Some(TaskError::Panicked) => SolveError::Panicked { vertex: own },
            None => SolveError::Elsewhere { vertex: own, message: message.clone() },
        }
    }

    /// The vertex of `job` that got the result of a vertex of another job.
    fn position_behind(&self, job: JobId, runner: usize) -> usize {
        let audience = self.busy.get(&runner).map(|busy| busy.audience.as_slice()).unwrap_or_default();
        audience.iter().find(|(id, _)| *id == job).map_or(0, |(_, position)| *position)
    }

    /// Notes the outcome of a job that the core knows no more. The first one stays.
    fn end(&mut self, job: JobId, outcome: Outcome<O, C>) {
        let Some(started) = self.jobs.get_mut(&job) else { return };
        let failed = outcome.is_err();
        started.outcome.get_or_insert(outcome);
        let is_shared = |number: &usize| self.busy.get(number).is_some_and(|busy| busy.cancel.is_adopted());
        if failed && !started.numbers.iter().any(is_shared) {
            started.job.cancel.cancel();
        }
    }

    fn give_up_cancelled(&mut self) {
        let is_over = |started: &Started<O, C>| {
            started.outcome.is_none()
                && (started.job.cancel.is_cancelled()
                    || started.reply.as_ref().is_none_or(oneshot::Sender::is_closed))
        };
        let over: Vec<JobId> =
            self.jobs.iter().filter(|(_, started)| is_over(started)).map(|(id, _)| *id).collect();
        for job in over {
            self.end(job, Err(SolveError::Cancelled));
            self.learn(Fact::GivenUp { job });
        }
    }

    /// Ends jobs that nothing will ever happen to: better an error than a build that hangs.
    fn give_up_stuck(&mut self) {
        // Everything that is under way is either a task or was answered already.
        if !self.busy.is_empty() {
            return;
        }
        let is_stuck = |started: &Started<O, C>| started.outcome.is_none();
        let stuck: Vec<JobId> =
            self.jobs.iter().filter(|(_, started)| is_stuck(started)).map(|(id, _)| *id).collect();
        for job in stuck {
            let texts: Vec<String> = self.waits().into_iter().map(|(_, text)| text).collect();
            self.end(job, Err(SolveError::Stuck { waits: texts.join("; ") }));
            self.learn(Fact::GivenUp { job });
        }
    }

    /// Answers jobs that are over and of which nothing runs any more.
    fn tell_outcomes(&mut self) {
        let runs = |started: &Started<O, C>| {
            let is_own = |number: &usize| self.busy.get(number).is_some_and(|busy| !busy.cancel.is_adopted());
            started.numbers.iter().any(is_own)
        };
        let told: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, started)| started.outcome.is_some() && !runs(started))
            .map(|(id, _)| *id)
            .collect();
        for id in &told {
            let Some(started) = self.jobs.get_mut(id) else { continue };
            if let (Some(reply), Some(outcome)) = (started.reply.take(), started.outcome.take()) {
                // Nobody listens to a job that was dropped.
                let _ = reply.send(outcome);
            }
        }
        // A job whose work others wait for stays known until that ends.
        let busy: BTreeSet<JobId> =
            self.busy.keys().filter_map(|number| Some(self.places.get(number)?.0)).collect();
        let gone = |id: &JobId, started: &Started<O, C>| started.reply.is_none() && !busy.contains(id);
        let gone: Vec<JobId> =
            self.jobs.iter().filter(|(id, started)| gone(id, started)).map(|(id, _)| *id).collect();
        for id in gone {
            for number in self.jobs.remove(&id).map(|started| started.numbers).unwrap_or_default() {
                if self.places.get(&number).is_some_and(|(owner, _)| *owner == id) {
                    self.places.remove(&number);
                    self.errors.remove(&number);
                }
            }
        }
    }

    /// Vertices that others wait for and that wait for no other themselves, with what they are about.
    fn waits(&self) -> Vec<(usize, String)> {
        let title = |number: usize| {
            let (id, position) = self.places.get(&number)?;
            Some(self.jobs.get(id)?.job.vertices.get(*position)?.title.as_str())
        };
        let waits = self.core.waits();
        let ends = waits.iter().filter(|wait| wait.on.is_empty());
        let text = |end: &Wait| {
            let users = waits.iter().filter(|other| other.on.contains(&end.vertex));
            let users: Vec<&str> = users.filter_map(|user| title(user.vertex)).collect();
            match users.as_slice() {
                [] => end.doing.to_owned(),
                users => format!("it {}, and {} waits for it", end.doing, users.join(", ")),
            }
        };
        ends.map(|end| (end.vertex, text(end))).collect()
    }

    /// Says what waits for what.
    fn tell_waits(&self) {
        for (vertex, waits) in self.waits() {
            self.tell(vertex, &Event::Quiet { vertex, waits });
        }
    }
}

#[cfg(test)]
mod far_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod threads;
