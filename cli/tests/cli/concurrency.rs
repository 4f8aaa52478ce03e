//! Eight processes at once on one store, at random: each finds what it left, whatever the others do
//! and collect.
//!
//! First, names belong to a worker, so that its own operations in turn are the model; what the names lead to,
//! layers, blobs and cached steps, is shared by all. Then one name belongs to all, and what they saw of it must
//! be what they could have seen in some order. `KILN_SEEDS=N` runs N times.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::process::Command;
use std::time::Instant;

use crate::harness::{Context, Outcome, Place, Running, Store, needs_root, text};

const WORKERS: usize = 8;
const OPERATIONS: usize = 8;
const SEEDS: usize = 20;
/// Contents that images have; few, so that workers meet.
const VARIANTS: usize = 4;
/// A command that takes longer hangs.
const PATIENCE: &str = "120";

struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % most as u64).expect("less than most")
    }
}

/// One of the processes, and what it knows of its images.
struct Worker<'s> {
    store: &'s Store,
    contexts: &'s [Context],
    number: usize,
    random: Random,
    /// The variant that each of its names leads to.
    model: BTreeMap<String, usize>,
    done: Vec<String>,
}

impl Worker<'_> {
    fn kiln(&mut self, args: &[&str]) -> Result<String, String> {
        let kiln = self.store.command(args);
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", PATIENCE]).arg(kiln.get_program()).args(kiln.get_args());
        for (name, value) in kiln.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let output = command.output().map_err(|error| error.to_string())?;
        self.done.push(args.join(" "));
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            return Ok(stdout.into_owned());
        }
        Err(format!(
            "worker {}, {}: {}\n{stderr}\nbefore: {:#?}",
            self.number,
            args.join(" "),
            output.status,
            self.done
        ))
    }

    fn any_name(&mut self) -> Option<String> {
        let count = self.model.len();
        (count > 0).then(|| self.model.keys().nth(self.random.below(count)).expect("less than count").clone())
    }

    fn new_name(&mut self) -> String {
        format!("w{}-{}", self.number, self.random.below(4))
    }

    fn step(&mut self) -> Result<(), String> {
        match (self.random.below(10), self.any_name()) {
            (0..=3, _) | (_, None) => {
                let (name, variant) = (self.new_name(), self.random.below(VARIANTS));
                let contexts = self.contexts;
                let context = contexts[variant].path();
                let mut line = vec!["build", "--progress", "plain", "-t", &name, context];
                if self.random.below(4) == 0 {
                    line.push("--no-cache");
                }
                self.kiln(&line)?;
                self.model.insert(name, variant);
            }
            (4, Some(name)) => {
                let (other, variant) = (self.new_name(), self.model[&name]);
                self.kiln(&["tag", &name, &other])?;
                self.model.insert(other, variant);
            }
            (5, Some(name)) => {
                self.kiln(&["rmi", &name])?;
                self.model.remove(&name);
            }
            (6, Some(name)) => {
                let out = self.store.beside(&format!("{}.tar", self.number));
                self.kiln(&["save", "-o", text(&out), &name])?;
                self.kiln(&["rmi", &name])?;
                self.kiln(&["load", "-i", text(&out)])?;
            }
            (7, Some(name)) => self.look(&name)?,
            (8, _) => drop(self.kiln(&["gc", "--max-store", "1kB"])?),
            (_, _) => drop(self.kiln(&["prune", "--force"])?),
        }
        Ok(())
    }

    /// What a name leads to is what the model says.
    fn look(&mut self, name: &str) -> Result<(), String> {
        let content = self.kiln(&["run", "--rm", "--network", "none", name, "cat", "/variant", "/made"])?;
        let variant = self.model[name];
        if content == format!("variant {variant}\nmade {variant}\n") {
            return Ok(());
        }
        Err(format!(
            "worker {}: {name} has {content:?}, not variant {variant}\nbefore: {:#?}",
            self.number, self.done
        ))
    }

    fn run(mut self) -> Result<BTreeMap<String, usize>, String> {
        for _ in 0..OPERATIONS {
            self.step()?;
        }
        Ok(self.model)
    }
}

/// A context for each variant.
fn contexts() -> Vec<Context> {
    let context = |variant| {
        let run = format!(
            "FROM busybox\nCOPY variant /\nRUN --network=none echo made {variant} > /made\nCMD [\"true\"]\n"
        );
        Context::new(&[("Dockerfile", &run), ("variant", &format!("variant {variant}\n"))])
    };
    (0..VARIANTS).map(context).collect()
}

