//! A program in which one system call fails, or which dies at one.
//!
//! [`trace`] runs a program under ptrace(2) and numbers those of its calls that are watched: in all
//! threads and in the processes it forks, as long as they execute the same file. One of them can be
//! made to fail, to do half of its work, or to be the last: counting the calls first and then failing
//! each in turn visits every place where the kernel can refuse.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use libc::c_long;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not made, and returns this.
    Fail(Errno),
    /// A read or write handles half of its bytes or vectors.
    Short,
    /// All processes of the program are killed before it is made.
    Kill,
}

/// A group of system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// What changes the disk: writes, links, renames, removals, syncs, directories, attributes, reflinks,
    /// mounts, and opening what is made or emptied thereby.
    Changing,
    /// What looks at the disk: content, directories, attributes, links, and opening. Of calls that take a
    /// descriptor those whose file has a path: pipes and sockets are no disk.
    Reading,
    /// What allocates a descriptor of a file.
    Opening,
    /// What reads, writes or copies content and can do half of it: two bytes or vectors at least, and no
    /// counter or signal, which come whole.
    Transferring,
}

/// A finished program.
#[derive(Debug)]
pub struct Traced {
    /// How many watched calls it made.
    pub calls: usize,
    /// Name of the call that the fault met.
    pub hit: Option<&'static str>,
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// Why a program could not be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Starting it, or its files.
    #[error("the program cannot be started")]
    Start(#[from] io::Error),
    /// ptrace(2) or waitpid(2).
    #[error("{call} failed")]
    Trace {
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

impl Calls {
    /// The name of a call that is one of them.
    fn name(self, thread: Pid, call: &SystemCall) -> Option<&'static str> {
        let table: &[(c_long, &'static str)] = match self {
            Self::Changing => CHANGING,
            Self::Reading => READING,
            Self::Opening => OPENING,
            Self::Transferring => TRANSFERRING,
        };
        let (_, name) = table.iter().find(|(known, _)| *known == call.number)?;
        self.counts(thread, call).then_some(name)
    }

    /// Whether a call of the table does with these arguments what the group is about.
    fn counts(self, thread: Pid, call: &SystemCall) -> bool {
        let [a, b, c, ..] = call.args;
        match (self, call.number) {
            (Self::Changing, libc::SYS_open) => b & CREATING != 0,
            (Self::Changing, libc::SYS_openat) => c & CREATING != 0,
            // The flags are the first word of what the third argument points to.
            (Self::Changing, libc::SYS_openat2) => word(thread, c).is_some_and(|flags| flags & CREATING != 0),
            (Self::Changing, libc::SYS_ioctl) => [FICLONE, FICLONERANGE].contains(&b),
            (Self::Opening, libc::SYS_fcntl) => {
                [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC].iter().any(|&command| b == command as u64)
            }
            (Self::Reading, number) if OF_DESCRIPTORS.contains(&number) => {
                file_of(thread, a).is_some_and(|file| file.is_absolute())
            }
            (Self::Transferring, _) => {
                let counter = |file: PathBuf| file.to_string_lossy().starts_with("anon_inode:");
                call.args[length_argument(call.number)] > 1 && !file_of(thread, a).is_some_and(counter)
            }
            _ => true,
        }
    }
}

const CREATING: u64 = (libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as u64;
const FICLONE: u64 = 0x4004_9409;
const FICLONERANGE: u64 = 0x4020_940d;

/// Which argument says how many bytes or vectors there are.
fn length_argument(number: c_long) -> usize {
    match number {
        libc::SYS_copy_file_range => 4,
        libc::SYS_sendfile => 3,
        _ => 2,
    }
}

/// A word of the memory of a thread that has stopped.
fn word(thread: Pid, at: u64) -> Option<u64> {
    ptrace::read(thread, at as ptrace::AddressType).ok().map(i64::cast_unsigned)
}

/// What a descriptor of a thread leads to.
pub(crate) fn file_of(thread: Pid, fd: u64) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{thread}/fd/{}", fd as u32)).ok()
}

const CHANGING: &[(c_long, &str)] = &[
    (libc::SYS_write, "write"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_pwritev2, "pwritev2"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_sendfile, "sendfile"),
    (libc::SYS_splice, "splice"),
    (libc::SYS_ioctl, "ioctl FICLONE"),
    (libc::SYS_creat, "creat"),
    (libc::SYS_open, "open"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_truncate, "truncate"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_syncfs, "syncfs"),
    (libc::SYS_sync_file_range, "sync_file_range"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_link, "link"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlink, "symlink"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_mknod, "mknod"),
    (libc::SYS_mknodat, "mknodat"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_fchmodat, "fchmodat"),
    (libc::SYS_fchmodat2, "fchmodat2"),
    (libc::SYS_chmod, "chmod"),
    (libc::SYS_chown, "chown"),
    (libc::SYS_lchown, "lchown"),
    (libc::SYS_fchown, "fchown"),
    (libc::SYS_fchownat, "fchownat"),
    (libc::SYS_utimensat, "utimensat"),
    (libc::SYS_fsetxattr, "fsetxattr"),
    (libc::SYS_lsetxattr, "lsetxattr"),
    (libc::SYS_setxattr, "setxattr"),
    (libc::SYS_fremovexattr, "fremovexattr"),
    (libc::SYS_lremovexattr, "lremovexattr"),
    (libc::SYS_removexattr, "removexattr"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_mount_setattr, "mount_setattr"),
    (libc::SYS_fsopen, "fsopen"),
    (libc::SYS_fsconfig, "fsconfig"),
    (libc::SYS_fsmount, "fsmount"),
    (libc::SYS_open_tree, "open_tree"),
    (libc::SYS_move_mount, "move_mount"),
];

const READING: &[(c_long, &str)] = &[
    (libc::SYS_open, "open"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_read, "read"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_preadv, "preadv"),
    (libc::SYS_preadv2, "preadv2"),
    (libc::SYS_getdents64, "getdents64"),
    (libc::SYS_lseek, "lseek"),
    (libc::SYS_stat, "stat"),
    (libc::SYS_lstat, "lstat"),
    (libc::SYS_fstat, "fstat"),
    (libc::SYS_newfstatat, "newfstatat"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_statfs, "statfs"),
    (libc::SYS_fstatfs, "fstatfs"),
    (libc::SYS_access, "access"),
    (libc::SYS_faccessat, "faccessat"),
    (libc::SYS_faccessat2, "faccessat2"),
    (libc::SYS_readlink, "readlink"),
    (libc::SYS_readlinkat, "readlinkat"),
    (libc::SYS_getxattr, "getxattr"),
    (libc::SYS_lgetxattr, "lgetxattr"),
    (libc::SYS_fgetxattr, "fgetxattr"),
    (libc::SYS_listxattr, "listxattr"),
    (libc::SYS_llistxattr, "llistxattr"),
    (libc::SYS_flistxattr, "flistxattr"),
];

/// Those whose first argument is an open file.
const OF_DESCRIPTORS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
];

const OPENING: &[(c_long, &str)] = &[
    (libc::SYS_open, "open"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_memfd_create, "memfd_create"),
    (libc::SYS_pipe2, "pipe2"),
    (libc::SYS_socketpair, "socketpair"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_dup, "dup"),
    (libc::SYS_dup3, "dup3"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_epoll_create1, "epoll_create1"),
    (libc::SYS_eventfd2, "eventfd2"),
    (libc::SYS_timerfd_create, "timerfd_create"),
    (libc::SYS_signalfd4, "signalfd4"),
    (libc::SYS_inotify_init1, "inotify_init1"),
    (libc::SYS_pidfd_open, "pidfd_open"),
    (libc::SYS_fsopen, "fsopen"),
    (libc::SYS_fsmount, "fsmount"),
    (libc::SYS_open_tree, "open_tree"),
];

const TRANSFERRING: &[(c_long, &str)] = &[
    (libc::SYS_read, "read"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_preadv, "preadv"),
    (libc::SYS_preadv2, "preadv2"),
    (libc::SYS_write, "write"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_pwritev2, "pwritev2"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_sendfile, "sendfile"),
];

/// A system call as it is made.
#[derive(Debug, Clone, Copy)]
pub struct SystemCall {
    /// Which one.
    pub number: c_long,
    /// Its arguments; pointers are of the program's memory.
    pub args: [u64; 6],
}

/// Looks on while a program makes its system calls.
pub trait Watch {
    /// Whether this call is worth being looked at.
    fn wants(&self, number: c_long) -> bool;
    /// A thread is about to make a call.
    fn enters(&mut self, thread: Pid, call: &SystemCall);
    /// The call has returned: a negative `result` is an error number.
    fn leaves(&mut self, thread: Pid, call: &SystemCall, result: i64);
}

/// One thread of the program.
struct Thread {
    /// It executes the program itself, not something that the program runs.
    own: bool,
    /// What its call is to return instead.
    answer: Option<Errno>,
    /// The call it is in, if somebody watches.
    call: Option<SystemCall>,
}

impl Thread {
    fn new(own: bool) -> Self {
        Self { own, answer: None, call: None }
    }
}

struct Tracer<'w> {
    watch: Option<&'w mut dyn Watch>,
    program: PathBuf,
    calls: Calls,
    fault: Option<(usize, Fault)>,
    threads: HashMap<Pid, Thread>,
    count: usize,
    hit: Option<&'static str>,
    /// Whoever stops is killed: it was forked when the others were.
    killing: bool,
}

/// Runs `command` to its end, and with it whatever it starts. The `at`-th watched call, counted from
/// 0, meets the fault. Standard input is empty.
///
/// Costs two context switches a system call: a program takes about ten times as long.
///
/// # Errors
/// [`TraceError`]; the program is killed then.
pub fn trace(command: &Command, calls: Calls, fault: Option<(usize, Fault)>) -> Result<Traced, TraceError> {
    run(command, calls, fault, None)
}

/// Runs `command` to its end as [`trace`] does, without a fault, and lets `watch` look on.
///
/// # Errors
/// [`TraceError`].
pub fn observe(command: &Command, watch: &mut dyn Watch) -> Result<Traced, TraceError> {
    run(command, Calls::Changing, None, Some(watch))
}

fn run(
    command: &Command,
    calls: Calls,
    fault: Option<(usize, Fault)>,
    watch: Option<&mut dyn Watch>,
) -> Result<Traced, TraceError> {
    let (mut stdout, mut stderr) = (scratch()?, scratch()?);
    // A shell waits for a line until it is traced; then it becomes the program.
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "read -r line && exec \"$@\" < /dev/null", "sh"]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        shell.current_dir(dir);
    }
    let mut child =
        shell.stdin(Stdio::piped()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?).spawn()?;
    let root = Pid::from_raw(child.id().cast_signed());
    let options = Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(root, options).map_err(failed("PTRACE_SEIZE"))?;
    ptrace::interrupt(root).map_err(failed("PTRACE_INTERRUPT"))?;
    child.stdin.take().expect("it is piped").write_all(b"go\n")?;
    let program = fs::canonicalize(command.get_program())?;
    let mut tracer =
        Tracer { watch, program, calls, fault, threads: HashMap::new(), count: 0, hit: None, killing: false };
    let code = tracer.run(root)?;
    let (stdout, stderr) = (text(&mut stdout)?, text(&mut stderr)?);
    Ok(Traced { calls: tracer.count, hit: tracer.hit, code, stdout, stderr })
}

