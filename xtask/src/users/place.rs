//! Where a user without privileges runs the tests: a mount namespace in which he has a name, his ids, the
//! devices that distributions give to everybody, and a way to what was built although that may lie in
//! somebody's closed home. Nothing of the host is changed.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, io, process};

use super::Ids;
use crate::step::{self, Failure};

/// A user and the namespace around him; both end with this value.
pub(super) struct Place {
    ids: Ids,
    uid: u32,
    /// Where the user's stores are, on the disk that everything is built on.
    stores: PathBuf,
    /// Files that are mounted over others; its path is short.
    scratch: PathBuf,
    bases: PathBuf,
    /// Holds the namespace for as long as we hold its standard input.
    holder: Child,
}

impl Place {
    pub(super) fn make(ids: Ids, bases: &Path) -> Result<Self, Failure> {
        // Users of other runs, and those that the tests make themselves, have other numbers.
        let number = process::id() % 8192 * 2 + u32::from(ids == Ids::Single);
        let uid = 200_000 + number;
        let target = step::target_dir()?;
        let stores = target.join(format!("test-stores-{}", ids.name()));
        remove(&stores)?;
        fs::create_dir_all(&stores).map_err(Failure::io("create", &stores))?;
        chown(&stores, Some(uid), Some(uid)).map_err(Failure::io("chown", &stores))?;
        let scratch = scratch(number)?;
        let range = match ids {
            Ids::Range => format!("{uid}:{}:65536\n", 0x4000_0000 + number * 65_536),
            Ids::Single => String::new(),
        };
        let known = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let own = format!("{known}kilntest:x:{uid}:{uid}::{0}/home:/bin/sh\n", scratch.display());
        for (name, text) in [("subid", range), ("passwd", own)] {
            let path = scratch.join(name);
            fs::write(&path, text).map_err(Failure::io("write", &path))?;
            open_to_all(&path, 0o644)?;
        }
        let needed = [step::repository(), &target, bases];
        let script = script(&scratch, &stores, &needed, &closed_above);
        let holder = hold(&script)?;
        let place = Self { ids, uid, stores, scratch, bases: bases.to_owned(), holder };
        place.check(&target)?;
        Ok(place)
    }

    /// Has nextest start its tests as the user.
    pub(super) fn tell(&self, command: &mut Command) {
        command.env(format!("CARGO_TARGET_{}_RUNNER", triple()), self.runner().join(" "));
        command.env("KILN_TEST_AS", self.ids.name()).env("KILN_TEST_BASES", &self.bases);
        command.env_remove("KILN_ROOT");
    }

    /// The words before a command that the user is to run.
    fn runner(&self) -> Vec<String> {
        let (uid, pid) = (self.uid, self.holder.id());
        let user = format!("--target {pid} --mount --wd setpriv --reuid {uid} --regid {uid} --clear-groups");
        let at = self.scratch.display();
        let env = format!(
            "env -u XDG_RUNTIME_DIR -u XDG_DATA_HOME -u XDG_CONFIG_HOME USER=kilntest LOGNAME=kilntest \
             HOME={at}/stores TMPDIR={at}/stores"
        );
        format!("nsenter {user} {env}").split(' ').map(str::to_owned).collect()
    }

    /// A file mode that keeps others out is found before a thousand tests fail of it.
    fn check(&self, target: &Path) -> Result<(), Failure> {
        for dir in [target, &self.bases, step::repository()] {
            let words = self.runner();
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).args(["test", "-x"]).arg(dir);
            if !step::succeeds(&mut command) {
                let source = io::Error::other("a user without privileges cannot look into it (chmod o+x)");
                return Err(Failure::io("use", dir)(source));
            }
        }
        Ok(())
    }

    /// Ends what is left of the user.
    ///
    /// # Errors
    /// [`Failure::LeftRunning`]: the tests have ended, and processes of theirs have not.
    pub(super) fn leave(&self) -> Result<(), Failure> {
        let left: Vec<String> = self.processes().into_iter().map(|(_, name)| name).collect();
        if left.is_empty() { Ok(()) } else { Err(Failure::LeftRunning { processes: left }) }
    }

    /// Numbers and names of the user's processes.
    fn processes(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mine = format!("Uid:\t{}\t", self.uid);
        let status = |entry: fs::DirEntry| {
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let alive = status.contains(&mine) && !status.contains("State:\tZ");
            let line =
                fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default().replace('\0', " ");
            alive.then(|| (entry.file_name().to_string_lossy().into_owned(), line))
        };
        entries.filter_map(status).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for (process, _) in self.processes() {
            step::succeeds(Command::new("sh").args(["-c", &format!("kill -KILL {process}")]));
        }
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
        // The next run begins with this as well.
        let _ = (remove(&self.stores), remove(&self.scratch));
    }
}

/// The namespace's making, by root; ends when nobody holds its standard input any more.
fn hold(script: &str) -> Result<Child, Failure> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(step::spawn_failure(&command))?;
    let mut line = String::new();
    let said = child.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
    if !matches!(said, Some(Ok(_))) || line != "ready\n" {
        let _ = child.wait();
        return Err(Failure::Output { line: "unshare --mount sh".to_owned(), expected: "that it is ready" });
    }
    Ok(child)
}

