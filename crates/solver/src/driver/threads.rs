//! Threads of several solves under shuttle, which tries orders of everything that one can see of another.
//!
//! The threads run the real [`task`], compiled once more with shuttle's flags and channel; the core is the real
//! one. The loop here does what the driver does without tokio.

// The driver's own use of it is not here.
#[allow(dead_code, clippy::duplicate_mod, reason = "the same file serves the driver")]
#[path = "task.rs"]
mod task;

/// In the place of the driver's `shared.rs`.
mod shared {
    pub(super) use shuttle::sync::atomic::{AtomicBool, Ordering};

    pub(super) struct Sender<T>(pub(super) shuttle::sync::mpsc::SyncSender<T>);

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            Self(self.0.clone())
        }
    }

    impl<T> Sender<T> {
        pub(super) fn blocking_send(&self, message: T) -> Result<(), ()> {
            self.0.send(message).map_err(|_| ())
        }
    }
}

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;

use kiln_oci::Digest;
use shuttle::sync::{Condvar, Mutex};

use self::shared::{AtomicBool, Ordering, Sender};
use self::task::{Ended, Task, VertexCancel};
use crate::core::{Command, Core, Fact, JobId, Limits, Plan};
use crate::{
    CacheKey, CacheStore, Cached, Cancellation, Claim, Cost, Event, Identity, InputUse, Op, Places, Scope,
    VertexInput,
};

/// What [`task`] knows by this name.
enum Message<O: Op, C: CacheStore<O::Output>> {
    Told { number: usize, event: Event },
    Ended { number: usize, ended: Ended<O, C::Error> },
    GivenUp { job: JobId },
}

#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

/// Which ops run, and which have run to their end.
#[derive(Default)]
struct Runs {
    now: BTreeSet<u8>,
    done: Vec<u8>,
}

/// Adds its number to its inputs' sum.
struct Step {
    name: u8,
    inputs: Vec<(usize, InputUse)>,
    runs: Arc<Mutex<Runs>>,
}

impl Op for Step {
    type Output = u64;
    type Error = Stopped;

    fn identity(&self) -> Identity {
        Identity::Cached(Digest::of(&[self.name]))
    }

    fn content(&self, _: usize, output: &u64, _: &Scope<'_>) -> Result<Digest, Stopped> {
        Ok(Digest::of(&output.to_le_bytes()))
    }

    fn run(&self, inputs: &[u64], scope: &Scope<'_>) -> Result<u64, Stopped> {
        assert!(self.runs.lock().unwrap().now.insert(self.name), "the same work twice at a time");
        shuttle::thread::yield_now();
        let stopped = scope.is_cancelled();
        let mut runs = self.runs.lock().unwrap();
        runs.now.remove(&self.name);
        if stopped {
            return Err(Stopped);
        }
        runs.done.push(self.name);
        Ok(u64::from(self.name) + inputs.iter().sum::<u64>())
    }

    fn is_same(&self, earlier: &u64, now: &u64, _: &Scope<'_>) -> Result<bool, Stopped> {
        Ok(earlier == now)
    }

    fn name(&self, output: &u64) -> Digest {
        Digest::of(&output.to_le_bytes())
    }
}

/// A store that several solves share, with claims.
#[derive(Default)]
struct Memory(Arc<Shared>);

#[derive(Default)]
struct Shared {
    records: Mutex<HashMap<CacheKey, Cached<u64>>>,
    held: Mutex<BTreeSet<CacheKey>>,
    released: Condvar,
}

struct Held(Arc<Shared>, CacheKey);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.lock().unwrap().remove(&self.1);
        self.0.released.notify_all();
    }
}

impl CacheStore<u64> for Memory {
    type Error = Infallible;

    fn lookup(&self, key: &CacheKey) -> Result<Option<Cached<u64>>, Infallible> {
        Ok(self.0.records.lock().unwrap().get(key).cloned())
    }

    fn load(&self, _: &Cached<u64>) -> Result<bool, Infallible> {
        Ok(true)
    }

    fn save(&self, places: &Places<'_>, result: &Cached<u64>, _: &str) -> Result<(), Infallible> {
        let mut records = self.0.records.lock().unwrap();
        for key in places.keys {
            records.entry(*key).or_insert_with(|| result.clone());
        }
        let newest = places.marks.iter().chain(&places.slot);
        records.extend(newest.map(|key| (*key, result.clone())));
        Ok(())
    }

    fn link(&self, places: &Places<'_>, result: &Cached<u64>, title: &str) -> Result<(), Infallible> {
        self.save(places, result, title)
    }

