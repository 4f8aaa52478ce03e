//! The kernel refuses, the disk fills, somebody pulls the plug on the process: at each system call in
//! turn. Whatever fails, the command says so or its result is the right one, and the next command
//! needs no help.
//!
//! Full and broken disks at what changes something, broken ones at what reads, too: content, directories,
//! attributes, opening. Not at closing and unmounting, which no disk refuses.
//!
//! A run of the test command visits some of the calls, another part each time the binary changes;
//! `KILN_FAULTS=all` visits every one.

use std::time::Instant;

use kiln_testkit::faults::{Calls, Fault, Traced, trace};
use nix::errno::Errno;

use crate::deltas::{are_possible, deltas};
use crate::harness::{Context, Store, needs_root};

/// Calls that a run of the test command visits, for each kind of fault.
const VISITS: usize = 40;

/// A build of each kind of step whose image does not depend on when it is made.
struct Reference {
    store: Store,
    context: Context,
    golden: String,
}

impl Reference {
    fn new() -> Self {
        let dockerfile = "FROM busybox\n\
            COPY --link a /linked\n\
            COPY . /\n\
            RUN --network=none echo made > /made && touch -d @7 /made\n";
        Self::of(Context::new(&[("Dockerfile", dockerfile), ("a", "a"), ("d/b", "b"), ("d/c", "c")]))
    }

    /// A copy that is made in front of the one before.
    fn delta() -> Self {
        let dockerfile = "FROM busybox\nCOPY . /\nRUN --network=none cat /d/1 > /made && touch -d @7 /made\n";
        let context = Context::new(&[("Dockerfile", dockerfile)]);
        (0..80).for_each(|nth| context.write(&format!("d/{nth}"), &nth.to_string()));
        let reference = Self::of(context);
        let expected = usize::from(are_possible(&reference.store));
        assert_eq!(deltas(&reference.store).len(), expected, "the second build");
        reference
    }

    fn of(context: Context) -> Self {
        let store = Store::with_few_commands();
        let mut reference = Self { store, context, golden: String::new() };
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

    fn line(&self) -> Vec<&str> {
        let epoch = ["--build-arg", "SOURCE_DATE_EPOCH=0", "-t", "reference"];
        [&["build", "--progress", "plain", "--no-cache"][..], &epoch, &[self.context.path()]].concat()
    }

    fn trace(&self, calls: Calls, fault: Option<(usize, Fault)>) -> Traced {
        trace(&self.store.command(&self.line()), calls, fault).expect("kiln can be traced")
    }

    /// Lets calls fail one after the other and says what was wrong then.
    fn visit(&self, calls: Calls, fault: Fault) {
        let total = self.trace(calls, None).calls;
        let started = Instant::now();
        let step = if visits_all() { 1 } else { total.div_ceil(VISITS).max(1) };
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
    }

    /// Lets one call fail. Threads race, and a run may make a few calls less than another: then it is the
    /// last one of that run. `None`: no fault was met at all.
    fn meet(&self, calls: Calls, at: usize, fault: Fault) -> Option<(Traced, &'static str)> {
        let mut at = at;
        for _ in 0..5 {
            let traced = self.trace(calls, Some((at, fault)));
            if let Some(name) = traced.hit {
                return Some((traced, name));
            }
            at = at.min(traced.calls).saturating_sub(1);
        }
        None
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

fn image_id(stdout: &str) -> Option<&str> {
    stdout.lines().find_map(|line| line.strip_prefix("image "))
}

#[test]
fn a_full_disk_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Fail(Errno::ENOSPC));
}

#[test]
fn a_broken_disk_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Fail(Errno::EIO));
}

#[test]
fn a_disk_that_cannot_be_read_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Reading, Fault::Fail(Errno::EIO));
}

#[test]
fn no_descriptor_left_at_any_call_is_told_and_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Opening, Fault::Fail(Errno::EMFILE));
}

#[test]
fn a_short_read_or_write_at_any_call_is_continued() {
    needs_root!();
    Reference::new().visit(Calls::Transferring, Fault::Short);
}

#[test]
fn a_kill_at_any_call_loses_nothing() {
    needs_root!();
    Reference::new().visit(Calls::Changing, Fault::Kill);
}

#[test]
fn a_kill_while_a_delta_is_made_loses_nothing() {
    needs_root!();
    Reference::delta().visit(Calls::Changing, Fault::Kill);
}

#[test]
fn a_full_or_broken_disk_while_a_delta_is_made_is_told_and_loses_nothing() {
    needs_root!();
    let reference = Reference::delta();
    for errno in [Errno::ENOSPC, Errno::EIO] {
        reference.visit(Calls::Changing, Fault::Fail(errno));
    }
    // What a delta reads besides is little: the other reference stands for it, unless all is asked for.
    if visits_all() {
        reference.visit(Calls::Reading, Fault::Fail(Errno::EIO));
    }
}
