//! Detached overlay mounts: fsopen, fsconfig, fsmount, and no `move_mount`.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use crate::error::host;
use crate::{Error, sys};

/// `OVL_MAX_STACK`: the most lowerdirs that the kernel takes.
pub const MAX_LOWER: usize = 500;

/// Where this process's open descriptors have names.
const DESCRIPTORS: &str = "/proc/self/fd";

/// fsconfig(2) takes strings up to 256 bytes with their NUL.
const MAX_STRING_BYTES: usize = 255;

/// The directories of one overlay mount; relative paths start at the store's `root`.
pub(crate) struct Stack<'a> {
    pub(crate) root: BorrowedFd<'a>,
    /// Top first, at least one, two if there is no upperdir.
    pub(crate) lower: &'a [PathBuf],
    /// upperdir and workdir; `None` mounts read-only.
    pub(crate) upper: Option<(PathBuf, PathBuf)>,
    /// fsync(2) in the mount means what it says.
    pub(crate) durable: bool,
}

/// How lowerdirs are told to the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LowerStyle {
    /// One `lowerdir+` after the other (Linux 6.8).
    Each,
    /// One `lowerdir` with colons, of numbers in the directory of this process's descriptors: with whole
    /// paths, a string has room for 15 of them.
    Joined,
}

/// Mounts `stack` without attaching it anywhere.
pub(crate) fn overlay(stack: &Stack<'_>) -> Result<OwnedFd, Error> {
    if stack.lower.len() > MAX_LOWER {
        return Err(Error::TooDeep { limit: MAX_LOWER });
    }
    let each = if is_legacy() { None } else { mount(stack, LowerStyle::Each)? };
    match each {
        Some(tree) => Ok(tree),
        None => mount_joined(stack)?.ok_or_else(|| too_old(stack)),
    }
}

/// Whether overlayfs learns its options only when it is mounted (before Linux 6.5): such a kernel takes
/// any name, and then refuses without telling which. Two system calls in the life of this process.
fn is_legacy() -> bool {
    static LEGACY: OnceLock<bool> = OnceLock::new();
    *LEGACY.get_or_init(|| {
        fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
            .is_ok_and(|context| fsconfig_set_flag(context.as_fd(), "no-such-option").is_ok())
    })
}

/// In a thread of its own, whose working directory is its own: the numbers are looked up from there.
fn mount_joined(stack: &Stack<'_>) -> Result<Option<OwnedFd>, Error> {
    let there = || {
        sys::leave_shared_directory().map_err(host("unshare", "the working directory"))?;
        rustix::process::chdir(DESCRIPTORS).map_err(host("chdir", DESCRIPTORS))?;
        mount(stack, LowerStyle::Joined)
    };
    thread::scope(|scope| scope.spawn(there).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Returns `None` if the kernel does not know this style or cannot take so many layers in it.
fn mount(stack: &Stack<'_>, style: LowerStyle) -> Result<Option<OwnedFd>, Error> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(host("fsopen", "overlay"))?;
    let option = |key: &'static str, value: &str| {
        fsconfig_set_string(context.as_fd(), key, value).map_err(host("fsconfig", key))
    };
    option("source", "kiln")?;
    // Before 6.5 the kernel looks the directories up at the end only: they stay open until then.
    let mut open_until_mounted = Vec::new();
    match style {
        LowerStyle::Each => {
            for (nth, path) in stack.lower.iter().enumerate() {
                let dir = open_dir(stack.root, path)?;
                match fsconfig_set_string(context.as_fd(), "lowerdir+", magic_path(&dir)) {
                    Ok(()) => {}
                    Err(Errno::INVAL) if nth == 0 => return Ok(None),
                    Err(errno) => return Err(host("fsconfig lowerdir+", path)(errno)),
                }
            }
        }
        LowerStyle::Joined => {
            for path in stack.lower {
                open_until_mounted.push(open_dir(stack.root, path)?);
            }
            let numbers = open_until_mounted.iter().map(|dir| dir.as_raw_fd().to_string());
            let joined = numbers.collect::<Vec<_>>().join(":");
            if joined.len() > MAX_STRING_BYTES {
                return Ok(None);
            }
            option("lowerdir", &joined)?;
        }
    }
    let mut attributes = MountAttrFlags::empty();
    match &stack.upper {
        Some((upper, work)) => {
            for (key, path) in [("upperdir", upper), ("workdir", work)] {
                let dir = open_dir(stack.root, path)?;
                option(key, &magic_path(&dir))?;
                open_until_mounted.push(dir);
            }
            if !stack.durable {
                fsconfig_set_flag(context.as_fd(), "volatile").map_err(host("fsconfig", "volatile"))?;
            }
        }
        None => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    // Whatever the kernel was built with: an upperdir must hold whole files, under their own names,
    // that mean the same as a lowerdir of any other stack.
    if kiln_layer::uses_user_attributes() {
        // With it, the first two are off and may not even be said to be.
        fsconfig_set_flag(context.as_fd(), "userxattr").map_err(host("fsconfig", "userxattr"))?;
        option("index", "off")?;
    } else {
        for key in ["redirect_dir", "metacopy", "index"] {
            option(key, "off")?;
        }
    }
    // Only spares inode numbers; kernels and file systems that cannot do it may say no.
    let _ = option("xino", "off");
    let top = || stack.upper.as_ref().map_or(&stack.lower[0], |(upper, _)| upper);
    fsconfig_create(context.as_fd()).map_err(host("overlay mount", top()))?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(host("fsmount", top()))
        .map(Some)
}

/// Opens a directory of the store, or an absolute one, to be named and nothing else.
pub(crate) fn open_dir(root: impl AsFd, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(root, path, flags, Mode::empty()).map_err(host("openat", path))
}

/// A name for an open directory that is short, free of colons and cannot be swapped meanwhile.
fn magic_path(dir: &OwnedFd) -> String {
    format!("{DESCRIPTORS}/{}", dir.as_raw_fd())
}

fn too_old(stack: &Stack<'_>) -> Error {
    Error::KernelTooOld { layers: stack.lower.len(), needed: "6.8" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn layers_mount_in_the_style_of_old_kernels_too() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting overlayfs needs root");
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::create_dir(temp.path().join(name)).unwrap();
            fs::write(temp.path().join(name).join(name), name).unwrap();
        }
        let root = fs::File::open(temp.path()).unwrap();
        let mut lower = vec![PathBuf::from("a"), PathBuf::from("b")];
        let stack = Stack { root: root.as_fd(), lower: &lower, upper: None, durable: false };
        let here = std::env::current_dir().unwrap();
        let tree = mount_joined(&stack).unwrap().unwrap();
        assert_eq!(std::env::current_dir().unwrap(), here);
        assert_eq!(fs::read_to_string(format!("{}/b", magic_path(&tree))).unwrap(), "b");

        // More than whole paths would have room for. (No directory may be there twice.)
        lower = (0..40).map(|number| PathBuf::from(format!("layer{number}"))).collect();
        lower.iter().for_each(|layer| fs::create_dir(temp.path().join(layer)).unwrap());
        let stack = Stack { root: root.as_fd(), lower: &lower, upper: None, durable: false };
        assert!(mount_joined(&stack).unwrap().is_some());

        lower = vec![PathBuf::from("a"); 130];
        let stack = Stack { root: root.as_fd(), lower: &lower, upper: None, durable: false };
        assert!(mount_joined(&stack).unwrap().is_none());
        assert!(matches!(too_old(&stack), Error::KernelTooOld { layers: 130, .. }));
    }
}
