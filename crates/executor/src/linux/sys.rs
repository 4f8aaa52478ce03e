//! The fence: system calls that neither rustix nor nix wrap safely, one function each.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow};
use nix::unistd::ForkResult;
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::seccomp::Program;
use crate::ResourceLimit;

fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result < 0 {
        let raw = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Err(Errno::from_raw_os_error(raw))
    } else {
        Ok(result)
    }
}

/// `fork(2)` in the helper, or in `main` before its first thread: that there is one thread is what makes
/// it sound to go on with Rust code in the child.
pub(super) fn fork() -> Result<ForkResult, Errno> {
    // SAFETY: the helper and the nursery are freshly executed processes, or forked by one, that never start
    // a thread, and who calls
    // `become_root` has started none, so no lock can be held by a thread that the child lacks.
    unsafe { nix::unistd::fork() }.map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

/// `_exit(2)`: ends a forked child without running anything that its parent registered for its end.
pub(super) fn end_now(code: i32) -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// `unshare(2)`. Called in the single-threaded helper only: no other thread shares its fs struct.
pub(super) fn unshare(flags: rustix::thread::UnshareFlags) -> Result<(), Errno> {
    // SAFETY: `UnshareFlags::FILES`, the unsound one, is never passed by this crate, and there is
    // only one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Has what this process was given beside its standard streams close in every program that it starts:
/// a lock or a pipe of the caller's must not live as long as a container. One system call.
pub fn close_inherited_at_exec() {
    // A kernel without it is one that the sandbox does not start on either.
    let _ = mark_cloexec_from(3);
}

/// `close_range(2)` with `CLOEXEC`: everything from `first` on closes at exec.
pub(super) fn mark_cloexec_from(first: RawFd) -> Result<(), Errno> {
    let first = libc::c_uint::try_from(first).unwrap_or(3);
    // SAFETY: only integers cross. CLOEXEC closes nothing until exec, so no live `OwnedFd` loses
    // its file.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    check(result).map(drop)
}

/// `mount_setattr(2)`: adds `attributes` to the mount behind `fd` and to all below it, and keeps what is
/// mounted there to this copy of it: of a host's mount that is shared, as all are where systemd is, a
/// copy is a peer, and each mount in one of them appears in the other.
pub(super) fn restrict_mount(fd: BorrowedFd<'_>, attributes: MountAttrFlags) -> Result<(), Errno> {
    set_attributes(fd, attributes, libc::MS_PRIVATE, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE)
}

/// `mount_setattr(2)`: adds `attributes` to the mount behind `fd`, and not to those below it.
pub(super) fn restrict_one_mount(fd: BorrowedFd<'_>, attributes: MountAttrFlags) -> Result<(), Errno> {
    set_attributes(fd, attributes, 0, libc::AT_EMPTY_PATH)
}

fn set_attributes(
    fd: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    propagation: libc::c_ulong,
    flags: i32,
) -> Result<(), Errno> {
    let attr_set = attributes.bits().into();
    let attr = libc::mount_attr { attr_set, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the path is an empty C string, `attr` lives across the call and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// `seccomp(SECCOMP_SET_MODE_FILTER)` for this thread, the only one.
pub(super) fn load_filter(program: &Program) -> Result<(), Errno> {
    set_filter(program, 0).map(drop)
}

/// The same, with a descriptor to answer from.
pub(super) fn load_listener(program: &Program) -> Result<OwnedFd, Errno> {
    let fd = set_filter(program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_filter(program: &Program, flags: libc::c_ulong) -> Result<libc::c_long, Errno> {
    let instructions: Vec<libc::sock_filter> = program
        .0
        .iter()
        .map(|one| libc::sock_filter { code: one.0, jt: one.1, jf: one.2, k: one.3 })
        .collect();
    let program = libc::sock_fprog {
        len: libc::c_ushort::try_from(instructions.len()).map_err(|_| Errno::TOOBIG)?,
        filter: instructions.as_ptr().cast_mut(),
    };
    // Without this flag, kernels before 5.16 switch speculative stores off for filtered processes,
    // which slows them down by a tenth or more; the kernel's own default is to leave them on today.
    let flags = flags | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `program` and the instructions that it points to live across the call, which copies
    // them and writes to neither.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    check(result)
}

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawNotification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct RawAnswer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// A call that was stopped.
pub(super) struct Notification {
    pub(super) id: u64,
    pub(super) process: u32,
    pub(super) number: i32,
    pub(super) arguments: [u64; 6],
}

// linux/seccomp.h, for machines whose ioctl numbers are asm-generic/ioctl.h's: all that kiln has a
// filter for.
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_ID_VALID: libc::c_ulong = 0x4008_2102;

/// `ioctl(SECCOMP_IOCTL_NOTIF_RECV)`.
pub(super) fn receive_notification(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    let mut raw = MaybeUninit::<RawNotification>::zeroed();
    // SAFETY: the structure has the size that is part of the number, and is zero, as the kernel wants
    // it; it writes no more than that.
    check(unsafe { libc::syscall(libc::SYS_ioctl, listener.as_raw_fd(), NOTIF_RECV, raw.as_mut_ptr()) })?;
    // SAFETY: all zeroes is a value of it, and so is whatever the kernel wrote: there are integers only.
    let raw = unsafe { raw.assume_init() };
    Ok(Notification { id: raw.id, process: raw.pid, number: raw.number, arguments: raw.arguments })
}

/// `ioctl(SECCOMP_IOCTL_NOTIF_ID_VALID)`: whether who called still waits.
pub(super) fn check_notification(listener: BorrowedFd<'_>, id: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads eight bytes, which live across the call.
    let result =
        unsafe { libc::syscall(libc::SYS_ioctl, listener.as_raw_fd(), NOTIF_ID_VALID, &raw const id) };
    check(result).map(drop)
}

/// `ioctl(SECCOMP_IOCTL_NOTIF_SEND)`: the call returns 0, or this error.
pub(super) fn answer_notification(listener: BorrowedFd<'_>, id: u64, error: i32) -> Result<(), Errno> {
    let mut answer = RawAnswer { id, value: 0, error: -error, flags: 0 };
    // SAFETY: the structure has the size that is part of the number and lives across the call.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, listener.as_raw_fd(), NOTIF_SEND, &raw mut answer) };
    check(result).map(drop)
}

/// `setrlimit(2)`.
pub(super) fn set_limit(limit: ResourceLimit) -> Result<(), Errno> {
    let value = |value: Option<u64>| value.unwrap_or(libc::RLIM_INFINITY);
    let both = libc::rlimit64 { rlim_cur: value(limit.soft), rlim_max: value(limit.hard) };
    // SAFETY: `both` lives across the call, which only reads it; the old limit is not asked for.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            limit.resource,
            &raw const both,
            std::ptr::null_mut::<libc::rlimit64>(),
        )
    };
    check(result).map(drop)
}

/// `getrusage(RUSAGE_CHILDREN)`: processor time, and the largest child's memory in bytes.
pub(super) fn children_usage() -> (Duration, u64) {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is large enough and ours; all zeroes is a value of it, so it is
    // initialized even if the call failed.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    let time = |time: libc::timeval| {
        let micros = u64::try_from(time.tv_usec).unwrap_or(0);
        Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0)) + Duration::from_micros(micros)
    };
    let kilobytes = u64::try_from(usage.ru_maxrss).unwrap_or(0);
    (time(usage.ru_utime) + time(usage.ru_stime), kilobytes << 10)
}

/// `pidfd_send_signal(2)` with any signal, real-time ones too.
///
/// # Errors
/// `ESRCH` when the process has ended, `EINVAL` for what is no signal.
pub fn signal_by_fd(process: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: only integers and a null pointer cross, which stands for what kill(2) would send.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, none, 0) };
    check(result).map(drop)
}

