//! What the calling process and its helper say to each other, over one `SEQPACKET` socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::seccomp::Program;
use crate::spec::ProcessSpec;
use crate::{ExecError, Exit, Unfit, Usage};

/// The helper's whole task, in a memory file that travels with the first message, beside the root
/// and the standard streams. Messages with the inputs follow.
#[derive(Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) spec: ProcessSpec,
    /// The caller; a helper with another parent was orphaned before it could watch it.
    pub(super) parent_pid: i32,
    /// An empty directory to attach the root at, in the helper's own mount namespace.
    pub(super) attach_at: String,
    pub(super) terminal: bool,
    /// Report when the program runs.
    pub(super) managed: bool,
    /// What travels as the root is a pidfd of a container to join.
    pub(super) join: bool,
    /// How many inputs follow, [`MAX_FDS`] a message.
    pub(super) inputs: usize,
    /// Files to write "0" to, of the control groups that process 1 joins.
    pub(super) groups: Vec<String>,
    /// The system calls' filter, compiled; `None`: none. It stands in front of the task, as bytes.
    #[serde(skip)]
    pub(super) filter: Option<Program>,
    /// What runs the container instead of the helper itself.
    pub(super) runtime: Option<super::oci::Runtime>,
    /// The container's address; `None`: no network of its own.
    pub(super) lease: Option<super::net::Lease>,
    /// The network namespace that comes along is up already.
    pub(super) network_is_up: bool,
    /// Give the network namespace back, if it is as good as new.
    pub(super) network_back: bool,
    /// Who gives a user's container its network.
    pub(super) user_network: Option<super::user_net::UserNetwork>,
}

/// What the helper reports. Errors travel as what they are: step and errno, never as prose.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The terminal's master follows with this message.
    Terminal,
    /// The stopped calls' listener follows with this message; who runs there, user and group.
    Owners(u32, u32),
    /// The program runs, as this process of the host.
    Started(i32),
    /// The process ended. The network namespace follows with this message where it was asked for and
    /// can be used again.
    Ended(Exit, Usage),
    Failed(Failure),
}

/// An [`ExecError`] on its way between processes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    NotFound { program: String },
    NotExecutable { program: String, why: Unfit },
    BadUser { user: String, reason: String },
    BadCwd { cwd: String, errno: i32 },
    Refused { target: String, reason: String },
    BadSetting { setting: String, reason: String },
    Runtime { program: String, reason: String },
    Network { step: String, errno: i32 },
    Start { step: String, errno: i32 },
}

impl From<Failure> for ExecError {
    fn from(failure: Failure) -> Self {
        let os = io::Error::from_raw_os_error;
        match failure {
            Failure::NotFound { program } => ExecError::NotFound { program },
            Failure::NotExecutable { program, why } => ExecError::NotExecutable { program, why },
            Failure::BadUser { user, reason } => ExecError::BadUser { user, reason },
            Failure::BadCwd { cwd, errno } => ExecError::BadCwd { cwd, source: os(errno) },
            Failure::Refused { target, reason } => ExecError::Refused { target, reason },
            Failure::Runtime { program, reason } => ExecError::Runtime { program, reason },
            Failure::BadSetting { setting, reason } => ExecError::BadSetting { setting, reason },
            Failure::Network { step, errno } => ExecError::Network { step, source: os(errno) },
            Failure::Start { step, errno } => ExecError::Start { step, source: os(errno) },
        }
    }
}

impl From<ExecError> for Failure {
    fn from(error: ExecError) -> Self {
        let errno = |source: io::Error| source.raw_os_error().unwrap_or(libc::EIO);
        match error {
            ExecError::NotFound { program } => Failure::NotFound { program },
            ExecError::NotExecutable { program, why } => Failure::NotExecutable { program, why },
            ExecError::BadUser { user, reason } => Failure::BadUser { user, reason },
            ExecError::BadCwd { cwd, source } => Failure::BadCwd { cwd, errno: errno(source) },
            ExecError::Refused { target, reason } => Failure::Refused { target, reason },
            ExecError::Runtime { program, reason } => Failure::Runtime { program, reason },
            ExecError::BadSetting { setting, reason } => Failure::BadSetting { setting, reason },
            ExecError::Network { step, source } => Failure::Network { step, errno: errno(source) },
            ExecError::Start { step, source } => Failure::Start { step, errno: errno(source) },
            ExecError::Cancelled => Failure::Start { step: "cancelled".to_owned(), errno: libc::ECANCELED },
            ExecError::HelperDied => Failure::Start { step: "helper".to_owned(), errno: libc::ESRCH },
        }
    }
}

/// At most this many descriptors travel with one message; the kernel's own limit is 253.
pub(super) const MAX_FDS: usize = 32;
/// Reports are small; the task travels in a memory file.
const MAX_MESSAGE_BYTES: usize = 16 << 10;

/// Sends `bytes` with `fds`.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// A message's bytes and the descriptors that came with it.
pub(super) type Received = (Vec<u8>, Vec<OwnedFd>);

/// Receives one message; `None` when the other side is gone.
pub(super) fn receive(socket: BorrowedFd<'_>) -> Result<Option<Received>, Errno> {
    let mut bytes = vec![0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut iov = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some((bytes, fds)))
}

/// Sends a report; a caller that is gone needs none.
pub(super) fn report(socket: impl AsFd, report: &Report, fds: &[BorrowedFd<'_>]) {
    if let Ok(bytes) = serde_json::to_vec(report) {
        let _ = send(socket.as_fd(), &bytes, fds);
    }
}
