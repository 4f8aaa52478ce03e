//! What is mounted below the container's root.
//!
//! Every mount is made detached and moved onto a descriptor that was resolved inside the root, so
//! a link in the image can send none of them elsewhere (CVE-2021-30465, CVE-2025-31133).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, FileType, OFlags, statat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
};
use rustix::thread::UnshareFlags;

use super::channel::Task;
use super::inputs::{Covered, mount_one, open_sources};
use super::paths::{Created, make_dirs, make_file, open_inside};
use super::userns::{self, Ids};
use super::{dev, etc, limits, sys};
use crate::{ExecError, Network, Security, SystemPaths};

pub(super) const SAFE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Unreadable inside: what tells about the host or its hardware (SECURITY: docker's and BuildKit's
/// lists together).
pub(super) const MASKED: [&str; 13] = [
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
pub(super) const READ_ONLY: [&str; 4] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"];

/// Attaches the root and mounts everything below it; returns the container's devpts.
pub(super) fn mount_all(
    task: &Task,
    root: BorrowedFd<'_>,
    inputs: &[OwnedFd],
    created: &mut Created,
) -> Result<OwnedFd, ExecError> {
    let spec = &task.spec;
    sys::unshare(UnshareFlags::NEWNS).map_err(ExecError::start("mount namespace"))?;
    // Nothing that happens here may travel to the host.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(ExecError::start("private mounts"))?;
    // Sources are opened before the root, so that no mount of the container can stand in for one.
    // What is attached for that lies under the root and goes with the host's tree.
    let files = etc::own_files(task)?;
    let devices = dev::devices(task)?;
    let sources = open_sources(task, inputs)?;
    let no_devices = match spec.security {
        // CAP_MKNOD is part of the profile: what it makes, or what an image brings, must not open.
        Security::Sandbox => MountAttrFlags::MOUNT_ATTR_NODEV,
        Security::Insecure => MountAttrFlags::empty(),
    };
    sys::restrict_mount(root, no_devices).map_err(ExecError::start("attributes of the root"))?;
    attach_aside(root, task, "the root")?;

    let writable = match spec.security {
        Security::Sandbox => MountAttrFlags::MOUNT_ATTR_RDONLY,
        Security::Insecure => MountAttrFlags::empty(),
    };
    let proc = new_mount("proc", &[], SAFE)?;
    attach(&proc, &make_dirs(root, "/proc", created).map_err(ExecError::start("/proc"))?, "/proc")?;
    let sys = new_sysfs(spec.network, writable)?;
    attach(&sys, &make_dirs(root, "/sys", created).map_err(ExecError::start("/sys"))?, "/sys")?;
    let dev_target = make_dirs(root, "/dev", created).map_err(ExecError::start("/dev"))?;
    let (dev, devpts) = dev::mount_dev(&dev_target, &devices, spec)?;
    dev::mount_own(root, &spec.devices, &devices, created)?;
    for (name, file) in &files {
        let target = format!("/etc/{name}");
        let at = make_file(root, &target, created).map_err(ExecError::start(target.clone()))?;
        attach(file, &at, &target)?;
    }
    let covered = Covered { root, dev: dev.as_fd(), devices: devices.as_fd() };
    for (mount, source) in spec.mounts.iter().zip(sources) {
        mount_one(mount, source, &covered, created)?;
    }
    limits::write_settings(spec, &proc)?;
    if spec.security == Security::Sandbox && spec.system_paths == SystemPaths::Masked {
        for path in MASKED {
            mask(path, if path.starts_with("/proc") { &proc } else { &sys }, &devices)?;
        }
        for path in READ_ONLY {
            read_only(path, &proc)?;
        }
        mask_heat(&sys, &devices)?;
    }
    Ok(devpts)
}

pub(super) fn new_mount(
    kind: &str,
    options: &[(&str, &str)],
    flags: MountAttrFlags,
) -> Result<OwnedFd, ExecError> {
    let failed = |errno| ExecError::start(format!("mount {kind}"))(errno);
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    for (name, value) in options {
        fsconfig_set_string(context.as_fd(), *name, *value).map_err(failed)?;
    }
    fsconfig_create(context.as_fd()).map_err(failed)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(failed)
}

/// A `sysfs`; in a user namespace that has no network namespace of its own, the kernel makes none, and
/// the host's is shown, with what is mounted in it.
fn new_sysfs(network: Network, writable: MountAttrFlags) -> Result<OwnedFd, ExecError> {
    if network != Network::Host || userns::ids() == Ids::Host {
        return new_mount("sysfs", &[], SAFE | writable);
    }
    let sys = clone_tree(CWD, "/sys", true).map_err(ExecError::start("the host's /sys"))?;
    sys::restrict_mount(sys.as_fd(), SAFE | writable).map_err(ExecError::start("the host's /sys"))?;
    Ok(sys)
}

pub(super) fn attach(mount: impl AsFd, target: impl AsFd, name: &str) -> Result<(), ExecError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags).map_err(ExecError::start(format!("mount on {name}")))
}

