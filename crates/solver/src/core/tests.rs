//! Toy graphs: keys and results are small numbers, the driver is a loop.

use std::collections::{BTreeMap, VecDeque};

use super::*;

/// A vertex of a toy graph; its output is its name.
struct Toy {
    identity: Identity,
    inputs: Vec<VertexInput>,
}

fn cached(name: &str, inputs: &[(usize, InputUse)]) -> Toy {
    Toy { identity: Identity::Cached(Digest::of(name.as_bytes())), inputs: list(inputs) }
}

fn source(name: &str) -> Toy {
    Toy { identity: Identity::Source(Digest::of(name.as_bytes())), inputs: Vec::new() }
}

fn unknown() -> Toy {
    Toy { identity: Identity::Unknown, inputs: Vec::new() }
}

fn list(inputs: &[(usize, InputUse)]) -> Vec<VertexInput> {
    inputs.iter().map(|&(vertex, usage)| VertexInput { vertex, usage }).collect()
}

/// Solves toy graphs against one cache and remembers what ran.
#[derive(Default)]
struct Sim {
    cache: BTreeMap<CacheKey, Cached<usize>>,
    /// What each vertex's content looks like to a reader.
    content: BTreeMap<usize, &'static str>,
    ran: Vec<usize>,
    digested: Vec<(usize, usize)>,
    newest_first: bool,
}

impl Sim {
    fn solve(&mut self, toys: &[Toy], target: usize) -> Vec<usize> {
        self.ran.clear();
        self.digested.clear();
        let graph: Vec<_> = toys.iter().map(|toy| (toy.identity.clone(), toy.inputs.clone())).collect();
        let mut core: Core<usize> = Core::new(&graph, target, true);
        let mut commands: VecDeque<_> = core.start().into();
        loop {
            let next = if self.newest_first { commands.pop_back() } else { commands.pop_front() };
            let Some(command) = next else { break };
            let more = match command {
                Command::Lookup { vertex, key } => {
                    let hit = self.cache.get(&key).cloned();
                    core.found(vertex, hit)
                }
                Command::Digest { vertex, input, output } => {
                    self.digested.push((vertex, input));
                    let text = self.content.get(&output).copied().unwrap_or("same");
                    core.digested(vertex, input, Digest::of(text.as_bytes()))
                }
                Command::Run { vertex, save, .. } => {
                    self.ran.push(vertex);
                    if let Some(Save { canonical, keys }) = save {
                        for key in keys {
                            self.cache.insert(key, Cached { canonical, output: vertex });
                        }
                    }
                    core.ran(vertex, vertex)
                }
            };
            commands.extend(more);
        }
        assert_eq!(core.result(), Some(&target), "the target has its result");
        let mut ran = self.ran.clone();
        ran.sort_unstable();
        ran
    }
}

use InputUse::{Content, Definition};

/// base, context, COPY, RUN
fn copy_then_run() -> Vec<Toy> {
    vec![
        source("base"),
        unknown(),
        cached("copy", &[(0, Definition), (1, Content)]),
        cached("run", &[(2, Definition)]),
    ]
}

#[test]
fn second_solve_runs_only_the_context() {
    let mut sim = Sim::default();
    assert_eq!(sim.solve(&copy_then_run(), 3), [0, 1, 2, 3]);
    assert_eq!(sim.solve(&copy_then_run(), 3), [1], "the context is looked at, nothing is done");
}

#[test]
fn changed_content_reruns_copy_and_what_follows() {
    let mut sim = Sim::default();
    sim.solve(&copy_then_run(), 3);
    sim.content.insert(1, "edited");
    assert_eq!(sim.solve(&copy_then_run(), 3), [0, 1, 2, 3]);
    sim.content.insert(1, "same");
    assert_eq!(sim.solve(&copy_then_run(), 3), [1], "the old content is still known");
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
    let mut sim = Sim::default();
    sim.solve(&copy_from_stage("compile"), 3);
    assert_eq!(sim.solve(&copy_from_stage("compile"), 3), Vec::<usize>::new());
    assert!(sim.digested.is_empty(), "the definition key was enough");
}

