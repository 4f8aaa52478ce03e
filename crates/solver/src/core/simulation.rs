//! Random graphs, caches and orders of answers against the [`Model`].

use std::collections::{BTreeSet, HashMap};

use super::model::Model;
use super::toy::{Made, Report, Sim, Toy, UNLIMITED, World, mix, toy, value};
use super::*;
use crate::Identity;

/// Builds that are compared with the model, all histories together.
const CASES: u64 = 100_000;

/// A stream of numbers that its seed decides.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("it is below a usize")
    }

    /// True once in `times`.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// A step whose text may be edited: versions 0 and 1 do the same, and so do 2 and 3.
#[derive(Clone)]
struct Step {
    family: u64,
    version: u64,
    kind: Kind,
    inputs: Vec<(usize, InputUse)>,
    has_lineage: bool,
    /// By content its versions that do the same are one op.
    is_coarse: bool,
    refresh: bool,
    fails: bool,
    ages: bool,
    /// The step it repeats.
    twin_of: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Source,
    Context,
    Step,
}

impl Step {
    fn toy(&self) -> Toy {
        let op = Digest::of(&[self.family.to_le_bytes(), self.version.to_le_bytes()].concat());
        let effect = mix(self.family * 256 + self.version / 2);
        let identity = match self.kind {
            Kind::Source => Identity::Source(op),
            Kind::Context => Identity::Unknown,
            Kind::Step => Identity::Cached(op),
        };
        let mut toy = toy(identity, effect, &self.inputs);
        let by_content = [self.family.to_le_bytes(), (self.version / 2).to_le_bytes(), *b"coarsely"].concat();
        toy.plan.by_content = self.is_coarse.then(|| Digest::of(&by_content));
        toy.plan.lineage = self.has_lineage.then(|| Digest::of(&self.family.to_le_bytes()));
        toy.plan.refresh = self.refresh;
        toy.plan.cost.peak_memory_bytes = self.family % 5;
        toy.fails = self.fails;
        toy.ages = self.ages;
        toy
    }
}

fn any_usage(dice: &mut Dice) -> InputUse {
    if dice.once_in(2) { InputUse::Content } else { InputUse::Definition }
}

fn any_steps(has_twins: bool, dice: &mut Dice) -> Vec<Step> {
    let count = 2 + dice.below(9);
    let mut steps: Vec<Step> = Vec::with_capacity(count);
    for at in 0..count {
        let kind = match dice.below(8) {
            _ if at == 0 => Kind::Source,
            0 => Kind::Source,
            1 => Kind::Context,
            _ => Kind::Step,
        };
        let mut step = Step {
            family: at as u64,
            version: dice.next() % 2,
            kind,
            inputs: Vec::new(),
            has_lineage: dice.once_in(2),
            is_coarse: dice.once_in(2),
            refresh: false,
            fails: false,
            // Whether one of two that do the same finds what the other made anew depends on who comes first.
            ages: !has_twins && dice.once_in(2),
            twin_of: None,
        };
        if kind == Kind::Step {
            for _ in 0..1 + dice.below(3) {
                // Mostly near ones: chains.
                let input = if dice.once_in(2) { at - 1 } else { dice.below(at) };
                step.inputs.push((input, any_usage(dice)));
            }
            let repeated = dice.below(at);
            if has_twins && dice.once_in(4) && steps[repeated].kind == Kind::Step {
                // Whether one of them finds the other's result by the key that it has now, or by that of an
                // earlier result that it turned out to be, depends on who comes first.
                steps[repeated].has_lineage = false;
                step = Step { twin_of: Some(repeated), ..steps[repeated].clone() };
                if dice.once_in(2) {
                    // The same op reading something else, which may look the same.
                    for (input, usage) in &mut step.inputs {
                        if *usage == InputUse::Content {
                            *input = dice.below(at);
                        }
                    }
                }
            }
        }
        steps.push(step);
    }
    steps
}

