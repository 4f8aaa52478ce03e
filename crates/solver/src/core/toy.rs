//! Toy graphs and a toy cache: results are numbers, the driver is a loop that answers in any order.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::*;
use crate::{Cost, Identity, VertexInput};

/// A vertex of a toy graph.
#[derive(Debug, Clone)]
pub(super) struct Toy {
    pub(super) plan: Plan,
    /// What it does; two versions of an op may do the same.
    pub(super) effect: u64,
    pub(super) fails: bool,
    /// Old results of it do not count.
    pub(super) ages: bool,
}

pub(super) fn toy(identity: Identity, effect: u64, inputs: &[(usize, InputUse)]) -> Toy {
    let inputs = inputs.iter().map(|&(vertex, usage)| VertexInput { vertex, usage }).collect();
    let (by_content, lineage, cost) = (None, None, Cost::default());
    let plan = Plan { identity, by_content, inputs, refresh: false, lineage, cost };
    Toy { plan, effect, fails: false, ages: false }
}

/// What a toy makes of its inputs: of what it reads, a part only.
pub(super) fn value(effect: u64, inputs: impl Iterator<Item = (InputUse, u64)>) -> u64 {
    inputs.fold(mix(effect), |so_far, (usage, input)| {
        let seen = if usage == InputUse::Content { part(input) } else { input };
        mix(so_far ^ mix(seen))
    })
}

/// What is read of an output: few different things.
pub(super) fn part(output: u64) -> u64 {
    output % 3
}

/// Spreads bits; the finalizer of splitmix64.
pub(super) fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// A result of a toy: its value, and a name of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) value: u64,
    pub(super) name: u64,
}

/// What earlier builds left.
#[derive(Debug, Clone, Default)]
pub(super) struct World {
    pub(super) records: HashMap<CacheKey, Cached<Made>>,
    /// What others say, and what was made from that.
    pub(super) borrowed: HashMap<CacheKey, Cached<Made>>,
    /// Whether the build believes others.
    pub(super) believes: bool,
    pub(super) marks: HashSet<CacheKey>,
    /// Results that are recorded and not there.
    pub(super) gone: HashSet<u64>,
    /// Results that are old.
    pub(super) old: HashSet<u64>,
    pub(super) names: u64,
}

impl World {
    /// A result's name; in the order of nothing: it depends on the value alone where it enters keys.
    fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    pub(super) fn put(&mut self, key: CacheKey, cached: &Cached<Made>, replace: bool) {
        let records = if cached.is_borrowed { &mut self.borrowed } else { &mut self.records };
        let is_gone = records.get(&key).is_none_or(|known| self.gone.contains(&known.output.name));
        if replace || is_gone {
            records.insert(key, cached.clone());
        }
    }

    /// What a lookup finds.
    pub(super) fn find(&self, key: &CacheKey) -> Option<&Cached<Made>> {
        self.records.get(key).or_else(|| self.borrowed.get(key).filter(|_| self.believes))
    }

    /// What the driver's threads do once an op has run: compares and saves.
    pub(super) fn keep(&mut self, value: u64, save: &Save) -> Cached<Made> {
        self.marks.extend(&save.marks);
        let earlier = save.slot.and_then(|slot| self.find(&slot)).cloned();
        if let Some(earlier) = earlier.filter(|earlier| earlier.is_borrowed == save.is_borrowed)
            && !self.gone.contains(&earlier.output.name)
            && earlier.output.value == value
        {
            save.keys.iter().for_each(|key| self.put(*key, &earlier, save.refresh));
            self.old.remove(&earlier.output.name);
            return earlier;
        }
        let made = Made { value, name: self.name() };
        let fresh = Digest::of(&mix(value ^ 0xf2e5).to_le_bytes());
        let is_borrowed = save.is_borrowed;
        let cached = Cached { canonical: save.canonical(&fresh), output: made, is_borrowed };
        save.keys.iter().for_each(|key| self.put(*key, &cached, save.refresh));
        if let Some(slot) = save.slot {
            self.put(slot, &cached, true);
        }
        cached
    }
}

/// What a build of toys did.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// By job: the value, or nothing where it failed; jobs that were given up have no entry.
    pub(super) outcomes: HashMap<JobId, Option<u64>>,
    /// What ran: by key, or by vertex where there is none.
    pub(super) ran: Vec<(Option<(CacheKey, bool)>, usize)>,
    /// Runs and digests that were told to stop.
    pub(super) stopped: BTreeSet<usize>,
    pub(super) digested: Vec<(usize, usize)>,
    /// The most that ran at once, and what it needed.
    pub(super) most: (usize, u64),
}

impl Report {
    /// What ran, by vertex.
    pub(super) fn vertices(&self) -> Vec<usize> {
        let mut ran: Vec<usize> = self.ran.iter().map(|(_, vertex)| *vertex).collect();
        ran.sort_unstable();
        ran
    }
}

/// Answers a core's commands.
pub(super) struct Sim<'a> {
    pub(super) core: Core<Made>,
    pub(super) world: &'a mut World,
    /// By the core's numbers.
    pub(super) toys: HashMap<usize, Toy>,
    pub(super) open: Vec<Command<Made>>,
    pub(super) report: Report,
}

