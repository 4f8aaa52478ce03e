//! Mounts by fuse-overlayfs, where the kernel's overlayfs does not work.
//!
//! The mount is made here, detached as all others; the program gets the open `/dev/fuse` as its standard
//! input, which libfuse takes for an accomplished mount when it is named as the mount point. It ends
//! when the mount is gone.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use kiln_layer::{Entry, EntryKind, ScanOptions, beneath};
use rustix::event::{PollFd, PollFlags, Timespec as Patience, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags, fremovexattr, fsetxattr,
    futimens, mknodat, openat, statat, unlinkat,
};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::Error;
use crate::error::host;
use crate::mount::{MAX_LOWER, Stack};

/// How long the program may take to end once its mount is gone.
const PATIENCE: Patience = Patience { tv_sec: 10, tv_nsec: 0 };
/// Of what the program says before it gives up.
const MAX_WORDS: u64 = 4096;
/// The program's own attributes.
const OWN: &[u8] = b"user.fuseoverlayfs.";

/// The program and those of its processes that have not been waited for.
#[derive(Debug)]
pub(crate) struct Fuse {
    program: PathBuf,
    running: Mutex<Vec<Serving>>,
}

#[derive(Debug)]
struct Serving {
    process: Child,
    /// What it writes to.
    upper: Option<PathBuf>,
}

impl Fuse {
    pub(crate) fn new(program: &Path) -> Self {
        Self { program: program.to_owned(), running: Mutex::default() }
    }

    /// Mounts `stack`, whose relative paths are below `base`, without attaching it anywhere.
    pub(crate) fn mount(&self, base: &Path, stack: &Stack<'_>) -> Result<OwnedFd, Error> {
        if stack.lower.len() > MAX_LOWER {
            return Err(Error::TooDeep { limit: MAX_LOWER });
        }
        let options = options(base, stack)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = openat(CWD, "/dev/fuse", flags, Mode::empty()).map_err(host("open", "/dev/fuse"))?;
        let tree = attach(&device, stack.upper.is_some())?;
        let mut command = Command::new(&self.program);
        command.args(["-f", "-o"]).arg(OsStr::from_bytes(&options)).arg("/dev/fd/0");
        command.stdin(device).stdout(Stdio::null()).stderr(Stdio::piped());
        let spawned = command.spawn();
        // With it goes our hold on the device: from now on a dead program is an answer.
        drop(command);
        let mut process = spawned.map_err(host("start", &self.program))?;
        // Waits for the first answer, or fails when the program has given up.
        if let Err(errno) = statat(&tree, ".", AtFlags::empty()) {
            drop(tree);
            let mut words = String::new();
            if let Some(stderr) = process.stderr.take() {
                // It has ended or ends now: its mount is gone.
                let _ = stderr.take(MAX_WORDS).read_to_string(&mut words);
            }
            let _ = process.wait();
            return Err(Error::Fuse { reason: format!("{} ({errno})", words.trim()) });
        }
        let upper = stack.upper.as_ref().map(|(upper, _)| upper.clone());
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // Of those that wrote, it is known until their snapshot is complete.
        running.retain_mut(|serving| {
            serving.upper.is_some() || !matches!(serving.process.try_wait(), Ok(Some(_)))
        });
        running.push(Serving { process, upper });
        Ok(tree)
    }

    /// Waits until all that was written through mounts over `upper` is there: they are gone, and so are
    /// soon the processes behind them. Whether there were any.
    pub(crate) fn settle(&self, upper: &Path) -> Result<bool, Error> {
        let writes = |serving: &mut Serving| serving.upper.as_deref() == Some(upper);
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let ending: Vec<Serving> = running.extract_if(.., writes).collect();
        drop(running);
        let were_any = !ending.is_empty();
        for mut serving in ending {
            if matches!(serving.process.try_wait(), Ok(Some(_))) {
                continue;
            }
            let pid = Pid::from_child(&serving.process);
            let process = pidfd_open(pid, PidfdFlags::empty()).map_err(host("pidfd_open", upper))?;
            let mut events = [PollFd::new(&process, PollFlags::IN)];
            if poll(&mut events, Some(&PATIENCE)).map_err(host("poll", upper))? == 0 {
                let reason = "a mount is still there, although its snapshot is complete".to_owned();
                return Err(Error::Fuse { reason });
            }
            serving.process.wait().map_err(host("wait", upper))?;
        }
        Ok(were_any)
    }
}

fn options(base: &Path, stack: &Stack<'_>) -> Result<Vec<u8>, Error> {
    // A path through /proc/self leads elsewhere in another process.
    let absolute = |path: &PathBuf| match base.join(path).canonicalize() {
        Ok(path) => Ok(path.into_os_string().into_vec()),
        Err(error) => Err(host("realpath", path)(error)),
    };
    let lower: Vec<Vec<u8>> = stack.lower.iter().map(absolute).collect::<Result<_, _>>()?;
    let odd = |path: &[u8]| path.iter().any(|byte| b",:\\".contains(byte));
    if lower.iter().any(|path| odd(path)) {
        let reason = "the path of the store must not have a comma, a colon or a backslash".to_owned();
        return Err(Error::Fuse { reason });
    }
    let mut options = [b"lowerdir=", lower.join(&b':').as_slice()].concat();
    if let Some((upper, work)) = &stack.upper {
        options.extend(
            [b",upperdir=", absolute(upper)?.as_slice(), b",workdir=", absolute(work)?.as_slice()].concat(),
        );
    }
    Ok(options)
}

