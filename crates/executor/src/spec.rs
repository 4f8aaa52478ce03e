//! What to run, and the contract of whoever runs it.

use std::os::fd::OwnedFd;
use std::path::Path;

use kiln_oci::Mount;
use serde::{Deserialize, Serialize};

use crate::{Cancel, ExecError, Managed};

/// A process as its image and its user describe it; no host path but the mounts' sources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments; a program without a slash is looked up in the `PATH` of `env`.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// Make the working directory when it is missing.
    pub create_cwd: bool,
    /// `user[:group]`, names looked up in the tree; `None`: root.
    pub user: Option<String>,
    /// Host name inside.
    pub hostname: String,
    /// What network it sees.
    pub network: Network,
    /// How much it is held back.
    pub security: Security,
    /// Mounts below the root, in order.
    pub mounts: Vec<Mount>,
    /// Lines for `/etc/hosts`: name and address.
    pub extra_hosts: Vec<(String, String)>,
    /// Forbid to gain privileges by setuid programs.
    pub no_new_privileges: bool,
}

/// What network a process sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Network {
    /// Its own, with address translation to the outside.
    #[default]
    Default,
    /// Loopback only.
    None,
    /// The host's.
    Host,
}

/// How much a process is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Security {
    /// The default profile.
    #[default]
    Sandbox,
    /// All capabilities of the caller; `/proc` and `/sys` are whole and writable, devices work.
    /// The process can take over the host: whoever asks for this has been asked whether it may be.
    Insecure,
}

/// The open files that a [`ProcessSpec`] refers to.
#[derive(Debug)]
pub struct Handles {
    /// A detached mount of the process's whole tree.
    pub root: OwnedFd,
    /// What [`Mount::Tree`] and [`Mount::File`] name by position: detached mounts, and files to
    /// read from.
    pub inputs: Vec<OwnedFd>,
}

impl From<OwnedFd> for Handles {
    /// A root and nothing beside it.
    fn from(root: OwnedFd) -> Self {
        Self { root, inputs: Vec::new() }
    }
}

/// Which of a process's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Where a process's standard streams lead.
pub enum Stdio<'a> {
    /// Output to the callback as it comes; standard input is empty.
    Captured(&'a mut (dyn FnMut(Stream, &[u8]) + Send)),
    /// Output to this process's; standard input is empty.
    Output,
    /// All three are this process's.
    Inherit,
    /// A terminal inside the container, joined to this process's terminal in raw mode.
    Terminal,
    /// As the caller says, who is told when the program starts.
    Managed(Managed<'a>),
}

impl Stdio<'_> {
    /// Whether the process gets a terminal of its own.
    pub(crate) fn has_terminal(&self) -> bool {
        matches!(self, Stdio::Terminal | Stdio::Managed(Managed { streams: None, .. }))
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl Exit {
    /// The code as a shell shows it: 128 + n for signal n.
    pub fn shell_code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

/// Runs processes.
pub trait Executor: Send + Sync {
    /// Runs a process on `handles.root` until it and all its children ended. Blocks; costs a few
    /// milliseconds besides what the process does.
    ///
    /// # Errors
    /// [`ExecError::Cancelled`] after `cancel`; [`ExecError::NotFound`] and
    /// [`ExecError::NotExecutable`] when the program cannot be started; [`ExecError::Refused`] for
    /// a mount where none may be; others when the kernel refuses a part of the sandbox. Nothing is
    /// left behind in any case.
    fn run(
        &self,
        handles: Handles,
        spec: &ProcessSpec,
        stdio: Stdio<'_>,
        cancel: &Cancel,
    ) -> Result<Exit, ExecError>;

    /// A directory with the mount targets every container needs (`proc`, `etc/hosts`, …), to be
    /// the lowest layer of its root. So they exist without a change to the image
    /// (`docs/adr/0002-trees-travel-as-fds.md`).
    fn stub_dir(&self) -> &Path;
}
