//! `/dev`: a few harmless devices, a devpts and a shared memory of its own.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, chmodat, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::mount::MountAttrFlags;

use super::channel::Task;
use super::mounts::{SAFE, attach, attach_aside, clone_tree, new_mount};
use crate::{ExecError, Security};

/// Character devices by name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Names in `/dev` that lead elsewhere.
const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// All that the sandbox has in `/dev`, `shm` apart.
pub(super) const NAMES: [&str; 13] = [
    "null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdin", "stdout", "stderr", "pts",
    "mqueue",
];

const NO_EXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The devices a container gets, on a file system that it never sees.
pub(super) fn devices(task: &Task) -> Result<OwnedFd, ExecError> {
    let tmpfs = new_mount("tmpfs", &[("mode", "755"), ("size", "64k")], NO_EXEC)?;
    for (name, major, minor) in DEVICES {
        let failed = |errno| ExecError::start(format!("/dev/{name}"))(errno);
        let device = makedev(major, minor);
        mknodat(&tmpfs, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
            .map_err(failed)?;
        // The umask took bits away.
        chmodat(&tmpfs, name, Mode::from_raw_mode(0o666), AtFlags::empty()).map_err(failed)?;
    }
    attach_aside(&tmpfs, task, "devices")?;
    Ok(tmpfs)
}

/// Mounts `/dev` on `target`; returns it and its devpts.
///
/// Each device is a mount of its own on a file system that opens none: the profile has CAP_MKNOD,
/// so a process could make the host's disk there otherwise.
pub(super) fn mount_dev(
    target: &OwnedFd,
    devices: &OwnedFd,
    security: Security,
) -> Result<(OwnedFd, OwnedFd), ExecError> {
    let flags = match security {
        Security::Sandbox => NO_EXEC | MountAttrFlags::MOUNT_ATTR_NODEV,
        Security::Insecure => NO_EXEC,
    };
    let dev = new_mount("tmpfs", &[("mode", "755"), ("size", "65536k")], flags)?;
    for (name, to) in LINKS {
        symlinkat(to, &dev, name).map_err(ExecError::start(format!("/dev/{name}")))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        mkdirat(&dev, name, Mode::from_raw_mode(0o755)).map_err(ExecError::start(format!("/dev/{name}")))?;
    }
    // Older kernels mount only onto what is part of a namespace: first /dev, then what is below.
    attach(&dev, target, "/dev")?;
    for (name, ..) in DEVICES {
        let failed = |errno| ExecError::start(format!("/dev/{name}"))(errno);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let at = openat(&dev, name, flags, Mode::from_raw_mode(0o666)).map_err(failed)?;
        attach(clone_tree(devices, name, false).map_err(failed)?, &at, name)?;
    }
    let below = |name: &str| {
        openat(&dev, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(ExecError::start(format!("/dev/{name}")))
    };
    // Group 5 is tty everywhere.
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let devpts = new_mount("devpts", &options, NO_EXEC)?;
    attach(&devpts, below("pts")?.as_fd(), "/dev/pts")?;
    let shm = new_mount("tmpfs", &[("mode", "1777"), ("size", "65536k")], SAFE)?;
    attach(&shm, below("shm")?.as_fd(), "/dev/shm")?;
    attach(new_mount("mqueue", &[], SAFE)?, below("mqueue")?.as_fd(), "/dev/mqueue")?;
    Ok((dev, devpts))
}