/// A mount of the FUSE file system that answers on `device`.
fn attach(device: &OwnedFd, writable: bool) -> Result<OwnedFd, Error> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(host("fsopen", "fuse"))?;
    let fd = device.as_raw_fd().to_string();
    let id =
        (rustix::process::geteuid().as_raw().to_string(), rustix::process::getegid().as_raw().to_string());
    let strings = [
        ("source", "fuse-overlayfs"),
        ("fd", fd.as_str()),
        ("rootmode", "40000"),
        ("user_id", id.0.as_str()),
        ("group_id", id.1.as_str()),
    ];
    for (key, value) in strings {
        fsconfig_set_string(context.as_fd(), key, value).map_err(host("fsconfig", key))?;
    }
    for key in ["allow_other", "default_permissions"] {
        fsconfig_set_flag(context.as_fd(), key).map_err(host("fsconfig", key))?;
    }
    fsconfig_create(context.as_fd()).map_err(host("fuse mount", "/dev/fuse"))?;
    let attributes = if writable { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_RDONLY };
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(host("fsmount", "/dev/fuse"))
}

/// Turns what fuse-overlayfs writes into an upperdir into what overlayfs would have written: it marks
/// opaque directories by a file, whiteouts too where it may not make devices, and has attributes of
/// its own.
pub(crate) fn normalise(upper: BorrowedFd<'_>) -> Result<(), Error> {
    let never = AtomicBool::new(false);
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: &never };
    let entries = kiln_layer::scan(upper, b"", &options)
        .map_err(|error| Error::Tree { path: "upperdir".into(), source: error.into() })?;
    let mut touched: Vec<&Entry> = Vec::new();
    let mut dirs: Vec<&Entry> = Vec::new();
    for entry in &entries {
        let shown = PathBuf::from(OsString::from_vec(entry.path.clone()));
        let name = entry.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        dirs.retain(|dir| is_in(&entry.path, &dir.path));
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            let (parent, _) = beneath::open_parent(upper, &entry.path).map_err(beneath_error)?;
            unlinkat(&parent, name, AtFlags::empty()).map_err(host("unlink", &shown))?;
            // Where it may not make devices, it writes the second name as well.
            if hidden == b".wh..opq" || hidden == b".opq" {
                fsetxattr(&parent, kiln_layer::opaque_attribute(), b"y", XattrFlags::empty())
                    .map_err(host("fsetxattr", &shown))?;
            } else {
                mknodat(&parent, hidden, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(host("mknod", &shown))?;
            }
            touched.extend(dirs.last());
        } else if entry.xattrs.keys().any(|name| name.starts_with(OWN)) {
            let opaque =
                entry.xattrs.get(&b"user.fuseoverlayfs.opaque"[..]).is_some_and(|value| value == b"y");
            // Only files and directories have attributes of the user's.
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let node = beneath::open_file(upper, &entry.path, flags).map_err(beneath_error)?;
            for name in entry.xattrs.keys().filter(|name| name.starts_with(OWN)) {
                fremovexattr(&node, name.as_slice()).map_err(host("fremovexattr", &shown))?;
            }
            if opaque {
                fsetxattr(&node, kiln_layer::opaque_attribute(), b"y", XattrFlags::empty())
                    .map_err(host("fsetxattr", &shown))?;
            }
        }
        if entry.kind == EntryKind::Dir {
            dirs.push(entry);
        }
    }
    for dir in touched {
        let node = beneath::open_file(upper, &dir.path, OFlags::RDONLY | OFlags::DIRECTORY);
        let time = Timespec { tv_sec: dir.mtime.secs, tv_nsec: dir.mtime.nanos.into() };
        futimens(node.map_err(beneath_error)?, &Timestamps { last_access: time, last_modification: time })
            .map_err(host("futimens", "upperdir"))?;
    }
    Ok(())
}

fn is_in(path: &[u8], dir: &[u8]) -> bool {
    dir.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
}

fn beneath_error(error: beneath::BeneathError) -> Error {
    let source = kiln_layer::ScanError::from(error);
    Error::Tree { path: "upperdir".into(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    use super::*;

    #[test]
    fn what_fuse_overlayfs_writes_becomes_what_overlayfs_writes() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED ALOUD: whiteouts need root");
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        for dir in ["by-file", "by-file/sub", "by-name"] {
            fs::create_dir(at(dir)).unwrap();
        }
        fs::write(at("by-file/.wh..wh..opq"), "").unwrap();
        fs::write(at("by-file/.wh..opq"), "").unwrap();
        fs::write(at("by-file/sub/.wh.gone"), "").unwrap();
        for (name, value) in [("opaque", &b"y"[..]), ("origin", b"/lower/by-name")] {
            let name = format!("user.fuseoverlayfs.{name}");
            rustix::fs::lsetxattr(at("by-name"), name, value, XattrFlags::empty()).unwrap();
        }
        let before = fs::metadata(at("by-file/sub")).unwrap();
        normalise(fs::File::open(temp.path()).unwrap().as_fd()).unwrap();
        let whiteout = fs::symlink_metadata(at("by-file/sub/gone")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        assert_eq!(fs::metadata(at("by-file/sub")).unwrap().mtime_nsec(), before.mtime_nsec());
        for dir in ["by-file", "by-name"] {
            let mut value = [0; 4];
            let length =
                rustix::fs::getxattr(at(dir), kiln_layer::opaque_attribute(), &mut value[..]).unwrap();
            assert_eq!(&value[..length], b"y", "{dir}");
        }
        let mut names = [0; 256];
        let length = rustix::fs::llistxattr(at("by-name"), &mut names[..]).unwrap();
        assert!(!String::from_utf8_lossy(&names[..length]).contains("fuseoverlayfs"));
        assert_eq!(fs::read_dir(at("by-file")).unwrap().count(), 1);
    }
}