fn failed(call: &'static str) -> impl Fn(Errno) -> TraceError {
    move |source| TraceError::Trace { call, source }
}

/// A file without a name.
fn scratch() -> io::Result<fs::File> {
    let dir = std::env::temp_dir();
    let name = format!("kiln-trace-{}-{:?}", std::process::id(), std::thread::current().id());
    let path = dir.join(name);
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

fn text(file: &mut fs::File) -> io::Result<String> {
    use io::{Read, Seek};
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Tracer<'_> {
    /// Until the last thread is gone; the exit code of the first.
    fn run(&mut self, root: Pid) -> Result<Option<i32>, TraceError> {
        let mut code = None;
        // Other threads of this test have children of their own.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            let status = match waitpid(None, Some(flags)) {
                Ok(status) => status,
                Err(Errno::ECHILD) => return Ok(code),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed("waitpid")(errno)),
            };
            if let Some(thread) = status.pid().filter(|_| self.killing) {
                let _ = kill(thread, Signal::SIGKILL);
            }
            match status {
                WaitStatus::PtraceSyscall(thread) => {
                    self.syscall(thread)?;
                    go_on(thread, None)?;
                }
                WaitStatus::PtraceEvent(thread, signal, event) => {
                    if event == libc::PTRACE_EVENT_EXEC {
                        let own = self.runs_program(thread);
                        self.threads.insert(thread, Thread::new(own));
                    }
                    let is_stop = event == libc::PTRACE_EVENT_STOP && signal != Signal::SIGTRAP;
                    if is_stop {
                        // A group-stop: nothing here sends one, so it ends at once.
                        let _ = kill(thread, Signal::SIGCONT);
                    }
                    go_on(thread, None)?;
                }
                WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal))?,
                WaitStatus::Exited(thread, exit) => {
                    self.threads.remove(&thread);
                    if thread == root {
                        code = Some(exit);
                    }
                }
                WaitStatus::Signaled(thread, _, _) => {
                    self.threads.remove(&thread);
                }
                WaitStatus::Continued(_) | WaitStatus::StillAlive => {}
            }
        }
    }

    /// A thread enters or leaves a system call.
    fn syscall(&mut self, id: Pid) -> Result<(), TraceError> {
        // One that is being killed meanwhile says ESRCH to everything.
        let Ok(info) = ptrace::syscall_info(id) else { return Ok(()) };
        let own = match self.threads.get(&id) {
            Some(thread) => thread.own,
            None => {
                let own = self.runs_program(id);
                self.threads.insert(id, Thread::new(own));
                own
            }
        };
        if info.op == libc::PTRACE_SYSCALL_INFO_EXIT {
            let answer = self.threads.get_mut(&id).and_then(|thread| thread.answer.take());
            if let Some(errno) = answer {
                let mut registers = ptrace::getregs(id).map_err(failed("PTRACE_GETREGS"))?;
                registers.rax = i64::from(-(errno as i32)).cast_unsigned();
                ptrace::setregs(id, registers).map_err(failed("PTRACE_SETREGS"))?;
            }
            let call = self.threads.get_mut(&id).and_then(|thread| thread.call.take());
            if let (Some(call), Some(watch)) = (call, &mut self.watch)
                && let Ok(registers) = ptrace::getregs(id)
            {
                watch.leaves(id, &call, registers.rax.cast_signed());
            }
            return Ok(());
        }
        if !own || info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return Ok(());
        }
        let Ok(mut registers) = ptrace::getregs(id) else { return Ok(()) };
        let libc::user_regs_struct { rdi, rsi, rdx, r10, r8, r9, .. } = registers;
        let call =
            SystemCall { number: registers.orig_rax.cast_signed(), args: [rdi, rsi, rdx, r10, r8, r9] };
        if let Some(watch) = &mut self.watch
            && watch.wants(call.number)
        {
            watch.enters(id, &call);
            self.threads.entry(id).and_modify(|thread| thread.call = Some(call));
        }
        let Some(name) = self.calls.name(id, &call) else { return Ok(()) };
        let number = self.count;
        self.count += 1;
        let Some((at, fault)) = self.fault else { return Ok(()) };
        if at != number {
            return Ok(());
        }
        self.hit = Some(name);
        match fault {
            Fault::Fail(errno) => {
                registers.orig_rax = u64::MAX;
                ptrace::setregs(id, registers).map_err(failed("PTRACE_SETREGS"))?;
                self.threads.entry(id).and_modify(|thread| thread.answer = Some(errno));
            }
            Fault::Short => {
                let length = match length_argument(call.number) {
                    4 => &mut registers.r8,
                    3 => &mut registers.r10,
                    _ => &mut registers.rdx,
                };
                *length /= 2;
                ptrace::setregs(id, registers).map_err(failed("PTRACE_SETREGS"))?;
            }
            Fault::Kill => {
                self.killing = true;
                for &thread in self.threads.keys() {
                    let _ = kill(thread, Signal::SIGKILL);
                }
            }
        }
        Ok(())
    }

    fn runs_program(&self, thread: Pid) -> bool {
        fs::read_link(format!("/proc/{thread}/exe")).is_ok_and(|exe| exe == self.program)
    }
}

