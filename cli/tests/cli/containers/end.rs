//! How containers end, and what is known of it then.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::Docker;
use crate::harness::{Store, busybox_tar, needs_root, processes_with, text};

/// The monitor of a container.
fn monitor_of(docker: &Docker, name: &str) -> Pid {
    let id = docker.field(name, "{{.Id}}");
    let monitor = fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"kiln-monitor") && String::from_utf8_lossy(&line).contains(&id)
        });
    Pid::from_raw(monitor.expect("it has a monitor")).expect("no zero")
}

/// Waits until a container says that it is ready.
fn ready(docker: &Docker, name: &str) {
    docker.until(&["logs", name], |outcome| outcome.stdout.contains("ready\n"));
}

/// Unmounted with this value.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

const POLITE: &str = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done";

#[test]
fn the_exit_code_is_known_although_the_disk_is_full() {
    needs_root!();
    let store = Store::empty();
    let root = store.root();
    fs::create_dir(&root).expect("ours to write");
    mount("tmpfs", &root, "tmpfs", MountFlags::empty(), Some(c"size=64m")).expect("root may mount");
    let _mounted = Mounted(root.clone());
    let tar = busybox_tar(&store.beside(""));
    store.ok(&["import", text(&tar), "busybox", "-c", "CMD [\"sh\"]"]);
    let docker = Docker::Kiln(store);
    docker.start("polite", &[], POLITE);
    docker.start("again", &["--restart", "on-failure:3"], "until [ -e /full ]; do sleep 0.05; done; exit 5");
    docker.start("killed", &[], "echo ready; exec sleep 31536301");
    docker.ok(&["create", "--name", "never", "--network", "none", "busybox", "true"]);
    ready(&docker, "polite");
    ready(&docker, "killed");
    // To the last byte: what is left of a page, too.
    let mut filler = File::create(root.join("filler")).expect("there is room for a name");
    let mut chunk = 1 << 20;
    while chunk > 0 {
        if filler.write_all(&vec![b'x'; chunk]).is_err() {
            chunk /= 2;
        }
    }
    docker.run(&["exec", "again", "mkdir", "/full"]).expect(0);
    let ended = |outcome: &crate::harness::Outcome| outcome.stdout == "exited 5 3\n";
    docker
        .until(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}", "again"], ended);
    docker.ok(&["stop", "polite"]);
    assert_eq!(docker.field("polite", "{{.State.Status}} {{.State.ExitCode}}"), "exited 3");
    kill_process(monitor_of(&docker, "killed"), Signal::KILL).expect("it lives");
    docker.until(&["ps", "-q"], |_| processes_with("31536301").is_empty());
    assert_eq!(docker.field("killed", "{{.State.Status}} {{.State.ExitCode}}"), "exited 137");
    let listed = docker.ok(&["ps", "-a", "--format", "{{.Names}} {{.State}}"]);
    assert_eq!(listed, "never created\nkilled exited\nagain exited\npolite exited");
    // What makes room is not refused for want of it.
    docker.ok(&["rm", "-f", "polite", "again", "killed", "never"]);
    assert_eq!(docker.ok(&["ps", "-aq"]), "");
    drop(filler);
    let Docker::Kiln(store) = &docker else { unreachable!("it is kiln") };
    assert_eq!(store.active_snapshots(), [""; 0]);
}

#[test]
fn a_check_is_over_with_its_process_or_with_its_time() {
    needs_root!();
    let docker = Docker::kiln();
    let check = |name: &str, command: &str, interval: &str, time: &str| {
        let flags = ["--health-cmd", command, "--health-interval", interval, "--health-timeout", time];
        docker.start(name, &[&flags[..], &["--health-retries", "1"]].concat(), "exec sleep 31536302");
    };
    let health =
        |name| ["inspect", "-f", "{{.State.Health.Status}} {{(index .State.Health.Log 0).ExitCode}}", name];
    // A child that has its output open is not the check.
    check("child", "echo well; sleep 31536303 & true", "50ms", "30s");
    docker.until(&health("child"), |outcome| outcome.stdout == "healthy 0\n");
    assert_eq!(docker.field("child", "{{(index .State.Health.Log 0).Output}}"), "well");
    docker.ok(&["rm", "-f", "child"]);
    check("slow", "sleep 31536304 & trap '' TERM; sleep 31536304; sleep 31536304", "1s", "200ms");
    docker.until(&health("slow"), |outcome| outcome.stdout == "unhealthy -1\n");
    // Until the next one begins, nothing is there of what it had started.
    docker.until(&["ps", "-q"], |_| processes_with("31536304").is_empty());
    let log = docker.field("slow", "{{(index .State.Health.Log 0).Output}}");
    assert!(log.contains("exceeded timeout (200ms)"), "{log}");
    docker.ok(&["rm", "-f", "slow"]);
    docker.is_clean();
}

