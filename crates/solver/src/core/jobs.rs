//! Several jobs in one graph: what each still waits for, and what ends with it.

use std::collections::BTreeSet;
use std::sync::Arc;

use petgraph::Direction;
use petgraph::stable_graph::NodeIndex;

use super::node::{Node, Plan, State};
use super::{Command, Core};
use crate::{Identity, InputUse};

/// Names a job of this core.
pub(crate) type JobId = u64;

/// One client's wish.
#[derive(Debug)]
pub(crate) struct Job {
    target: usize,
    vertices: Vec<usize>,
}

/// One vertex that does not go on, and what it waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wait {
    pub(crate) vertex: usize,
    /// What it is about.
    pub(crate) doing: &'static str,
    /// The vertices that it waits for.
    pub(crate) on: Vec<usize>,
}

/// A step that was never measured.
const UNKNOWN_STEP_NANOS: u64 = 1_000_000_000;

/// Vertices that are asked, and those of them that are wanted.
#[derive(Default)]
struct Demand {
    asked: BTreeSet<usize>,
    wanted: BTreeSet<usize>,
}

impl<O: Clone> Core<O> {
    /// Adds a job: its graph, inputs before their users, and whose output it wants. Returns the numbers
    /// of its vertices, in their order.
    pub(crate) fn start(&mut self, plans: &[Plan], target: usize) -> (JobId, Vec<usize>, Vec<Command<O>>) {
        let job = self.next_job;
        self.next_job += 1;
        let priorities = priorities(plans);
        let mut vertices: Vec<usize> = Vec::with_capacity(plans.len());
        for (plan, priority) in plans.iter().zip(priorities) {
            let inputs: Arc<[(usize, InputUse)]> =
                plan.inputs.iter().map(|input| (vertices[input.vertex], input.usage)).collect();
            vertices.push(self.graph.add_node(Node::new(plan, job, inputs, priority)).index());
        }
        // The newest edge of a vertex is the first one that is met: from the last user to the first, they are
        // met in the order of the job, and `disconnect` finds each at once.
        for (&vertex, plan) in vertices.iter().zip(plans).rev() {
            for (position, input) in plan.inputs.iter().enumerate().rev() {
                let input = NodeIndex::new(vertices[input.vertex]);
                self.graph.add_edge(input, NodeIndex::new(vertex), position);
            }
        }
        let target = vertices[target];
        self.jobs.insert(job, Job { target, vertices: vertices.clone() });
        self.want(target);
        let commands = self.go_on();
        (job, vertices, commands)
    }

    /// Ends jobs that have what they want, or cannot get it any more.
    pub(super) fn finish_jobs(&mut self) {
        let mut over: Vec<(JobId, Result<O, usize>)> = Vec::new();
        for (id, job) in &self.jobs {
            if let Some(output) = self.node(job.target).output() {
                over.push((*id, Ok(output.clone())));
            }
        }
        for failed in std::mem::take(&mut self.failures) {
            for (id, job) in &self.jobs {
                if over.iter().all(|(known, _)| known != id)
                    && self.demand([job.target]).asked.contains(&failed)
                {
                    over.push((*id, Err(failed)));
                }
            }
        }
        for (job, outcome) in over {
            self.commands.push(Command::Finish { job, outcome });
            self.end_job(job);
        }
    }

    /// Forgets a job, and stops what only it waited for.
    pub(super) fn end_job(&mut self, job: JobId) {
        let Some(ended) = self.jobs.remove(&job) else { return };
        let demand = self.demand(self.jobs.values().map(|job| job.target).collect::<Vec<_>>());
        let followed: BTreeSet<usize> = self
            .jobs
            .values()
            .flat_map(|job| &job.vertices)
            .filter_map(|&vertex| match self.node(vertex).state {
                State::Follows { runner, .. } => Some(runner),
                _ => None,
            })
            .collect();
        // Runners of ended jobs that somebody followed so far.
        let adopted = std::mem::take(&mut self.adopted);
        ended.vertices.iter().for_each(|&vertex| self.disconnect(vertex));
        for vertex in ended.vertices.into_iter().chain(adopted) {
            let node = self.node_mut(vertex);
            if followed.contains(&vertex) && demand.asked.contains(&vertex) {
                node.wanted = demand.wanted.contains(&vertex);
                self.adopted.push(vertex);
                continue;
            }
            self.abandon(vertex);
        }
        let jobs = &self.jobs;
        let lives = |vertex: &usize| {
            self.known_node(*vertex).is_some_and(|node| !node.is_orphan && jobs.contains_key(&node.job))
        };
        let kept: Vec<(usize, Vec<usize>)> = self
            .adopted
            .iter()
            .chain(jobs.values().flat_map(|job| &job.vertices))
            .filter(|vertex| !self.node(**vertex).followers.is_empty())
            .map(|&vertex| (vertex, self.node(vertex).followers.iter().copied().filter(lives).collect()))
            .collect();
        for (vertex, followers) in kept {
            self.node_mut(vertex).followers = followers;
        }
        let mut doubtful = std::mem::take(&mut self.doubtful);
        doubtful.retain(|(vertex, _)| self.is_known(*vertex));
        self.doubtful = doubtful;
    }

