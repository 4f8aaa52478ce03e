//! What is mounted below the container's root.
//!
//! Every mount is made detached and moved onto a descriptor that was resolved inside the root, so
//! a link in the image can send none of them elsewhere (CVE-2021-30465, CVE-2025-31133).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_oci::{BindMount, Mount, TmpfsMount};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fchmod, mkdirat, mknodat, openat, statat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
};
use rustix::thread::UnshareFlags;

use super::channel::Task;
use super::paths::{Created, make_dirs, make_file, open_inside};
use super::sys;
use crate::{ExecError, Network, ProcessSpec};

const SAFE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Unreadable inside: what tells about the host or its hardware (SECURITY: docker's and BuildKit's
/// lists together).
const MASKED: [&str; 13] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/sysrq-trigger",
];

/// Readable, never writable: what would change the host.
const READ_ONLY: [&str; 4] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"];

/// Attaches the root and mounts everything below it; returns the container's devpts.
pub(super) fn mount_all(
    task: &Task,
    root: BorrowedFd<'_>,
    created: &mut Created,
) -> Result<OwnedFd, ExecError> {
    let spec = &task.spec;
    sys::unshare(UnshareFlags::NEWNS).map_err(ExecError::start("mount namespace"))?;
    // Nothing that happens here may travel to the host.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(ExecError::start("private mounts"))?;
    let files = own_files(task)?;
    // Sources are opened before the root, so that no mount of the container can stand in for one.
    let sources = open_sources(spec)?;
    move_mount(root, "", CWD, task.attach_at.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(ExecError::start("attach the root"))?;

    let proc = new_mount("proc", &[], SAFE)?;
    attach(&proc, &make_dirs(root, "/proc", created).map_err(ExecError::start("/proc"))?, "/proc")?;
    let sys = new_mount("sysfs", &[], SAFE | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    attach(&sys, &make_dirs(root, "/sys", created).map_err(ExecError::start("/sys"))?, "/sys")?;
    let dev_target = make_dirs(root, "/dev", created).map_err(ExecError::start("/dev"))?;
    let (dev, devpts) = mount_dev(&dev_target)?;
    for (name, file) in &files {
        let target = format!("/etc/{name}");
        let at = make_file(root, &target, created).map_err(ExecError::start(target.clone()))?;
        attach(file, &at, &target)?;
    }
    for (mount, source) in spec.mounts.iter().zip(sources) {
        mount_one(mount, source, root, created)?;
    }
    for path in MASKED {
        mask(path, if path.starts_with("/proc") { &proc } else { &sys }, &dev)?;
    }
    for path in READ_ONLY {
        read_only(path, &proc)?;
    }
    Ok(devpts)
}

fn new_mount(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> Result<OwnedFd, ExecError> {
    let failed = |errno| ExecError::start(format!("mount {kind}"))(errno);
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    for (name, value) in options {
        fsconfig_set_string(context.as_fd(), *name, *value).map_err(failed)?;
    }
    fsconfig_create(context.as_fd()).map_err(failed)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(failed)
}

fn attach(mount: &OwnedFd, target: &OwnedFd, name: &str) -> Result<(), ExecError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags).map_err(ExecError::start(format!("mount on {name}")))
}

/// A copy of one file or directory as a mount of its own.
fn clone_tree(at: impl AsFd, path: &str, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(at, path, flags)
}

/// `/dev`: a few harmless devices, a devpts and a shared memory of its own.
fn mount_dev(target: &OwnedFd) -> Result<(OwnedFd, OwnedFd), ExecError> {
    let no_exec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev = new_mount("tmpfs", &[("mode", "755"), ("size", "65536k")], no_exec)?;
    for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
        make_device(&dev, name, 1, minor)?;
    }
    make_device(&dev, "tty", 5, 0)?;
    let links = [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ];
    for (name, to) in links {
        symlinkat(to, &dev, name).map_err(ExecError::start(format!("/dev/{name}")))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        mkdirat(&dev, name, Mode::from_raw_mode(0o755)).map_err(ExecError::start(format!("/dev/{name}")))?;
    }
    // Older kernels mount only onto what is part of a namespace: first /dev, then what is below.
    attach(&dev, target, "/dev")?;
    let below = |name: &str| {
        openat(&dev, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(ExecError::start(format!("/dev/{name}")))
    };
    // Group 5 is tty everywhere.
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let devpts = new_mount("devpts", &options, no_exec)?;
    attach(&devpts, &below("pts")?, "/dev/pts")?;
    let shm = new_mount("tmpfs", &[("mode", "1777"), ("size", "65536k")], SAFE)?;
    attach(&shm, &below("shm")?, "/dev/shm")?;
    attach(&new_mount("mqueue", &[], SAFE)?, &below("mqueue")?, "/dev/mqueue")?;
    Ok((dev, devpts))
}

fn make_device(dev: &OwnedFd, name: &str, major: u32, minor: u32) -> Result<(), ExecError> {
    let failed = |errno| ExecError::start(format!("/dev/{name}"))(errno);
    let device = rustix::fs::makedev(major, minor);
    mknodat(dev, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device).map_err(failed)?;
    // The umask took bits away.
    rustix::fs::chmodat(dev, name, Mode::from_raw_mode(0o666), AtFlags::empty()).map_err(failed)
}

/// `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`, each as a read-only mount.
fn own_files(task: &Task) -> Result<Vec<(&'static str, OwnedFd)>, ExecError> {
    let spec = &task.spec;
    let contents = [
        ("resolv.conf", resolver(spec.network)),
        ("hosts", hosts(task)),
        ("hostname", format!("{}\n", spec.hostname)),
    ];
    let tmpfs = new_mount("tmpfs", &[("mode", "755"), ("size", "1m")], SAFE)?;
    for (name, text) in &contents {
        let failed = |errno| ExecError::start(format!("/etc/{name}"))(errno);
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&tmpfs, *name, flags, Mode::from_raw_mode(0o644)).map_err(failed)?;
        fchmod(&file, Mode::from_raw_mode(0o644)).map_err(failed)?;
        rustix::io::write(&file, text.as_bytes()).map_err(failed)?;
    }
    // Cloning needs a mount that is part of the namespace; the place is free until the root comes.
    move_mount(&tmpfs, "", CWD, task.attach_at.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(ExecError::start("container files"))?;
    contents
        .iter()
        .map(|(name, _)| {
            let file = clone_tree(&tmpfs, name, false).map_err(ExecError::start(format!("/etc/{name}")))?;
            sys::mount_read_only(file.as_fd()).map_err(ExecError::start(format!("/etc/{name}")))?;
            Ok((*name, file))
        })
        .collect()
}

/// The host's resolver configuration without servers that only the host can reach.
fn resolver(network: Network) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf");
    if network == Network::Host {
        return text;
    }
    let usable = reachable(&text);
    if usable.contains("nameserver") || !text.contains("nameserver") {
        return usable;
    }
    // systemd-resolved listens on loopback; what it asks itself stands here.
    reachable(&read("/run/systemd/resolve/resolv.conf"))
}

