//! Owners on record: with one id only, the kernel refuses a process every `chown`. A filter stops those
//! calls, and the caller's side answers them: it notes the owner where `kiln_layer` finds it, in an
//! attribute of the file, and says that it is done. What looks at the owner still sees the only one there
//! is.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, chmod, getxattr, openat, openat2,
    readlink, setxattr, statat,
};
use rustix::io::Errno;

use super::seccomp::{Program, stop_calls};
use super::sys::{self, Notification};
use crate::ExecError;

/// Agreed with `kiln_layer`, which this crate does not know.
const RECORD: &str = "user.kiln.stat";
const MAX_PATH: usize = 4096;
/// `chown(2)` leaves this id as it is.
const SAME: u32 = u32::MAX;

/// The calls that are stopped, in this processor's own set of them.
fn calls() -> Vec<u32> {
    #[cfg(target_arch = "x86_64")]
    let old = [libc::SYS_chown, libc::SYS_lchown];
    #[cfg(not(target_arch = "x86_64"))]
    let old: [libc::c_long; 0] = [];
    let all = old.into_iter().chain([libc::SYS_fchown, libc::SYS_fchownat]);
    all.filter_map(|number| u32::try_from(number).ok()).collect()
}

/// Has this process's and its children's calls stopped, from now on; who holds the descriptor answers.
pub(super) fn listen() -> Result<OwnedFd, ExecError> {
    let program: Program = stop_calls(&calls()).ok_or_else(|| ExecError::start("owners")(Errno::NOSYS))?;
    sys::load_listener(&program).map_err(ExecError::start("owners"))
}

/// Answers on `listener`, in a thread that ends with the last process that it listens to. `process` is who
/// these run as.
pub(super) fn answer(listener: OwnedFd, process: (u32, u32)) {
    // Without it the calls are answered by ENOSYS as soon as the descriptor is gone.
    let _ = thread::Builder::new().name("owners".to_owned()).spawn(move || {
        while let Some(call) = next(&listener) {
            let error = record(&listener, &call, process).err().map_or(0, Errno::raw_os_error);
            let _ = sys::answer_notification(listener.as_fd(), call.id, error);
        }
    });
}