/// One run; what was wrong.
fn round(seed: u64) -> Result<(), String> {
    let store = Store::with_few_commands(Place::Disk);
    let contexts = contexts();
    let worker = |number: usize| Worker {
        store: &store,
        contexts: &contexts,
        number,
        random: Random(seed.wrapping_add(number as u64)),
        model: BTreeMap::new(),
        done: Vec::new(),
    };
    let models: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WORKERS).map(|number| scope.spawn(move || worker(number).run())).collect();
        threads.into_iter().map(|thread| thread.join().expect("workers do not panic")).collect()
    });
    let mut expected = BTreeMap::new();
    for model in models {
        expected.extend(model?);
    }
    store.sound()?;
    let mut looker = Worker { model: expected, ..worker(WORKERS) };
    for name in looker.model.keys().cloned().collect::<Vec<_>>() {
        looker.look(&name)?;
    }
    let listed = looker.kiln(&["images"])?;
    let named =
        |line: &str| line.split_whitespace().next().filter(|name| name.starts_with('w')).map(str::to_owned);
    let listed: Vec<String> = listed.lines().filter_map(named).collect();
    match listed.iter().find(|name| !looker.model.contains_key(*name)) {
        None => Ok(()),
        Some(name) => Err(format!("{name} was removed and is there")),
    }
}

/// How many seeds, and the first of them.
fn seeds() -> (usize, u64) {
    let given = std::env::var("KILN_SEEDS").ok().map(|seeds| seeds.parse().expect("KILN_SEEDS is a number"));
    let first = std::env::var("KILN_SEED").ok().map(|seed| seed.parse().expect("KILN_SEED is a number"));
    let first = first.unwrap_or_else(|| RandomState::new().hash_one(std::process::id()) >> 8);
    (given.unwrap_or(SEEDS), first)
}

#[test]
fn eight_processes_at_random_find_what_they_left() {
    needs_root!();
    let ((seeds, first), started) = (seeds(), Instant::now());
    let mut wrong = Vec::new();
    for number in 0..seeds as u64 {
        let seed = first + number * 1000;
        if let Err(what) = round(seed) {
            wrong.push(format!("seed {seed}: {what}"));
        }
    }
    let took = started.elapsed().as_secs_f64();
    println!(
        "{seeds} seeds from {first}, {WORKERS} processes of {OPERATIONS} operations: {} violations, {took:.1} s",
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What one process does with the name that all share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// A build of a variant gets the name.
    Build(usize),
    /// A variant that is there gets it, too.
    Tag(usize),
    /// A variant comes out of an archive, under the name.
    Load(usize),
    /// The name goes.
    Remove,
    /// A container is made of what it leads to.
    Run,
}

/// What that process saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saw {
    Done,
    Variant(usize),
    Nothing,
}

impl Act {
    fn random(random: &mut Random) -> Self {
        let variant = random.below(VARIANTS);
        match random.below(7) {
            0 | 1 => Self::Build(variant),
            2 => Self::Tag(variant),
            3 => Self::Load(variant),
            4 => Self::Remove,
            _ => Self::Run,
        }
    }

    /// What it sees when nobody else is there, and what it leaves.
    fn alone(self, name: Option<usize>) -> (Saw, Option<usize>) {
        match (self, name) {
            (Self::Build(variant) | Self::Tag(variant) | Self::Load(variant), _) => {
                (Saw::Done, Some(variant))
            }
            (Self::Remove, Some(_)) => (Saw::Done, None),
            (Self::Run, Some(variant)) => (Saw::Variant(variant), name),
            (Self::Remove | Self::Run, None) => (Saw::Nothing, None),
        }
    }

    fn start(self, store: &Store, contexts: &[Context]) -> Running {
        let archive = |variant| store.beside(&format!("{variant}.tar"));
        let run = ["run", "--rm", "--network", "none", "shared", "cat", "/variant", "/made"];
        Running::start(match self {
            Self::Build(variant) => {
                let context = contexts[variant].path();
                store.command(&["build", "--progress", "plain", "-t", "shared", context])
            }
            Self::Tag(variant) => store.command(&["tag", &format!("kept-{variant}"), "shared"]),
            Self::Load(variant) => store.command(&["load", "-i", text(&archive(variant))]),
            Self::Remove => store.command(&["rmi", "shared"]),
            Self::Run => store.command(&run),
        })
    }

    fn saw(self, outcome: &Outcome) -> Result<Saw, String> {
        let is_missing = outcome.stderr.contains("there is no image");
        let content = |variant: &usize| outcome.stdout == format!("variant {variant}\nmade {variant}\n");
        match (self, outcome.code) {
            (Self::Run, Some(0)) => {
                let variant = (0..VARIANTS).find(content);
                variant.map(Saw::Variant).ok_or_else(|| format!("a container has {:?}", outcome.stdout))
            }
            (_, Some(0)) => Ok(Saw::Done),
            (Self::Run | Self::Remove, Some(_)) if is_missing => Ok(Saw::Nothing),
            _ => Err(format!("{self:?}: exit code {:?}\n{}", outcome.code, outcome.stderr)),
        }
    }
}