fn reachable(text: &str) -> String {
    let loopback = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words.next().is_some_and(|server| server.starts_with("127.") || server == "::1")
    };
    text.lines().filter(|line| !loopback(line)).map(|line| format!("{line}\n")).collect()
}

fn hosts(task: &Task) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let address =
        task.lease.as_ref().map_or_else(|| "127.0.0.1".to_owned(), |lease| lease.address().to_string());
    text.push_str(&format!("{address}\t{}\n", task.spec.hostname));
    for (name, address) in &task.spec.extra_hosts {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

/// The bind mounts' sources as mounts of their own; `None` for other mounts.
fn open_sources(spec: &ProcessSpec) -> Result<Vec<Option<OwnedFd>>, ExecError> {
    spec.mounts
        .iter()
        .map(|mount| match mount {
            Mount::Tmpfs(_) => Ok(None),
            Mount::Bind(BindMount { source, read_only, .. }) => {
                let step = || format!("mount source {}", source.display());
                let path = source.to_str().ok_or_else(|| ExecError::start(step())(Errno::INVAL))?;
                let tree = clone_tree(CWD, path, true).map_err(ExecError::start(step()))?;
                if *read_only {
                    sys::mount_read_only(tree.as_fd()).map_err(ExecError::start(step()))?;
                }
                Ok(Some(tree))
            }
        })
        .collect()
}

fn mount_one(
    mount: &Mount,
    source: Option<OwnedFd>,
    root: BorrowedFd<'_>,
    created: &mut Created,
) -> Result<(), ExecError> {
    let (target, tree) = match (mount, source) {
        (Mount::Bind(BindMount { target, .. }), Some(tree)) => (target, tree),
        (Mount::Tmpfs(TmpfsMount { target, size_bytes }), _) => {
            let size = size_bytes.map(|bytes| bytes.to_string());
            let options: Vec<(&str, &str)> = size.iter().map(|size| ("size", size.as_str())).collect();
            (target, new_mount("tmpfs", &options, SAFE)?)
        }
        (Mount::Bind(_), None) => return Ok(()),
    };
    let failed = |errno| ExecError::start(format!("mount target {target}"))(errno);
    let stat = statat(&tree, "", AtFlags::EMPTY_PATH).map_err(failed)?;
    let at = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => make_dirs(root, target, created),
        _ => make_file(root, target, created),
    };
    attach(&tree, &at.map_err(failed)?, target)
}

/// Opens a path below `/proc` or `/sys` on the mount itself, never through the image.
fn open_on(mount: &OwnedFd, path: &str) -> Result<Option<OwnedFd>, ExecError> {
    let below = path.splitn(3, '/').nth(2).unwrap_or_default();
    match open_inside(mount.as_fd(), below, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(ExecError::start(path)(errno)),
    }
}

fn mask(path: &str, mount: &OwnedFd, dev: &OwnedFd) -> Result<(), ExecError> {
    let Some(target) = open_on(mount, path)? else { return Ok(()) };
    let stat = statat(&target, "", AtFlags::EMPTY_PATH).map_err(ExecError::start(path))?;
    let cover = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            new_mount("tmpfs", &[("size", "0")], SAFE | MountAttrFlags::MOUNT_ATTR_RDONLY)?
        }
        _ => clone_tree(dev, "null", false).map_err(ExecError::start(path))?,
    };
    attach(&cover, &target, path)
}

fn read_only(path: &str, mount: &OwnedFd) -> Result<(), ExecError> {
    let Some(target) = open_on(mount, path)? else { return Ok(()) };
    let tree = clone_tree(&target, "", true).map_err(ExecError::start(path))?;
    sys::mount_read_only(tree.as_fd()).map_err(ExecError::start(path))?;
    attach(&tree, &target, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_hosts_loopback_are_left_out() {
        let text = "search example.com\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions edns0\n";
        assert_eq!(reachable(text), "search example.com\nnameserver 10.0.0.2\noptions edns0\n");
    }
}