#[test]
fn a_monitor_that_is_asked_to_end_stops_its_container() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["--restart", "always", "--stop-signal", "USR1"], &POLITE.replace("TERM", "USR1"));
    ready(&docker, "web");
    let monitor = monitor_of(&docker, "web");
    // A terminal that goes is nothing to it.
    kill_process(monitor, Signal::HUP).expect("it lives");
    kill_process(monitor, Signal::TERM).expect("it lives");
    docker.until(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web"], |outcome| {
        outcome.stdout == "exited 3\n"
    });
    assert_eq!(docker.ok(&["logs", "web"]), "ready\nbye");
    docker.ok(&["rm", "web"]);
    docker.is_clean();
}

#[test]
fn an_interrupt_of_its_caller_is_nothing_to_a_monitor_that_begins() {
    needs_root!();
    let store = Store::with_busybox();
    store.ok(&["create", "--name", "web", "--network", "none", "busybox", "sleep", "31536305"]);
    let id = store.ok(&["inspect", "-f", "{{.Id}}", "web"]).stdout;
    // As its caller starts it: with the signals blocked that it waits for, and some of them came already.
    let mut command = Command::new("env");
    command.args(["--block-signal=INT,TERM,HUP,QUIT", "bash", "-c"]);
    command.arg("for signal in INT TERM HUP QUIT; do kill -$signal $$; done; exec -a kiln-monitor \"$@\"");
    command.args(["bash", env!("CARGO_BIN_EXE_kiln")]).arg(store.root()).args(["auto", id.trim_end()]);
    let mut monitor =
        command.stdout(Stdio::piped()).spawn().expect("bash and coreutils are on every machine");
    let mut word = String::new();
    monitor.stdout.take().expect("piped above").read_to_string(&mut word).expect("it answers");
    assert_eq!(word, "ready\n");
    // Had it ended, the container would have another one.
    let docker = Docker::Kiln(store);
    docker.ok(&["start", "web"]);
    assert_eq!(monitor_of(&docker, "web"), Pid::from_child(&monitor));
    docker.ok(&["rm", "-f", "web"]);
    monitor.wait().expect("our child");
    docker.is_clean();
}

#[test]
fn containers_end_side_by_side() {
    needs_root!();
    let docker = Docker::kiln();
    let names = ["a1", "a2", "a3", "a4", "a5"];
    for name in names {
        docker.start(name, &[], "trap '' TERM; echo ready; while :; do sleep 0.05; done");
    }
    names.iter().for_each(|name| ready(&docker, name));
    // One after the other they would take 25 seconds at least.
    let begun = Instant::now();
    assert_eq!(docker.ok(&[&["stop", "-t", "5"], &names[..]].concat()), names.join("\n"));
    let took = begun.elapsed();
    assert!((Duration::from_secs(5)..Duration::from_secs(24)).contains(&took), "{took:?}");
    let said = docker.run(&["rm", "a4", "absent", "a1", "a5"]).expect(1).says(&["\"absent\""]);
    assert_eq!(said.stdout, "a4\na1\na5\n");
    docker.ok(&["restart", "-t", "0", "a2", "a3"]);
    docker.ok(&["kill", "a2", "a3"]);
    assert_eq!(docker.run(&["wait", "absent", "a2", "a3"]).expect(1).stdout, "137\n137\n");
    docker.ok(&["rm", "-f", "a2", "a3", "absent"]);
    docker.is_clean();
}

