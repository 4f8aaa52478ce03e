//! C13: Ctrl-C, SIGTERM and SIGHUP in every phase of a command: 130 within two seconds, and nothing is
//! left.

use std::fs;
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{
    Context, Ends, Place, Running, Store, busybox_tar, minds, needs_root, processes_left, text,
};

const SIGNALS: [Signal; 3] = [Signal::INT, Signal::TERM, Signal::HUP];
/// Moments of each command in a run of the test command; `KILN_SIGNALS=N` is another number.
const MOMENTS: usize = 5;

/// Behind a command that ended so long after the signal.
#[track_caller]
fn check_nothing_is_left(store: &Store, what: &str, took: Duration) {
    store.tidy_after(took);
    let ingest = fs::read_dir(store.root().join("ingest")).expect("a store").count();
    assert_eq!(ingest, 0, "{what}: half a blob is left");
    assert_eq!(store.mounts(), [""; 0], "{what}: mounts are left");
    // What was in flight goes with the next command at the latest.
    store.ok(&["images"]);
    assert_eq!(store.active_snapshots(), [""; 0], "{what}: active snapshots are left");
    store.sound().unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn c13_a_step_is_stopped_by_each_signal() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox\nRUN --network=none echo re\"\"ady; sleep 31536020\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let mut ends = Ends::default();
    for signal in SIGNALS {
        let before = store.holds();
        let mut build = Running::start(store.command(&["build", "--progress", "plain", context.path()]));
        build.wait_for("ready");
        let sent = Instant::now();
        build.signal(signal);
        build.end().expect(130).says(&["error: "]);
        let took = sent.elapsed();
        ends.add(&format!("{signal:?}"), took);
        assert_eq!(processes_left("31536020"), [""; 0], "{signal:?}: processes are left");
        check_nothing_is_left(&store, "RUN", took);
        assert_eq!(store.holds(), before);
    }
    ends.check("RUN");
}