    /// A run was given up with the job that started it; somebody of another job may still wait.
    pub(super) fn disown(&mut self, vertex: usize) -> bool {
        let is_adopted = !self.jobs.contains_key(&self.node(vertex).job);
        if is_adopted {
            self.adopted.retain(|known| *known != vertex);
            self.abandon(vertex);
        }
        is_adopted
    }

    /// Nobody knows this vertex any more.
    fn abandon(&mut self, vertex: usize) {
        let node = self.node_mut(vertex);
        node.is_orphan = true;
        node.followers.clear();
        let runs_as = node.runs_as.take();
        let is_busy = node.pending > 0;
        if let Some(key) = runs_as {
            self.runners.remove(&key);
        }
        if is_busy {
            self.commands.push(Command::Stop { vertex });
        } else {
            self.remove(vertex);
        }
    }

    pub(super) fn remove(&mut self, vertex: usize) {
        self.graph.remove_node(NodeIndex::new(vertex));
    }

    /// Forgets what a vertex reads. Costs O(inputs) when its job's vertices before it went before.
    fn disconnect(&mut self, vertex: usize) {
        let mut reads = self.graph.neighbors_directed(NodeIndex::new(vertex), Direction::Incoming).detach();
        while let Some(edge) = reads.next_edge(&self.graph) {
            self.graph.remove_edge(edge);
        }
    }

    /// What is needed for the outputs of `targets`, as far as it is known now.
    fn demand(&self, targets: impl IntoIterator<Item = usize>) -> Demand {
        let mut demand = Demand::default();
        let mut open: Vec<(usize, bool)> = targets.into_iter().map(|target| (target, true)).collect();
        while let Some((vertex, wanted)) = open.pop() {
            let is_news = demand.asked.insert(vertex) | (wanted && demand.wanted.insert(vertex));
            if !is_news {
                continue;
            }
            let wanted = demand.wanted.contains(&vertex);
            open.extend(self.needs(vertex, wanted));
        }
        demand
    }

    /// What a vertex needs of others to go on, and whether that is their output.
    fn needs(&self, vertex: usize, wanted: bool) -> Vec<(usize, bool)> {
        let node = self.node(vertex);
        let inputs = || node.inputs.iter();
        match &node.state {
            State::Follows { runner, .. } => vec![(*runner, true)],
            State::Done { .. } | State::Failed | State::Ready { .. } | State::Running { .. } => Vec::new(),
            State::Hit { .. } | State::Loading { .. } => Vec::new(),
            State::Missed { .. } if wanted || node.refresh => {
                inputs().map(|&(input, _)| (input, true)).collect()
            }
            State::Missed { .. } => Vec::new(),
            State::Idle if !matches!(node.identity, Identity::Cached(_)) => Vec::new(),
            State::Idle | State::Fast { .. } | State::Content { .. } | State::Slow { .. } => {
                let reads = node.fast_lost || matches!(node.state, State::Content { .. });
                let all = node.refresh || (node.lost && wanted);
                let needed = |usage| all || (reads && usage == InputUse::Content);
                inputs().map(|&(input, usage)| (input, needed(usage))).collect()
            }
        }
    }

    /// What keeps the jobs from being done: every vertex that is asked for and waits.
    pub(crate) fn waits(&self) -> Vec<Wait> {
        let demand = self.demand(self.jobs.values().map(|job| job.target).collect::<Vec<_>>());
        let wait = |&vertex: &usize| {
            let node = self.node(vertex);
            let wanted = demand.wanted.contains(&vertex);
            let doing = match &node.state {
                State::Idle => "waits for its inputs' keys",
                State::Fast { .. } | State::Slow { .. } => "is looked up",
                State::Content { .. } => "waits for what it reads",
                State::Loading { .. } => "is fetched",
                State::Missed { .. } if wanted => "waits for its inputs",
                State::Ready { .. } => "waits for a place to run",
                State::Running { .. } => "runs",
                State::Follows { .. } => "waits for the same work of another step",
                State::Hit { .. } | State::Missed { .. } | State::Done { .. } | State::Failed => return None,
            };
            let needs = self.needs(vertex, wanted);
            let on = needs.into_iter().filter(|&(input, wanted)| match self.node(input).state {
                State::Done { .. } => false,
                _ => wanted || !self.is_identified(input),
            });
            Some(Wait { vertex, doing, on: on.map(|(input, _)| input).collect() })
        };
        demand.asked.iter().filter_map(wait).collect()
    }
}

/// How long the way from each vertex to the end takes, itself included; nanoseconds.
fn priorities(plans: &[Plan]) -> Vec<u64> {
    let mut longest = vec![0_u64; plans.len()];
    // Users stand behind their inputs: backwards, every user is done before what it uses.
    for (at, plan) in plans.iter().enumerate().rev() {
        let own = match (plan.cost.took, &plan.identity) {
            (Some(took), _) => u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            (None, Identity::Cached(_)) => UNKNOWN_STEP_NANOS,
            (None, Identity::Source(_) | Identity::Unknown) => 0,
        };
        longest[at] = longest[at].saturating_add(own);
        for input in &plan.inputs {
            longest[input.vertex] = longest[input.vertex].max(longest[at]);
        }
    }
    longest
}
