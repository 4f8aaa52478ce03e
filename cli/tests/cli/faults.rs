//! The kernel refuses, the disk fills, somebody pulls the plug on the process: at each system call in
//! turn. Whatever fails, the command says so or its result is the right one, and the next command
//! needs no help.
//!
//! Full and broken disks at what changes something, broken ones at what reads, too: content, directories,
//! attributes, opening. Not at closing and unmounting, which no disk refuses.
//!
//! A run of the test command visits some of the calls, another part each time the binary changes;
//! `KILN_FAULTS=all` visits every one.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use kiln_testkit::faults::{Calls, Fault, Traced, trace};
use nix::errno::Errno;

use crate::deltas::{are_possible, deltas, files_in};
use crate::harness::{Context, Place, Store, needs_root};
use crate::hash_states;

/// Calls that a run of the test command visits, for each kind of fault.
const VISITS: usize = 40;
/// Of calls that most builds make alike.
const FEW_VISITS: usize = 20;

/// Files of a copy, of which one changes.
const FILES: usize = 80;

/// A build of each kind of step whose image does not depend on when it is made.
struct Reference {
    store: Store,
    context: Context,
    golden: String,
    /// What the store advises to the next copy: each of these files, and what is in it.
    advice: Vec<(PathBuf, Vec<u8>)>,
}

impl Reference {
    fn new() -> Self {
        let dockerfile = "FROM busybox\n\
            COPY --link a /linked\n\
            COPY . /\n\
            RUN --network=none echo made > /made && touch -d @7 /made\n";
        let context = Context::new(&[("Dockerfile", dockerfile), ("a", "a"), ("d/b", "b"), ("d/c", "c")]);
        Self::of(Store::with_few_commands(Place::Disk), context)
    }

    /// A copy that is made in front of an earlier one, of which one file has changed since, and whose layer is
    /// hashed from a state of that one's.
    fn delta() -> Self {
        let dockerfile = "FROM busybox\nCOPY . /\nRUN --network=none cat /d/1 > /made && touch -d @7 /made\n";
        let context = Context::new(&[("Dockerfile", dockerfile)]);
        // Behind it is a state: they are 4 MiB apart.
        context.write("a", &"a".repeat(5 << 20));
        (0..FILES).for_each(|nth| context.write(&format!("d/{nth}"), &nth.to_string()));
        let store = Store::with_few_commands(Place::Memory);
        store.kiln(&line(&context)).expect(0);
        context.write("d/1", "one");
        let mut reference = Self::of(store, context);
        if !are_possible(&reference.store) {
            return reference;
        }
        // Faults and what comes after them shall not make another copy the earlier one.
        let copies = fs::read_dir(reference.store.root().join("state/copies")).expect("there are some");
        let mut advice: Vec<PathBuf> = copies.map(|file| file.expect("ours").path()).collect();
        advice.push(hash_states::states_file(&reference.store));
        reference.advice =
            advice.into_iter().map(|path| (path.clone(), fs::read(path).expect("ours"))).collect();
        reference
    }

    fn of(store: Store, context: Context) -> Self {
        let mut reference = Self { store, context, golden: String::new(), advice: Vec::new() };
        let outcome = reference.store.kiln(&reference.line()).expect(0);
        reference.golden = image_id(&outcome.stdout).expect("a build says what it made").to_owned();
        let again = reference.store.kiln(&reference.line()).expect(0);
        assert_eq!(
            image_id(&again.stdout),
            Some(reference.golden.as_str()),
            "the image is not deterministic"
        );
        reference
    }

    fn advise(&self) {
        for (path, advice) in &self.advice {
            fs::write(path, advice).expect("ours to write");
        }
    }

    fn line(&self) -> Vec<&str> {
        line(&self.context)
    }

    fn trace(&self, calls: Calls, fault: Option<(usize, Fault)>) -> Traced {
        trace(&self.store.command(&self.line()), calls, fault).expect("kiln can be traced")
    }

    /// Lets calls fail one after the other and says what was wrong then; how many there were.
    fn visit(&self, calls: Calls, fault: Fault, visits: usize) -> usize {
        self.advise();
        let total = self.trace(calls, None).calls;
        let started = Instant::now();
        let step = if visits_all() { 1 } else { total.div_ceil(visits).max(1) };
        // Another start for each total, so that runs in the life of the project see all places.
        let mut wrong = Vec::new();
        let (mut visited, mut missed) = (0, 0);
        for at in (total % step..total).step_by(step) {
            let Some((traced, name)) = self.meet(calls, at, fault) else {
                missed += 1;
                continue;
            };
            visited += 1;
            let complaint = self.judge(fault, &traced).or_else(|| self.recovers());
            if let Some(complaint) = complaint {
                wrong.push(format!("{fault:?} at {name} ({at} of {total}): {complaint}"));
            }
        }
        let took = started.elapsed().as_secs_f64();
        println!(
            "{fault:?}: {visited} of {total} calls ({calls:?}) in {took:.1} s, {} violations",
            wrong.len()
        );
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(missed, 0, "so many commands ended before the call that was to fail");
        visited
    }