/// `kill(2)` with any signal; a process that is gone needs none.
pub(super) fn send_signal(process: i32, signal: i32) {
    // SAFETY: only integers cross.
    unsafe { libc::kill(process, signal) };
}

/// `kill(2)` for all processes of the group that `leader`, a child nobody has waited for, leads.
///
/// # Errors
/// `ESRCH` when it leads none yet.
pub(super) fn signal_group(leader: rustix::process::Pid, signal: i32) -> Result<(), Errno> {
    // SAFETY: only integers cross.
    check(libc::c_long::from(unsafe { libc::kill(-leader.as_raw_nonzero().get(), signal) })).map(drop)
}

/// `sigprocmask(2)`: all signals blocked.
pub(super) fn block_signals() -> Result<(), Errno> {
    set_blocked(SigSet::all())
}

/// `sigprocmask(2)`: none blocked.
pub(super) fn unblock_signals() -> Result<(), Errno> {
    set_blocked(SigSet::empty())
}

/// Has a program that this process starts block no signals, whatever this process blocks.
pub(super) fn unblock_in(command: &mut Command) {
    // SAFETY: between fork and exec there is one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(|| Ok(set_blocked(SigSet::empty())?)) };
}

fn set_blocked(set: SigSet) -> Result<(), Errno> {
    let result = nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None);
    result.map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