/// All orders of so many things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let Some(last) = count.checked_sub(1) else { return vec![Vec::new()] };
    let insert = |order: Vec<usize>| {
        (0..=order.len()).map(move |at| {
            let mut longer = order.clone();
            longer.insert(at, last);
            longer
        })
    };
    orders(last).into_iter().flat_map(insert).collect()
}

/// Whether there is an order in which each of `acts` sees what it saw and the name is left as it was left.
fn is_sequential(start: Option<usize>, acts: &[Act], saw: &[Saw], end: Option<usize>) -> bool {
    orders(acts.len()).into_iter().any(|order| {
        let mut name = start;
        let fits = order.into_iter().all(|nth| {
            let (seen, left) = acts[nth].alone(name);
            name = left;
            seen == saw[nth]
        });
        fits && name == end
    })
}

#[test]
fn orders_are_all_and_a_run_that_no_order_explains_is_told() {
    assert_eq!((orders(0).len(), orders(1).len(), orders(4).len()), (1, 1, 24));
    let acts = [Act::Build(1), Act::Remove, Act::Run];
    let done = |last| [Saw::Done, Saw::Done, last];
    assert!(is_sequential(Some(0), &acts, &done(Saw::Variant(0)), None));
    assert!(is_sequential(Some(0), &acts, &done(Saw::Variant(1)), None));
    assert!(is_sequential(Some(0), &acts, &done(Saw::Nothing), Some(1)));
    assert!(!is_sequential(Some(0), &acts, &done(Saw::Variant(2)), None), "nobody made it");
    assert!(!is_sequential(Some(0), &acts, &done(Saw::Nothing), Some(0)), "it was removed");
    assert!(!is_sequential(None, &[Act::Remove], &[Saw::Done], None), "there was nothing");
}

#[test]
fn processes_that_share_a_name_see_it_as_if_one_came_after_the_other() {
    needs_root!();
    const AT_ONCE: usize = 4;
    let store = Store::with_few_commands(Place::Disk);
    let contexts = contexts();
    for (variant, context) in contexts.iter().enumerate() {
        store.build(context, &["-t", "shared"]).expect(0);
        store.ok(&["tag", "shared", &format!("kept-{variant}")]);
        store.ok(&["save", "-o", text(&store.beside(&format!("{variant}.tar"))), "shared"]);
    }
    let ((seeds, first), started) = (seeds(), Instant::now());
    let mut wrong = Vec::new();
    for seed in (0..seeds as u64).map(|number| first + number * 1000) {
        let mut random = Random(seed);
        let start = (random.below(3) > 0).then(|| random.below(VARIANTS));
        store.kiln(&["rmi", "shared"]);
        if let Some(variant) = start {
            store.ok(&["tag", &format!("kept-{variant}"), "shared"]);
        }
        let mut acts: Vec<Act> = (0..AT_ONCE).map(|_| Act::random(&mut random)).collect();
        if seed % 4 == 0 {
            // Of these one at most finds the same name.
            acts[..2].fill(Act::Remove);
        }
        let running: Vec<Running> = acts.iter().map(|act| act.start(&store, &contexts)).collect();
        // What no name leads to goes meanwhile.
        let collection = Running::start(store.command(&["gc", "--keep-duration", "0s"]));
        let ended: Vec<Outcome> = running.into_iter().map(Running::end).collect();
        let collected = collection.end();
        let saw: Result<Vec<Saw>, String> =
            acts.iter().zip(&ended).map(|(act, outcome)| act.saw(outcome)).collect();
        let end = Act::Run.saw(&Act::Run.start(&store, &contexts).end());
        let told = match (saw, end) {
            (Err(what), _) | (_, Err(what)) => Err(what),
            _ if collected.code != Some(0) => Err(collected.stderr),
            (Ok(saw), Ok(end)) => {
                let left = if let Saw::Variant(variant) = end { Some(variant) } else { None };
                match is_sequential(start, &acts, &saw, left) {
                    true => Ok(()),
                    false => Err(format!("from {start:?}, {acts:?} saw {saw:?} and left {left:?}")),
                }
            }
        };
        if let Err(what) = told.and_then(|()| store.sound()) {
            wrong.push(format!("seed {seed}: {what}"));
        }
    }
    let took = started.elapsed().as_secs_f64();
    println!("{seeds} seeds from {first}, one name: {} violations, {took:.1} s", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