    fn claim(&self, key: &CacheKey, scope: &Scope<'_>) -> Result<Option<Claim>, Infallible> {
        let mut held = self.0.held.lock().unwrap();
        while !scope.is_cancelled() {
            if held.insert(*key) {
                return Ok(Some(Claim::new(Held(self.0.clone(), *key))));
            }
            held = self.0.released.wait(held).unwrap();
        }
        Ok(None)
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

/// One solver: jobs of one graph each, whose last step is wanted.
struct Solve {
    core: Core<u64>,
    store: Arc<Memory>,
    /// By the core's numbers.
    steps: HashMap<usize, (JobId, Arc<Step>)>,
    busy: HashMap<usize, (Arc<VertexCancel>, usize)>,
    cancels: HashMap<JobId, Arc<Flag>>,
    outcomes: BTreeMap<JobId, Option<u64>>,
    inbox: Sender<Message<Step, Memory>>,
    messages: shuttle::sync::mpsc::Receiver<Message<Step, Memory>>,
}

impl Solve {
    fn new(store: &Arc<Memory>) -> Self {
        let (inbox, messages) = shuttle::sync::mpsc::sync_channel(4);
        Self {
            core: Core::new(Limits { jobs: 4, memory_bytes: u64::MAX }),
            store: store.clone(),
            steps: HashMap::new(),
            busy: HashMap::new(),
            cancels: HashMap::new(),
            outcomes: BTreeMap::new(),
            inbox: Sender(inbox),
            messages,
        }
    }

    fn start(&mut self, steps: &[Arc<Step>]) -> JobId {
        let plan = |step: &Arc<Step>| Plan {
            identity: step.identity(),
            by_content: None,
            inputs: step.inputs.iter().map(|&(vertex, usage)| VertexInput { vertex, usage }).collect(),
            refresh: false,
            lineage: Some(Digest::of(&[step.name, 0])),
            cost: Cost::default(),
        };
        let plans: Vec<Plan> = steps.iter().map(plan).collect();
        let (job, numbers, commands) = self.core.start(&plans, plans.len() - 1);
        self.steps.extend(numbers.into_iter().zip(steps.iter().map(|step| (job, step.clone()))));
        self.cancels.insert(job, Arc::default());
        self.carry_out(commands);
        job
    }

    /// A thread that gives up `job` at any time.
    fn give_up_later(&self, job: JobId) -> shuttle::thread::JoinHandle<()> {
        let (cancel, store, inbox) = (self.cancels[&job].clone(), self.store.clone(), self.inbox.clone());
        shuttle::thread::spawn(move || {
            cancel.cancel();
            // Whoever waits for a claim looks at the flag now and then.
            drop(store.0.held.lock().unwrap());
            store.0.released.notify_all();
            // Nobody hears it who has all outcomes already.
            let _ = inbox.blocking_send(Message::GivenUp { job });
        })
    }

    /// Until all jobs are over and nothing runs.
    fn finish(mut self) -> BTreeMap<JobId, Option<u64>> {
        while !self.busy.is_empty() || self.outcomes.len() < self.cancels.len() {
            let fact = match self.messages.recv().unwrap() {
                Message::Told { number, event: Event::Started { vertex } } => {
                    assert_eq!(number, vertex);
                    continue;
                }
                Message::Told { .. } => continue,
                Message::GivenUp { job } => {
                    self.outcomes.entry(job).or_insert(None);
                    Fact::GivenUp { job }
                }
                Message::Ended { number: vertex, ended } => {
                    let busy = self.busy.get_mut(&vertex).unwrap();
                    busy.1 -= 1;
                    if busy.1 == 0 {
                        self.busy.remove(&vertex);
                    }
                    match ended {
                        Ended::Digested { input, digest } => Fact::Digested { vertex, input, digest },
                        Ended::Ran { canonical, output } => Fact::Ran { vertex, canonical, output },
                        Ended::Stopped { digesting } => Fact::Stopped { vertex, digesting },
                        Ended::Failed { message, .. } => panic!("{message}"),
                        Ended::Asked { .. } | Ended::Fetched { .. } => panic!("nothing is far here"),
                    }
                }
            };
            let commands = self.core.apply(fact);
            self.carry_out(commands);
        }
        self.outcomes
    }

    fn carry_out(&mut self, commands: Vec<Command<u64>>) {
        for command in commands {
            let fact = match command {
                Command::Lookup { vertex, key } => {
                    let Ok(hit) = self.store.lookup(&key);
                    Fact::Found { vertex, hit, is_old: false }
                }
                Command::Mark { vertex, input, key } => {
                    let Ok(known) = self.store.lookup(&key);
                    Fact::Marked { vertex, input, known: known.is_some() }
                }
                Command::Load { vertex, cached } => Fact::Loaded { vertex, output: Some(cached.output) },
                Command::Link { keys, marks, cached, .. } => {
                    let places = Places { keys: &keys, replace: false, marks: &marks, slot: None };
                    let Ok(()) = self.store.link(&places, &cached, "");
                    continue;
                }
                Command::Digest { vertex, input, output } => {
                    let (task, step) = (self.task(vertex), self.steps[&vertex].1.clone());
                    shuttle::thread::spawn(move || task.digest(&*step, input, &output));
                    continue;
                }
                Command::Run { vertex, inputs, save } => {
                    let (task, step) = (self.task(vertex), self.steps[&vertex].1.clone());
                    let store = self.store.clone();
                    shuttle::thread::spawn(move || task.run(&*step, &*store, "", &inputs, save.as_deref()));
                    continue;
                }
                Command::Stop { vertex } => {
                    if let Some((cancel, _)) = self.busy.get(&vertex) {
                        cancel.stop();
                        drop(self.store.0.held.lock().unwrap());
                        self.store.0.released.notify_all();
                    }
                    continue;
                }
                Command::Merged { vertex, with } => {
                    if let Some((cancel, _)) = self.busy.get(&with)
                        && self.steps[&vertex].0 != self.steps[&with].0
                    {
                        cancel.adopt();
                    }
                    continue;
                }
                Command::Finish { job, outcome } => {
                    self.outcomes.insert(job, Some(outcome.expect("nothing fails")));
                    continue;
                }
            };
            let more = self.core.apply(fact);
            self.carry_out(more);
        }
    }

    fn task(&mut self, vertex: usize) -> Task<Step, Memory> {
        let job: Arc<dyn Cancellation> = self.cancels[&self.steps[&vertex].0].clone();
        let busy = self.busy.entry(vertex).or_insert_with(|| (Arc::new(VertexCancel::new(job)), 0));
        busy.1 += 1;
        Task { number: vertex, position: vertex, cancel: busy.0.clone(), inbox: self.inbox.clone() }
    }
}

/// Two stages, and what is copied from one to the other: 1 and 2, 4 on 1 with files of 2.
fn steps(runs: &Arc<Mutex<Runs>>) -> Vec<Arc<Step>> {
    let step = |name, inputs: &[(usize, InputUse)]| {
        Arc::new(Step { name, inputs: inputs.to_vec(), runs: runs.clone() })
    };
    let copy = [(0, InputUse::Definition), (1, InputUse::Content)];
    vec![step(1, &[]), step(2, &[]), step(4, &copy)]
}

const SUM: u64 = 7;

/// Some random orders, and some that are told apart by few changes of threads at bad moments.
fn in_many_orders(check: impl Fn() + Send + Sync + Copy + 'static) {
    // More of them by `KILN_ORDERS=N`.
    let orders =
        std::env::var("KILN_ORDERS").map_or(400, |count| count.parse().expect("KILN_ORDERS is a number"));
    shuttle::check_random(check, orders);
    shuttle::check_pct(check, orders, 3);
}

#[test]
fn two_processes_with_one_store_run_each_step_once() {
    in_many_orders(|| {
        let (store, runs) = (Arc::<Memory>::default(), Arc::<Mutex<Runs>>::default());
        let solve = |store: Arc<Memory>, runs: Arc<Mutex<Runs>>| {
            let mut solve = Solve::new(&store);
            let job = solve.start(&steps(&runs));
            assert_eq!(solve.finish()[&job], Some(SUM));
        };
        let (other_store, other_runs) = (store.clone(), runs.clone());
        let other = shuttle::thread::spawn(move || solve(other_store, other_runs));
        solve(store.clone(), runs.clone());
        other.join().unwrap();
        let mut done = runs.lock().unwrap().done.clone();
        done.sort_unstable();
        assert_eq!(done, [1, 2, 4]);
        assert!(store.0.held.lock().unwrap().is_empty(), "a claim is left");
    });
}

#[test]
fn a_build_that_is_given_up_at_any_time_takes_nothing_from_another() {
    in_many_orders(|| {
        let (store, runs) = (Arc::<Memory>::default(), Arc::<Mutex<Runs>>::default());
        let mut solve = Solve::new(&store);
        let one = solve.start(&steps(&runs));
        let canceller = solve.give_up_later(one);
        let two = solve.start(&steps(&runs));
        let outcomes = solve.finish();
        canceller.join().unwrap();
        assert_eq!(outcomes[&two], Some(SUM));
        let mut done = runs.lock().unwrap().done.clone();
        done.sort_unstable();
        assert_eq!(done, [1, 2, 4], "all of it, and nothing twice");
        assert!(store.0.held.lock().unwrap().is_empty(), "a claim is left");
    });
}

#[test]
fn a_build_that_waits_for_a_claim_can_be_given_up() {
    in_many_orders(|| {
        let (store, runs) = (Arc::<Memory>::default(), Arc::<Mutex<Runs>>::default());
        let mut solve = Solve::new(&store);
        // Somebody else has all steps, and never ends: claims of everything that this build will ask for.
        let mut elsewhere = Solve::new(&store);
        let endless = elsewhere.start(&steps(&Arc::default()));
        let job = solve.start(&steps(&runs));
        let (canceller, other) = (solve.give_up_later(job), elsewhere.give_up_later(endless));
        assert!(elsewhere.finish().contains_key(&endless));
        assert!(solve.finish().contains_key(&job));
        canceller.join().unwrap();
        other.join().unwrap();
        assert!(store.0.held.lock().unwrap().is_empty(), "a claim is left");
    });
}
