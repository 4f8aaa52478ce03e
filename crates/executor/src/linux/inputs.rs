//! Mounts that a process's spec asks for: their sources before the root is there, then their
//! targets inside it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_oci::{BindMount, FileMount, Mount, TmpfsMount, TreeMount};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, fstatfs, openat, statat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::channel::Task;
use super::mounts::{SAFE, attach, attach_aside, clone_tree, new_mount};
use super::paths::{Created, make_dirs, make_file, open_inside};
use super::userns::{self, Ids};
use super::{dev, sys};
use crate::{ExecError, Security};

/// Kinds of file systems that only the sandbox mounts: proc, sysfs, devpts and mqueue (linux/magic.h).
const KEPT_KINDS: [i128; 4] = [0x9fa0, 0x6265_6572, 0x1cd1, 0x1980_0202];

/// Says whether a step may mount something at `target`, an absolute, cleaned path: not where the
/// sandbox itself stands. The executor looks again at what the path turns out to be inside.
///
/// # Errors
/// [`ExecError::Refused`].
pub fn check_mount_target(target: &str) -> Result<(), ExecError> {
    let below =
        |dir: &str| target == dir || target.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'));
    let reason = match target {
        "" | "/" => "it is the root file system",
        _ if !target.starts_with('/') => "it is not absolute",
        _ if target.split('/').any(|component| component == "..") => "it is not clean",
        _ if below("/dev/shm") => return Ok(()),
        _ if below("/proc") || below("/sys") || target == "/dev" => SANDBOX,
        // Names of their own in /dev are free: heredoc scripts come as /dev/pipes.
        _ if dev::NAMES.iter().any(|name| below(&format!("/dev/{name}"))) => SANDBOX,
        _ => return Ok(()),
    };
    Err(refused(target, reason))
}

const SANDBOX: &str = "the sandbox keeps /proc, /sys and what it has in /dev, except /dev/shm";

fn refused(target: &str, reason: &str) -> ExecError {
    ExecError::Refused { target: target.to_owned(), reason: reason.to_owned() }
}

/// The sources of the spec's mounts as mounts of their own; `None` for a mount without one.
pub(super) fn open_sources(task: &Task, inputs: &[OwnedFd]) -> Result<Vec<Option<OwnedFd>>, ExecError> {
    let input = |position: usize| {
        inputs.get(position).ok_or_else(|| ExecError::start(format!("input {position}"))(Errno::BADF))
    };
    let mut secrets = None;
    task.spec
        .mounts
        .iter()
        .map(|mount| match mount {
            Mount::Tmpfs(_) => Ok(None),
            Mount::Bind(bind) => host_path(bind, task.spec.security).map(Some),
            Mount::Tree(tree) => part_of(tree, input(tree.input)?, task).map(Some),
            Mount::File(file) => {
                let tmpfs = match &secrets {
                    Some(tmpfs) => tmpfs,
                    None => secrets.insert(memory(task)?),
                };
                in_memory(file, input(file.input)?, tmpfs).map(Some)
            }
        })
        .collect()
}

