//! The driver with ops that do as the test says.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};

use kiln_oci::Digest;

use super::*;
use crate::{CacheKey, Cached, Claim, Cost, Identity, InputUse, Scope, VertexInput};

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(&'static str);

/// A gate that ops wait at.
#[derive(Default)]
struct Gate {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    /// Waits until it is open, or `scope` is cancelled; says whether it is open.
    fn pass(&self, scope: &Scope<'_>) -> bool {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        while !state.1 && !scope.is_cancelled() {
            // Nobody tells of a cancellation.
            state = self.changed.wait_timeout(state, Duration::from_millis(5)).unwrap().0;
        }
        state.1
    }

    /// Waits until so many stand at it.
    async fn reached(self: &Arc<Self>, count: usize) {
        let gate = self.clone();
        let wait = move || {
            let mut state = gate.state.lock().unwrap();
            while state.0 < count {
                state = gate.changed.wait(state).unwrap();
            }
        };
        tokio::task::spawn_blocking(wait).await.unwrap();
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

/// What a job was told.
type Heard = Arc<Mutex<Vec<Event>>>;

type Action = Arc<dyn Fn(&[u64], &Scope<'_>) -> Result<u64, Broken> + Send + Sync>;

struct Step {
    identity: Identity,
    action: Action,
}

impl Op for Step {
    type Output = u64;
    type Error = Broken;

    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn content(&self, _input: usize, output: &u64, _scope: &Scope<'_>) -> Result<Digest, Broken> {
        Ok(Digest::of(&output.to_le_bytes()))
    }

    fn run(&self, inputs: &[u64], scope: &Scope<'_>) -> Result<u64, Broken> {
        (self.action)(inputs, scope)
    }

    fn is_same(&self, earlier: &u64, now: &u64, _scope: &Scope<'_>) -> Result<bool, Broken> {
        Ok(earlier == now)
    }

    fn name(&self, output: &u64) -> Digest {
        Digest::of(&output.to_le_bytes())
    }
}

#[derive(Default)]
struct Memory {
    results: Mutex<HashMap<CacheKey, Cached<u64>>>,
    /// It does not answer.
    is_broken: AtomicBool,
}

impl CacheStore<u64> for Memory {
    type Error = Broken;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<u64>>, Broken> {
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(Broken("no cache"));
        }
        Ok(self.results.lock().unwrap().get(key).cloned())
    }

    fn load(&self, _found: &Cached<u64>) -> Result<bool, Broken> {
        Ok(true)
    }

    fn save(&self, places: &Places<'_>, result: &Cached<u64>, _title: &str) -> Result<(), Broken> {
        let mut results = self.results.lock().unwrap();
        for key in places.keys {
            if places.replace {
                results.insert(*key, result.clone());
            } else {
                results.entry(*key).or_insert_with(|| result.clone());
            }
        }
        let newest = places.marks.iter().chain(&places.slot);
        results.extend(newest.map(|key| (*key, result.clone())));
        Ok(())
    }

    fn link(&self, places: &Places<'_>, result: &Cached<u64>, title: &str) -> Result<(), Broken> {
        self.save(places, result, title)
    }

    fn claim(&self, _key: &CacheKey, _scope: &Scope<'_>) -> Result<Option<Claim>, Broken> {
        Ok(Some(Claim::new(())))
    }
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Cancellation for Flag {
    fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn step(
    name: &str,
    inputs: &[usize],
    action: impl Fn(&[u64], &Scope<'_>) -> Result<u64, Broken> + Send + Sync + 'static,
) -> Vertex<Step> {
    let usage = InputUse::Definition;
    Vertex {
        op: Arc::new(Step {
            identity: Identity::Cached(Digest::of(name.as_bytes())),
            action: Arc::new(action),
        }),
        inputs: inputs.iter().map(|&vertex| VertexInput { vertex, usage }).collect(),
        title: name.to_owned(),
        refresh: false,
        lineage: None,
        cost: Cost::default(),
    }
}

/// A job with what it tells.
fn job(vertices: Vec<Vertex<Step>>, cache: &Arc<Memory>) -> (Job<Step, Memory>, Arc<Flag>, Heard) {
    let (cancel, told) = (Arc::<Flag>::default(), Heard::default());
    let events = told.clone();
    let target = vertices.len() - 1;
    let events: EventSink = Arc::new(move |event| events.lock().unwrap().push(event));
    (Job { vertices, target, cache: cache.clone(), cancel: cancel.clone(), events }, cancel, told)
}

const LIMITS: Limits = Limits { jobs: 8, memory_bytes: u64::MAX };

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
    runtime.unwrap().block_on(work)
}

#[test]
fn a_second_solve_finds_what_the_first_one_made() {
    let (cache, runs) = (Arc::new(Memory::default()), Arc::new(AtomicUsize::new(0)));
    for round in 0..2 {
        let runs = runs.clone();
        let vertices = vec![
            step("one", &[], |_, _| Ok(1)),
            step("two", &[0], move |inputs, _| {
                runs.fetch_add(1, Ordering::SeqCst);
                Ok(inputs[0] + 1)
            }),
        ];
        let (job, _, told) = job(vertices, &cache);
        assert_eq!(block_on(solve(job, LIMITS)).unwrap(), 2);
        let cached = matches!(told.lock().unwrap().last(), Some(Event::Cached { vertex: 1, from: None }));
        assert_eq!(cached, round == 1);
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[test]
fn the_first_failure_stops_the_rest_and_is_told_once_it_has_stopped() {
    let (gate, stopped) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let (wait, end) = (gate.clone(), stopped.clone());
    let vertices = vec![
        step("slow", &[], move |_, scope| {
            wait.pass(scope);
            end.store(true, Ordering::SeqCst);
            Err(Broken("stopped"))
        }),
        step("bad", &[], move |_, scope| {
            // Both are under way.
            while gate.state.lock().unwrap().0 == 0 && !scope.is_cancelled() {
                std::thread::yield_now();
            }
            Err(Broken("bad"))
        }),
        step("join", &[0, 1], |_, _| Ok(0)),
    ];
    let (job, cancel, _) = job(vertices, &Arc::default());
    let error = block_on(solve(job, LIMITS)).unwrap_err();
    assert!(matches!(error, SolveError::Vertex { vertex: 1, source: Broken("bad") }), "{error:?}");
    assert!(stopped.load(Ordering::SeqCst), "nothing runs on");
    assert!(cancel.is_cancelled());
}

#[test]
fn a_cancelled_job_ends_as_cancelled() {
    let gate = Arc::new(Gate::default());
    let wait = gate.clone();
    let vertices = vec![step("slow", &[], move |_, scope| {
        wait.pass(scope);
        Err(Broken("stopped"))
    })];
    let (job, cancel, _) = job(vertices, &Arc::default());
    let error = block_on(async {
        let solved = tokio::spawn(solve(job, LIMITS));
        gate.reached(1).await;
        cancel.cancel();
        solved.await.unwrap().unwrap_err()
    });
    assert!(matches!(error, SolveError::Cancelled), "{error:?}");
}

#[test]
fn a_panic_and_a_broken_cache_are_errors() {
    let (panics, ..) = job(vec![step("bug", &[], |_, _| panic!("a bug"))], &Arc::default());
    assert!(matches!(block_on(solve(panics, LIMITS)), Err(SolveError::Panicked { vertex: 0 })));
    let cache = Arc::new(Memory::default());
    cache.is_broken.store(true, Ordering::SeqCst);
    let (broken, ..) = job(vec![step("fine", &[], |_, _| Ok(1))], &cache);
    assert!(matches!(block_on(solve(broken, LIMITS)), Err(SolveError::Cache { source: Broken("no cache") })));
}

/// One step that waits at `gate` and counts how often it is run.
fn gated(gate: &Arc<Gate>, runs: &Arc<AtomicUsize>) -> Vec<Vertex<Step>> {
    let (gate, runs) = (gate.clone(), runs.clone());
    vec![step("compile", &[], move |_, scope| {
        runs.fetch_add(1, Ordering::SeqCst);
        scope.log(crate::Stream::Stdout, b"compiling");
        if gate.pass(scope) { Ok(7) } else { Err(Broken("stopped")) }
    })]
}

/// Waits until the solver has told a job something.
async fn told_something(told: &Mutex<Vec<Event>>) {
    while told.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[test]
fn two_builds_share_one_running_step() {
    let (gate, runs, cache) = (Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)), Arc::default());
    let (one, _, _) = job(gated(&gate, &runs), &cache);
    let (two, _, told) = job(gated(&gate, &runs), &cache);
    block_on(async {
        let solver = Arc::new(Solver::new(LIMITS));
        let first = tokio::spawn({
            let solver = solver.clone();
            async move { solver.solve(one).await }
        });
        gate.reached(1).await;
        let second = tokio::spawn({
            let solver = solver.clone();
            async move { solver.solve(two).await }
        });
        told_something(&told).await;
        gate.open();
        assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap().unwrap()), (7, 7));
    });
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    let told = told.lock().unwrap();
    assert!(matches!(told[..], [Event::Started { .. }, .., Event::Completed { .. }]), "{told:?}");
}

#[test]
fn a_cancelled_build_does_not_stop_what_another_one_waits_for() {
    let (gate, runs, cache) = (Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)), Arc::default());
    let (one, cancel, _) = job(gated(&gate, &runs), &cache);
    let (two, _, told) = job(gated(&gate, &runs), &cache);
    block_on(async {
        let solver = Arc::new(Solver::new(LIMITS));
        let first = tokio::spawn({
            let solver = solver.clone();
            async move { solver.solve(one).await }
        });
        gate.reached(1).await;
        let second = tokio::spawn({
            let solver = solver.clone();
            async move { solver.solve(two).await }
        });
        told_something(&told).await;
        cancel.cancel();
        assert!(matches!(first.await.unwrap(), Err(SolveError::Cancelled)));
        gate.open();
        assert_eq!(second.await.unwrap().unwrap(), 7);
    });
    assert_eq!(runs.load(Ordering::SeqCst), 1, "it went on");
}

#[test]
fn a_dropped_solve_stops_what_it_ran() {
    let (gate, runs, cache) = (Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)), Arc::default());
    let ended = Arc::new(AtomicBool::new(false));
    let (wait, end) = (gate.clone(), ended.clone());
    let vertices = vec![step("slow", &[], move |_, scope| {
        let open = wait.pass(scope);
        end.store(!open, Ordering::SeqCst);
        Err(Broken("stopped"))
    })];
    let (one, _, _) = job(vertices, &cache);
    let (two, _, _) = job(gated(&gate, &runs), &cache);
    block_on(async {
        let solver = Arc::new(Solver::new(LIMITS));
        let first = tokio::spawn({
            let solver = solver.clone();
            async move { solver.solve(one).await }
        });
        gate.reached(1).await;
        first.abort();
        while !ended.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
        gate.open();
        assert_eq!(solver.solve(two).await.unwrap(), 7, "the solver serves others");
    });
}

