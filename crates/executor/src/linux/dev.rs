//! `/dev`: a few harmless devices, a devpts and a shared memory of its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, makedev, mkdirat, mknodat, openat,
    symlinkat,
};
use rustix::mount::{MountAttrFlags, MoveMountFlags, move_mount};

use super::channel::Task;
use super::mounts::{SAFE, attach, attach_aside, clone_tree, new_mount};
use super::paths::{Created, make_file};
use super::userns::{self, Ids};
use crate::{Device, ExecError, ProcessSpec, Security};

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
    mkdirat(&tmpfs, EMPTY, Mode::from_raw_mode(0o555)).map_err(ExecError::start("empty directory"))?;
    if userns::ids() != Ids::Host {
        attach_aside(&tmpfs, task, "devices")?;
        show_hosts(task, &tmpfs)?;
        return Ok(tmpfs);
    }
    for (name, major, minor) in DEVICES {
        let failed = |errno| ExecError::start(format!("/dev/{name}"))(errno);
        let device = makedev(major, minor);
        mknodat(&tmpfs, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
            .map_err(failed)?;
        // The umask took bits away.
        chmodat(&tmpfs, name, Mode::from_raw_mode(0o666), AtFlags::empty()).map_err(failed)?;
    }
    for (position, device) in task.spec.devices.iter().enumerate() {
        let failed = |errno| ExecError::start(format!("device {}", device.path))(errno);
        let kind = if device.block { FileType::BlockDevice } else { FileType::CharacterDevice };
        let (name, mode) = (own_name(position), Mode::from_raw_mode(device.mode & 0o7777));
        let (uid, gid) = (Uid::from_raw(device.owner.0), Gid::from_raw(device.owner.1));
        mknodat(&tmpfs, &name, kind, mode, makedev(device.number.0, device.number.1)).map_err(failed)?;
        chownat(&tmpfs, &name, Some(uid), Some(gid), AtFlags::empty()).map_err(failed)?;
        chmodat(&tmpfs, &name, mode, AtFlags::empty()).map_err(failed)?;
    }
    attach_aside(&tmpfs, task, "devices")?;
    Ok(tmpfs)
}

/// Mounts the host's own devices in a user namespace, where the kernel makes none. Whether one may be
/// opened is for its mode on the host to say.
fn show_hosts(task: &Task, tmpfs: &OwnedFd) -> Result<(), ExecError> {
    let show = |name: &str, from: &str| {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let at = openat(tmpfs, name, flags, Mode::RUSR)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(clone_tree(CWD, from, false)?, "", &at, "", flags)
    };
    for (name, ..) in DEVICES {
        let from = format!("/dev/{name}");
        show(name, &from).map_err(ExecError::start(from.clone()))?;
    }
    for (position, device) in task.spec.devices.iter().enumerate() {
        let (major, minor) = device.number;
        // udev has a link for each device by its number; without it, its usual name has to do.
        let by_number = format!("/dev/{}/{major}:{minor}", if device.block { "block" } else { "char" });
        let from = match Path::new(&by_number).exists() {
            true => by_number,
            false => find("/dev", device, 3).unwrap_or_else(|| device.path.clone()),
        };
        show(&own_name(position), &from).map_err(ExecError::start(format!("device {}", device.path)))?;
    }
    Ok(())
}

/// The host's node of a device, so many directories deep.
fn find(dir: &str, device: &Device, depth: usize) -> Option<String> {
    let wanted = makedev(device.number.0, device.number.1);
    let mut below = Vec::new();
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let (Ok(kind), Ok(path)) = (entry.file_type(), entry.path().into_os_string().into_string()) else {
            continue;
        };
        let is_kind = if device.block { kind.is_block_device() } else { kind.is_char_device() };
        if is_kind && entry.metadata().is_ok_and(|stat| stat.rdev() == wanted) {
            return Some(path);
        }
        if kind.is_dir() {
            below.push(path);
        }
    }
    let deeper = depth.checked_sub(1)?;
    below.iter().find_map(|dir| find(dir, device, deeper))
}

/// Name of an empty directory beside the devices, to cover others with.
pub(super) const EMPTY: &str = "empty";

fn own_name(position: usize) -> String {
    format!("own{position}")
}

/// Mounts the devices that were asked for, each where it was asked for.
pub(super) fn mount_own(
    root: BorrowedFd<'_>,
    own: &[Device],
    devices: &OwnedFd,
    created: &mut Created,
) -> Result<(), ExecError> {
    for (position, device) in own.iter().enumerate() {
        let failed = |errno| ExecError::start(format!("device {}", device.path))(errno);
        let at = make_file(root, &device.path, created).map_err(failed)?;
        attach(clone_tree(devices, &own_name(position), false).map_err(failed)?, &at, &device.path)?;
    }
    Ok(())
}

/// Mounts `/dev` on `target`; returns it and its devpts.
///
/// Each device is a mount of its own on a file system that opens none: the profile has CAP_MKNOD,
/// so a process could make the host's disk there otherwise.
pub(super) fn mount_dev(
    target: &OwnedFd,
    devices: &OwnedFd,
    spec: &ProcessSpec,
) -> Result<(OwnedFd, OwnedFd), ExecError> {
    let flags = match spec.security {
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
    // Group 5 is tty everywhere, where there are groups.
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let options = if userns::ids() == Ids::Single { &options[..2] } else { &options };
    let devpts = new_mount("devpts", options, NO_EXEC)?;
    attach(&devpts, below("pts")?.as_fd(), "/dev/pts")?;
    let size = spec.shm_size_bytes.to_string();
    let shm = new_mount("tmpfs", &[("mode", "1777"), ("size", &size)], SAFE)?;
    attach(&shm, below("shm")?.as_fd(), "/dev/shm")?;
    attach(new_mount("mqueue", &[], SAFE)?, below("mqueue")?.as_fd(), "/dev/mqueue")?;
    Ok((dev, devpts))
}
