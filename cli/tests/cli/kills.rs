//! Killed at random moments: whatever kiln was doing, the store is sound and the same command does
//! its work the next time.
//!
//! A kill counts when the command was still running: its status says that a signal ended it. The test
//! command makes 400 that count for each of build, save, load, import and gc, 2,000 in all, and 20 for each
//! kind of damage that `fsck` mends and for a copy in front of an earlier one, with seeds of its own, which it
//! prints. `KILN_KILLS=N` makes N for each
//! kind of command (`KILN_KILLS=2000`: 10,000 for the five), `KILN_SEED=N` repeats a run.
//!
//! A fourth of the 400 are of stores on the disk, the others of stores in memory, which take less time: of
//! what a process has written a kill loses nothing, wherever it was written to. What a power cut loses is
//! another campaign's, `power`.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_testkit::random::Random;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::deltas::{are_possible, deltas};
use crate::harness::{Context, Place, Store, few_commands_tar, needs_root, text};

/// Kills that count, for each kind of command in a run of the test command.
const KILLS: usize = 400;
/// The same for each kind of damage that is mended, and for a copy in front of an earlier one.
const FEW_KILLS: usize = 20;
/// One of so many is made on the disk.
const DISK_PART: usize = 4;
/// After so many moments the command is timed anew: other tests come and go beside this one.
const TIMED_EVERY: usize = 25;

/// How many kills of a kind: as `KILN_KILLS` says, or so many.
fn kills(usual: usize) -> usize {
    let given = std::env::var("KILN_KILLS").ok();
    given.map_or(usual, |count| count.parse().expect("KILN_KILLS is a number"))
}

/// Where to make [`KILLS`], and how many there.
fn places() -> [(Place, usize); 2] {
    let (all, on_disk) = (kills(KILLS), kills(KILLS).div_ceil(DISK_PART));
    [(Place::Disk, on_disk), (Place::Memory, all - on_disk)]
}

/// How long a command takes on this machine now: the median of its last five runs.
#[derive(Default)]
struct Pace(VecDeque<Duration>);

impl Pace {
    fn add(&mut self, took: Duration) {
        self.0.push_back(took);
        if self.0.len() > 5 {
            self.0.pop_front();
        }
    }

    fn median(&self) -> Duration {
        let mut sorted: Vec<Duration> = self.0.iter().copied().collect();
        sorted.sort();
        sorted[sorted.len() / 2]
    }
}

/// A command, what has to be done before it, and what its result is told by.
struct Scenario<'s> {
    store: &'s Store,
    line: Vec<String>,
    prepare: Box<dyn Fn() + 's>,
    result: Box<dyn Fn(&str) -> String + 's>,
}

