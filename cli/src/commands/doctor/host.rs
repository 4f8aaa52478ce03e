//! What the host has and allows.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiln_executor::{Ids, Subordinate, UserNetwork};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{Rung, State};
use crate::errors::Failure;

/// What is to be seen from outside of the namespace only.
pub(super) fn before() -> Vec<Rung> {
    let mut rungs = vec![kernel()];
    if !rustix::process::geteuid().is_root() {
        rungs.push(subordinate(&Subordinate::of_user()));
    }
    rungs
}

fn kernel() -> Rung {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    match (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) {
        (0..5, _) | (5, 0..11) => Rung::new(
            "kernel",
            State::Limited,
            format!("Linux {release}: users cannot mount overlayfs before 5.11, so trees are copied"),
        ),
        _ => Rung::ok("kernel", format!("Linux {release}")),
    }
}

/// What a user has to get a range of ids with.
fn subordinate(given: &Subordinate) -> Rung {
    let limited = |found: String| Rung::new("subuid/subgid", State::Limited, found);
    let user = std::env::var("USER").unwrap_or_else(|_| rustix::process::getuid().as_raw().to_string());
    let (users, groups) = (given.users.count(), given.groups.count());
    if users == 0 || groups == 0 {
        let file = if users == 0 { "/etc/subuid" } else { "/etc/subgid" };
        return limited(format!("{file} has no line for {user}"))
            .help(format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"));
    }
    for (name, program) in [("newuidmap", &given.newuidmap), ("newgidmap", &given.newgidmap)] {
        match program {
            None => {
                return limited(format!("{name} is not installed"))
                    .help("sudo apt-get install uidmap, or the package shadow-utils");
            }
            Some(program) if !raises(program) => {
                return limited(format!("{} is not setuid and has no capability", program.display()))
                    .help(format!("sudo chmod u+s {}", program.display()));
            }
            Some(_) => {}
        }
    }
    if users < 65536 || groups < 65536 {
        return limited(format!("{users} user and {groups} group ids: images have users up to 65535"))
            .help(format!("sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"));
    }
    Rung::ok("subuid/subgid", format!("{users} user and {groups} group ids"))
}

/// Whether a program has more privileges than who starts it.
fn raises(program: &Path) -> bool {
    let setuid = fs::metadata(program).is_ok_and(|stat| stat.permissions().mode() & 0o4000 != 0);
    setuid || rustix::fs::getxattr(program, "security.capability", &mut [0_u8; 64][..]).is_ok()
}

/// Whether this process has a namespace of its own, and which ids in it.
pub(super) fn namespaces(error: Option<&Failure>) -> Vec<Rung> {
    let Some(error) = error else {
        let ids = match kiln_executor::ids() {
            Ids::Host => Rung::ok("ids", "all: this is root"),
            Ids::Range => Rung::ok("ids", "a range: files have their true owners on disk"),
            Ids::Single => Rung::new(
                "ids",
                State::Limited,
                "one: true owners of files and directories are on record, those of links are lost; chown and \
                 USER work in RUN, what becomes another user there does not (su, sudo, gosu, setpriv)",
            ),
        };
        let namespaces = match kiln_executor::ids() {
            Ids::Host => Rung::new("user namespaces", State::Unused, "not needed by root"),
            _ => Rung::ok("user namespaces", "this is root of one"),
        };
        return vec![namespaces, ids];
    };
    let text = error.render();
    let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let blocked = Rung::new("user namespaces", State::Blocked, reason);
    let says = |name: &str, value: &str| {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::read_to_string(path).is_ok_and(|found| found.trim() == value)
    };
    let settings = [
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("user.max_user_namespaces", "0", "28633"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    let culprit = settings.iter().find(|(name, value, _)| says(name, value));
    vec![match culprit {
        Some((name, value, better)) => {
            Rung { found: format!("{} ({name} is {value})", blocked.found), ..blocked }
                .help(format!("sudo sysctl -w {name}={better}"))
        }
        None => blocked.help("run kiln outside of the container or sandbox around it, or as root"),
    }]
}

/// What is asked for by some builds only.
pub(super) fn after() -> Vec<Rung> {
    let mut rungs = vec![seccomp(), foreign()];
    if kiln_executor::ids() != Ids::Host {
        rungs.insert(0, network());
    }
    rungs
}

/// A user's network; root's is tried.
fn network() -> Rung {
    match UserNetwork::find() {
        Ok(found) => Rung::ok("network", found.program().display().to_string()),
        Err(reason) => {
            let (what, help) = reason.split_once(": ").unwrap_or((&reason, "install slirp4netns"));
            let found = format!("{what}: RUN has none but with --network host");
            Rung::new("network", State::Limited, found).help(format!("sudo {help}"))
        }
    }
}

fn seccomp() -> Rung {
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.split_whitespace().any(|action| action == "errno") => {
            Rung::ok("seccomp", "filters work")
        }
        _ => Rung::new("seccomp", State::Blocked, "this kernel has no filters of system calls")
            .help("kiln --security-opt seccomp=unconfined, if you trust what you build"),
    }
}

/// Programs of other processors.
fn foreign() -> Rung {
    let names = fs::read_dir("/proc/sys/fs/binfmt_misc").into_iter().flatten().flatten();
    let names: Vec<String> = names
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("qemu-")?.to_owned()))
        .collect();
    if names.is_empty() {
        return Rung::new("other platforms", State::Limited, "no program of another processor can be run")
            .help("sudo apt-get install qemu-user-static binfmt-support");
    }
    Rung::ok("other platforms", names.join(", "))
}

/// Whether `/dev/fuse` can be opened.
pub(super) fn fuse_opens() -> bool {
    openat(CWD, "/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use kiln_executor::SubIds;

    use super::*;

    #[test]
    fn what_a_user_lacks_is_named_with_what_gives_it() {
        let ids = |count| SubIds { ranges: vec![(100_000, count)] };
        let mut given = Subordinate {
            users: ids(65536),
            groups: SubIds::default(),
            newuidmap: None,
            newgidmap: Some(PathBuf::from("/proc/version")),
        };
        let check = |given: &Subordinate, found: &str, help: &str| {
            let rung = subordinate(given);
            assert_eq!(rung.state, State::Limited);
            assert!(rung.found.contains(found), "{}", rung.found);
            assert!(rung.help.as_ref().is_some_and(|text| text.contains(help)), "{:?}", rung.help);
        };
        check(&given, "/etc/subgid has no line", "usermod --add-subuids");
        given.groups = ids(65536);
        check(&given, "newuidmap is not installed", "install uidmap");
        given.newuidmap = given.newgidmap.clone();
        check(&given, "/proc/version is not setuid", "chmod u+s /proc/version");
    }
}
