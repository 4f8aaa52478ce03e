//! Limits on a machine with control groups of version 2 and systemd, as root and as a user who has
//! logged in. `cargo xtask vm` runs these in a machine where none of them may be skipped.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::harness::{Outcome, Running, Store, busybox_tar, needs_root, text};

const GROUPS: &str = "/sys/fs/cgroup";
const ALICE: u32 = 1000;

/// Whether this is the machine of `cargo xtask vm`. Elsewhere nobody has logged in whose session tests
/// may use, and says so.
fn in_machine() -> bool {
    let inside = std::env::var_os("KILN_TEST_MACHINE").is_some();
    if !inside {
        eprintln!("SKIPPED ALOUD: needs systemd, and a user who has logged in (`cargo xtask vm`)");
    }
    inside
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The group of a container, by its process.
fn group_of(pid: &str) -> PathBuf {
    let own = read(format!("/proc/{pid}/cgroup"));
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("version 2 is there");
    Path::new(GROUPS).join(path)
}

/// kiln as the user whose session systemd keeps, in a group that belongs to root, as a login shell is.
struct Alice {
    dir: TempDir,
}

impl Alice {
    fn new() -> Alice {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("ours");
        fs::copy(env!("CARGO_BIN_EXE_kiln"), dir.path().join("kiln")).expect("ours to write");
        let tar = busybox_tar(dir.path());
        fs::copy(tar, dir.path().join("base.tar")).expect("ours to write");
        let home = dir.path().join("home");
        fs::create_dir(&home).expect("ours to write");
        chown(&home, Some(ALICE), Some(ALICE)).expect("root may");
        let alice = Alice { dir };
        let base = alice.dir.path().join("base.tar");
        alice.kiln(&["import", text(&base), "busybox", "-c", "ENV PATH=/bin"]).expect(0);
        alice
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "1000", "--regid", "1000", "--init-groups"]);
        command.arg(self.dir.path().join("kiln")).args(args);
        let home = self.dir.path().join("home");
        command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("HOME", &home);
        command.env("XDG_RUNTIME_DIR", "/run/user/1000").current_dir(home).stdin(Stdio::null());
        command
    }

    fn kiln(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("setpriv starts"))
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        self.kiln(args).expect(0).stdout.trim().to_owned()
    }
}

/// A test that fails leaves nothing running.
impl Drop for Alice {
    fn drop(&mut self) {
        let all = self.kiln(&["ps", "-aq"]).stdout;
        if !all.is_empty() {
            self.kiln(&[&["rm", "-f"], &all.lines().collect::<Vec<_>>()[..]].concat());
        }
    }
}

#[test]
fn every_limit_is_in_its_file_of_version_2() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let store = Store::with_busybox();
    let flags = [
        "--memory=64m",
        "--memory-swap=96m",
        "--cpus=0.5",
        "--cpu-shares=512",
        "--cpuset-cpus=0",
        "--pids-limit=33",
    ];
    let line = [&["run", "-d", "--name", "limited"], &flags[..], &["busybox", "sleep", "600"]].concat();
    store.ok(&line);
    let pid = store.ok(&["inspect", "--format", "{{.State.Pid}}", "limited"]).stdout.trim().to_owned();
    let group = group_of(&pid);
    for (file, value) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "20"),
        ("cpuset.cpus", "0"),
        ("pids.max", "33"),
    ] {
        assert_eq!(read(group.join(file)), value, "{file} of {}", group.display());
    }
    assert_eq!(store.ok(&["exec", "limited", "cat", "/proc/self/cgroup"]).stdout, "0::/\n");
    let before = read(group.join("cgroup.procs")).lines().count();
    let mut inside =
        Running::start(store.command(&["exec", "limited", "sh", "-c", "echo up >&2; sleep 600"]));
    inside.wait_for("up");
    assert!(read(group.join("cgroup.procs")).lines().count() > before, "exec is not in the group");

    let paused = store.ok(&["pause", "limited"]);
    assert!(!paused.stderr.contains("one by one"), "{}", paused.stderr);
    assert!(read(group.join("cgroup.events")).contains("frozen 1"));
    store.ok(&["unpause", "limited"]);
    assert!(read(group.join("cgroup.events")).contains("frozen 0"));
    store.ok(&["rm", "-f", "limited"]);
    inside.end();
    assert!(!group.exists(), "{} is left", group.display());
}

#[test]
fn what_ran_out_of_memory_is_known() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let store = Store::with_busybox();
    let eat = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let line =
        ["run", "--name", "eater", "--memory", "32m", "--memory-swap", "32m", "busybox", "sh", "-c", eat];
    let outcome = store.kiln(&line);
    assert!(!outcome.stdout.contains("200000000"), "{outcome:?}");
    assert_eq!(store.ok(&["inspect", "--format", "{{.State.OOMKilled}}", "eater"]).stdout, "true\n");
    store.ok(&["rm", "eater"]);
}