/// Lets a stopped thread run to its next stop; one that was killed meanwhile is reaped later.
fn go_on(thread: Pid, signal: Option<Signal>) -> Result<(), TraceError> {
    match ptrace::syscall(thread, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(failed("PTRACE_SYSCALL")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(args: &[&str]) -> Command {
        let mut command = Command::new("/usr/bin/env");
        command.args(args);
        command
    }

    #[test]
    fn calls_are_counted_and_output_is_kept() {
        let mut dd = Command::new("/bin/dd");
        dd.args(["if=/dev/zero", "of=/dev/null", "bs=1", "count=7", "status=none"]);
        let traced = trace(&dd, Calls::Changing, None).unwrap();
        // Opening what it writes to is one of them.
        assert_eq!((traced.calls, traced.code, traced.hit), (8, Some(0), None));
        let echo = trace(&program(&["echo", "hello"]), Calls::Changing, None).unwrap();
        // `env` becomes `echo`, which is another program: none of its calls count.
        assert_eq!((echo.calls, echo.code, echo.stdout.as_str()), (0, Some(0), "hello\n"));
    }

    #[test]
    fn the_chosen_call_fails_and_no_other() {
        let mut dd = Command::new("/bin/dd");
        dd.args(["if=/dev/zero", "of=/dev/null", "bs=1", "count=7"]).env("LC_ALL", "C");
        let fault = Some((4, Fault::Fail(Errno::ENOSPC)));
        let traced = trace(&dd, Calls::Changing, fault).unwrap();
        assert_eq!((traced.code, traced.hit), (Some(1), Some("write")));
        assert!(traced.stderr.contains("No space left on device"), "{}", traced.stderr);
        assert!(traced.stderr.contains("3+0 records out"), "{}", traced.stderr);
    }

    #[test]
    fn opening_to_write_is_a_change_and_looking_is_none() {
        let dir = std::env::temp_dir().join(format!("kiln-opens-{}", std::process::id()));
        let mut touch = Command::new("/usr/bin/touch");
        touch.arg(&dir).env("LC_ALL", "C");
        let traced = trace(&touch, Calls::Changing, Some((0, Fault::Fail(Errno::EIO)))).unwrap();
        assert_eq!((traced.code, traced.hit), (Some(1), Some("openat")), "{}", traced.stderr);
        assert!(!dir.exists());
        let mut list = Command::new("/bin/ls");
        list.arg("/").env("LC_ALL", "C");
        assert_eq!(trace(&list, Calls::Changing, None).unwrap().calls, 1, "it writes what it found");
        let looks = trace(&list, Calls::Reading, None).unwrap().calls;
        // The loader has looked for libraries before.
        let is_told = (0..looks).rev().any(|at| {
            let traced = trace(&list, Calls::Reading, Some((at, Fault::Fail(Errno::EIO)))).unwrap();
            traced.hit == Some("getdents64") && traced.stderr.contains("Input/output error")
        });
        assert!(is_told, "of {looks} calls");
    }

    #[test]
    fn half_a_write_is_half_a_write() {
        let dir = std::env::temp_dir().join(format!("kiln-short-{}", std::process::id()));
        let mut dd = Command::new("/bin/dd");
        dd.args(["if=/dev/zero", "bs=100", "count=1", "status=none"]).arg(format!("of={}", dir.display()));
        let traced = trace(&dd, Calls::Transferring, Some((0, Fault::Short))).unwrap();
        // The loader reads libraries before dd reads its input; whatever was halved, dd copes.
        assert_eq!(traced.code, Some(0), "{}", traced.stderr);
        fs::remove_file(dir).unwrap();
    }

    #[test]
    fn a_kill_takes_children_too() {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "(sleep 31536021) & echo started; wait"]);
        let traced = trace(&shell, Calls::Changing, Some((0, Fault::Kill))).unwrap();
        assert_eq!((traced.code, traced.hit, traced.stdout.as_str()), (None, Some("write"), ""));
    }
}
