//! What kiln is held to with every input, hostile ones above all: no panic, no core, a minute,
//! 256 MiB, one error with its place; the store sound, nothing outside touched, nothing left mounted
//! or running.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Outcome, Store, left, test_as};
use crate::layers::listing;

/// A command runs in a mount namespace and a cgroup of its own, so that what it leaves there is its
/// own; cores would be as large as they like, in a directory that is empty.
const WRAPPER: &str = r#"
ulimit -c unlimited
if [ -n "$1" ]; then echo $$ > "$1/cgroup.procs"; fi
mounts=$2
shift 2
cat /proc/self/mountinfo > "$mounts.before"
"$@"
code=$?
cat /proc/self/mountinfo > "$mounts.after"
exit $code
"#;

/// Holds the commands on a store to what every input is bound to.
pub(crate) struct Watch<'s> {
    store: &'s Store,
    sentinel: Sentinel,
    cwd: PathBuf,
}

impl<'s> Watch<'s> {
    pub(crate) fn new(store: &'s Store) -> Watch<'s> {
        let cwd = store.beside("cwd");
        fs::create_dir_all(&cwd).expect("ours to write");
        Watch { store, sentinel: Sentinel::new(&store.beside("sentinel")), cwd }
    }

    /// Runs kiln on this store.
    #[track_caller]
    pub(crate) fn kiln(&self, args: &[&str]) -> Outcome {
        self.run(&self.store.command(args))
    }

    /// Runs a command line of kiln's: program, arguments and environment of `command`.
    #[track_caller]
    pub(crate) fn run(&self, command: &Command) -> Outcome {
        let cgroup = Cgroup::new();
        let mounts = self.store.beside("mountinfo");
        // A user's mounts are in the namespace of his kiln anyway.
        let own = ["unshare", "--mount", "--propagation", "private"];
        let line =
            [if test_as().is_none() { &own[..] } else { &[] }, &["/bin/sh", "-c", WRAPPER, "sh"]].concat();
        let mut wrapped = Command::new(line[0]);
        wrapped.args(&line[1..]);
        wrapped.arg(cgroup.as_ref().map_or(Path::new(""), |cgroup| &cgroup.dir)).arg(&mounts);
        wrapped.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped.current_dir(command.get_current_dir().unwrap_or(&self.cwd));
        wrapped.stdin(std::process::Stdio::null());
        let outcome = self.store.bounded(wrapped);
        let said = &outcome.stderr;
        // The shell says 128 and its number of a signal.
        assert!(outcome.code.is_some_and(|code| code < 128 || code == 130), "killed: {outcome:?}");
        let table = |when: &str| fs::read_to_string(mounts.with_extension(when)).expect("the shell wrote it");
        // Fewer are no fault: what others made goes when they remove the directory it is on.
        let (before, after) = (table("before"), table("after"));
        let new: Vec<&str> =
            after.lines().filter(|line| before.lines().all(|known| known != *line)).collect();
        assert_eq!(new, [""; 0], "mounts are left:\n{said}");
        assert_eq!(listing(&self.cwd), [""; 0], "files are left where it ran:\n{said}");
        if let Some(cgroup) = cgroup {
            cgroup.check();
        }
        self.sentinel.check();
        if let Err(what) = self.store.sound() {
            panic!("the store is not sound: {what}\n{said}");
        }
        outcome
    }

    /// The same for what is refused with this code and these words: one error, and a store as before.
    #[track_caller]
    pub(crate) fn refuses(&self, command: &Command, code: i32, says: &[&str]) -> Outcome {
        let before = self.store.holds();
        let outcome = self.run(command).expect(code).says(says);
        assert_eq!(outcome.stderr.matches("error:").count(), 1, "not one error:\n{}", outcome.stderr);
        assert_eq!(self.store.holds(), before, "something is left in the store:\n{}", outcome.stderr);
        assert_eq!(ingests(self.store), [""; 0], "half a blob is left:\n{}", outcome.stderr);
        outcome
    }
}

fn ingests(store: &Store) -> Vec<String> {
    let dir = store.root().join("ingest");
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path().display().to_string()).collect()
}

/// A cgroup that must have neither processes nor cgroups in it when a command has ended.
struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// `None`, aloud, where none can be made.
    fn new() -> Option<Cgroup> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("kiln-test-{}-{number}", std::process::id());
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = root.into_iter().find(|root| root.join("cgroup.procs").exists());
        let dir = root.map(|root| root.join(&name)).filter(|dir| fs::create_dir(dir).is_ok());
        if dir.is_none() {
            eprintln!("NOT TESTED: whether processes and cgroups are left: no cgroup can be made here");
        }
        dir.map(|dir| Cgroup { dir })
    }

    #[track_caller]
    fn check(self) {
        let processes = || {
            let list = fs::read_to_string(self.dir.join("cgroup.procs")).expect("ours");
            list.lines().map(str::to_owned).collect()
        };
        assert_eq!(left(processes), [""; 0], "processes are left");
        let below = || {
            let all = fs::read_dir(&self.dir).expect("ours").flatten().map(|entry| entry.path());
            all.filter(|path| path.is_dir()).map(|path| path.display().to_string()).collect()
        };
        assert_eq!(left(below), [""; 0], "cgroups are left");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Known files outside the store that nobody may touch.
struct Sentinel {
    dir: PathBuf,
    before: Vec<String>,
}

impl Sentinel {
    fn new(dir: &Path) -> Sentinel {
        fs::create_dir_all(dir.join("sub")).expect("ours to write");
        fs::write(dir.join("passwd"), "sentinel").expect("ours to write");
        fs::write(dir.join("sub/x"), "sentinel").expect("ours to write");
        Sentinel { dir: dir.to_owned(), before: Sentinel::state(dir) }
    }

    /// Contents, and the change times, which chmod, chown and new names in a directory set.
    fn state(dir: &Path) -> Vec<String> {
        let mut state = listing(dir);
        for path in ["", "passwd", "sub", "sub/x"] {
            let stat = fs::symlink_metadata(dir.join(path)).expect("it was there");
            state.push(format!("{path} {:?} {:o}", (stat.ctime(), stat.ctime_nsec()), stat.mode()));
        }
        // The host's own, which others change too: what hostile images of these tests aim at.
        let host = fs::symlink_metadata("/etc").expect("it is always there");
        state.push(format!("/etc {:o} {}:{}", host.mode(), host.uid(), host.gid()));
        for path in ["/etc/passwd", "/etc/x", "/etc/global"] {
            state.push(format!("{path} {:?}", fs::read(path).ok().map(|bytes| kiln_oci::Digest::of(&bytes))));
        }
        state
    }

    #[track_caller]
    fn check(&self) {
        assert_eq!(Sentinel::state(&self.dir), self.before, "something outside was touched");
    }
}