impl<'a> Sim<'a> {
    pub(super) fn new(world: &'a mut World, limits: Limits) -> Self {
        let (toys, open, report) = (HashMap::new(), Vec::new(), Report::default());
        Self { core: Core::new(limits), world, toys, open, report }
    }

    pub(super) fn start(&mut self, toys: &[Toy], target: usize) -> (JobId, Vec<usize>) {
        let plans: Vec<Plan> = toys.iter().map(|toy| toy.plan.clone()).collect();
        let (job, numbers, commands) = self.core.start(&plans, target);
        self.toys.extend(numbers.iter().copied().zip(toys.iter().cloned()));
        self.take(commands);
        (job, numbers)
    }

    pub(super) fn tell(&mut self, fact: Fact<Made>) {
        let commands = self.core.apply(fact);
        self.take(commands);
    }

    /// Notes what needs no answer; keeps the rest.
    fn take(&mut self, commands: Vec<Command<Made>>) {
        for command in commands {
            match command {
                Command::Link { keys, marks, cached, .. } => {
                    keys.iter().for_each(|key| self.world.put(*key, &cached, false));
                    self.world.marks.extend(marks);
                }
                Command::Stop { vertex } => {
                    self.report.stopped.insert(vertex);
                }
                Command::Merged { .. } => {}
                Command::Finish { job, outcome } => {
                    let outcome = outcome.ok().map(|made| made.value);
                    assert!(self.report.outcomes.insert(job, outcome).is_none(), "a job ends once");
                }
                Command::Run { vertex, inputs, save } => {
                    self.open.push(Command::Run { vertex, inputs, save });
                    self.note_running();
                }
                command => self.open.push(command),
            }
        }
    }

    fn note_running(&mut self) {
        let running: Vec<u64> = self
            .open
            .iter()
            .filter_map(|command| match command {
                Command::Run { vertex, .. } => Some(self.toys[vertex].plan.cost.peak_memory_bytes),
                _ => None,
            })
            .collect();
        let (count, bytes) = &mut self.report.most;
        *count = running.len().max(*count);
        if running.len() > 1 {
            *bytes = running.iter().sum::<u64>().max(*bytes);
        }
    }

    /// Answers the command at `place` of those that are open.
    pub(super) fn answer(&mut self, place: usize) {
        let fact = match self.open.swap_remove(place) {
            Command::Lookup { vertex, key } => {
                let hit = self.world.find(&key).cloned();
                let is_old = hit.as_ref().is_some_and(|hit| self.world.old.contains(&hit.output.name));
                Fact::Found { vertex, hit, is_old: is_old && self.toys[&vertex].ages }
            }
            Command::Mark { vertex, input, key } => {
                Fact::Marked { vertex, input, known: self.world.marks.contains(&key) }
            }
            Command::Load { vertex, cached } => {
                let there = !self.world.gone.contains(&cached.output.name);
                Fact::Loaded { vertex, output: there.then_some(cached.output) }
            }
            Command::Digest { vertex, input, output } => {
                self.report.digested.push((vertex, input));
                let digest = Digest::of(&part(output.value).to_le_bytes());
                Fact::Digested { vertex, input, digest }
            }
            Command::Run { vertex, .. } if self.report.stopped.contains(&vertex) => {
                Fact::Stopped { vertex, digesting: None }
            }
            Command::Run { vertex, inputs, save } => self.run(vertex, &inputs, save.as_deref()),
            Command::Link { .. } | Command::Stop { .. } | Command::Merged { .. } | Command::Finish { .. } => {
                unreachable!("needs no answer")
            }
        };
        self.tell(fact);
    }

    fn run(&mut self, vertex: usize, inputs: &[Made], save: Option<&Save>) -> Fact<Made> {
        let key = save.map(|save| (save.keys[0], save.refresh));
        // As the driver does once nobody else makes it: a job that is over may have.
        if let Some((key, false)) = key
            && let Some(found) = self.world.find(&key)
            && save.is_some_and(|save| save.is_borrowed || !found.is_borrowed)
            && !self.world.gone.contains(&found.output.name)
        {
            return Fact::Ran { vertex, canonical: Some(found.canonical), output: found.output };
        }
        self.report.ran.push((key, vertex));
        let toy = &self.toys[&vertex];
        if toy.fails {
            return Fact::Failed { vertex };
        }
        assert_eq!(inputs.len(), toy.plan.inputs.len(), "it has all inputs");
        let uses = toy.plan.inputs.iter().map(|input| input.usage);
        let value = value(toy.effect, uses.zip(inputs.iter().map(|made| made.value)));
        let Some(save) = save else {
            let output = Made { value, name: self.world.name() };
            return Fact::Ran { vertex, canonical: None, output };
        };
        let Cached { canonical, output, .. } = self.world.keep(value, save);
        Fact::Ran { vertex, canonical: Some(canonical), output }
    }

    /// Answers everything; `next` chooses among as many.
    pub(super) fn finish(mut self, mut next: impl FnMut(usize) -> usize) -> Report {
        while !self.open.is_empty() {
            let place = next(self.open.len());
            self.answer(place);
        }
        assert!(self.core.jobs.is_empty(), "nothing is left to do: {:?}", self.core.waits());
        assert!(self.core.graph.node_count() == 0, "nothing is kept for nobody");
        self.report
    }
}

pub(super) const UNLIMITED: Limits = Limits { jobs: usize::MAX, memory_bytes: u64::MAX };