fn script(
    scratch: &Path,
    stores: &Path,
    needed: &[&Path],
    closed_above: &dyn Fn(&Path) -> Option<PathBuf>,
) -> String {
    let quoted = |path: &Path| step::quoted(path.as_os_str());
    let at = quoted(scratch);
    let mut lines = vec![
        "set -e".to_owned(),
        // In here nobody else sees what is added.
        format!("for file in subuid subgid; do mount --bind {at}/subid /etc/$file; done"),
        format!("mount --bind {at}/passwd /etc/passwd"),
        format!("mkdir {at}/more; mount -t tmpfs -o mode=755 more {at}/more"),
        format!("give() {{ [ ! -e /dev/$1 ] || {{ mknod {at}/more/$2 c 10 $3; chmod 666 {at}/more/$2"),
        format!("mount --bind {at}/more/$2 /dev/$1; }}; }}"),
        "give net/tun tun 200; give fuse fuse 229".to_owned(),
        // What leads through directories of others is put where it is again, in empty ones.
        format!("umask 022; ln -s {} {at}/stores", quoted(stores)),
    ];
    let mut closed = BTreeSet::new();
    let (mut aside, mut back) = (Vec::new(), Vec::new());
    let mut paths = needed.to_vec();
    paths.sort_unstable();
    for (at_number, path) in paths.into_iter().enumerate() {
        let Some(top) = closed_above(path) else { continue };
        let kept = format!("{at}/more/{at_number}");
        aside.push(format!("mkdir {kept}; mount --bind {} {kept}", quoted(path)));
        back.push(format!("mkdir -p {0}; mount --bind {kept} {0}", quoted(path)));
        closed.insert(top);
    }
    lines.extend(aside);
    lines.extend(closed.iter().map(|top| format!("mount -t tmpfs -o mode=755 opened {}", quoted(top))));
    lines.extend(back);
    lines.push(format!("cd {}", quoted(&step::repository().join("cli"))));
    lines.push("echo ready; exec >&-; read -r end || :".to_owned());
    lines.join("\n")
}

/// The highest directory on the way to `path` that lets others not through.
fn closed_above(path: &Path) -> Option<PathBuf> {
    let way: Vec<&Path> = path.ancestors().skip(1).collect();
    let closed = |dir: &&&Path| fs::metadata(dir).is_ok_and(|stat| stat.mode() & 0o001 == 0);
    way.iter().rev().find(closed).map(|dir| dir.to_path_buf())
}

/// A new directory that everybody reaches, with a path short enough for sockets below it.
fn scratch(number: u32) -> Result<PathBuf, Failure> {
    let usual = env::temp_dir();
    let open = closed_above(&usual.join("x")).is_none() && !usual.to_string_lossy().contains(' ');
    let within = if open { usual } else { PathBuf::from("/var/tmp") };
    if !open {
        step::note(&format!("{} stands in for a TMPDIR that the user does not reach", within.display()));
    }
    let dir = within.join(format!("kiln-as-{number}"));
    remove(&dir)?;
    fs::create_dir(&dir).map_err(Failure::io("create", &dir))?;
    open_to_all(&dir, 0o755)?;
    Ok(dir)
}

fn open_to_all(path: &Path, mode: u32) -> Result<(), Failure> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(Failure::io("chmod", path))
}

fn remove(dir: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// The machine's name in cargo's environment variables.
fn triple() -> String {
    let (arch, libc) = (env::consts::ARCH, if cfg!(target_env = "musl") { "MUSL" } else { "GNU" });
    format!("{}_UNKNOWN_LINUX_{libc}", arch.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_closed_home_is_reached_all_the_same() {
        let closed = |path: &Path| path.starts_with("/root").then(|| PathBuf::from("/root"));
        let needed = [Path::new("/root/kiln"), Path::new("/root/kiln/target"), Path::new("/srv/bases")];
        let script = script(Path::new("/tmp/x"), Path::new("/root/kiln/target/s"), &needed, &closed);
        let place = |text: &str| script.find(text).unwrap_or_else(|| panic!("no {text} in\n{script}"));
        let aside = place("mount --bind /root/kiln/target /tmp/x/more/1");
        let hidden = place("mount -t tmpfs -o mode=755 opened /root\n");
        let back = place("mount --bind /tmp/x/more/1 /root/kiln/target");
        assert!(aside < hidden && hidden < back && place("mount --bind /tmp/x/more/0 /root/kiln\n") < back);
        assert!(!script.contains("/srv/bases"));
    }

    #[test]
    fn the_highest_closed_directory_is_found() {
        let dir = env::temp_dir().join(format!("xtask-closed-{}", process::id()));
        fs::create_dir_all(dir.join("closed/open")).expect("ours");
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).expect("ours");
        fs::set_permissions(dir.join("closed"), Permissions::from_mode(0o700)).expect("ours");
        let found = closed_above(&dir.join("closed/open/file"));
        let outside = closed_above(&dir.join("file"));
        fs::remove_dir_all(&dir).expect("ours");
        // The directory for temporary files may itself be in a closed one.
        assert!(outside.is_some() || found == Some(dir.join("closed")), "{found:?}");
        assert!(found.is_some());
    }
}