/// What happens between two builds.
///
/// Where steps are repeated no recorded result is gone: one of them may find the record empty and the
/// other, later, what the first has put there again. Both is right; the model knows one order only.
fn edit(steps: &mut [Step], has_twins: bool, world: &mut World, dice: &mut Dice) {
    for step in steps.iter_mut() {
        if step.twin_of.is_none() && dice.once_in(4) {
            step.version = dice.next() % 4;
        }
        step.refresh = step.kind == Kind::Step && dice.once_in(12);
        step.fails = dice.once_in(40);
    }
    for at in 0..steps.len() {
        if let Some(twin) = steps[at].twin_of {
            let Step { version, refresh, fails, .. } = steps[twin];
            steps[at] = Step { version, refresh, fails, ..steps[at].clone() };
        }
    }
    let mut keys: Vec<CacheKey> = world.records.keys().copied().collect();
    keys.sort_unstable();
    for key in keys {
        match dice.below(8) {
            0 => drop(world.records.remove(&key)),
            1 if !has_twins => {
                world.gone.insert(world.records[&key].output.name);
            }
            2 => {
                world.old.insert(world.records[&key].output.name);
            }
            _ => {}
        }
    }
}

fn any_limits(dice: &mut Dice) -> Limits {
    if dice.once_in(2) {
        return UNLIMITED;
    }
    Limits { jobs: 1 + dice.below(3), memory_bytes: dice.next() % 9 }
}

/// What the target is when everything is made from nothing.
fn true_value(toys: &[Toy], target: usize) -> u64 {
    let mut values: Vec<u64> = Vec::new();
    for toy in &toys[..=target] {
        let inputs = toy.plan.inputs.iter().map(|input| (input.usage, values[input.vertex]));
        values.push(value(toy.effect, inputs));
    }
    values[target]
}

fn check_build(toys: &[Toy], target: usize, world: &mut World, dice: &mut Dice, seed: u64) {
    let before = world.clone();
    let mut model = Model::new(toys, before.clone());
    let expected = model.solve(target).ok();
    let limits = any_limits(dice);
    let mut sim = Sim::new(world, limits);
    let (job, numbers) = sim.start(toys, target);
    let report = sim.finish(|count| dice.below(count));
    let Report { outcomes, ran, most, .. } = &report;

    let story = || story(toys, target, &report, &numbers, seed);
    assert_eq!(outcomes[&job], expected, "outcome in {}", story());
    if let Some(value) = expected {
        assert_eq!(value, true_value(toys, target), "a cached result is a true one, {}", story());
    }
    let mut once: Vec<_> = ran
        .iter()
        .map(|(key, vertex)| match key {
            Some(key) => (Some(*key), None),
            None => (None, numbers.iter().position(|number| number == vertex)),
        })
        .collect();
    once.sort_unstable();
    let all = once.len();
    once.dedup();
    assert_eq!(once.len(), all, "nothing runs twice, {}", story());
    let mut allowed = model.ran();
    if expected.is_some() {
        assert!(once.iter().eq(allowed.iter()), "needed {allowed:?}, {}", story());
        let canonical = |world: &World| -> BTreeSet<(CacheKey, CacheKey)> {
            world.records.iter().map(|(key, found)| (*key, found.canonical)).collect()
        };
        let (kept, expected) = (canonical(world), canonical(&model.world));
        let (surplus, missing) = (kept.difference(&expected), expected.difference(&kept));
        let (surplus, missing): (Vec<_>, Vec<_>) = (surplus.collect(), missing.collect());
        assert!(kept == expected, "not to be remembered {surplus:?}, but {missing:?}, {}", story());
    } else {
        // What else was going to run depends on when the failure came; nothing does that would not be
        // run if all went well.
        let sound: Vec<Toy> = toys.iter().map(|toy| Toy { fails: false, ..toy.clone() }).collect();
        let mut model = Model::new(&sound, before);
        model.solve(target).expect("nothing fails");
        allowed.extend(model.ran());
        assert!(once.iter().all(|run| allowed.contains(run)), "needed {allowed:?}, {}", story());
    }
    assert!(most.0 <= limits.jobs, "history {seed}");
    assert!(most.1 <= limits.memory_bytes, "history {seed}");
}