#[test]
fn when_nothing_happens_it_is_said_what_waits_for_what() {
    let gate = Arc::new(Gate::default());
    let wait = gate.clone();
    let hangs =
        move |_: &[u64], scope: &Scope<'_>| if wait.pass(scope) { Ok(1) } else { Err(Broken("stopped")) };
    let vertices = vec![step("RUN hangs", &[], hangs), step("RUN next", &[0], |_, _| Ok(2))];
    let (job, _, told) = job(vertices, &Arc::default());
    block_on(async {
        let solver = Solver::watched(LIMITS, Duration::from_millis(1));
        let solved = tokio::spawn(async move { solver.solve(job).await });
        let quiet = |event: &Event| match event {
            Event::Quiet { vertex, waits } => Some((*vertex, waits.clone())),
            _ => None,
        };
        // A busy machine may take longer than that to begin, and says so first.
        let said = (0, "it runs, and RUN next waits for it".to_owned());
        let begun = std::time::Instant::now();
        while !told.lock().unwrap().iter().filter_map(quiet).any(|told| told == said) {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", told.lock().unwrap());
            tokio::task::yield_now().await;
        }
        gate.open();
        assert_eq!(solved.await.unwrap().unwrap(), 2);
    });
}

/// What a thread that runs an op gets of the solve can be sent there, and the solve itself is never shared:
/// nobody but its own task can reach it.
#[test]
fn threads_share_nothing_but_a_channel_and_flags() {
    fn is_send<T: Send>() {}
    is_send::<Task<Step, Memory>>();
    is_send::<Message<Step, Memory>>();
    is_send::<Driver<Step, Memory>>();
}
