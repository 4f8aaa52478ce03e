//! What becomes of a build whose cache server dies or falls silent in the middle of what it says or is told, and of one
//! whose user does not wait for an export.
//!
//! A run of the test command ends servers at some of the places where that can happen; `KILN_REMOTE_CACHE=all` at each.

use std::fs;
use std::net::SocketAddr;

use rustix::process::Signal;
use serde_json::Value;

use crate::between::{Between, End, How, Side, Silent};
use crate::clouds::{Cloud, Server};
use crate::harness::{Context, Outcome, Running, Store, needs_root, text};
use crate::remote_cache::{Cache, build, id, small, warnings};

/// A cache: what both flags take for one at this address.
pub(crate) type Place<'a> = &'a dyn Fn(SocketAddr, &str) -> String;

/// Builds of one project with a cache that ends.
pub(crate) struct Ends<'a> {
    server: SocketAddr,
    place: Place<'a>,
    base: Cache,
    /// The cache has all of its steps but the last.
    context: Context,
}

impl<'a> Ends<'a> {
    pub(crate) fn of(server: SocketAddr, place: Place<'a>) -> Self {
        let (context, base) = (small(), Cache::new());
        let filled = build(&base.store(), &context, &["--cache-to", &place(server, ",mode=max")]);
        assert_eq!((filled.ran().len(), warnings(&filled)), (4, vec![]));
        let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
        context.write("Dockerfile", &format!("{dockerfile}RUN --network=none echo e > /e\n"));
        Self { server, place, base, context }
    }

    /// A build with this end in it: within a minute, with exit code 0, the right image and a word about it.
    #[track_caller]
    fn check(&self, end: Option<End>, scope: &str) -> (Between, Outcome) {
        let between = Between::until(self.server, end);
        let store = self.base.store();
        let (from, to) = (
            (self.place)(between.address, ""),
            (self.place)(between.address, &format!(",mode=max,scope={scope}")),
        );
        let built =
            store.build_bounded(&self.context, &["-t", "app", "--cache-from", &from, "--cache-to", &to]);
        let built = built.expect(0);
        let warned = warnings(&built);
        let of = |start: &str| warned.iter().filter(|text| text.starts_with(start)).count();
        let counts = [
            of("the build goes on without the cache of "),
            of("the cache is not exported to "),
            of("a result in the cache of "),
        ];
        assert!(counts[0] <= 1 && counts[1] <= 1, "{end:?}: {warned:?}");
        assert_eq!(counts.iter().sum::<usize>(), warned.len(), "{end:?}: {warned:?}");
        if !between.has_ended() {
            assert_eq!((built.ran().len(), warned.len()), (1, 0), "{end:?}: {}", built.stderr);
        } else if end.is_some_and(|end| end.side == Side::Client) {
            // What it was told last it has not understood.
            assert_eq!(counts[1], 1, "{end:?}: {warned:?}");
        }
        assert!(!built.stderr.contains("SECRET"), "{}", built.stderr);
        assert_eq!(store.shell("app", "cat /a /b /c /d /e"), "a\nb\nb\na\ne", "{end:?}");
        assert_eq!(store.sound(), Ok(()), "{end:?}");
        (between, built)
    }

    /// A server that dies in the middle of every `nth` request, and of every `nth` answer.
    #[track_caller]
    pub(crate) fn die_at_every(&self, nth: usize) {
        let all = std::env::var_os("KILN_REMOTE_CACHE").is_some_and(|value| value == "all");
        let step = if all { 1 } else { nth };
        let (whole, _) = self.check(None, "whole");
        let (mut died, mut places) = (0, 0);
        for side in [Side::Client, Side::Server] {
            let pieces = whole.pieces(side);
            assert!(pieces >= 8, "{pieces} pieces of {side:?}");
            for piece in (0..pieces).step_by(step) {
                let end = End { how: How::Dies, side, piece };
                let (between, _) = self.check(Some(end), &format!("{side:?}-{piece}"));
                died += usize::from(between.has_ended());
                places += 1;
            }
        }
        println!("{died} of {places} servers died before the build had ended");
        // Requests that go out side by side are sometimes one piece less, and a busy machine reads several as one.
        assert!(2 * died >= places, "{died} of {places} died");
    }

