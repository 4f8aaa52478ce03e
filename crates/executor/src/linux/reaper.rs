//! Process 1 of a container that asked for one of kiln's (`--init`).
//!
//! It stays kiln's own program, inside, beside hostile processes. They cannot look into it: it is
//! not dumpable, so even root inside needs CAP_SYS_PTRACE for its memory, its descriptors and
//! `/proc/1/exe`. And whoever gets at that file cannot write to it (see `start.rs`).

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

use super::sys;
use crate::ExecError;

/// Starts `program` in a child, then passes signals on to it and reaps until it ends. Ends this
/// process as the child ended, the way a shell shows it. Returns only in the child, and only the
/// reason why the program did not start.
///
/// Called last: there is one thread, identity and filter are the program's, and every descriptor
/// from 3 on is closed in process 1.
pub(super) fn start_below(program: impl FnOnce() -> ExecError) -> ExecError {
    // Blocked, so that none is lost before the first is waited for.
    let blocked = sys::block_signals().map_err(ExecError::start("signals"));
    let child = match blocked.and_then(|()| sys::fork().map_err(ExecError::start("fork"))) {
        Err(error) => return error,
        Ok(nix::unistd::ForkResult::Child) => {
            lead_terminal();
            return match sys::unblock_signals() {
                Ok(()) => program(),
                Err(errno) => ExecError::start("signals")(errno),
            };
        }
        Ok(nix::unistd::ForkResult::Parent { child }) => child.as_raw(),
    };
    sys::close_all_from_3();
    std::process::exit(watch(child))
}

/// A process group of its own, in front on the terminal if there is one: what the terminal sends on
/// Ctrl-C reaches the program alone, once.
fn lead_terminal() {
    let _ = rustix::process::setpgid(None, None);
    let _ = rustix::termios::tcsetpgrp(rustix::stdio::stdin(), rustix::process::getpgrp());
}

fn watch(child: i32) -> i32 {
    loop {
        match sys::wait_for_signal() {
            Ok(libc::SIGCHLD) => {
                if let Some(code) = reap(child) {
                    return code;
                }
            }
            // What the kernel sends for this process's own mistakes is nobody else's.
            Ok(libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP | libc::SIGSYS) => {
            }
            Ok(signal) => sys::send_signal(child, signal),
            Err(Errno::INTR) => {}
            Err(_) => return 1,
        }
    }
}

/// Waits for all that ended; the program's code if it is among them.
fn reap(child: i32) -> Option<i32> {
    let mut code = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Pid::as_raw(Some(pid)) == child {
            code = Some(shell_code(status));
        }
    }
    code
}

fn shell_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 1,
    }
}