impl Scenario<'_> {
    fn command(&self) -> Command {
        self.store.command(&self.line.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs it to its end; its result, and how long it took.
    fn complete(&self) -> Result<(String, Duration), String> {
        let begun = Instant::now();
        let output = self.command().output().expect("kiln starts");
        let took = begun.elapsed();
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            return Err(format!("{}: {stderr}", output.status));
        }
        Ok(((self.result)(&stdout), took))
    }

    /// Starts it and kills its whole process group; whether that was what ended it.
    fn cut(&self, after: Duration) -> bool {
        let mut command = self.command();
        command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("kiln starts");
        // Not a wait for something: the moment is what is random here.
        std::thread::sleep(after);
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        child.wait().expect("our child").signal() == Some(Signal::KILL.as_raw())
    }

    /// Runs it from its beginning to its end, and times it; what was wrong with its result.
    fn time(&self, pace: &mut Pace, golden: &str) -> Result<(), String> {
        (self.prepare)();
        let (result, took) = self.complete()?;
        pace.add(took);
        if result == golden { Ok(()) } else { Err(format!("{result}, not {golden}")) }
    }

    fn campaign(&self, name: &str, place: Place, kills: usize) {
        let mut random = Random::new();
        let (seed, started) = (random.seed(), Instant::now());
        (self.prepare)();
        let (golden, _) = self.complete().unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut pace = Pace::default();
        let (mut moments, mut killed, mut wrong) = (0_usize, 0, Vec::new());
        // A tenth of them come too late, up to a half where the machine is busy.
        while killed < kills && moments < 4 * kills + TIMED_EVERY {
            if moments.is_multiple_of(TIMED_EVERY)
                && let Err(what) = self.time(&mut pace, &golden)
            {
                wrong.push(format!("before kill {moments}: {what}"));
                break;
            }
            (self.prepare)();
            let after = pace.median().mul_f64(1.1 * random.fraction());
            killed += usize::from(self.cut(after));
            let mut complain = |what: String| wrong.push(format!("kill {moments} after {after:?}: {what}"));
            if let Err(what) = self.store.sound() {
                complain(what);
            }
            // Not timed: a part of its work may be done.
            match self.complete() {
                Ok((result, _)) if result == golden => {}
                Ok((result, _)) => complain(format!("{result}, not {golden}")),
                Err(error) => complain(error),
            }
            moments += 1;
        }
        let took = started.elapsed().as_secs_f64();
        println!(
            "{name}, {place:?}: {killed} kills that count, of {moments}, seed {seed}, {took:.1} s, {} violations",
            wrong.len()
        );
        assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
        assert!(killed >= kills, "{name}: only {killed} of {moments} kills met a command that was running");
    }
}

fn nothing() -> Box<dyn Fn()> {
    Box::new(|| {})
}

fn lines(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// The same image whenever it is built.
const AS_IMAGE: [&str; 4] = ["--build-arg", "SOURCE_DATE_EPOCH=0", "-t", "image"];

fn build_line(context: &Context) -> Vec<&str> {
    [&["build", "--progress", "plain", "--no-cache"][..], &AS_IMAGE, &[context.path()]].concat()
}

/// A store with an image of several layers, and its files for other commands.
fn with_image(place: Place) -> (Store, Context, PathBuf) {
    let store = Store::with_few_commands(place);
    let run = "FROM busybox\nCOPY . /\nRUN --network=none echo made > /made && touch -d @7 /made\n";
    let context = Context::new(&[("Dockerfile", run), ("a", "a"), ("d/b", "b")]);
    store.build(&context, &AS_IMAGE).expect(0);
    let saved = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&saved), "image"]);
    (store, context, saved)
}

