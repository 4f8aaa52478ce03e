//! Ctrl-C and SIGTERM at random moments of builds and containers: kiln ends in time with the
//! documented code, and no process, mount, control group, interface, firewall rule or network
//! namespace is left.
//!
//! A run of the test command interrupts 60 times with a seed of its own, which it prints;
//! `KILN_INTERRUPTS=N` does so N times, `KILN_SEED=N` repeats a run. All of it happens in namespaces of
//! its own, so that whatever is there afterwards was left by kiln.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_testkit::random::Random;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::harness::{Context, Ends, Store, minds, needs_root};

/// Interrupts in a run of the test command.
const INTERRUPTS: usize = 60;
/// A command that has not ended by then does not.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel takes dead network namespaces apart when it has time.
const KERNELS_TIME: Duration = Duration::from_secs(20);
/// Says that this process is the one in the namespaces.
const INSIDE: &str = "KILN_INTERRUPTS_INSIDE";

#[test]
fn an_interrupt_at_any_moment_leaves_nothing() {
    needs_root!();
    if std::env::var_os(INSIDE).is_some() {
        return campaign();
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(std::env::current_exe().expect("this test is a program"));
    command.args(["interrupts::an_interrupt_at_any_moment_leaves_nothing", "--exact", "--nocapture"]);
    let output = command.env(INSIDE, "1").output().expect("unshare is part of util-linux");
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(" interrupts "), "the campaign did not run:\n{said}");
}

/// A command to interrupt, and how it may end.
struct Scenario<'a> {
    name: &'static str,
    line: Vec<&'a str>,
    /// Codes beside 0.
    codes: fn(Signal) -> Vec<i32>,
}

fn cancelled(_: Signal) -> Vec<i32> {
    vec![130]
}

/// The process's own answer, or the end of a process that has none.
fn passed_on(signal: Signal) -> Vec<i32> {
    vec![130, 137, 128 + signal.as_raw()]
}

/// Everything that outlives a command.
#[derive(Debug, PartialEq, Eq)]
struct World {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    groups: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    rules: String,
}

impl World {
    fn look() -> World {
        let interfaces = fs::read_to_string("/proc/self/net/dev").expect("/proc is mounted");
        let names = interfaces.lines().skip(2).filter_map(|line| line.split(':').next());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let namespace = fs::metadata("/proc/self/ns/pid").expect("/proc is mounted").ino();
        let mut groups = BTreeSet::new();
        find_groups(Path::new("/sys/fs/cgroup"), &format!("kiln-{namespace}-"), &mut groups);
        let rules = Command::new("nft").args(["--stateless", "list", "ruleset"]).output();
        World {
            processes: processes(),
            // What is mounted on and where; numbers and order are the kernel's.
            mounts: mounts
                .lines()
                .map(|line| line.split(' ').skip(3).collect::<Vec<_>>().join(" "))
                .collect(),
            groups,
            interfaces: names.map(|name| name.trim().to_owned()).collect(),
            rules: rules
                .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
                .unwrap_or_default(),
        }
    }

    /// What is there now and was not in `before`, once the kernel had its time.
    fn left_since(before: &World) -> Option<String> {
        let begun = Instant::now();
        loop {
            let now = World::look();
            let new = |now: &BTreeSet<String>, before: &BTreeSet<String>| {
                now.difference(before).cloned().collect::<Vec<_>>()
            };
            let left = [
                ("processes", new(&now.processes, &before.processes)),
                ("mounts", new(&now.mounts, &before.mounts)),
                ("control groups", new(&now.groups, &before.groups)),
                ("interfaces", new(&now.interfaces, &before.interfaces)),
                ("rules", if now.rules == before.rules { vec![] } else { vec![now.rules.clone()] }),
            ];
            let left: Vec<String> = left
                .into_iter()
                .filter(|(_, things)| !things.is_empty())
                .map(|(what, things)| format!("{what} are left: {}", things.join(", ")))
                .collect();
            if left.is_empty() {
                return None;
            }
            if begun.elapsed() > KERNELS_TIME {
                return Some(left.join("; "));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn find_groups(dir: &Path, prefix: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.insert(entry.path().display().to_string());
            }
            find_groups(&entry.path(), prefix, found);
        }
    }
}

/// All but this one, and those of which only the exit code is left: this is process 1, and they wait
/// for nobody else.
fn processes() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if pid != std::process::id() && !matches!(state, None | Some('Z' | 'X')) {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            found.insert(format!("{pid} {}", line.trim_end()));
        }
    }
    found
}

