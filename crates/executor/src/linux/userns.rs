//! A user without privileges becomes root of a user namespace (`docs/adr/0014-rootless.md`).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use kiln_oci::IdMap;
use nix::unistd::ForkResult;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, getegid, geteuid, getpid, waitpid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::sys;
use crate::ExecError;

/// Which ids this process can give to files and processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// All of the host's: there is no user namespace around it.
    Host,
    /// Those of a range.
    Range,
    /// Its own only.
    Single,
}

/// Which ids this process has; looked up once, so not to be asked before [`become_root`].
pub fn ids() -> Ids {
    static IDS: OnceLock<Ids> = OnceLock::new();
    *IDS.get_or_init(|| {
        let read = |path: &str| IdMap::parse(&fs::read_to_string(path).unwrap_or_default());
        classify(&read("/proc/self/uid_map"), &read("/proc/self/gid_map"))
    })
}

fn classify(users: &IdMap, groups: &IdMap) -> Ids {
    // Without procfs, nothing is known; with the whole map, there is none but the host's.
    if users.is_empty() || groups.is_empty() || users.is_whole() {
        Ids::Host
    } else if users.is_single() || groups.is_single() {
        Ids::Single
    } else {
        Ids::Range
    }
}

/// Ranges of ids that a user was given, as `/etc/subuid` or `/etc/subgid` has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SubIds {
    /// First and number of each range.
    pub ranges: Vec<(u32, u32)>,
}

impl SubIds {
    /// What `text` says about a user; a range that is no range is left out.
    fn parse(text: &str, uid: u32, name: Option<&str>) -> Self {
        let number = uid.to_string();
        let range = |line: &str| {
            let mut fields = line.trim().split(':');
            let owner = fields.next()?;
            if owner != number && Some(owner) != name {
                return None;
            }
            let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            (count > 0).then_some((first, count))
        };
        Self { ranges: text.lines().filter_map(range).collect() }
    }

    /// How many ids these are.
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|(_, count)| u64::from(*count)).sum()
    }

    /// Arguments of `newuidmap`: inside, outside, how many; 0 is the user.
    fn arguments(&self, own: u32) -> Vec<String> {
        let mut all = vec!["0".to_owned(), own.to_string(), "1".to_owned()];
        let mut next = 1_u32;
        for &(first, count) in &self.ranges {
            all.extend([next.to_string(), first.to_string(), count.to_string()]);
            next = next.saturating_add(count);
        }
        all
    }
}

/// What a user has to get a range of ids with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subordinate {
    /// `/etc/subuid`.
    pub users: SubIds,
    /// `/etc/subgid`.
    pub groups: SubIds,
    /// The program `newuidmap`.
    pub newuidmap: Option<PathBuf>,
    /// The program `newgidmap`.
    pub newgidmap: Option<PathBuf>,
}

impl Subordinate {
    /// What this process's user has.
    pub fn of_user() -> Self {
        let uid = geteuid().as_raw();
        let name = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
        let name = name.map(|user| user.name);
        let ids = |path: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            SubIds::parse(&text, uid, name.as_deref())
        };
        Self {
            users: ids("/etc/subuid"),
            groups: ids("/etc/subgid"),
            newuidmap: program("newuidmap"),
            newgidmap: program("newgidmap"),
        }
    }

    fn tools(&self) -> Option<(&Path, &Path)> {
        let any = !self.users.ranges.is_empty() && !self.groups.ranges.is_empty();
        any.then_some((self.newuidmap.as_deref()?, self.newgidmap.as_deref()?))
    }
}

