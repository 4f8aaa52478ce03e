//! The solver's state machine: facts in, commands out, no waiting.
//!
//! Demand runs from a job's target to the sources: a vertex is *asked* when a user needs its key, and
//! *wanted* when a user needs its output. What nobody asks for or wants is never touched. Read
//! [`node`] for what a vertex can be, then [`Core::apply`], then [`resolve`] (keys and lookups),
//! [`early`] (what is wanted before its turn) and [`jobs`] (who still waits for what).
//!
//! # Which ops are run
//! The set of runs follows from graph, cache and results alone; the order of answers decides nothing:
//! - An input's *provisional* key is all that its users see at first: that of the record that was found,
//!   or else the one it will be saved under. A vertex is looked up by it, by definition and then by content.
//! - Content is read only where the lookup by definition failed; the inputs that are read are made for it.
//! - A wanted vertex that was not found wants all its inputs. When they are there and one of them turned
//!   out to be an earlier result, the vertex is looked up once more by their *final* keys before it is run.
//! - Vertices that are about to run under one key run once.
//!
//! # What is borrowed
//! A record that somebody else wrote may say any key, and any files. So whatever is made from a result that is
//! [borrowed](Cached::is_borrowed) is borrowed, and so is each key that says what such a result holds.

mod early;
mod guess;
mod jobs;
mod node;
mod resolve;
mod schedule;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kiln_oci::Digest;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};

pub(crate) use self::jobs::{JobId, Wait};
use self::node::{Node, Provisional, RunsAs, State};
pub(crate) use self::node::{Plan, Save};
pub use self::schedule::Limits;
use self::schedule::Ready;
use crate::{CacheKey, Cached, InputUse};

/// What became known.
#[derive(Debug)]
pub(crate) enum Fact<O> {
    /// The cache answered [`Command::Lookup`]; what is too old does not count.
    Found { vertex: usize, hit: Option<Cached<O>>, is_old: bool },
    /// The cache answered [`Command::Mark`].
    Marked { vertex: usize, input: usize, known: bool },
    /// The result is at hand, or is gone (`None`): the answer to [`Command::Load`].
    Loaded { vertex: usize, output: Option<O> },
    /// The answer to [`Command::Digest`].
    Digested { vertex: usize, input: usize, digest: Digest },
    /// The answer to [`Command::Run`]; `canonical` is `None` when it was not to be saved.
    Ran { vertex: usize, canonical: Option<CacheKey>, output: O },
    /// A command did not work: nobody gets this vertex.
    Failed { vertex: usize },
    /// A command ended without a result because of [`Command::Stop`], or because its own job was given up.
    Stopped { vertex: usize, digesting: Option<usize> },
    /// A job is not waited for any more.
    GivenUp { job: JobId },
}

/// What the driver shall do. Each but `Link`, `Stop` and `Finish` is answered by one fact.
#[derive(Debug)]
pub(crate) enum Command<O> {
    /// Ask the cache.
    Lookup { vertex: usize, key: CacheKey },
    /// Ask the cache whether there is anything under `key`.
    Mark { vertex: usize, input: usize, key: CacheKey },
    /// Make sure that a result that was found is there, and stays.
    Load { vertex: usize, cached: Cached<O> },
    /// Take the digest of what `vertex` reads from its input.
    Digest { vertex: usize, input: usize, output: O },
    /// Run it.
    Run { vertex: usize, inputs: Vec<O>, save: Option<Arc<Save>> },
    /// Remember a result that was found under more keys.
    Link { vertex: usize, keys: Vec<CacheKey>, marks: Vec<CacheKey>, cached: Cached<O> },
    /// Nobody waits for what `vertex` is doing.
    Stop { vertex: usize },
    /// `vertex` has the result of `with`, or will have it.
    Merged { vertex: usize, with: usize },
    /// A job is over: its target's output, or the vertex that failed.
    Finish { job: JobId, outcome: Result<O, usize> },
}

