//! What it costs to solve a graph whose results are all there: `cargo bench -p kiln-solver`.
//!
//! The cache is in memory: this is the solver alone. The target is 100 ms for 10,000 vertices,
//! which is what as many index reads of a store cost.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_oci::Digest;
use kiln_solver::{
    CacheKey, CacheStore, Cached, Cancellation, Claim, Cost, Identity, InputUse, Job, Limits, Op, Places,
    Scope, Vertex, VertexInput, solve,
};

const VERTICES: usize = 10_000;
const SAMPLES: usize = 9;

struct Step {
    name: Digest,
    runs: Arc<AtomicUsize>,
}

impl Op for Step {
    type Output = u32;
    type Error = Infallible;

    fn identity(&self) -> Identity {
        Identity::Cached(self.name)
    }

    fn content(&self, _: usize, output: &u32, _: &Scope<'_>) -> Result<Digest, Infallible> {
        Ok(Digest::of(&output.to_le_bytes()))
    }

    fn run(&self, _: &[u32], _: &Scope<'_>) -> Result<u32, Infallible> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }

    fn is_same(&self, _: &u32, _: &u32, _: &Scope<'_>) -> Result<bool, Infallible> {
        Ok(false)
    }

    fn name(&self, _: &u32) -> Digest {
        self.name
    }
}

#[derive(Default)]
struct Memory(Mutex<HashMap<CacheKey, Cached<u32>>>);

impl CacheStore<u32> for Memory {
    type Error = Infallible;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<u32>>, Infallible> {
        Ok(self.0.lock().expect("nobody panics").get(key).cloned())
    }

    fn load(&self, _: &Cached<u32>) -> Result<bool, Infallible> {
        Ok(true)
    }

    fn save(&self, places: &Places<'_>, result: &Cached<u32>, _: &str) -> Result<(), Infallible> {
        let mut all = self.0.lock().expect("nobody panics");
        all.extend(
            places.keys.iter().chain(places.marks).chain(&places.slot).map(|key| (*key, result.clone())),
        );
        Ok(())
    }

    fn link(&self, places: &Places<'_>, result: &Cached<u32>, title: &str) -> Result<(), Infallible> {
        self.save(places, result, title)
    }

    fn claim(&self, _: &CacheKey, _: &Scope<'_>) -> Result<Option<Claim>, Infallible> {
        Ok(Some(Claim::new(())))
    }
}

struct Never;

impl Cancellation for Never {
    fn cancel(&self) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Which earlier vertices a vertex stands on.
type Shape = fn(usize) -> Vec<(usize, InputUse)>;

const SHAPES: [(&str, Shape); 3] = [
    ("a chain", |at| at.checked_sub(1).map(|below| (below, InputUse::Definition)).into_iter().collect()),
    ("stages of ten steps, each copied from the one before", |at| match at {
        0 => Vec::new(),
        _ if at % 10 == 0 && at >= 20 => vec![(at - 10, InputUse::Definition), (at - 1, InputUse::Content)],
        _ => vec![(at - 1, InputUse::Definition)],
    }),
    ("one step on all others", |at| match at {
        _ if at + 1 == VERTICES => (0..at).map(|below| (below, InputUse::Definition)).collect(),
        _ => Vec::new(),
    }),
];

fn sample(runtime: &tokio::runtime::Runtime, cache: &Arc<Memory>, shape: Shape) -> (Duration, usize) {
    let runs = Arc::new(AtomicUsize::new(0));
    let vertex = |at: usize| {
        let op = Step { name: Digest::of(&at.to_le_bytes()), runs: runs.clone() };
        let inputs = shape(at).into_iter().map(|(vertex, usage)| VertexInput { vertex, usage }).collect();
        let (title, cost) = (String::new(), Cost::default());
        Vertex { op: Arc::new(op), inputs, title, refresh: false, lineage: None, cost }
    };
    let job = Job {
        vertices: (0..VERTICES).map(vertex).collect(),
        target: VERTICES - 1,
        cache: cache.clone(),
        cancel: Arc::new(Never),
        events: Arc::new(|_| {}),
    };
    let started = Instant::now();
    let limits = Limits { jobs: 4, memory_bytes: u64::MAX };
    runtime.block_on(solve(job, limits)).expect("nothing fails");
    (started.elapsed(), runs.load(Ordering::Relaxed))
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
    let runtime = runtime.expect("threads can be started");
    for (name, shape) in SHAPES {
        let cache = Arc::new(Memory::default());
        let (first, ran) = sample(&runtime, &cache, shape);
        assert_eq!(ran, VERTICES, "the first time everything runs");
        let mut samples: Vec<Duration> = (0..SAMPLES)
            .map(|_| {
                let (took, ran) = sample(&runtime, &cache, shape);
                assert_eq!(ran, 0, "everything is cached");
                took
            })
            .collect();
        samples.sort();
        println!("{VERTICES} vertices, {name}: {:.1?} cached, {first:.1?} run", samples[SAMPLES / 2]);
    }
}
