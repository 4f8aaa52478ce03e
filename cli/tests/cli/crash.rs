//! Killed at any instant: the next build succeeds and nothing of the old one is left.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Context, Running, Store, needs_root, processes_left, processes_with};

/// Steps before the one that sleeps: helpers of later ones are forked, not executed.
const BEFORE: [&str; 2] = ["", "RUN true\n"];

/// After the steps `before`, a RUN that says `ready` and then sleeps for `seconds`, a number nobody else
/// sleeps for.
fn sleeping(before: &str, seconds: &str) -> Context {
    // The title of the step must not contain the mark that the step prints.
    let run = format!("FROM busybox\n{before}RUN echo half > /half; echo re\"\"ady; sleep {seconds}\n");
    Context::new(&[("Dockerfile", &run)])
}

#[track_caller]
fn check_nothing_is_left(store: &Store, argument: &str) {
    assert_eq!(processes_left(argument), [""; 0], "processes are left");
    assert_eq!(store.mounts(), [""; 0], "mounts are left");
    assert_eq!(store.active_snapshots(), [""; 0], "active snapshots are left");
}

#[test]
fn after_a_sigkill_in_a_run_the_next_build_succeeds_and_nothing_is_left() {
    needs_root!();
    for before in BEFORE {
        let store = Store::with_busybox();
        let context = sleeping(before, "31536017");
        let mut build = Running::start(store.command(&["build", "--progress", "plain", context.path()]));
        build.wait_for("ready");
        // Not at once: a process that is just executing another program has no arguments.
        let begun = Instant::now();
        while processes_with("31536017").is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the step does not run");
            std::thread::yield_now();
        }
        build.signal(Signal::KILL);
        assert_eq!(build.end().code, None);

        context.write("Dockerfile", "FROM busybox\nRUN test ! -e /half && echo whole > /whole\n");
        store.build(&context, &["-t", "after"]).expect(0);
        check_nothing_is_left(&store, "31536017");
        assert_eq!(store.shell("after", "cat /whole"), "whole");
    }
}

#[test]
fn ctrl_c_ends_a_run_with_130_and_nothing_is_left() {
    needs_root!();
    for before in BEFORE {
        let store = Store::with_busybox();
        // What stays of a build that is stopped is what was finished.
        store.build(&Context::new(&[("Dockerfile", &format!("FROM busybox\n{before}"))]), &[]).expect(0);
        let held = store.holds();
        let context = sleeping(before, "31536018");
        let args = ["build", "--no-cache", "--progress", "plain", context.path()];
        let mut build = Running::start(store.command(&args));
        build.wait_for("ready");
        let sent = Instant::now();
        build.signal(Signal::INT);
        build.end().expect(130);
        store.tidy_after(sent.elapsed());
        check_nothing_is_left(&store, "31536018");
        if before.is_empty() {
            assert_eq!(store.holds(), held);
        }
    }
}

#[test]
fn a_terminated_container_leaves_nothing() {
    needs_root!();
    let store = Store::with_busybox();
    let args = ["run", "--rm", "--network", "none", "busybox", "sh", "-c", "echo ready >&2; sleep 31536019"];
    let mut run = Running::start(store.command(&args));
    run.wait_for("ready");
    run.signal(Signal::KILL);
    assert_eq!(run.end().code, None);
    // Any command that opens the store tidies it.
    store.ok(&["run", "--rm", "--network", "none", "busybox", "true"]);
    check_nothing_is_left(&store, "31536019");
}