/// The graphs of all jobs with every vertex's state.
pub(crate) struct Core<O> {
    /// An edge leads from a vertex to one that reads from it, and says as which of its inputs. The number that
    /// commands and facts use is the vertex's index; numbers of vertices that are gone are used again.
    graph: StableDiGraph<Node<O>, usize>,
    jobs: BTreeMap<JobId, jobs::Job>,
    next_job: JobId,
    /// Vertices of jobs that are over, for others that wait for what they do.
    adopted: Vec<usize>,
    /// Who runs, or ran, what is run once.
    runners: HashMap<RunsAs, usize>,
    /// Vertices to look at.
    work: Vec<usize>,
    /// Vertices that cannot be looked up yet, with an input that is known.
    doubtful: Vec<(usize, usize)>,
    /// Lookups without an answer.
    lookups: usize,
    ready: Ready,
    /// Vertices that failed and are asked for.
    failures: Vec<usize>,
    commands: Vec<Command<O>>,
}

impl<O: Clone> Core<O> {
    /// A core without jobs.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            graph: StableDiGraph::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            adopted: Vec::new(),
            runners: HashMap::new(),
            work: Vec::new(),
            doubtful: Vec::new(),
            lookups: 0,
            ready: Ready::new(limits),
            failures: Vec::new(),
            commands: Vec::new(),
        }
    }

    /// Takes in what became known, and says what to do next.
    ///
    /// Costs what it sets in motion, all vertices of all jobs at most when a job ends.
    pub(crate) fn apply(&mut self, fact: Fact<O>) -> Vec<Command<O>> {
        match fact {
            Fact::Found { vertex, hit, is_old } => {
                self.lookups -= 1;
                match self.answered(vertex) {
                    true if is_old => self.outdated(vertex),
                    true => self.found(vertex, hit),
                    false => {}
                }
            }
            Fact::Marked { vertex, input, known } => {
                self.lookups -= 1;
                if self.answered(vertex) && !known {
                    self.is_lost_by(vertex, input);
                }
            }
            Fact::Loaded { vertex, output } => {
                if self.answered(vertex) {
                    self.loaded(vertex, output);
                }
            }
            Fact::Digested { vertex, input, digest } => {
                if self.answered(vertex) {
                    self.digested(vertex, input, digest);
                }
            }
            Fact::Ran { vertex, canonical, output } => {
                self.leave_slot(vertex);
                if self.answered(vertex) {
                    let canonical = canonical.or(self.node(vertex).provisional.key());
                    // What others adopted has no inputs any more.
                    let runs_as = self.node(vertex).runs_as;
                    let known = runs_as.map(|(_, _, is_borrowed)| is_borrowed);
                    let is_borrowed = known.unwrap_or_else(|| self.reads_borrowed(vertex));
                    self.done(vertex, canonical, output, is_borrowed);
                }
            }
            Fact::Failed { vertex } => {
                self.leave_slot(vertex);
                if self.answered(vertex) {
                    self.failed(vertex);
                }
            }
            Fact::Stopped { vertex, digesting } => {
                self.leave_slot(vertex);
                if self.answered(vertex) {
                    self.stopped(vertex, digesting);
                }
            }
            Fact::GivenUp { job } => self.end_job(job),
        }
        self.go_on()
    }

    /// Looks at all that changed until nothing more follows.
    fn go_on(&mut self) -> Vec<Command<O>> {
        loop {
            while let Some(vertex) = self.work.pop() {
                if self.is_known(vertex) {
                    self.look_at(vertex);
                }
            }
            // With lookups under way the answers may tell more than marks do, and cheaper.
            if self.lookups > 0 || !self.ask_marks() {
                self.dispatch();
                self.finish_jobs();
                if self.work.is_empty() {
                    return std::mem::take(&mut self.commands);
                }
            }
        }
    }

    fn node(&self, vertex: usize) -> &Node<O> {
        self.known_node(vertex).expect("a vertex with a state, users or answers to come is kept")
    }

    fn node_mut(&mut self, vertex: usize) -> &mut Node<O> {
        let node = self.graph.node_weight_mut(NodeIndex::new(vertex));
        node.expect("a vertex with a state, users or answers to come is kept")
    }

    /// `None`: the vertex is gone.
    fn known_node(&self, vertex: usize) -> Option<&Node<O>> {
        self.graph.node_weight(NodeIndex::new(vertex))
    }

    /// Some job is interested in it.
    fn is_known(&self, vertex: usize) -> bool {
        self.known_node(vertex).is_some_and(|node| !node.is_orphan)
    }

    /// Calls `tell` with everybody who reads from `vertex`, and the position of that input, in the order of
    /// the job. What `tell` does leaves the edges alone.
    fn each_user(&mut self, vertex: usize, mut tell: impl FnMut(&mut Self, usize, usize)) {
        let mut users = self.graph.neighbors_directed(NodeIndex::new(vertex), Direction::Outgoing).detach();
        while let Some((edge, user)) = users.next(&self.graph) {
            let position = self.graph[edge];
            tell(self, user.index(), position);
        }
    }

    /// Notes that a command was answered; false: nobody is interested, and the vertex is dropped.
    fn answered(&mut self, vertex: usize) -> bool {
        let node = self.node_mut(vertex);
        node.pending -= 1;
        if node.is_orphan && node.pending == 0 {
            self.remove(vertex);
            return false;
        }
        !self.node(vertex).is_orphan
    }

    fn command(&mut self, vertex: usize, command: Command<O>) {
        self.node_mut(vertex).pending += 1;
        self.lookups += usize::from(matches!(command, Command::Lookup { .. } | Command::Mark { .. }));
        self.commands.push(command);
    }

    /// Somebody needs this vertex's key.
    fn ask(&mut self, vertex: usize) {
        // A failure is noticed by whoever asks, too: it may be the first who cannot do without.
        let is_news = !std::mem::replace(&mut self.node_mut(vertex).asked, true);
        if is_news || matches!(self.node(vertex).state, State::Failed) {
            self.work.push(vertex);
        }
    }

    /// Somebody needs this vertex's output.
    fn want(&mut self, vertex: usize) {
        self.ask(vertex);
        if !std::mem::replace(&mut self.node_mut(vertex).wanted, true) {
            self.work.push(vertex);
        }
    }

    fn inputs(&self, vertex: usize) -> Arc<[(usize, InputUse)]> {
        self.node(vertex).inputs.clone()
    }

    fn want_inputs(&mut self, vertex: usize) {
        if !std::mem::replace(&mut self.node_mut(vertex).inputs_wanted, true) {
            self.inputs(vertex).iter().for_each(|&(input, _)| self.want(input));
        }
    }

    /// Wants the inputs that are read.
    fn want_reads(&mut self, vertex: usize) {
        if !std::mem::replace(&mut self.node_mut(vertex).reads_wanted, true) {
            let inputs = self.inputs(vertex);
            let read = inputs.iter().filter(|(_, usage)| *usage == InputUse::Content);
            read.for_each(|&(input, _)| self.want(input));
        }
    }

    /// Makes the progress that a vertex's state and the demand for it allow.
    fn look_at(&mut self, vertex: usize) {
        let node = self.node(vertex);
        match &node.state {
            State::Idle if node.asked => self.identify(vertex),
            State::Content { .. } if node.undigested == 0 => self.know_content(vertex),
            State::Hit { .. } if node.wanted => self.load(vertex),
            State::Missed { .. } if node.wanted && node.missing_outputs == 0 => self.settle(vertex),
            State::Missed { .. } if node.wanted => self.want_inputs(vertex),
            State::Follows { runner, .. } if node.wanted => {
                let runner = *runner;
                self.want(runner);
            }
            State::Failed if node.asked => self.failures.push(vertex),
            _ => {}
        }
        self.want_early(vertex);
    }

    /// From now on users may derive keys from this vertex.
    fn identified(&mut self, vertex: usize, key: Option<CacheKey>) {
        if self.node(vertex).provisional != Provisional::Open {
            return;
        }
        self.node_mut(vertex).provisional = key.map_or(Provisional::Never, Provisional::Key);
        self.each_user(vertex, |core, user, position| {
            let node = core.node_mut(user);
            node.missing_keys -= 1;
            if node.missing_keys == 0 {
                core.work.push(user);
            } else {
                core.doubt(user, position);
            }
        });
    }

    /// There is a result.
    fn done(&mut self, vertex: usize, canonical: Option<CacheKey>, output: O, is_borrowed: bool) {
        self.node_mut(vertex).state = State::Done { canonical, output: output.clone(), is_borrowed };
        self.identified(vertex, canonical);
        self.each_user(vertex, |core, user, position| {
            core.read(user, position);
            let node = core.node_mut(user);
            node.missing_outputs -= 1;
            if node.missing_outputs == 0 {
                core.work.push(user);
            }
        });
        for follower in std::mem::take(&mut self.node_mut(vertex).followers) {
            self.share(follower, canonical, output.clone(), is_borrowed);
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;
