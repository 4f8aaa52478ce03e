//! Toy graphs that say one thing each.

use std::time::Duration;

use super::toy::{Sim, Toy, UNLIMITED, World, mix, part, toy, value};
use super::*;
use crate::Identity;

fn cached(name: &str, inputs: &[(usize, InputUse)]) -> Toy {
    toy(Identity::Cached(Digest::of(name.as_bytes())), effect(name), inputs)
}

fn source(name: &str) -> Toy {
    toy(Identity::Source(Digest::of(name.as_bytes())), effect(name), &[])
}

/// A directory; what is read of it is one of three things.
fn context(files: u64) -> Toy {
    let looks_so = |effect: &u64| part(value(*effect, std::iter::empty())) == files;
    toy(Identity::Unknown, (0..).find(looks_so).expect("numbers are many"), &[])
}

/// What stands in front of a comment.
fn effect(name: &str) -> u64 {
    let name = name.split(" #").next().unwrap_or_default();
    name.bytes().fold(0, |so_far, byte| mix(so_far ^ u64::from(byte)))
}

/// Compared with its earlier results.
fn with_lineage(mut toy: Toy, step: &str) -> Toy {
    toy.plan.lineage = Some(Digest::of(step.as_bytes()));
    toy
}

fn refreshed(mut toy: Toy) -> Toy {
    toy.plan.refresh = true;
    toy
}

fn taking(mut toy: Toy, seconds: u64, peak_memory_bytes: u64) -> Toy {
    toy.plan.cost.took = Some(Duration::from_secs(seconds));
    toy.plan.cost.peak_memory_bytes = peak_memory_bytes;
    toy
}

/// What runs, in order of the vertices; the oldest command is answered first.
fn solve(world: &mut World, toys: &[Toy], target: usize) -> Vec<usize> {
    let mut sim = Sim::new(world, UNLIMITED);
    let (job, _) = sim.start(toys, target);
    let report = sim.finish(|_| 0);
    assert!(report.outcomes[&job].is_some(), "the target has its result");
    report.vertices()
}

use InputUse::{Content, Definition};

/// base, context, COPY, RUN
fn copy_then_run(files: u64) -> Vec<Toy> {
    vec![
        source("base"),
        context(files),
        cached("copy", &[(0, Definition), (1, Content)]),
        cached("run", &[(2, Definition)]),
    ]
}

#[test]
fn second_solve_runs_only_the_context() {
    let mut world = World::default();
    assert_eq!(solve(&mut world, &copy_then_run(1), 3), [0, 1, 2, 3]);
    assert_eq!(solve(&mut world, &copy_then_run(1), 3), [1], "the context is looked at, nothing is done");
}

#[test]
fn changed_content_reruns_copy_and_what_follows() {
    let mut world = World::default();
    solve(&mut world, &copy_then_run(1), 3);
    assert_eq!(solve(&mut world, &copy_then_run(2), 3), [0, 1, 2, 3]);
    assert_eq!(solve(&mut world, &copy_then_run(1), 3), [1], "the old content is still known");
}

/// base, COMPILE on it, COPY --from=COMPILE onto base, RUN
fn copy_from_stage(compile: &str) -> Vec<Toy> {
    vec![
        source("base"),
        cached(compile, &[(0, Definition)]),
        cached("copy", &[(0, Definition), (1, Content)]),
        cached("run", &[(2, Definition)]),
    ]
}

#[test]
fn stage_is_not_touched_when_its_copy_is_cached() {
    let mut world = World::default();
    solve(&mut world, &copy_from_stage("compile"), 3);
    let mut sim = Sim::new(&mut world, UNLIMITED);
    sim.start(&copy_from_stage("compile"), 3);
    let report = sim.finish(|_| 0);
    assert!(report.ran.is_empty());
    assert!(report.digested.is_empty(), "the definition key was enough");
}

#[test]
fn rebuilt_stage_with_same_files_leaves_the_copy_cached() {
    let mut world = World::default();
    solve(&mut world, &copy_from_stage("compile"), 3);
    assert_eq!(solve(&mut world, &copy_from_stage("compile # again"), 3), [0, 1], "only the stage ran");
    let again = solve(&mut world, &copy_from_stage("compile # again"), 3);
    assert!(again.is_empty(), "next time nothing has to be read");
}

#[test]
fn vertices_nobody_needs_are_never_touched() {
    let toys = [source("base"), cached("unused", &[(0, Definition)]), cached("run", &[(0, Definition)])];
    assert_eq!(solve(&mut World::default(), &toys, 2), [0, 2]);
}