    /// Lets one call fail. Threads race, and a run may make a few calls less than another: then it is the
    /// last one of that run. `None`: no fault was met at all.
    fn meet(&self, calls: Calls, at: usize, fault: Fault) -> Option<(Traced, &'static str)> {
        let mut at = at;
        for _ in 0..5 {
            self.advise();
            let traced = self.trace(calls, Some((at, fault)));
            if let Some(name) = traced.hit {
                return Some((traced, name));
            }
            at = at.min(traced.calls).saturating_sub(1);
        }
        None
    }

    /// Visits calls of a build that makes a delta each time, unless it may not.
    fn visit_deltas(&self, faults: &[(Calls, Fault)], visits: usize) {
        let made = || deltas(&self.store).iter().filter(|delta| files_in(&delta.join("fs")) == ["1"]).count();
        let before = made();
        let mut visited = 0;
        for &(calls, fault) in faults {
            visited += self.visit(calls, fault, visits);
        }
        // The build after the fault makes one in any case.
        let least = if are_possible(&self.store) { visited } else { 0 };
        let after = made() - before;
        assert!(after >= least, "{after} deltas of one file in {visited} visits");
    }

    /// What is wrong with how a command with a fault ended.
    fn judge(&self, fault: Fault, traced: &Traced) -> Option<String> {
        let said = || format!("exit code {:?}\n{}{}", traced.code, traced.stdout, traced.stderr);
        if traced.stderr.contains("panicked at") {
            return Some(format!("it panics: {}", said()));
        }
        match traced.code {
            Some(0) if image_id(&traced.stdout) != Some(&self.golden) => {
                Some(format!("it succeeds with another image: {}", said()))
            }
            Some(0) => None,
            Some(101) => Some(format!("exit code 101: {}", said())),
            // SQLite does not tell what a sync or an opening failed with.
            Some(_)
                if traced.hit == Some("fsync") || traced.stderr.contains("unable to open database file") =>
            {
                None
            }
            Some(code) if fault == Fault::Fail(Errno::ENOSPC) && code != 8 => {
                Some(format!("a full disk is not told as one: {}", said()))
            }
            Some(_) => None,
            None if fault == Fault::Kill => None,
            None => Some(format!("a signal ends it: {}", said())),
        }
    }

    /// What is wrong with the store after a fault, and with the next build.
    fn recovers(&self) -> Option<String> {
        if let Err(what) = self.store.sound() {
            return Some(format!("the store is not sound: {what}"));
        }
        let next = self.store.kiln(&self.line());
        if next.code != Some(0) {
            return Some(format!("the next build fails: {}", next.stderr));
        }
        if image_id(&next.stdout) != Some(&self.golden) {
            return Some(format!("the next build makes another image: {}", next.stdout));
        }
        let left = self.store.active_snapshots();
        (!left.is_empty()).then(|| format!("active snapshots are left: {left:?}"))
    }
}

fn visits_all() -> bool {
    std::env::var_os("KILN_FAULTS").is_some_and(|what| what == "all")
}

fn line(context: &Context) -> Vec<&str> {
    let epoch = ["--build-arg", "SOURCE_DATE_EPOCH=0", "-t", "reference"];
    [&["build", "--progress", "plain", "--no-cache"][..], &epoch, &[context.path()]].concat()
}

fn image_id(stdout: &str) -> Option<&str> {
    stdout.lines().find_map(|line| line.strip_prefix("image "))
}

#[test]
fn a_full_disk_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Fail(Errno::ENOSPC), VISITS);
}

#[test]
fn a_broken_disk_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Fail(Errno::EIO), VISITS);
}

#[test]
fn a_disk_that_cannot_be_read_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Reading, Fault::Fail(Errno::EIO), VISITS);
}

#[test]
fn no_descriptor_left_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Opening, Fault::Fail(Errno::EMFILE), VISITS);
}

#[test]
fn a_short_read_or_write_at_any_call_is_continued() {
    needs_root!();
    Reference::new().visit(Calls::Transferring, Fault::Short, VISITS);
}

#[test]
fn a_kill_at_any_call_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Kill, VISITS);
}

#[test]
fn a_kill_while_a_delta_is_made_loses_nothing() {
    needs_root!();
    Reference::delta().visit_deltas(&[(Calls::Changing, Fault::Kill)], VISITS);
}

#[test]
fn a_full_or_broken_disk_while_a_delta_is_made_is_told_and_loses_nothing() {
    needs_root!();
    let faults = [Errno::ENOSPC, Errno::EIO].map(|errno| (Calls::Changing, Fault::Fail(errno)));
    let reference = Reference::delta();
    reference.visit_deltas(&faults, VISITS);
    // What a delta reads besides is little: the other reference stands for it, unless all is asked for.
    if visits_all() {
        reference.visit_deltas(&[(Calls::Reading, Fault::Fail(Errno::EIO))], VISITS);
    }
}

#[test]
fn few_descriptors_and_short_transfers_while_a_delta_is_made_are_told_or_continued() {
    needs_root!();
    let faults = [(Calls::Opening, Fault::Fail(Errno::EMFILE)), (Calls::Transferring, Fault::Short)];
    Reference::delta().visit_deltas(&faults, FEW_VISITS);
}