fn restrictions(read_only: bool, security: Security) -> MountAttrFlags {
    let mut flags = MountAttrFlags::empty();
    if read_only {
        flags |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    if security == Security::Sandbox {
        flags |= MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    flags
}

fn host_path(bind: &BindMount, security: Security) -> Result<OwnedFd, ExecError> {
    let step = || format!("mount source {}", bind.source.display());
    let path = bind.source.to_str().ok_or_else(|| ExecError::start(step())(Errno::INVAL))?;
    let tree = clone_tree(CWD, path, true).map_err(ExecError::start(step()))?;
    sys::restrict_mount(tree.as_fd(), restrictions(bind.read_only, security))
        .map_err(ExecError::start(step()))?;
    Ok(tree)
}

/// The part of an open tree that a mount shows. Its path is resolved here, once, inside the tree:
/// what somebody puts there afterwards changes nothing (CVE-2024-23651).
fn part_of(mount: &TreeMount, input: &OwnedFd, task: &Task) -> Result<OwnedFd, ExecError> {
    let failed = |errno| ExecError::start(format!("mount source {:?}", mount.source))(errno);
    let tree = if mount.source.is_empty() {
        rustix::io::fcntl_dupfd_cloexec(input, 3).map_err(failed)?
    } else {
        // Sources lie on each other there: a shared one would have peers get what lies on it.
        sys::restrict_mount(input.as_fd(), MountAttrFlags::empty()).map_err(failed)?;
        attach_aside(input, task, "a mount's source")?;
        let part = open_inside(input.as_fd(), &mount.source, OFlags::PATH).map_err(failed)?;
        clone_tree(part, "", true).map_err(failed)?
    };
    sys::restrict_mount(tree.as_fd(), restrictions(mount.read_only, task.spec.security)).map_err(failed)?;
    Ok(tree)
}

/// A file system for secrets: never written to a disk, not even to swap where the kernel can help it.
fn memory(task: &Task) -> Result<OwnedFd, ExecError> {
    let failed = |errno| ExecError::start("memory for secrets")(errno);
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    fsconfig_set_string(context.as_fd(), "mode", "700").map_err(failed)?;
    // Linux 6.4; before, and inside a user namespace, secrets may be swapped as any memory.
    let _ = fsconfig_set_flag(context.as_fd(), "noswap");
    fsconfig_create(context.as_fd()).map_err(failed)?;
    let tmpfs = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, SAFE).map_err(failed)?;
    attach_aside(&tmpfs, task, "memory for secrets")?;
    Ok(tmpfs)
}

fn in_memory(mount: &FileMount, content: &OwnedFd, tmpfs: &OwnedFd) -> Result<OwnedFd, ExecError> {
    let step = || format!("file for {}", mount.target);
    let failed = |errno| ExecError::start(step())(errno);
    let name = mount.input.to_string();
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let made = openat(tmpfs, name.as_str(), flags, Mode::RUSR).map_err(failed)?;
    let copy = || -> io::Result<()> {
        let (mut from, mut to) = (File::from(content.try_clone()?), File::from(made.try_clone()?));
        io::Seek::rewind(&mut from)?;
        io::copy(&mut from, &mut to).map(drop)
    };
    copy().map_err(|source| ExecError::Start { step: step(), source })?;
    // Owner before mode: chown(2) clears setuid bits.
    if userns::ids() != Ids::Single {
        fchown(&made, Some(Uid::from_raw(mount.uid)), Some(Gid::from_raw(mount.gid))).map_err(failed)?;
    }
    fchmod(&made, Mode::from_raw_mode(mount.mode & 0o7777)).map_err(failed)?;
    let file = clone_tree(tmpfs, &name, false).map_err(failed)?;
    sys::restrict_mount(file.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(failed)?;
    Ok(file)
}

/// What a step's mounts must not cover.
pub(super) struct Covered<'a> {
    pub(super) root: BorrowedFd<'a>,
    /// `/dev`
    pub(super) dev: BorrowedFd<'a>,
    /// The file system that its devices are mounted from.
    pub(super) devices: BorrowedFd<'a>,
}

impl Covered<'_> {
    /// A link in the image may lead an innocent target to a place that is refused.
    fn check(&self, target: &str, at: &OwnedFd) -> Result<(), ExecError> {
        let failed = |errno| ExecError::start(format!("mount target {target}"))(errno);
        let kind = i128::from(fstatfs(at).map_err(failed)?.f_type);
        let at = fstat(at).map_err(failed)?;
        let is = |other: BorrowedFd<'_>| {
            fstat(other).map(|other| (other.st_dev, other.st_ino) == (at.st_dev, at.st_ino)).map_err(failed)
        };
        // A user's are the host's own devices, on the host's file system.
        let null = statat(self.devices, "null", AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let is_device = [fstat(self.devices).map_err(failed)?.st_dev, null.st_dev].contains(&at.st_dev);
        if KEPT_KINDS.contains(&kind) || is_device || is(self.dev)? {
            return Err(refused(target, SANDBOX));
        }
        if is(self.root)? {
            return Err(refused(target, "it is the root file system"));
        }
        Ok(())
    }
}

/// Mounts `source`, or an empty file system, where `mount` says.
pub(super) fn mount_one(
    mount: &Mount,
    source: Option<OwnedFd>,
    covered: &Covered<'_>,
    created: &mut Created,
) -> Result<(), ExecError> {
    let target = mount.target();
    // The user's own `--volume` may go anywhere; what a build asks for may not.
    let asked_by_user = matches!(mount, Mount::Bind(_));
    if !asked_by_user {
        check_mount_target(target)?;
    }
    let tree = match (mount, source) {
        (_, Some(tree)) => tree,
        (Mount::Tmpfs(TmpfsMount { size_bytes, mode, executable, .. }), None) => {
            let size = size_bytes.map(|bytes| bytes.to_string());
            let mode = mode.map(|mode| format!("{mode:o}"));
            let options = [("size", &size), ("mode", &mode)];
            let options: Vec<(&str, &str)> =
                options.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?))).collect();
            let flags = match executable {
                true => MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
                false => SAFE,
            };
            new_mount("tmpfs", &options, flags)?
        }
        (_, None) => return Ok(()),
    };
    let failed = |errno| match errno {
        // A file where a directory is to be mounted, or the other way round.
        Errno::NOTDIR | Errno::ISDIR => refused(target, "the image has something of another kind there"),
        errno => ExecError::start(format!("mount target {target}"))(errno),
    };
    let stat = statat(&tree, "", AtFlags::EMPTY_PATH).map_err(failed)?;
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let at = if is_dir {
        make_dirs(covered.root, target, created)
    } else {
        make_file(covered.root, target, created)
    };
    let at = at.map_err(failed)?;
    if !asked_by_user {
        covered.check(target, &at)?;
    }
    let there = statat(&at, "", AtFlags::EMPTY_PATH).map_err(failed)?;
    if (FileType::from_raw_mode(there.st_mode) == FileType::Directory) != is_dir {
        return Err(failed(if is_dir { Errno::NOTDIR } else { Errno::ISDIR }));
    }
    attach(&tree, &at, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(target: &str, allowed: bool) {
        let result = check_mount_target(target);
        assert_eq!(result.is_ok(), allowed, "{target}: {result:?}");
    }

    #[test]
    fn mounts_stay_away_from_what_the_sandbox_keeps() {
        for target in
            ["", "/", "/proc", "/proc/sys", "/sys", "/sys/fs/cgroup", "/dev", "/dev/null", "/dev/pts/0", "x"]
        {
            check(target, false);
        }
        for target in
            ["/dev/shm", "/dev/shm/x", "/dev/pipes", "/process", "/system", "/devel", "/run/secrets/x"]
        {
            check(target, true);
        }
        check("/dev/shm/../null", false);
    }
}
