//! Kiln as a user without privileges, with a range of ids and with one id only.
//!
//! The host's files stay as they are: `/etc/subuid`, `/etc/passwd` and devices that a distribution gives
//! to everybody are mounted in a mount namespace around the command.

mod builds;
mod doctor;
mod life;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

use crate::harness::{Outcome, Store, busybox_tar, text};

/// Which ids a user can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ids {
    Range,
    Single,
}

pub(super) const BOTH: [Ids; 2] = [Ids::Range, Ids::Single];

/// A user of this test alone: what he starts can be told from what others start.
pub(super) struct User {
    dir: TempDir,
    uid: u32,
    script: String,
}

impl User {
    /// A user with a home and kiln; `None`, said aloud, where that cannot be.
    pub(super) fn new(ids: Ids) -> Option<User> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Processes of one test run are told apart by it, tests within one by the counter.
        let uid = 31_337 + (std::process::id() % 4096) * 16 + NEXT.fetch_add(1, Ordering::Relaxed) % 16;
        for program in ["unshare", "setpriv", "newuidmap"] {
            let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
            if !found.is_ok_and(|found| found.status.success()) {
                eprintln!("SKIPPED ALOUD: needs {program}, of util-linux and uidmap");
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_kiln"), at("kiln")).unwrap();
        fs::create_dir(at("home")).unwrap();
        chown(at("home"), Some(uid), Some(uid)).unwrap();
        let range = match ids {
            Ids::Range => format!("{uid}:{}:65536\n", 0x2000_0000 + (uid - 31_337) % 50_000 * 65_536),
            Ids::Single => String::new(),
        };
        fs::write(at("subid"), range).unwrap();
        let known = fs::read_to_string("/etc/passwd").unwrap();
        fs::write(at("passwd"), format!("{known}kilntest{uid}:x:{uid}:{uid}::/:/bin/sh\n")).unwrap();
        let script = format!(
            "mount --bind {0}/subid /etc/subuid && mount --bind {0}/subid /etc/subgid && \
             mount --bind {0}/passwd /etc/passwd || exit 99\n",
            text(dir.path())
        );
        Some(User { dir, uid, script })
    }

    /// A user with `busybox:latest`, in which `node` is user 1000.
    pub(super) fn with_busybox(ids: Ids) -> Option<User> {
        let user = User::new(ids)?;
        let base = user.base();
        user.ok(&["import", text(&base), "busybox", "-c", PATH]);
        Some(user)
    }

    /// Has root do something in the mount namespace before the user's command starts.
    pub(super) fn prepare(&mut self, script: &str) {
        self.script.push_str(script);
        self.script.push('\n');
    }

    /// Gives the user devices that distributions give to everybody: `net/tun` or `fuse`.
    pub(super) fn give_device(&mut self, name: &str, number: &str) {
        let dir = text(self.dir.path()).to_owned();
        self.prepare(&format!(
            "mkdir -p {dir}/dev && mount -t tmpfs dev {dir}/dev && mknod -m 666 {dir}/dev/it c {number} && \
             mount --bind {dir}/dev/it /dev/{name} || exit 98"
        ));
    }

    /// The base tree as root has made it, for everybody to read.
    pub(super) fn base(&self) -> PathBuf {
        let tar = busybox_tar(self.dir.path());
        let (tree, own) = (self.at("tree"), self.at("base.tar"));
        fs::create_dir_all(&tree).unwrap();
        let script = format!(
            "tar -C {0} -xf {1} && cd {0} && mkdir -p etc tmp srv && chmod 1777 tmp && chown 5:6 srv && \
             echo 'node:x:1000:1000::/srv:/bin/sh' >> etc/passwd && echo 'node:x:1000:' >> etc/group && \
             echo mine > etc/owned && chown 1000:42 etc/owned && find . -exec touch -hd @1000000000 {{}} + && \
             tar --sort=name -cf {2} .",
            text(&tree),
            text(&tar),
            text(&own)
        );
        let made = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        own
    }

    /// A place beside the user's home, root's to write and everybody's to read.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    /// A build context.
    pub(super) fn context(&self, files: &[(&str, &str)]) -> String {
        let dir = self.at("context");
        fs::create_dir_all(&dir).unwrap();
        for (name, content) in files {
            fs::write(dir.join(name), content).unwrap();
            let time = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
            fs::File::open(dir.join(name)).unwrap().set_times(time).unwrap();
        }
        text(&dir).to_owned()
    }

    /// The user's command; words are programs and arguments.
    pub(super) fn command(&self, words: &[&str]) -> Command {
        let ids = self.uid.to_string();
        let mut command = Command::new("unshare");
        let exec = format!("{}exec setpriv --reuid {ids} --regid {ids} --clear-groups \"$@\"", self.script);
        command.args(["-m", "sh", "-c", &exec, "sh"]).args(words);
        command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("HOME", self.at("home"));
        command.current_dir(self.at("home")).stdin(Stdio::null());
        command
    }

    /// Runs kiln as the user.
    pub(super) fn kiln(&self, args: &[&str]) -> Outcome {
        let kiln = self.at("kiln");
        let words: Vec<&str> = std::iter::once(text(&kiln)).chain(args.iter().copied()).collect();
        Outcome::of(self.command(&words).output().unwrap())
    }

    #[track_caller]
    pub(super) fn ok(&self, args: &[&str]) -> Outcome {
        self.kiln(args).expect(0)
    }

    /// Who and what is in the layers of an image, the lowest left out unless it is the only one.
    pub(super) fn layers(&self, image: &str) -> Vec<Vec<String>> {
        let saved = self.at("home").join("saved.tar");
        self.ok(&["save", "-o", text(&saved), image]);
        layers_of(&saved)
    }

    /// Processes that the user, or a user of his range, has left.
    pub(super) fn processes(&self) -> Vec<String> {
        let mine = format!("Uid:\t{}\t", self.uid);
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let processes = entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
        processes
            .filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok())
            .filter(|status| status.contains(&mine) && !status.contains("State:\tZ"))
            .collect()
    }
}

/// A test that fails leaves nothing running: all processes of this user are its own.
impl Drop for User {
    fn drop(&mut self) {
        for status in self.processes() {
            let pid = status.lines().find_map(|line| line.strip_prefix("Pid:\t")?.trim().parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

pub(super) const PATH: &str = "ENV PATH=/bin";

/// The same in root's store.
pub(super) fn roots_layers(store: &Store, image: &str) -> Vec<Vec<String>> {
    let saved = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&saved), image]);
    layers_of(&saved)
}

/// Every entry of every layer: name, kind, owner, mode and content's length.
fn layers_of(archive: &Path) -> Vec<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    tar::Archive::new(fs::File::open(archive).unwrap()).unpack(dir.path()).unwrap();
    let manifest = fs::read(dir.path().join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest[0]["Layers"].as_array().unwrap();
    let entries = |layer: &serde_json::Value| {
        let file = fs::File::open(dir.path().join(layer.as_str().unwrap())).unwrap();
        let mut archive = tar::Archive::new(file);
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let (header, path) = (entry.header(), entry.path().unwrap().display().to_string());
            let device = (header.device_major().ok().flatten(), header.device_minor().ok().flatten());
            format!(
                "{path} {:?} {}:{} {:o} {} {device:?}",
                header.entry_type(),
                header.uid().unwrap(),
                header.gid().unwrap(),
                header.mode().unwrap(),
                header.size().unwrap()
            )
        });
        entries.collect()
    };
    layers.iter().map(entries).collect()
}