/// `sigwaitinfo(2)` for any signal; its number.
pub(super) fn wait_for_signal() -> Result<i32, Errno> {
    let set = SigSet::all();
    // SAFETY: the set lives across the call; no information about the signal is asked for.
    let result = unsafe { libc::sigwaitinfo(set.as_ref(), std::ptr::null_mut()) };
    check(libc::c_long::from(result)).map(|_| result)
}

/// `close_range(2)` from 3 on, in a process that never returns to who owns those descriptors.
pub(super) fn close_all_from_3() {
    // SAFETY: only integers cross. Process 1 ends by `exit` without touching an `OwnedFd` again.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Makes a system call only to see whether it is refused. The caller chooses arguments with which it
/// does nothing if it is not.
pub(super) fn probe_call(number: libc::c_long, first: usize, second: usize) -> Result<(), Errno> {
    // SAFETY: the arguments are null pointers, numbers that are no descriptors, or flags; no call of
    // the probe writes through any of them. The others are zero.
    check(unsafe { libc::syscall(number, first, second, 0usize, 0usize, 0usize, 0usize) }).map(drop)
}

/// `keyctl(KEYCTL_JOIN_SESSION_KEYRING)`: a new, empty session keyring.
pub(super) fn new_session_keyring() -> Result<(), Errno> {
    // SAFETY: a null name asks for an anonymous keyring; nothing else crosses.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    };
    check(result).map(drop)
}

/// `ioctl(TIOCGPTPEER)`: opens the terminal behind the pseudo-terminal master, without a path.
pub(super) fn open_pty_peer(master: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor.
    let fd = check(unsafe { libc::syscall(libc::SYS_ioctl, master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `execve(2)` with C strings made beforehand; returns only on failure.
pub(super) fn execve(program: &CStr, args: &[&CStr], env: &[&CStr]) -> Errno {
    match nix::unistd::execve(program, args, env) {
        Ok(never) => match never {},
        Err(errno) => Errno::from_raw_os_error(errno as i32),
    }
}

/// Takes over descriptor 0, over which the helper gets everything.
pub(super) fn take_stdin() -> OwnedFd {
    // SAFETY: called once, first thing in the helper, before anything else could own descriptor 0;
    // the parent passed it for this purpose.
    unsafe { OwnedFd::from_raw_fd(0) }
}

/// `dup2(2)` onto a standard stream.
pub(super) fn dup_onto(from: BorrowedFd<'_>, to: RawFd) -> Result<(), Errno> {
    // SAFETY: only integers cross; descriptors 0 to 2 belong to no `OwnedFd` of the helper once
    // `take_stdin`'s was moved up by `fcntl(F_DUPFD)`.
    check(libc::c_long::from(unsafe { libc::dup2(from.as_raw_fd(), to) })).map(drop)
}

/// `rt_sigaction(n, SIG_DFL)` for every signal but SIGPIPE, which this program needs ignored as long as it
/// is itself: whoever called may have ignored any of them, and that outlives `execve`. The C library's two
/// as well, which `signal` would not touch.
pub(super) fn default_signals() {
    // The kernel's structure and more: all zeroes is the default action without flags, mask and restorer.
    let action = [0_u64; 8];
    for signal in (1..=LAST_SIGNAL).filter(|signal| *signal != libc::SIGPIPE) {
        // SAFETY: the structure lives across the call, which only reads it; the size is that of the
        // kernel's set of signals. There are no threads yet that the C library would signal. SIGKILL and
        // SIGSTOP are refused, and have no other action anyway.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                action.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
}

/// `signal(SIGCHLD, SIG_IGN)`: the kernel buries the children of this process itself.
pub(super) fn ignore_children() {
    child_signal(nix::sys::signal::SigHandler::SigIgn);
}

/// `signal(SIGCHLD, SIG_DFL)`: children stay until they are waited for.
pub(super) fn notice_children() {
    child_signal(nix::sys::signal::SigHandler::SigDfl);
}

fn child_signal(action: nix::sys::signal::SigHandler) {
    // SAFETY: neither of the two actions is a handler of ours; nothing can run in a signal's context.
    let _ = unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGCHLD, action) };
}

/// The last real-time signal.
const LAST_SIGNAL: libc::c_int = 64;

/// `signal(SIGPIPE, SIG_DFL)`.
pub(super) fn default_sigpipe() -> Result<(), Errno> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default action is no handler of ours; nothing can run in a signal's context.
    let result = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    result.map(drop).map_err(|errno| Errno::from_raw_os_error(errno as i32))
}