/// A program on `PATH`, or where the system has its own.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/usr/sbin", "/usr/local/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Makes a user and a mount namespace in which this process is user 0; does nothing for who is that
/// already. True when there should have
/// been a range of ids and is none. Costs some 0.2 ms, and 3 ms with a range of ids, most of it the two programs that give it.
///
/// Must be called before the process has a second thread.
///
/// # Errors
/// [`ExecError::Start`] where users may have no namespaces; the process is as it was then, unless the
/// kernel gave it a namespace and no ids in it.
pub fn become_root() -> Result<bool, ExecError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    if uid == 0 {
        return Ok(false);
    }
    let given = Subordinate::of_user();
    let mapper = given.tools().map(|tools| Mapper::start(&given, tools, uid, gid)).transpose()?;
    sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS).map_err(ExecError::start("user namespace"))?;
    let has_range = mapper.is_some();
    if let Some(mapper) = mapper {
        mapper.map()?;
    }
    let write = |file: &str, text: String| {
        let source = fs::write(format!("/proc/self/{file}"), text);
        source.map_err(|source| ExecError::Start { step: format!("/proc/self/{file}"), source })
    };
    // Who has no range, or could not get it, has himself.
    if is_empty("/proc/self/gid_map")? {
        write("setgroups", "deny".to_owned())?;
        write("gid_map", format!("0 {gid} 1"))?;
    }
    if is_empty("/proc/self/uid_map")? {
        write("uid_map", format!("0 {uid} 1"))?;
    }
    be_user_0()?;
    Ok(has_range && ids() == Ids::Single)
}

/// With one id only: makes this process, which has one thread, be called `uid` and `gid`, in a namespace
/// in which these stand for what was 0. Needs `/proc` of its own.
pub(super) fn become_other(uid: u32, gid: u32) -> Result<(), ExecError> {
    if (uid, gid) == (0, 0) {
        return Ok(());
    }
    let write = |file: &str, text: String| {
        let source = fs::write(format!("/proc/self/{file}"), text);
        source.map_err(|source| ExecError::Start { step: format!("/proc/self/{file}"), source })
    };
    sys::unshare(UnshareFlags::NEWUSER).map_err(ExecError::start("user namespace"))?;
    write("setgroups", "deny".to_owned())?;
    write("gid_map", format!("{gid} 0 1"))?;
    write("uid_map", format!("{uid} 0 1"))
}

/// What programs have to be told where there is one id: apt gives up when it cannot become another user
/// for its downloads. It is seen in containers and never part of a layer.
pub(super) fn make_stubs(stubs: &Path) -> io::Result<()> {
    let dir = stubs.join("etc/apt/apt.conf.d");
    fs::create_dir_all(&dir)?;
    let file = dir.join("99kiln-one-id");
    fs::write(&file, "APT::Sandbox::User \"root\";\n")?;
    // They are seen in containers: the umask has no say.
    for (path, mode) in [(&file, 0o644), (&dir, 0o755), (&stubs.join("etc/apt"), 0o755)] {
        fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
    }
    Ok(())
}

/// Enters the user and the mount namespace of `process`, which a [`become_root`] of the same user made, and
/// is user 0 there; does nothing for who is that already. Costs a few system calls.
///
/// Must be called before the process has a second thread.
///
/// # Errors
/// [`ExecError::Start`], where it has none, or they are somebody else's; the process is as it was then.
pub fn join_root(process: i32) -> Result<(), ExecError> {
    if geteuid().as_raw() == 0 {
        return Ok(());
    }
    let open = |name: &str| {
        let path = format!("/proc/{process}/ns/{name}");
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(ExecError::start("a container's user namespace"))
    };
    let (user, mounts) = (open("user")?, open("mnt")?);
    let enter = |namespace: &OwnedFd, kind| {
        move_into_link_name_space(namespace.as_fd(), Some(kind))
            .map_err(ExecError::start("a container's user namespace"))
    };
    // Both belong to one process: who may enter the first may enter the second.
    enter(&user, LinkNameSpaceType::User)?;
    let here = std::env::current_dir();
    enter(&mounts, LinkNameSpaceType::Mount)?;
    // With the mount namespace, the working directory became its root.
    let back = here.and_then(std::env::set_current_dir);
    back.map_err(|source| ExecError::Start { step: "the working directory".to_owned(), source })?;
    be_user_0()
}