#[test]
fn one_vertex_used_twice_runs_once() {
    let toys = [
        source("base"),
        cached("lib", &[(0, Definition)]),
        cached("a", &[(0, Definition), (1, Content)]),
        cached("b", &[(2, Definition), (1, Content)]),
    ];
    assert_eq!(solve(&mut World::default(), &toys, 3), [0, 1, 2, 3]);
}

#[test]
fn steps_with_one_key_run_once() {
    let toys = [
        source("base"),
        cached("make", &[(0, Definition)]),
        cached("make", &[(0, Definition)]),
        cached("join", &[(1, Definition), (2, Definition)]),
    ];
    assert_eq!(solve(&mut World::default(), &toys, 3).len(), 3);
}

#[test]
fn copies_of_equal_files_from_two_places_run_once() {
    let toys = [
        source("base"),
        context(1),
        context(1),
        cached("copy", &[(0, Definition), (1, Content)]),
        cached("copy", &[(0, Definition), (2, Content)]),
        cached("join", &[(3, Definition), (4, Definition)]),
    ];
    let ran = solve(&mut World::default(), &toys, 5);
    assert_eq!(ran.iter().filter(|vertex| [3, 4].contains(*vertex)).count(), 1, "{ran:?}");
}

/// base, two stages on it, a step of the last stage, and a copy of each stage onto that.
fn two_copied_stages() -> Vec<Toy> {
    vec![
        source("base"),
        cached("a", &[(0, Definition)]),
        cached("b", &[(0, Definition)]),
        cached("packages", &[(0, Definition)]),
        cached("copy a", &[(3, Definition), (1, Content)]),
        cached("copy b", &[(4, Definition), (2, Content)]),
    ]
}

/// What runs before any run but that of the base has ended.
fn side_by_side(world: &mut World, toys: &[Toy], target: usize, limits: Limits) -> Vec<usize> {
    let mut sim = Sim::new(world, limits);
    sim.start(toys, target);
    let waits = |command: &Command<_>| matches!(command, Command::Run { vertex: 1.., .. });
    while let Some(place) = sim.open.iter().position(|command| !waits(command)) {
        sim.answer(place);
    }
    let mut running: Vec<usize> = sim
        .open
        .iter()
        .filter_map(|command| match command {
            Command::Run { vertex, .. } => Some(*vertex),
            _ => None,
        })
        .collect();
    running.sort_unstable();
    running
}

#[test]
fn stages_that_are_copied_from_run_side_by_side() {
    let side_by_side = |toys: &[Toy]| side_by_side(&mut World::default(), toys, 5, UNLIMITED);
    assert_eq!(side_by_side(&two_copied_stages()), [1, 2, 3]);
    let mut onto_base = two_copied_stages();
    onto_base[4] = cached("copy a", &[(0, Definition), (1, Content)]);
    assert_eq!(side_by_side(&onto_base), [1, 2]);
}

#[test]
fn a_stage_that_was_forgotten_stays_untouched_while_its_copy_is_cached() {
    let mut world = World::default();
    solve(&mut world, &two_copied_stages(), 5);
    let stages: Vec<_> = ["a", "b"].map(key_of_step).to_vec();
    world.records.retain(|key, _| !stages.contains(key));
    assert!(solve(&mut world, &two_copied_stages(), 5).is_empty());
}

/// The key of a step on the base.
fn key_of_step(name: &str) -> CacheKey {
    let base = CacheKey::derive(crate::key::KeyKind::Definition, &Digest::of(b"base"), &[]);
    CacheKey::derive(crate::key::KeyKind::Definition, &Digest::of(name.as_bytes()), &[base.0])
}

#[test]
fn a_forgotten_stage_does_not_run_beside_a_changed_one_whose_files_are_the_same() {
    let mut world = World::default();
    let mut toys = two_copied_stages();
    solve(&mut world, &toys, 5);
    world.records.remove(&key_of_step("b"));
    toys[1] = cached("a # edited", &[(0, Definition)]);
    assert_eq!(solve(&mut world, &toys, 5), [0, 1], "what stands on the copy of it is still there");
}

/// base, and three steps, one on the other.
fn chain(first: Toy) -> Vec<Toy> {
    vec![source("base"), first, cached("test", &[(1, Definition)]), cached("pack", &[(2, Definition)])]
}

#[test]
fn a_step_that_makes_the_same_again_leaves_what_stands_on_it_cached() {
    let mut world = World::default();
    let make = |text: &str| chain(with_lineage(cached(text, &[(0, Definition)]), "make"));
    assert_eq!(solve(&mut world, &make("make"), 3), [0, 1, 2, 3]);
    assert_eq!(solve(&mut world, &make("make # faster"), 3), [0, 1]);
    assert!(solve(&mut world, &make("make # faster"), 3).is_empty());
    assert_eq!(solve(&mut world, &make("other"), 3), [0, 1, 2, 3]);
}