#[test]
fn rebuilt_stage_with_same_files_leaves_the_copy_cached() {
    let mut sim = Sim::default();
    sim.solve(&copy_from_stage("compile"), 3);
    assert_eq!(sim.solve(&copy_from_stage("compile -O2"), 3), [0, 1], "only the stage ran");
}

#[test]
fn vertices_nobody_needs_are_never_touched() {
    let toys = vec![source("base"), cached("unused", &[(0, Definition)]), cached("run", &[(0, Definition)])];
    assert_eq!(Sim::default().solve(&toys, 2), [0, 2]);
}

#[test]
fn order_of_answers_changes_nothing() {
    for toys in [copy_then_run(), copy_from_stage("x")] {
        let (mut oldest, mut newest) = (Sim::default(), Sim { newest_first: true, ..Sim::default() });
        assert_eq!(oldest.solve(&toys, 3), newest.solve(&toys, 3));
        let (a, b): (Vec<_>, Vec<_>) = (oldest.cache.keys().collect(), newest.cache.keys().collect());
        assert_eq!(a, b);
    }
}

#[test]
fn one_vertex_used_twice_runs_once() {
    let toys = vec![
        source("base"),
        cached("lib", &[(0, Definition)]),
        cached("a", &[(0, Definition), (1, Content)]),
        cached("b", &[(2, Definition), (1, Content)]),
    ];
    assert_eq!(Sim::default().solve(&toys, 3), [0, 1, 2, 3]);
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

/// What runs before any of these runs has ended, once lookups and `first` are answered.
fn side_by_side(toys: &[Toy], target: usize, first: usize) -> Vec<usize> {
    let graph: Vec<_> = toys.iter().map(|toy| (toy.identity.clone(), toy.inputs.clone())).collect();
    let mut core: Core<usize> = Core::new(&graph, target, true);
    let mut commands: VecDeque<_> = core.start().into();
    let mut running = Vec::new();
    while let Some(command) = commands.pop_front() {
        match command {
            Command::Lookup { vertex, .. } => commands.extend(core.found(vertex, None)),
            Command::Run { vertex, .. } if vertex == first => commands.extend(core.ran(vertex, vertex)),
            Command::Run { vertex, .. } => running.push(vertex),
            Command::Digest { .. } => unreachable!("nothing that is read has run"),
        }
    }
    running.sort_unstable();
    running
}

#[test]
fn stages_that_are_copied_from_run_side_by_side() {
    assert_eq!(side_by_side(&two_copied_stages(), 5, 0), [1, 2, 3]);
    let mut onto_base = two_copied_stages();
    onto_base[4] = cached("copy a", &[(0, Definition), (1, Content)]);
    assert_eq!(side_by_side(&onto_base, 5, 0), [1, 2]);
}

#[test]
fn a_stage_that_was_forgotten_stays_untouched_while_its_copy_is_cached() {
    let mut sim = Sim::default();
    sim.solve(&two_copied_stages(), 5);
    sim.cache.retain(|_, cached| ![1, 2].contains(&cached.output));
    assert_eq!(sim.solve(&two_copied_stages(), 5), Vec::<usize>::new());
}

#[test]
fn stages_side_by_side_give_the_same_in_any_order() {
    let (mut oldest, mut newest) = (Sim::default(), Sim { newest_first: true, ..Sim::default() });
    assert_eq!(oldest.solve(&two_copied_stages(), 5), [0, 1, 2, 3, 4, 5]);
    assert_eq!(newest.solve(&two_copied_stages(), 5), [0, 1, 2, 3, 4, 5]);
    assert_eq!(oldest.ran.len(), 6, "each once");
    let (a, b): (Vec<_>, Vec<_>) = (oldest.cache.keys().collect(), newest.cache.keys().collect());
    assert_eq!(a, b);
}