#[test]
fn a_signal_ends_the_command_where_it_is_not_passed_on() {
    needs_root!();
    let docker = Docker::kiln();
    let deaf = "echo ready; while :; do sleep 0.05; done";
    let with = |args: &[&str]| docker.command(args).stdout(Stdio::null()).spawn().expect("it starts");
    let run = ["run", "--sig-proxy=false", "--name", "web", "--network", "none", "busybox", "sh", "-c", deaf];
    let mut child = with(&run);
    ready(&docker, "web");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("our child");
    assert_eq!(child.wait().expect("our child").code(), Some(143));
    // Nor is a container ended that somebody else looks at and that does not listen. Whoever is not yet
    // attached ends of it all the same, in the way of every command.
    let mut child = with(&["attach", "web"]);
    let begun = Instant::now();
    while child.try_wait().expect("our child").is_none() {
        kill_process(Pid::from_child(&child), Signal::TERM).expect("our child");
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = child.wait().expect("our child");
    assert!([Some(143), Some(130)].contains(&status.code()) || status.signal() == Some(15), "{status}");
    assert_eq!(docker.field("web", "{{.State.Status}}"), "running");
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn what_the_caller_ignores_and_may_not_open_is_nothing_to_a_container() {
    needs_root!();
    let docker = Docker::kiln();
    let Docker::Kiln(store) = &docker else { unreachable!("it is kiln") };
    let shell = |script: &str| {
        let kiln = store.command(&[]);
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("KILN", kiln.get_program()).env("KILN_ROOT", store.root());
        let output = command.output().expect("a shell");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let status = "busybox grep -E 'Sig(Ign|Blk)' /proc/self/status";
    let none = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
    let trap = "trap '' USR1 USR2 WINCH CHLD HUP INT PIPE; ";
    assert_eq!(shell(&format!("{trap} $KILN run --rm --network none {status}")), none);
    assert_eq!(shell(&format!("{trap} $KILN run --rm --name web --network none {status}")), none);
    let few = "ulimit -Sn 40; $KILN run -d --name web --network none busybox sleep 1000 > /dev/null;
        for i in 1 2 3 4 5 6 7 8 9 10 11 12; do $KILN exec web sleep 1 & done; wait;
        $KILN exec web sh -c 'ulimit -Sn'; $KILN run --rm --network none busybox sh -c 'ulimit -Sn'";
    let limits = shell(few);
    let limits: Vec<u64> = limits.lines().map(|line| line.parse().expect("a number")).collect();
    assert!(limits.len() == 2 && limits[0] == limits[1] && limits[0] > 1000, "{limits:?}");
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn what_is_made_for_a_container_is_its_own_from_the_beginning() {
    needs_root!();
    let docker = Docker::kiln();
    docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "true"]);
    for line in [
        // The name is taken; the image's directory cannot be copied.
        &["run", "--rm", "-v", "/a", "--name", "web", "--network", "none", "busybox", "true"][..],
        &["create", "-v", "/a", "-v", "named:/b", "--name", "web", "busybox", "true"],
    ] {
        docker.run(line).expect(if line[0] == "run" { 125 } else { 1 });
        assert_eq!(docker.ok(&["volume", "ls", "-q"]), "", "{line:?}");
    }
    docker.ok(&["rm", "web"]);
    // Whoever removes what nobody has does not remove what is being filled.
    let Docker::Kiln(store) = &docker else { unreachable!("it is kiln") };
    std::thread::scope(|scope| {
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let docker = &docker;
        scope.spawn(move || {
            while is_done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                docker.run(&["volume", "prune", "-a", "-f"]).expect(0);
            }
        });
        for _ in 0..8 {
            let seen = store.ok(&[
                "run",
                "--rm",
                "--network",
                "none",
                "-v",
                "named:/bin2",
                "-v",
                "/etc",
                "busybox",
                "ls",
                "/etc",
            ]);
            assert!(seen.stdout.contains("passwd"), "{}", seen.stdout);
        }
        drop(done);
    });
    docker.ok(&["volume", "prune", "-a", "-f"]);
    docker.is_clean();
}

#[test]
fn exec_answers_with_dockers_codes() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["-m", "64m"], "exec sleep 1000");
    docker.run(&["exec", "-u", "nobody-such", "web", "true"]).expect(126);
    docker.run(&["exec", "-w", "/absent", "web", "true"]).expect(126);
    docker.run(&["exec", "web", "absent"]).expect(127);
    let bits = |flags: &[&str]| {
        docker
            .ok(&[&["exec"], flags, &["web", "grep", "-E", "CapEff|Seccomp:", "/proc/self/status"]].concat())
    };
    assert!(bits(&[]).contains("CapEff:\t00000000a80425fb\nSeccomp:\t2"));
    assert!(
        !bits(&["--privileged"]).contains("00000000a80425fb")
            && bits(&["--privileged"]).contains("Seccomp:\t0")
    );
    // With a control group of its own the freezer holds it: nobody is stopped.
    let paused = docker.run(&["pause", "web"]).expect(0);
    assert_eq!(paused.stderr, "");
    docker.run(&["exec", "web", "true"]).expect(1).says(&["paused"]);
    docker.ok(&["unpause", "web"]);
    docker.ok(&["rm", "-f", "web"]);
    docker.run(&["exec", "web", "true"]).expect(1);
    docker.is_clean();
}

#[test]
fn a_container_without_a_log_says_so() {
    needs_root!();
    let docker = Docker::kiln();
    let mut command = docker.command(&["run", "--rm", "-i", "--network", "none", "busybox", "cat"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).spawn().expect("it starts");
    let id = docker.until(&["ps", "-q"], |outcome| !outcome.stdout.is_empty()).stdout;
    docker.run(&["logs", id.trim()]).expect(2).says(&["no log"]);
    drop(child.stdin.take());
    assert!(child.wait().expect("our child").success());
    docker.is_clean();
}