fn next(listener: &OwnedFd) -> Option<Notification> {
    loop {
        let mut events = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut events, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return None,
            Ok(_) if !events[0].revents().contains(PollFlags::IN) => return None,
            Ok(_) => {}
        }
        match sys::receive_notification(listener.as_fd()) {
            Ok(call) => return Some(call),
            // Whoever called was killed meanwhile.
            Err(Errno::NOENT | Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// What a call asks for.
struct Wanted {
    file: OwnedFd,
    uid: u32,
    gid: u32,
}

fn record(listener: &OwnedFd, call: &Notification, process: (u32, u32)) -> Result<(), Errno> {
    let wanted = look(call)?;
    // The process may have died, and another one have got its number: then that one's file was opened.
    sys::check_notification(listener.as_fd(), call.id)?;
    let allowed = |wanted: u32, own: u32| wanted == SAME || wanted == own;
    if process.0 != 0 && !(allowed(wanted.uid, process.0) && allowed(wanted.gid, process.1)) {
        return Err(Errno::PERM);
    }
    let stat = statat(&wanted.file, "", AtFlags::EMPTY_PATH)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        // Nothing else can have such an attribute.
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", wanted.file.as_raw_fd());
    let mut value = [0; 64];
    let length = getxattr(path.as_str(), RECORD, &mut value[..]).unwrap_or(0);
    let known = String::from_utf8_lossy(&value[..length]).into_owned();
    let record = after(&known, process, &wanted);
    if known.is_empty() && record == format!("{}:{}", process.0, process.1) {
        // As it is, and as the process saw it: that says nothing about who it belongs to in truth.
        return Ok(());
    }
    match setxattr(path.as_str(), RECORD, record.as_bytes(), XattrFlags::empty()) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other?,
    }
    // As the kernel does it.
    if kind == FileType::RegularFile && stat.st_mode & 0o6000 != 0 {
        let _ = chmod(path.as_str(), Mode::from_raw_mode(stat.st_mode & 0o1777));
    }
    Ok(())
}

/// The record that follows `known`; what else it says than the owner stays.
fn after(known: &str, process: (u32, u32), wanted: &Wanted) -> String {
    let mut fields = known.splitn(3, ':');
    let mut old = |own: u32| fields.next().and_then(|id| id.parse().ok()).unwrap_or(own);
    let (uid, gid) = (old(process.0), old(process.1));
    let choose = |wanted: u32, old: u32| if wanted == SAME { old } else { wanted };
    let rest = fields.next().map(|rest| format!(":{rest}")).unwrap_or_default();
    format!("{}:{}{rest}", choose(wanted.uid, uid), choose(wanted.gid, gid))
}

/// Opens what a call is about, without leaving the process's root.
fn look(call: &Notification) -> Result<Wanted, Errno> {
    let id = |nth: usize| u32::try_from(call.arguments[nth] & 0xffff_ffff).unwrap_or(SAME);
    // A descriptor is an int: the upper half says nothing.
    let fd = |nth: usize| i32::from_ne_bytes(id(nth).to_ne_bytes());
    let number = libc::c_long::from(call.number);
    if number == libc::SYS_fchown {
        return Ok(Wanted { file: opened(call.process, fd(0))?, uid: id(1), gid: id(2) });
    }
    if number == libc::SYS_fchownat {
        let path = text(call.process, call.arguments[1])?;
        let flags = fd(4);
        let (empty, follow) = (flags & libc::AT_EMPTY_PATH != 0, flags & libc::AT_SYMLINK_NOFOLLOW == 0);
        let file = match path.is_empty() && empty && fd(0) != libc::AT_FDCWD {
            true => opened(call.process, fd(0))?,
            false => named(call.process, fd(0), path, follow)?,
        };
        return Ok(Wanted { file, uid: id(2), gid: id(3) });
    }
    #[cfg(target_arch = "x86_64")]
    let follow = number == libc::SYS_chown;
    #[cfg(not(target_arch = "x86_64"))]
    let follow = true;
    let path = text(call.process, call.arguments[0])?;
    Ok(Wanted { file: named(call.process, libc::AT_FDCWD, path, follow)?, uid: id(1), gid: id(2) })
}

const OPEN: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

fn opened(process: u32, fd: i32) -> Result<OwnedFd, Errno> {
    openat(CWD, format!("/proc/{process}/fd/{fd}"), OPEN, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => Errno::BADF,
        errno => errno,
    })
}

fn named(process: u32, dir: i32, path: Vec<u8>, follow: bool) -> Result<OwnedFd, Errno> {
    if path.is_empty() {
        return Err(Errno::NOENT);
    }
    let root = openat(CWD, format!("/proc/{process}/root"), OPEN | OFlags::DIRECTORY, Mode::empty())?;
    let absolute = if path.starts_with(b"/") {
        path
    } else {
        let link = match dir {
            libc::AT_FDCWD => format!("/proc/{process}/cwd"),
            fd => format!("/proc/{process}/fd/{fd}"),
        };
        // As the process names it itself: the link is told from its own root on.
        let base = readlink(link, Vec::new())?.into_bytes();
        [&base, &b"/"[..], &path].concat()
    };
    let flags = if follow { OPEN } else { OPEN | OFlags::NOFOLLOW };
    openat2(root, absolute, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// A path out of a process's memory.
fn text(process: u32, address: u64) -> Result<Vec<u8>, Errno> {
    let memory = File::open(format!("/proc/{process}/mem")).map_err(|_| Errno::FAULT)?;
    let mut bytes = Vec::new();
    // Piece by piece up to the end of a page: the next one may not be there.
    while bytes.len() < MAX_PATH {
        let at = address + bytes.len() as u64;
        let mut piece = vec![0; 256 - usize::try_from(at % 256).unwrap_or(0)];
        let length = memory.read_at(&mut piece, at).map_err(|_| Errno::FAULT)?;
        match piece[..length].iter().position(|&byte| byte == 0) {
            Some(end) => {
                bytes.extend_from_slice(&piece[..end]);
                return Ok(bytes);
            }
            None if length == 0 => return Err(Errno::FAULT),
            None => bytes.extend_from_slice(&piece[..length]),
        }
    }
    Err(Errno::NAMETOOLONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_what_a_call_does_not_change() {
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        let check = |known: &str, uid, gid, expected: &str| {
            assert_eq!(after(known, (0, 0), &Wanted { file: file(), uid, gid }), expected, "{known}");
        };
        check("", 1000, 1000, "1000:1000");
        check("", SAME, 5, "0:5");
        check("7:8", SAME, 5, "7:5");
        check("7:8:c:5:1", 1, SAME, "1:8:c:5:1");
        assert_eq!(after("", (9, 9), &Wanted { file: file(), uid: SAME, gid: 3 }), "9:3");
    }

    #[test]
    fn paths_are_read_out_of_memory() {
        let path = format!("/{}\0", "x".repeat(700));
        let found = text(std::process::id(), path.as_ptr() as u64).unwrap();
        assert_eq!(found, path.trim_end_matches('\0').as_bytes());
        assert_eq!(text(std::process::id(), 8), Err(Errno::FAULT));
    }
}