/// systemd knows nothing of kiln's groups: its slices and scopes stay what they are.
#[test]
fn root_may_start_it_from_a_session_as_well_as_from_a_service() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let store = Store::with_busybox();
    let kiln = env!("CARGO_BIN_EXE_kiln");
    let root = format!("--root={}", text(&store.root()));
    for how in [
        &["--scope", "--quiet", "--slice=user-0.slice"][..],
        &["--scope", "--quiet", "-p", "Delegate=yes"],
        &["--pipe", "--wait", "--quiet"],
        &["--pipe", "--wait", "--quiet", "-p", "Delegate=yes"],
        &["--pipe", "--wait", "--quiet", "--slice=-.slice"],
    ] {
        let run = ["run", "--rm", "--network=none", "--memory=64m", "--pids-limit=30", "busybox"];
        let output = Command::new("systemd-run")
            .args(how)
            .args([kiln, &root])
            .args(run)
            .args(["cat", "/proc/self/cgroup"])
            .output()
            .expect("systemd-run starts");
        let outcome = Outcome::of(output).expect(0);
        assert_eq!(outcome.stdout, "0::/\n", "{how:?}");
    }
    // Where systemd takes controllers back that nobody asked it for, limits hold all the same.
    store.ok(&["run", "-d", "--name", "kept", "--memory=64m", "busybox", "sleep", "600"]);
    let pid = store.ok(&["inspect", "--format", "{{.State.Pid}}", "kept"]).stdout.trim().to_owned();
    let group = group_of(&pid);
    for _ in 0..3 {
        let reloaded = Command::new("systemctl").arg("daemon-reload").status().expect("systemctl starts");
        assert!(reloaded.success());
    }
    assert_eq!(read(group.join("memory.max")), "67108864");
    store.ok(&["rm", "-f", "kept"]);
}

#[test]
fn a_user_who_has_logged_in_has_limits_too() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let alice = Alice::new();
    let limits = ["--memory=64m", "--cpus=0.5", "--pids-limit=30"];
    let line =
        [&["run", "--rm", "--network=none"], &limits[..], &["busybox", "cat", "/proc/self/cgroup"]].concat();
    assert_eq!(alice.ok(&line), "0::/");
    let eat = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let line = ["run", "--rm", "--network=none", "--memory=32m", "busybox", "sh", "-c", eat];
    let outcome = alice.kiln(&line);
    assert!(outcome.code != Some(0) && !outcome.stdout.contains("200000000"), "{outcome:?}");

    alice.ok(&[
        &["run", "-d", "--name", "life", "--network=none"],
        &limits[..],
        &["busybox", "sleep", "600"],
    ]
    .concat());
    let group = group_of(&alice.ok(&["inspect", "--format", "{{.State.Pid}}", "life"]));
    assert!(group.starts_with("/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"), "{group:?}");
    assert_eq!(read(group.join("memory.max")), "67108864");
    assert_eq!(read(group.join("cpu.max")), "50000 100000");
    assert_eq!(read(group.join("pids.max")), "30");
    // Another session's command enters the group.
    assert_eq!(alice.ok(&["exec", "life", "cat", "/proc/self/cgroup"]), "0::/");
    let paused = alice.kiln(&["pause", "life"]).expect(0);
    assert!(!paused.stderr.contains("one by one"), "{}", paused.stderr);
    assert!(read(group.join("cgroup.events")).contains("frozen 1"));
    alice.ok(&["unpause", "life"]);
    alice.ok(&["rm", "-f", "life"]);
    assert!(!group.exists(), "{} is left", group.display());
}

#[test]
fn exec_of_another_session_needs_no_group() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let alice = Alice::new();
    let run = ["run", "-d", "--name", "life", "--network=none", "busybox", "sleep", "600"];
    // Two groups of root's, side by side, as two logins have them.
    let wrap = |args: &[&str]| {
        let inner = alice.command(args);
        let mut command = Command::new("systemd-run");
        command.args(["--scope", "--quiet"]).arg(inner.get_program()).args(inner.get_args());
        command.env_clear();
        for (name, value) in inner.get_envs() {
            value.map(|value| command.env(name, value));
        }
        command.current_dir(alice.dir.path().join("home")).stdin(Stdio::null());
        Outcome::of(command.output().expect("systemd-run starts"))
    };
    wrap(&run).expect(0);
    assert_eq!(wrap(&["exec", "life", "echo", "here"]).expect(0).stdout, "here\n");
    alice.ok(&["rm", "-f", "life"]);
}

#[test]
fn doctor_tries_limits() {
    needs_root!();
    if !in_machine() {
        return;
    }
    let limits = |outcome: Outcome| {
        let report: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        let rungs = report["rungs"].as_array().expect("a list").clone();
        rungs.into_iter().find(|rung| rung["name"] == "limits").expect("it is tried")
    };
    let line = ["doctor", "--format", "json"];
    let rung = limits(Store::empty().ok(&line));
    assert_eq!(rung["state"], "ok", "{rung}");
    let alice = Alice::new();
    let rung = limits(alice.kiln(&line));
    assert_eq!(rung["state"], "ok", "{rung}");
    // Nobody has logged in as this one.
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "4711", "--regid", "4711", "--clear-groups"]).arg(alice.dir.path().join("kiln"));
    let home = alice.dir.path().join("other");
    fs::create_dir(&home).expect("ours to write");
    chown(&home, Some(4711), Some(4711)).expect("root may");
    command.args(line).env_clear().env("HOME", &home).env("PATH", "/usr/bin:/bin").current_dir(&home);
    let rung = limits(Outcome::of(command.output().expect("setpriv starts")));
    assert_eq!(rung["state"], "limited", "{rung}");
    assert!(rung["found"].as_str().is_some_and(|found| found.contains("no service manager")), "{rung}");
}