/// A command that waits for standard input, of which it has read all that came, is stopped.
#[track_caller]
fn stop_while_reading(store: &Store, line: &[&str], first: &[u8]) {
    let mut ends = Ends::default();
    for signal in SIGNALS {
        let (reader, mut writer) = std::io::pipe().expect("pipes can be made");
        let mut command = store.command(line);
        command.stdin(reader.try_clone().expect("descriptors are left"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("kiln starts");
        writer.write_all(first).expect("it is read");
        // Nothing in the pipe: kiln has it, and asks for more.
        while rustix::io::ioctl_fionread(&reader).expect("a pipe") > 0 {
            assert!(child.try_wait().expect("our child").is_none(), "{line:?} does not wait for more");
            std::thread::yield_now();
        }
        let sent = Instant::now();
        kill_process(Pid::from_child(&child), signal).expect("it waits");
        let status = child.wait().expect("our child");
        let took = sent.elapsed();
        assert_eq!(status.code(), Some(130), "{line:?} {signal:?}");
        ends.add(&format!("{line:?} {signal:?}"), took);
        check_nothing_is_left(store, line[0], took);
    }
    ends.check_at_once(line[0]);
}

#[test]
fn c13_reading_is_stopped_by_each_signal() {
    needs_root!();
    let store = Store::with_few_commands(Place::Disk);
    let tar = fs::read(busybox_tar(&store.beside("scratch"))).expect("busybox");
    let half = &tar[..tar.len() / 2];
    let before = store.holds();
    stop_while_reading(&store, &["load"], half);
    stop_while_reading(&store, &["import", "-", "x"], half);
    stop_while_reading(&store, &["build", "-"], half);
    stop_while_reading(&store, &["build", "-"], b"FROM busybox\n");
    let context = Context::new(&[]);
    stop_while_reading(&store, &["build", "-f", "-", context.path()], b"FROM busybox\n");
    assert_eq!(store.holds(), before);
}

#[test]
fn c13_writing_is_stopped_by_each_signal() {
    needs_root!();
    let store = Store::with_few_commands(Place::Disk);
    let context = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    for line in [
        &["save", "busybox"][..],
        &["save", "--format", "oci", "busybox"],
        &["export", "busybox"],
        &["cp", "busybox:/bin", "-"],
        &["build", "--progress", "plain", "-o", "-", context.path()],
    ] {
        let mut ends = Ends::default();
        for signal in SIGNALS {
            let (reader, writer) = std::io::pipe().expect("pipes can be made");
            let mut command = store.command(line);
            let mut child = command.stdout(writer).stderr(Stdio::null()).spawn().expect("kiln starts");
            drop(command);
            // Something has come, and the rest is more than a pipe holds.
            while rustix::io::ioctl_fionread(&reader).expect("a pipe") == 0 {
                assert!(child.try_wait().expect("our child").is_none(), "{line:?} writes nothing");
                std::thread::yield_now();
            }
            let sent = Instant::now();
            kill_process(Pid::from_child(&child), signal).expect("it waits");
            let status = child.wait().expect("our child");
            let took = sent.elapsed();
            assert_eq!(status.code(), Some(130), "{line:?} {signal:?}");
            ends.add(&format!("{line:?} {signal:?}"), took);
            check_nothing_is_left(&store, line[0], took);
        }
        ends.check_at_once(line[0]);
    }
}

#[test]
fn c13_any_moment_is_a_good_one() {
    needs_root!();
    let store = Store::with_few_commands(Place::Disk);
    let dockerfile =
        "FROM busybox\nCOPY . /all/\nRUN --network=none cp -r /all /more\nRUN --network=none rm -r /all\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    for nth in 0..200 {
        context.write(&format!("d{}/f{nth}", nth % 10), &"x".repeat(nth * 100));
    }
    store.build(&context, &["-t", "app"]).expect(0);
    let saved = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&saved), "app"]);
    let other = Store::empty();
    other.ok(&["images"]);
    let outputs = store.beside("outputs");
    fs::create_dir(&outputs).expect("ours");
    let out = outputs.join("out.tar");
    let tar = busybox_tar(&store.beside("scratch"));
    let lines: [(&Store, &[&str]); 6] = [
        (&store, &["build", "--progress", "plain", "--no-cache", "-t", "again", context.path()]),
        (
            &store,
            &[
                "save",
                "--format",
                "oci",
                "--force-compression",
                "--compression",
                "zstd",
                "-o",
                text(&out),
                "app",
            ],
        ),
        (&other, &["load", "-i", text(&saved)]),
        (&store, &["import", text(&tar), "imported"]),
        (&store, &["gc", "--max-store", "1kB"]),
        (&store, &["fsck", "--deep"]),
    ];
    let given =
        std::env::var("KILN_SIGNALS").ok().map(|count| count.parse().expect("KILN_SIGNALS is a number"));
    let moments = given.unwrap_or(MOMENTS);
    for (of, line) in lines {
        let prepare = || {
            if line[0] == "load" {
                other.kiln(&["rmi", "app"]);
                other.ok(&["prune", "--all", "--force"]);
            }
            if line[0] == "gc" {
                // Something to collect.
                store.build(&context, &["--no-cache", "-t", "app"]).expect(0);
            }
            let _ = fs::remove_file(&out);
        };
        // The first one has more to do than those that follow.
        let whole = [(); 2].map(|()| {
            prepare();
            let begun = Instant::now();
            of.ok(line);
            begun.elapsed()
        })[1];
        let (mut stopped, mut ends) = (0, Ends::default());
        for moment in 0..moments {
            prepare();
            let signal = SIGNALS[moment % SIGNALS.len()];
            let mut command = of.command(line);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("kiln starts");
            // Not a wait for something: the moments are what is tested.
            let after = whole.mul_f64((moment as f64 + 0.5) / moments as f64);
            std::thread::sleep(after);
            let has_begun = minds(child.id(), signal);
            let sent = Instant::now();
            let _ = kill_process(Pid::from_child(&child), signal);
            let status = child.wait().expect("our child");
            let took = sent.elapsed();
            ends.add(&format!("{line:?} {signal:?}"), took);
            use std::os::unix::process::ExitStatusExt;
            match (status.code(), status.signal()) {
                (Some(0), _) => {}
                (Some(130), _) => {
                    stopped += 1;
                    let left = fs::read_dir(&outputs).expect("ours").count();
                    // Nobody tidies up behind a command that was not waited for.
                    assert!(left == 0 || took > Duration::from_secs(1), "{line:?}: half a file is left");
                    fs::remove_dir_all(&outputs).and_then(|()| fs::create_dir(&outputs)).expect("ours");
                }
                // Before the program has begun, a signal does what it does to any.
                (None, Some(number)) if number == signal.as_raw() && !has_begun => {}
                ended => panic!("{line:?} {signal:?} at {moment}: {ended:?}"),
            }
            check_nothing_is_left(of, line[0], took);
        }
        println!(
            "{}: {moments} moments of {whole:?}, {stopped} before the end, slowest end {:?}",
            line[0],
            ends.slowest()
        );
        ends.check(line[0]);
    }
}