/// Attaches a directory's mount where nobody of the container will look: cloning a part of a mount
/// needs it to be part of the namespace (any kernel before 6.15). One lies on top of the other.
pub(super) fn attach_aside(mount: impl AsFd, task: &Task, what: &str) -> Result<(), ExecError> {
    move_mount(mount, "", CWD, task.attach_at.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(ExecError::start(format!("attach {what}")))
}

/// A copy of one file or directory as a mount of its own.
pub(super) fn clone_tree(at: impl AsFd, path: &str, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(at, path, flags)
}

/// A detached mount of an open file or directory of the host with all that is mounted below it:
/// what [`Mount::Tree`](kiln_oci::Mount::Tree) takes. The kernel attaches it only while `file` has a
/// name somewhere.
///
/// # Errors
/// [`ExecError::Start`] when the kernel refuses; `file` must not itself be part of a detached mount.
pub fn detach(file: BorrowedFd<'_>) -> Result<OwnedFd, ExecError> {
    clone_tree(file, "", true).map_err(ExecError::start("detached mount"))
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

fn mask(path: &str, mount: &OwnedFd, devices: &OwnedFd) -> Result<(), ExecError> {
    let Some(target) = open_on(mount, path)? else { return Ok(()) };
    let stat = statat(&target, "", AtFlags::EMPTY_PATH).map_err(ExecError::start(path))?;
    let cover = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let empty = clone_tree(devices, dev::EMPTY, false).map_err(ExecError::start(path))?;
            sys::restrict_mount(empty.as_fd(), SAFE | MountAttrFlags::MOUNT_ATTR_RDONLY)
                .map_err(ExecError::start(path))?;
            empty
        }
        _ => clone_tree(devices, "null", false).map_err(ExecError::start(path))?,
    };
    attach(&cover, &target, path)
}

/// Hides how often each processor got too hot, which tells what the neighbours do. A mount for each
/// processor, on the machines whose kernel shows it.
fn mask_heat(sys: &OwnedFd, devices: &OwnedFd) -> Result<(), ExecError> {
    const PROCESSORS: &str = "/sys/devices/system/cpu";
    if open_on(sys, &format!("{PROCESSORS}/cpu0/thermal_throttle"))?.is_none() {
        return Ok(());
    }
    let failed = |errno: Errno| ExecError::start(PROCESSORS)(errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let list = open_inside(sys.as_fd(), PROCESSORS.trim_start_matches("/sys/"), flags).map_err(failed)?;
    for entry in Dir::read_from(&list).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy();
        if name.strip_prefix("cpu").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
            mask(&format!("{PROCESSORS}/{name}/thermal_throttle"), sys, devices)?;
        }
    }
    Ok(())
}

fn read_only(path: &str, mount: &OwnedFd) -> Result<(), ExecError> {
    let Some(target) = open_on(mount, path)? else { return Ok(()) };
    let tree = clone_tree(&target, "", true).map_err(ExecError::start(path))?;
    sys::restrict_mount(tree.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(ExecError::start(path))?;
    attach(&tree, &target, path)
}
