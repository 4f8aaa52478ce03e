//! Eight processes at once on one store, at random: each finds what it left, whatever the others do
//! and collect.
//!
//! Names belong to a worker, so that its own operations in turn are the model; what the names lead to,
//! layers, blobs and cached steps, is shared by all. `KILN_SEEDS=N` runs N times.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::process::Command;
use std::time::Instant;

use crate::harness::{Context, Store, needs_root, text};

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

/// One run; what was wrong.
fn round(seed: u64) -> Result<(), String> {
    let store = Store::with_few_commands();
    let contexts: Vec<Context> = (0..VARIANTS)
        .map(|variant| {
            let run = format!(
                "FROM busybox\nCOPY variant /\nRUN --network=none echo made {variant} > /made\nCMD [\"true\"]\n"
            );
            Context::new(&[("Dockerfile", &run), ("variant", &format!("variant {variant}\n"))])
        })
        .collect();
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

#[test]
fn eight_processes_at_random_find_what_they_left() {
    needs_root!();
    let given = std::env::var("KILN_SEEDS").ok().map(|seeds| seeds.parse().expect("KILN_SEEDS is a number"));
    let first = std::env::var("KILN_SEED").ok().map(|seed| seed.parse().expect("KILN_SEED is a number"));
    let first: u64 = first.unwrap_or_else(|| RandomState::new().hash_one(std::process::id()) >> 8);
    let (seeds, started) = (given.unwrap_or(SEEDS), Instant::now());
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