/// Everything about a build that went wrong.
fn story(toys: &[Toy], target: usize, report: &Report, numbers: &[usize], seed: u64) -> String {
    let mut text = format!("history {seed}, target {target}");
    for (at, Toy { plan, fails, ages, .. }) in toys.iter().enumerate() {
        let Plan { identity, by_content, inputs, refresh, lineage, cost: _ } = plan;
        let inputs: Vec<_> = inputs.iter().map(|input| (input.vertex, input.usage)).collect();
        let lineage = lineage.is_some();
        text += &format!("\n{at} {identity:?} {by_content:?} {inputs:?} {refresh} {lineage} {fails} {ages}");
    }
    for (key, vertex) in &report.ran {
        let position = numbers.iter().position(|number| number == vertex);
        text += &format!("\nran {position:?} {key:?}");
    }
    text
}

/// Says which history it was when the core itself panics.
struct History(u64);

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in history {}", self.0);
        }
    }
}

/// One Dockerfile's life: some builds with edits and losses between them.
fn check_history(seed: u64) {
    let _history = History(seed);
    let mut dice = Dice(mix(seed));
    let has_twins = dice.once_in(2);
    let (mut steps, mut world) = (any_steps(has_twins, &mut dice), World::default());
    for _ in 0..BUILDS {
        let toys: Vec<Toy> = steps.iter().map(Step::toy).collect();
        let target = if dice.once_in(4) { dice.below(toys.len()) } else { toys.len() - 1 };
        check_build(&toys, target, &mut world, &mut dice, seed);
        edit(&mut steps, has_twins, &mut world, &mut dice);
    }
}

/// Builds of a history.
const BUILDS: u64 = 5;

fn on_all_processors(cases: u64, check: impl Fn(u64) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    std::thread::scope(|scope| {
        let check = &check;
        for first in 0..threads {
            scope.spawn(move || (first..cases).step_by(threads as usize).for_each(check));
        }
    });
}

#[test]
fn random_builds_do_what_the_model_does_whatever_the_order_of_events() {
    on_all_processors(CASES / BUILDS, check_history);
}

/// What somebody says who wants others to build on his files: any answer to any key, and that it is any other one.
fn lie(world: &mut World, dice: &mut Dice) {
    let mut keys: Vec<CacheKey> = world.records.keys().chain(world.borrowed.keys()).copied().collect();
    keys.sort_unstable();
    for key in &keys {
        if dice.once_in(4) {
            world.names += 1;
            let output = Made { value: dice.next(), name: world.names };
            let canonical = if dice.once_in(2) { *key } else { keys[dice.below(keys.len())] };
            world.put(*key, &Cached { canonical, output, is_borrowed: true }, true);
        }
    }
}

/// A project's life where some builds believe a liar, and the others do not: these are true. Whether a lie was
/// ever believed.
fn check_lies(seed: u64) -> bool {
    let _history = History(seed);
    let mut dice = Dice(mix(seed ^ 0x11e5));
    let has_twins = dice.once_in(2);
    let (mut steps, mut world) = (any_steps(has_twins, &mut dice), World::default());
    let mut is_believed = false;
    for _ in 0..2 * BUILDS {
        let toys: Vec<Toy> = steps.iter().map(Step::toy).collect();
        let target = if dice.once_in(4) { dice.below(toys.len()) } else { toys.len() - 1 };
        lie(&mut world, &mut dice);
        world.believes = dice.once_in(2);
        let believes = world.believes;
        let mut sim = Sim::new(&mut world, any_limits(&mut dice));
        let (job, numbers) = sim.start(&toys, target);
        let report = sim.finish(|count| dice.below(count));
        if let Some(value) = report.outcomes[&job] {
            let is_true = value == true_value(&toys, target);
            assert!(
                believes || is_true,
                "a lie is believed, {}",
                story(&toys, target, &report, &numbers, seed)
            );
            is_believed |= !is_true;
        }
        edit(&mut steps, has_twins, &mut world, &mut dice);
    }
    is_believed
}