    /// A server that keeps its connections and says nothing more: each half of the build waits for it once.
    #[track_caller]
    pub(crate) fn fall_silent(&self) {
        let end = End { how: How::FallsSilent, side: Side::Server, piece: 6 };
        let (between, built) = self.check(Some(end), "silent");
        assert!(between.has_ended());
        assert_eq!(warnings(&built).len(), 2, "{}", built.stderr);
    }
}

macro_rules! cloud {
    ($cloud:expr) => {{
        needs_root!();
        Server::start($cloud)
    }};
}

#[test]
fn a_bucket_of_google_that_dies_costs_time_and_nothing_else() {
    let server = cloud!(Cloud::Google);
    Ends::of(server.address, &|at, more| Cloud::Google.place(at, more)).die_at_every(3);
}

#[test]
fn a_container_of_azure_that_dies_costs_time_and_nothing_else() {
    let server = cloud!(Cloud::Azure);
    Ends::of(server.address, &|at, more| Cloud::Azure.place(at, more)).die_at_every(5);
}

#[test]
fn a_bucket_that_falls_silent_costs_time_and_nothing_else() {
    let server = cloud!(Cloud::Google);
    Ends::of(server.address, &|at, more| Cloud::Google.place(at, more)).fall_silent();
}

/// The image is done by then, and stays.
#[track_caller]
fn check_interrupt(place: Place<'_>, signal: Signal) {
    let (context, base) = (small(), Cache::new());
    let (store, silent) = (base.store(), Silent::new());
    let (ids, to) = (store.beside("id"), place(silent.address, ",mode=max"));
    let line = [
        "build",
        "--progress",
        "plain",
        "-t",
        "app",
        "--iidfile",
        text(&ids),
        "--cache-to",
        &to,
        context.path(),
    ];
    let running = Running::start(store.command(&line));
    let asking = silent.is_asked();
    running.signal(signal);
    let outcome = running.end().expect(130);
    drop(asking);
    let told = "error: interrupted while the cache was exported; everything else of the build is done";
    assert_eq!(outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect::<Vec<_>>(), [told]);
    assert_eq!(warnings(&outcome), [""; 0], "the cache is not at fault");
    assert_eq!(id(&outcome), fs::read_to_string(&ids).expect("it was written").trim());
    assert_eq!(store.shell("app", "cat /a /b /c /d"), "a\nb\nb\na");
    let builds: Value =
        serde_json::from_str(&store.ok(&["history", "builds", "--json"]).stdout).expect("JSON");
    assert_eq!(builds[0]["outcome"], "done");
    // By now whoever has opened the store has tidied up.
    assert_eq!(build(&store, &context, &[]).ran(), [""; 0]);
    assert_eq!((store.active_snapshots(), store.sound()), (vec![], Ok(())));
}

#[test]
fn an_interrupted_export_is_said_and_leaves_the_image() {
    needs_root!();
    check_interrupt(&|at, more| Cloud::Google.place(at, more), Signal::INT);
    check_interrupt(&|at, more| format!("type=registry,ref={at}/cache/app:main{more}"), Signal::TERM);
}

/// Who stops the build stops it: no image, whatever the cache was about to say.
#[test]
fn an_interrupted_import_is_an_interrupted_build() {
    needs_root!();
    let (context, store, silent) = (small(), Store::with_busybox(), Silent::new());
    let from = Cloud::Azure.place(silent.address, "");
    let line = ["build", "--progress", "plain", "-t", "app", "--cache-from", &from, context.path()];
    let running = Running::start(store.command(&line));
    let asking = silent.is_asked();
    running.signal(Signal::INT);
    let outcome = running.end().expect(130).says(&["error: the build was cancelled"]);
    drop(asking);
    assert_eq!(warnings(&outcome), [""; 0]);
    store.kiln(&["inspect", "app"]).expect(4);
    assert_eq!((store.active_snapshots(), store.sound()), (vec![], Ok(())));
}
