//! The helper's parent from the second process on: it forks where this program would execute itself again.
//!
//! An executed helper costs about a millisecond: the kernel maps a large program, the C library asks the
//! processor what it can do (which virtual machines answer slowly), relocations are written. A forked one
//! has all that behind it. It is forked by a process that has one thread and little memory, not by the
//! build.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::unistd::ForkResult;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::process::{WaitOptions, wait};

use super::channel::{receive, send};
use super::outer::help_over;
use super::start::HELPER_NAME;
use super::sys;
use crate::ExecError;

/// What the nursery is told; the helper's socket travels with it.
pub(super) const FORK: &[u8] = b"fork";
/// There will be no more to fork: the nursery ends when all that it forked has ended.
const END: &[u8] = b"end";

/// How this program is started as a helper or a nursery; `socket` is how both are spoken to.
pub(super) fn execute(program: &Path, socket: OwnedFd) -> Result<Child, ExecError> {
    // Nothing that would make the standard library fork this process, which is costly for a large one:
    // what is said here, posix_spawn(3) can do.
    Command::new(program)
        .arg0(HELPER_NAME)
        .env_clear()
        .stdin(socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| ExecError::Start { step: "start of the helper".to_owned(), source })
}

/// A pair of connected ends.
pub(super) fn sockets() -> Result<(OwnedFd, OwnedFd), ExecError> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(ExecError::start("socketpair"))
}

/// A running nursery. Dropping it waits for its end, and so for that of its helpers, which have done all
/// that they were for by then: a helper that has closed its socket is still there while the kernel takes
/// its namespaces down. When this process dies, nursery and helpers go with it at once.
pub(super) struct Nursery {
    socket: OwnedFd,
    child: Child,
}

impl Nursery {
    /// Starts one.
    pub(super) fn start(program: &Path) -> Result<Self, ExecError> {
        let (socket, theirs) = sockets()?;
        Ok(Self { socket, child: execute(program, theirs)? })
    }

    /// Has a helper listen on `socket`. Where none can be forked, `socket` closes.
    ///
    /// # Errors
    /// When the nursery is gone.
    pub(super) fn fork(&self, socket: &OwnedFd) -> Result<(), Errno> {
        send(self.socket.as_fd(), FORK, &[socket.as_fd()])
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        let _ = send(self.socket.as_fd(), END, &[]);
        let _ = shutdown(&self.socket, Shutdown::Both);
        let _ = self.child.wait();
    }
}

/// What a nursery does, in a process of its own, until nobody can ask it any more: `first` came with the
/// first [`FORK`]. The exit code.
pub(super) fn serve(control: OwnedFd, first: Vec<OwnedFd>) -> i32 {
    // Keys pressed at a terminal are for the caller, who knows what to do about its helpers.
    let _ = rustix::process::setsid();
    sys::ignore_children();
    let own_pid = rustix::process::getpid().as_raw_nonzero().get();
    let mut came = first;
    loop {
        if let Ok([socket]) = <[OwnedFd; 1]>::try_from(came)
            && let Ok(ForkResult::Child) = sys::fork()
        {
            drop(control);
            sys::notice_children();
            return help_over(socket, own_pid);
        }
        came = match receive(control.as_fd()) {
            Ok(Some((said, _))) if said == END => {
                // Nobody is told of children that are not noticed, but of there being none any more.
                while !matches!(wait(WaitOptions::empty()), Err(Errno::CHILD)) {}
                return 0;
            }
            Ok(Some((_, fds))) => fds,
            // The caller is gone. So is, with this process, the parent of all helpers.
            Ok(None) | Err(_) => return 0,
        };
    }
}