#[test]
fn what_one_build_believes_is_no_matter_to_builds_that_do_not() {
    let believed = std::sync::atomic::AtomicU64::new(0);
    let cases = CASES / 5 / BUILDS;
    on_all_processors(cases, |seed| {
        believed.fetch_add(u64::from(check_lies(seed)), std::sync::atomic::Ordering::Relaxed);
    });
    assert!(believed.into_inner() > cases / 100, "nobody lied");
}

/// Several builds of one solver that start, and are given up, at any time.
fn check_crowd(seed: u64) {
    let _history = History(seed);
    let mut dice = Dice(mix(seed ^ 0xc0de));
    let mut first = any_steps(true, &mut dice);
    first.iter_mut().for_each(|step| step.fails = dice.once_in(60));
    let mut world = World::default();
    let mut sim = Sim::new(&mut world, any_limits(&mut dice));
    // By job: its graph and target, and whether it was given up.
    let mut jobs: HashMap<JobId, (Vec<Toy>, usize, bool)> = HashMap::new();
    let mut open_jobs: Vec<JobId> = Vec::new();
    let mut left = 4;
    loop {
        if left > 0 && dice.once_in(10) {
            left -= 1;
            let mut steps = first.clone();
            edit(&mut steps, true, &mut World::default(), &mut dice);
            // The same step fails for all.
            steps.iter_mut().zip(&first).for_each(|(step, first)| step.fails = first.fails);
            let toys: Vec<Toy> = steps.iter().map(Step::toy).collect();
            let target = dice.below(toys.len());
            let (job, _) = sim.start(&toys, target);
            jobs.insert(job, (toys, target, false));
            open_jobs.push(job);
        } else if !open_jobs.is_empty() && dice.once_in(30) {
            let job = open_jobs.swap_remove(dice.below(open_jobs.len()));
            if !sim.report.outcomes.contains_key(&job) {
                jobs.get_mut(&job).expect("it was started").2 = true;
                sim.tell(Fact::GivenUp { job });
            }
        } else if !sim.open.is_empty() {
            sim.answer(dice.below(sim.open.len()));
        } else if left == 0 {
            break;
        }
        if sim.core.jobs.is_empty() {
            let told = |command: &Command<Made>| match command {
                Command::Run { vertex, .. } | Command::Digest { vertex, .. } => {
                    sim.report.stopped.contains(vertex)
                }
                _ => true,
            };
            assert!(sim.open.iter().all(told), "runs on for nobody, history {seed}");
        }
    }
    let report = sim.finish(|_| 0);
    for (job, (toys, target, given_up)) in &jobs {
        match report.outcomes.get(job) {
            None => assert!(*given_up, "a job without outcome, history {seed}"),
            Some(outcome) => {
                assert!(!given_up, "an outcome after the end, history {seed}");
                let fails = toys.iter().any(|toy| toy.fails);
                match outcome {
                    Some(value) => assert_eq!(*value, true_value(toys, *target), "history {seed}"),
                    None => assert!(fails, "nothing fails in history {seed}"),
                }
            }
        }
    }
    // What was not stopped ran once, whoever wanted it, unless it was made again on purpose.
    let whole = report.ran.iter().filter(|(_, vertex)| !report.stopped.contains(vertex));
    let mut once: Vec<CacheKey> =
        whole.filter_map(|(key, _)| key.and_then(|(key, refresh)| (!refresh).then_some(key))).collect();
    let all = once.len();
    once.sort_unstable();
    once.dedup();
    let has_failures = jobs.values().any(|(toys, ..)| toys.iter().any(|toy| toy.fails));
    assert!(has_failures || once.len() == all, "the same work twice in history {seed}");
}

#[test]
fn builds_side_by_side_share_work_and_give_it_up_one_by_one() {
    on_all_processors(20_000, check_crowd);
}