#[test]
fn a_refreshed_step_runs_and_the_rest_follows_what_comes_out() {
    let mut world = World::default();
    let make = |text: &str| with_lineage(cached(text, &[(0, Definition)]), "make");
    solve(&mut world, &chain(make("make")), 3);
    assert_eq!(solve(&mut world, &chain(refreshed(make("make"))), 3), [0, 1], "it came out the same");

    // The same text, and something else comes out of it.
    let mut moody = chain(refreshed(make("make")));
    moody[1].effect += 1;
    assert_eq!(solve(&mut world, &moody, 3), [0, 1, 2, 3]);
    moody[1].plan.refresh = false;
    assert!(solve(&mut world, &moody, 3).is_empty(), "what was made last counts");
}

#[test]
fn a_result_that_is_gone_is_made_again_only_for_whoever_reads_it() {
    let mut world = World::default();
    let toys = chain(cached("make", &[(0, Definition)]));
    solve(&mut world, &toys, 3);
    world.gone.insert(world.records[&key_of_step("make")].output.name);
    assert!(solve(&mut world, &toys, 3).is_empty(), "its user is there");
    let mut longer = toys;
    longer.push(cached("shell", &[(1, Definition)]));
    assert_eq!(solve(&mut world, &longer, 4), [0, 1, 4]);
}

#[test]
fn the_longest_way_goes_first() {
    let toys = [
        source("base"),
        taking(cached("short", &[(0, Definition)]), 1, 0),
        taking(cached("first of two", &[(0, Definition)]), 2, 0),
        taking(cached("second", &[(2, Definition)]), 9, 0),
        taking(cached("long", &[(0, Definition)]), 10, 0),
        cached("join", &[(1, Definition), (3, Definition), (4, Definition)]),
    ];
    let order = |jobs| side_by_side(&mut World::default(), &toys, 5, Limits { jobs, ..UNLIMITED });
    assert_eq!(order(1), [2], "eleven seconds from there to the end");
    assert_eq!(order(2), [2, 4]);
    assert_eq!(order(3), [1, 2, 4]);
}

#[test]
fn steps_whose_memory_is_known_run_together_only_as_far_as_it_goes() {
    let toys = [
        source("base"),
        taking(cached("large", &[(0, Definition)]), 3, 700),
        taking(cached("middle", &[(0, Definition)]), 2, 400),
        taking(cached("small", &[(0, Definition)]), 1, 100),
        cached("join", &[(1, Definition), (2, Definition), (3, Definition)]),
    ];
    let within =
        |memory_bytes| side_by_side(&mut World::default(), &toys, 4, Limits { memory_bytes, ..UNLIMITED });
    assert_eq!(within(1200), [1, 2, 3]);
    assert_eq!(within(1100), [1, 2]);
    assert_eq!(within(1000), [1], "the next in line is not overtaken");
    assert_eq!(within(500), [1], "one alone may need more than there is");
}

#[test]
fn what_waits_for_what_can_be_told() {
    let mut world = World::default();
    let mut sim = Sim::new(&mut world, Limits { jobs: 1, ..UNLIMITED });
    sim.start(&two_copied_stages(), 5);
    while let Some(place) =
        sim.open.iter().position(|command| !matches!(command, Command::Run { vertex: 1.., .. }))
    {
        sim.answer(place);
    }
    let waits = sim.core.waits();
    let of = |vertex: usize| waits.iter().find(|wait| wait.vertex == vertex).expect("it waits");
    let running: Vec<usize> = (1..4).filter(|vertex| of(*vertex).doing == "runs").collect();
    assert_eq!(running.len(), 1, "{waits:?}");
    let queued = (1..4).filter(|vertex| of(*vertex).doing == "waits for a place to run");
    assert_eq!(queued.count(), 2, "{waits:?}");
    assert_eq!((of(4).doing, &of(4).on[..]), ("waits for what it reads", &[3, 1][..]));
    assert!(of(5).on.contains(&4) && of(5).on.contains(&2), "{waits:?}");
}

#[test]
fn ten_thousand_steps_on_one_another_need_no_deep_stack() {
    let mut toys = vec![source("base")];
    for at in 0..10_000 {
        toys.push(cached(&format!("step {at}"), &[(at, Definition)]));
    }
    let mut world = World::default();
    assert_eq!(solve(&mut world, &toys, 10_000).len(), 10_001);
    assert!(solve(&mut world, &toys, 10_000).is_empty());
}