fn digest(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("coreutils are there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn a_killed_build_loses_nothing() {
    needs_root!();
    for (place, kills) in places() {
        let (store, context, _) = with_image(place);
        let line = build_line(&context);
        let result = |stdout: &str| stdout.lines().next().unwrap_or_default().to_owned();
        Scenario { store: &store, line: lines(&line), prepare: nothing(), result: Box::new(result) }
            .campaign("build", place, kills);
    }
}

#[test]
fn a_killed_build_of_a_delta_loses_nothing() {
    needs_root!();
    let (store, context, _) = with_image(Place::Disk);
    (0..80).for_each(|nth| context.write(&format!("d/{nth}"), &nth.to_string()));
    let line = build_line(&context);
    store.ok(&line);
    context.write("d/1", "one");
    // Each build leaves a layer, and all of them would be checked.
    let prepare = || drop(store.ok(&["prune", "--force"]));
    let result = |stdout: &str| stdout.lines().next().unwrap_or_default().to_owned();
    Scenario { store: &store, line: lines(&line), prepare: Box::new(prepare), result: Box::new(result) }
        .campaign("build of a delta", Place::Disk, kills(FEW_KILLS));
    assert_eq!(deltas(&store).is_empty(), !are_possible(&store));
}

#[test]
fn a_killed_save_loses_nothing() {
    needs_root!();
    for (place, kills) in places() {
        let (store, _context, _) = with_image(place);
        let out = store.beside("out.tar");
        let line = lines(&["save", "-o", text(&out), "image"]);
        let prepare = || drop(fs::remove_file(&out));
        let result = |_: &str| digest(&out);
        Scenario { store: &store, line, prepare: Box::new(prepare), result: Box::new(result) }
            .campaign("save", place, kills);
    }
}

#[test]
fn a_killed_load_loses_nothing() {
    needs_root!();
    let (_store, _context, saved) = with_image(Place::Disk);
    for (place, kills) in places() {
        let other = Store::empty_at(place);
        let line = lines(&["load", "-i", text(&saved)]);
        // Nothing of it is there, so that there is something to do.
        let prepare = || {
            other.kiln(&["rmi", "image"]);
            other.ok(&["prune", "--all", "--force"]);
        };
        let result = |stdout: &str| format!("{stdout}{}", other.ok(&["inspect", "image"]).stdout);
        Scenario { store: &other, line, prepare: Box::new(prepare), result: Box::new(result) }
            .campaign("load", place, kills);
    }
}

#[test]
fn a_killed_import_loses_nothing() {
    needs_root!();
    for (place, kills) in places() {
        let store = Store::with_few_commands(place);
        let tar = few_commands_tar(store.beside("").as_path());
        let line = lines(&["import", text(&tar), "imported", "-c", "CMD [\"sh\"]"]);
        let prepare = || {
            store.kiln(&["rmi", "imported"]);
            store.ok(&["prune", "--all", "--force"]);
        };
        let result = |_: &str| store.inspect("imported")["RootFS"].to_string();
        Scenario { store: &store, line, prepare: Box::new(prepare), result: Box::new(result) }
            .campaign("import", place, kills);
    }
}

#[test]
fn a_killed_collection_loses_nothing() {
    needs_root!();
    let junk = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /junk/\n"), ("a", "a"), ("d/b", "b")]);
    for (place, kills) in places() {
        let (store, _context, _) = with_image(place);
        let prepare = || {
            store.build(&junk, &["--no-cache", "-t", "junk"]).expect(0);
            store.ok(&["rmi", "junk"]);
        };
        let line = lines(&["gc", "--max-store", "1kB"]);
        let result = |_: &str| store.ok(&["inspect", "image", "busybox"]).stdout;
        Scenario { store: &store, line, prepare: Box::new(prepare), result: Box::new(result) }
            .campaign("gc", place, kills);
    }
}

#[test]
fn a_killed_check_loses_nothing() {
    needs_root!();
    let (store, context, _) = with_image(Place::Disk);
    let db = |name: &str| store.root().join("db").join(name);
    let damage_journal = || {
        let mut bytes = fs::read(db("journal")).expect("ours");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(db("journal"), bytes).expect("ours");
    };
    let lose_index = || drop(fs::remove_file(db("meta.sqlite")));
    let lose_journal = || drop(fs::remove_file(db("journal")));
    let lose_both = || drop(fs::remove_dir_all(db("")));
    type Damage<'d> = (&'d str, &'d [&'d str], &'d dyn Fn());
    let damages: [Damage<'_>; 5] = [
        ("fsck of a damaged journal", &["fsck"], &damage_journal),
        ("fsck --rebuild", &["fsck", "--rebuild"], &|| ()),
        ("fsck --rebuild without an index", &["fsck", "--rebuild"], &lose_index),
        ("fsck --rebuild without a journal", &["fsck", "--rebuild"], &lose_journal),
        ("fsck --rebuild of what lies beside layers", &["fsck", "--rebuild"], &lose_both),
    ];
    for (name, line, prepare) in damages {
        let result = |_: &str| {
            let again = store.build(&context, &AS_IMAGE);
            match again.stdout.contains(", everything from the cache") {
                true => "all is cached".to_owned(),
                false => format!("{:?} {}{}", again.code, again.stdout, again.stderr),
            }
        };
        let prepare = Box::new(prepare);
        Scenario { store: &store, line: lines(line), prepare, result: Box::new(result) }.campaign(
            name,
            Place::Disk,
            kills(FEW_KILLS),
        );
    }
}
