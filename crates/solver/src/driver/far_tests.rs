//! A cache of which a part is far.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kiln_oci::Digest;

use super::{Job, Limits, solve};
use crate::{
    CacheKey, CacheStore, Cached, Cancellation, Claim, Cost, Event, Identity, InputUse, Op, Places, Scope,
    Vertex, VertexInput,
};

#[derive(Debug, thiserror::Error)]
#[error("nothing")]
struct Nothing;

/// A number, and whether it is on another machine still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Near(usize),
    Far(usize),
}

/// Adds one to the sum of its inputs.
struct Add {
    name: String,
    runs: Arc<AtomicUsize>,
}

impl Op for Add {
    type Output = Value;
    type Error = Nothing;

    fn identity(&self) -> Identity {
        Identity::Cached(Digest::of(self.name.as_bytes()))
    }

    fn content(&self, _input: usize, _output: &Value, _scope: &Scope<'_>) -> Result<Digest, Nothing> {
        Err(Nothing)
    }

    fn run(&self, inputs: &[Value], _scope: &Scope<'_>) -> Result<Value, Nothing> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let near = |value: &Value| match value {
            Value::Near(number) => Ok(*number),
            Value::Far(_) => Err(Nothing),
        };
        Ok(Value::Near(1 + inputs.iter().map(near).sum::<Result<usize, _>>()?))
    }

    fn is_same(&self, earlier: &Value, now: &Value, _scope: &Scope<'_>) -> Result<bool, Nothing> {
        Ok(earlier == now)
    }

    fn name(&self, output: &Value) -> Digest {
        Digest::of(format!("{output:?}").as_bytes())
    }
}

#[derive(Default)]
struct TwoPlaces {
    near: Mutex<HashMap<CacheKey, Cached<Value>>>,
    far: HashMap<CacheKey, Cached<Value>>,
    /// What the far side told in advance.
    told: Mutex<HashSet<CacheKey>>,
    /// Fetched results that turn out to be damaged.
    damaged: HashSet<usize>,
    asked: AtomicUsize,
    fetched: Mutex<Vec<usize>>,
    panics: bool,
}

impl CacheStore<Value> for TwoPlaces {
    type Error = Nothing;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<Value>>, Nothing> {
        let near = self.near.lock().unwrap().get(key).cloned();
        let told = || self.told.lock().unwrap().contains(key).then(|| self.far.get(key).cloned()).flatten();
        Ok(near.or_else(told))
    }

    fn may_be_far(&self, key: &CacheKey) -> bool {
        !self.told.lock().unwrap().contains(key)
    }

    fn ask_far(&self, keys: &[CacheKey], soon: &[CacheKey]) -> Vec<Option<Cached<Value>>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics, "as it should");
        self.told.lock().unwrap().extend(keys.iter().chain(soon));
        keys.iter().map(|key| self.far.get(key).cloned()).collect()
    }

    fn is_far(&self, found: &Cached<Value>) -> bool {
        matches!(found.output, Value::Far(_))
    }

    fn fetch(&self, found: &Cached<Value>, _scope: &Scope<'_>) -> Result<Option<Value>, Nothing> {
        let Value::Far(number) = found.output else { return Err(Nothing) };
        self.fetched.lock().unwrap().push(number);
        Ok((!self.damaged.contains(&number)).then_some(Value::Near(number)))
    }

    fn origin(&self, found: &Cached<Value>) -> Option<Arc<str>> {
        matches!(found.output, Value::Far(_)).then(|| Arc::from("far"))
    }

    fn load(&self, found: &Cached<Value>) -> Result<bool, Nothing> {
        Ok(!self.is_far(found))
    }

    fn save(&self, places: &Places<'_>, result: &Cached<Value>, _title: &str) -> Result<(), Nothing> {
        let mut near = self.near.lock().unwrap();
        near.extend(places.keys.iter().chain(places.marks).map(|key| (*key, result.clone())));
        Ok(())
    }

    fn link(&self, places: &Places<'_>, result: &Cached<Value>, title: &str) -> Result<(), Nothing> {
        self.save(places, result, title)
    }

    fn claim(&self, _key: &CacheKey, _scope: &Scope<'_>) -> Result<Option<Claim>, Nothing> {
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

/// What a build of `length` steps, each on the one before, came to.
struct Came {
    output: Value,
    runs: usize,
    from_far: usize,
    cache: Arc<TwoPlaces>,
}

fn build(length: usize, cache: TwoPlaces) -> Came {
    let (runs, cache) = (Arc::<AtomicUsize>::default(), Arc::new(cache));
    let vertex = |nth: usize| Vertex {
        op: Arc::new(Add { name: format!("step {nth}"), runs: runs.clone() }),
        inputs: nth
            .checked_sub(1)
            .map(|vertex| VertexInput { vertex, usage: InputUse::Definition })
            .into_iter()
            .collect(),
        title: String::new(),
        refresh: false,
        lineage: None,
        cost: Cost::default(),
    };
    let from_far = Arc::<AtomicUsize>::default();
    let heard = from_far.clone();
    let job = Job {
        vertices: (0..length).map(vertex).collect(),
        target: length - 1,
        cache: cache.clone(),
        cancel: Arc::new(Never),
        events: Arc::new(move |event| {
            if matches!(event, Event::Cached { from: Some(_), .. }) {
                heard.fetch_add(1, Ordering::SeqCst);
            }
        }),
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let limits = Limits { jobs: 8, memory_bytes: u64::MAX };
    let output = runtime.block_on(solve(job, limits)).unwrap();
    let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    Came { output, runs: count(&runs), from_far: count(&from_far), cache }
}

/// A far side that has what a build of `length` steps made.
fn with_results_of(length: usize) -> TwoPlaces {
    let made = build(length, TwoPlaces::default());
    assert_eq!(made.runs, length);
    let near = made.cache.near.lock().unwrap();
    let far = near.iter().map(|(key, found)| {
        let Value::Near(number) = found.output else { panic!("what was made is near") };
        (*key, Cached { output: Value::Far(number), ..found.clone() })
    });
    TwoPlaces { far: far.collect(), ..TwoPlaces::default() }
}

#[test]
fn what_is_far_is_asked_for_in_one_breath_and_only_what_is_needed_is_fetched() {
    let came = build(20, with_results_of(20));
    assert_eq!((came.output, came.runs, came.from_far), (Value::Near(20), 0, 20));
    assert_eq!(*came.cache.fetched.lock().unwrap(), [20]);
    assert_eq!(came.cache.asked.load(Ordering::SeqCst), 1, "the keys of a chain can be guessed");
}

#[test]
fn what_the_far_side_does_not_have_is_run_on_what_it_has() {
    let came = build(20, with_results_of(12));
    assert_eq!((came.output, came.runs, came.from_far), (Value::Near(20), 8, 12));
    assert_eq!(*came.cache.fetched.lock().unwrap(), [12]);
}

#[test]
fn what_cannot_be_fetched_is_made() {
    let far = with_results_of(5);
    let came = build(5, TwoPlaces { damaged: [4, 5].into(), ..far });
    assert_eq!((came.output, came.runs), (Value::Near(5), 2));
    assert_eq!(*came.cache.fetched.lock().unwrap(), [5, 4, 3]);
}

#[test]
fn a_far_side_that_breaks_knows_nothing() {
    let came = build(3, TwoPlaces { panics: true, ..with_results_of(3) });
    assert_eq!((came.output, came.runs), (Value::Near(3), 3));
}