fn be_user_0() -> Result<(), ExecError> {
    let failed = |errno: nix::errno::Errno| {
        ExecError::start("root of the user namespace")(Errno::from_raw_os_error(errno as i32))
    };
    let (root, wheel) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    nix::unistd::setresgid(wheel, wheel, wheel).map_err(failed)?;
    nix::unistd::setresuid(root, root, root).map_err(failed)
}

fn is_empty(map: &str) -> Result<bool, ExecError> {
    let text = fs::read_to_string(map);
    text.map(|text| IdMap::parse(&text).is_empty())
        .map_err(|source| ExecError::Start { step: map.to_owned(), source })
}

/// A child that stays outside of the namespace and has its ids mapped from there: inside, a setuid
/// program has no privileges over the host's ids.
struct Mapper {
    child: Pid,
    go: OwnedFd,
}

impl Mapper {
    fn start(given: &Subordinate, tools: (&Path, &Path), uid: u32, gid: u32) -> Result<Self, ExecError> {
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC).map_err(ExecError::start("pipe"))?;
        let parent = getpid().as_raw_nonzero().get();
        match sys::fork().map_err(ExecError::start("fork"))? {
            ForkResult::Child => {
                drop(go);
                let asked = rustix::io::read(&wait, &mut [0; 1]).is_ok_and(|count| count == 1);
                if asked {
                    let calls =
                        [(tools.1, given.groups.arguments(gid)), (tools.0, given.users.arguments(uid))];
                    map_ids(parent, calls);
                }
                // Nothing of the parent's, buffers above all, is to be touched here.
                sys::end_now(0)
            }
            ForkResult::Parent { child } => {
                let child = Pid::from_raw(child.as_raw()).ok_or(ExecError::HelperDied)?;
                Ok(Self { child, go })
            }
        }
    }

    /// Whether it worked is read from the maps themselves.
    fn map(self) -> Result<(), ExecError> {
        let written = rustix::io::write(self.go.as_fd(), b"!");
        drop(self.go);
        while let Err(Errno::INTR) = waitpid(Some(self.child), WaitOptions::empty()) {}
        written.map(drop).map_err(ExecError::start("maps of ids"))
    }
}

/// Calls both programs side by side and waits for them.
fn map_ids(process: i32, calls: [(&Path, Vec<String>); 2]) {
    let started: Vec<io::Result<std::process::Child>> = calls
        .iter()
        .map(|(program, arguments)| {
            let mut command = Command::new(program);
            command.arg(process.to_string()).args(arguments).stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        })
        .collect();
    for mut child in started.into_iter().flatten() {
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_tell_which_ids_there_are() {
        let [none, whole, single, range] =
            ["", "0 0 4294967295\n", "0 1000 1\n", "0 1000 1\n1 100000 65536\n"].map(IdMap::parse);
        assert_eq!(classify(&whole, &whole), Ids::Host);
        assert_eq!(classify(&none, &none), Ids::Host);
        assert_eq!(classify(&single, &single), Ids::Single);
        assert_eq!(classify(&range, &range), Ids::Range);
        // Half a map lets nobody be another user and group.
        assert_eq!(classify(&range, &single), Ids::Single);
    }

    #[test]
    fn ranges_are_those_of_the_name_and_of_the_number() {
        let text = "alice:100000:65536\n1000:300000:10\nbob:1:1\nalice:x:1\nalice:5:0\n# alice:7:7\n";
        let ids = SubIds::parse(text, 1000, Some("alice"));
        assert_eq!(ids.ranges, [(100_000, 65536), (300_000, 10)]);
        assert_eq!(ids.count(), 65546);
        assert_eq!(ids.arguments(1000), ["0", "1000", "1", "1", "100000", "65536", "65537", "300000", "10"]);
        assert_eq!(SubIds::parse(text, 7, None).ranges, []);
    }
}