/// Starts a command of the scenario and interrupts it; how long it took to end, and whether it was
/// interrupted before its end.
fn interrupt(
    store: &Store,
    scenario: &Scenario<'_>,
    after: Duration,
    signal: Signal,
    group: bool,
) -> Result<(Duration, bool), String> {
    let mut command = store.command(&scenario.line);
    command.process_group(0).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kiln starts");
    // Not a wait for something: the moment is what is random here.
    std::thread::sleep(after);
    let running = child.try_wait().expect("our child").is_none();
    let has_begun = minds(child.id(), signal);
    let sent = Instant::now();
    let pid = Pid::from_child(&child);
    // Keys of a terminal reach all processes of the group.
    let _ = if group { kill_process_group(pid, signal) } else { kill_process(pid, signal) };
    // A process that was left has standard error, too: only kiln itself is waited for.
    let status = loop {
        if let Some(status) = child.try_wait().expect("our child") {
            break status;
        }
        if sent.elapsed() > PATIENCE {
            let _ = kill_process_group(pid, Signal::KILL);
            return Err("it does not end".to_owned());
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let took = sent.elapsed();
    let allowed = match (status.code(), status.signal()) {
        (Some(0), _) => true,
        (Some(code), _) => (scenario.codes)(signal).contains(&code),
        // Before the program has begun, a signal does what it does to any.
        (None, number) => number == Some(signal.as_raw()) && !has_begun,
    };
    if !allowed {
        let mut said = String::new();
        let _ = std::io::Read::read_to_string(&mut child.stderr.take().expect("piped above"), &mut said);
        return Err(format!("{status}: {said}"));
    }
    Ok((took, running))
}

fn remove_containers(store: &Store) {
    let listed = store.ok(&["ps", "-aq"]).stdout;
    let ids: Vec<&str> = listed.lines().collect();
    if !ids.is_empty() {
        store.ok(&[&["rm", "-f", "-v"], &ids[..]].concat());
    }
}

fn campaign() {
    let given = std::env::var("KILN_INTERRUPTS").ok();
    let count = given.map_or(INTERRUPTS, |count| count.parse().expect("KILN_INTERRUPTS is a number"));
    let mut random = Random::new();
    let seed = random.seed();
    println!("seed {seed}");
    let started = Instant::now();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox\n\
        RUN sleep 0.1 && echo a > /a\n\
        RUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t sleep 0.1; touch /c/c /t/t\n\
        RUN sleep 0.1 & cp -r /bin /more\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let answers = "trap 'exit 130' INT; trap 'exit 143' TERM; sleep 0.3 & wait $!";
    let mut scenarios = vec![
        Scenario {
            name: "build",
            line: vec!["build", "--progress", "plain", "--no-cache", "-t", "x", context.path()],
            codes: cancelled,
        },
        Scenario { name: "run", line: vec!["run", "--rm", "busybox", "sleep", "0.3"], codes: cancelled },
        Scenario {
            name: "run with limits",
            line: vec!["run", "--rm", "--memory", "64m", "busybox", "sh", "-c", answers],
            codes: passed_on,
        },
        Scenario {
            name: "run with a monitor",
            line: vec!["run", "--memory", "64m", "busybox", "sh", "-c", answers],
            codes: passed_on,
        },
        Scenario {
            name: "run -d",
            line: vec!["run", "-d", "--memory", "64m", "busybox", "sleep", "31536022"],
            codes: cancelled,
        },
        Scenario { name: "exec", line: vec!["exec", "life", "sleep", "0.3"], codes: passed_on },
    ];
    for runtime in ["crun", "runc"] {
        if Command::new(runtime).arg("--version").output().is_err() {
            println!("SKIPPED ALOUD: needs {runtime}");
            continue;
        }
        let line = vec!["run", "--rm", "--runtime", runtime, "busybox", "sh", "-c", answers];
        scenarios.push(Scenario { name: runtime, line, codes: passed_on });
        let line =
            ["build", "--progress", "plain", "--no-cache", "-t", "x", "--runtime", runtime, context.path()];
        scenarios.push(Scenario { name: "build with a runtime", line: line.to_vec(), codes: cancelled });
    }
    let prepare = |scenario: &Scenario<'_>| {
        if scenario.name == "exec" {
            store.ok(&["run", "-d", "--name", "life", "busybox", "sleep", "31536023"]);
        }
    };
    // The bridge, its rules and what belongs to them stay for the next one.
    let whole: Vec<Duration> = scenarios
        .iter()
        .map(|scenario| {
            prepare(scenario);
            let begun = Instant::now();
            store.ok(&scenario.line);
            let took = begun.elapsed();
            remove_containers(&store);
            took
        })
        .collect();
    let before = World { processes: BTreeSet::new(), ..World::look() };
    // What nobody sees is not missed: a container that runs is seen.
    store.ok(&["run", "-d", "--memory", "64m", "busybox", "sleep", "31536024"]);
    let begun = Instant::now();
    // Not at once: a process that is just executing another program has no arguments.
    let now = loop {
        let now = World::look();
        if now.processes.iter().any(|process| process.ends_with("sleep 31536024")) {
            break now;
        }
        assert!(begun.elapsed() < KERNELS_TIME, "{now:?}");
    };
    assert!(now.interfaces.len() > before.interfaces.len(), "{now:?}");
    assert!(now.groups.len() > before.groups.len(), "{now:?}");
    remove_containers(&store);
    let (mut hit, mut ends, mut wrong) = (0, Ends::default(), Vec::new());
    for number in 0..count {
        let chosen = number % scenarios.len();
        let scenario = &scenarios[chosen];
        prepare(scenario);
        let after = whole[chosen].mul_f64(1.1 * random.fraction());
        let signal = [Signal::INT, Signal::TERM][random.below(2)];
        let group = signal == Signal::INT && random.below(2) == 0;
        let mut complain = |what: String| {
            let to = if group { " to the group" } else { "" };
            wrong.push(format!("{number}: {} {signal:?}{to} after {after:?}: {what}", scenario.name));
        };
        match interrupt(&store, scenario, after, signal, group) {
            Ok((took, running)) => {
                ends.add(scenario.name, took);
                hit += usize::from(running);
            }
            Err(what) => complain(what),
        }
        remove_containers(&store);
        World::left_since(&before).into_iter().for_each(&mut complain);
        if !store.active_snapshots().is_empty() {
            complain(format!("active snapshots are left: {:?}", store.active_snapshots()));
        }
        if number % 10 == 9 || number + 1 == count {
            store.sound().unwrap_or_else(&mut complain);
        }
    }
    println!(
        "{count} interrupts ({hit} before the end), seed {seed}, slowest end {:?}, {:.1} s, {} violations",
        ends.slowest(),
        started.elapsed().as_secs_f64(),
        wrong.len()
    );
    ends.check("interrupts");
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
}
