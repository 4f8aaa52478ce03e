//! What to run, and the contract of whoever runs it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use kiln_oci::{Mount, Platform};
use serde::{Deserialize, Serialize};

use crate::{Cancel, Capabilities, ExecError, Managed, Seccomp};

/// A process as its image and its user describe it; no host path but the mounts' sources.
///
/// The default is what docker and BuildKit give a process that asks for nothing.
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
    /// Groups beside the user's own, names looked up in the tree.
    pub more_groups: Vec<String>,
    /// Host name inside.
    pub hostname: String,
    /// What network it sees.
    pub network: Network,
    /// How much it is held back.
    pub security: Security,
    /// What it may at most have in the sandbox, as far as the caller has it.
    pub capabilities: Capabilities,
    /// Which system calls it may make in the sandbox.
    pub seccomp: Seccomp,
    /// Forbid to gain privileges by setuid programs.
    pub no_new_privileges: bool,
    /// What of `/proc` and `/sys` is hidden and read-only in the sandbox.
    pub system_paths: SystemPaths,
    /// Nothing can be written but to mounts.
    pub read_only: bool,
    /// Mounts below the root, in order.
    pub mounts: Vec<Mount>,
    /// Devices of the host beside the harmless ones.
    pub devices: Vec<Device>,
    /// Size of `/dev/shm`.
    pub shm_size_bytes: u64,
    /// Lines for `/etc/hosts`: name and address, or [`ProcessSpec::HOST_GATEWAY`].
    pub extra_hosts: Vec<(String, String)>,
    /// What `/etc/resolv.conf` says other than the host's.
    #[serde(default)]
    pub resolver: Resolver,
    /// Limits other than the usual ones.
    pub rlimits: Vec<ResourceLimit>,
    /// Kernel settings of the process's own namespaces, by dotted name.
    pub sysctls: Vec<(String, String)>,
    /// How willingly the kernel kills it when memory runs out, -1000 to 1000; `None`: as the caller.
    pub oom_score_adj: Option<i16>,
    /// Process 1 is kiln's: it passes signals on to the program and reaps what nobody waits for.
    pub reaper: bool,
    /// Number of the signal that asks it to end.
    pub stop_signal: i32,
    /// Processes and threads at most, where the kernel bounds them without a control group (Linux
    /// 6.14); elsewhere nothing does. `None`: no limit but the host's.
    pub task_limit: Option<u32>,
    /// What it may use of the machine, in a control group of its own; `None`: no such group.
    pub resources: Option<Resources>,
    /// Have [`Usage::peak_memory_bytes`] be that of all processes together where no control group counts it: they
    /// are looked at up to ten times a second.
    #[serde(default)]
    pub adds_up_memory: bool,
    /// What the image says that its programs are for, to explain one that does not start; `None`: nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl ProcessSpec {
    /// Stands for the host's address in [`ProcessSpec::extra_hosts`].
    pub const HOST_GATEWAY: &'static str = "host-gateway";
}

impl Default for ProcessSpec {
    fn default() -> Self {
        Self {
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".to_owned(),
            create_cwd: false,
            user: None,
            more_groups: Vec::new(),
            hostname: "localhost".to_owned(),
            network: Network::Default,
            security: Security::Sandbox,
            capabilities: Capabilities::default(),
            seccomp: Seccomp::Default,
            no_new_privileges: false,
            system_paths: SystemPaths::Masked,
            read_only: false,
            mounts: Vec::new(),
            devices: Vec::new(),
            shm_size_bytes: 64 << 20,
            extra_hosts: Vec::new(),
            resolver: Resolver::default(),
            rlimits: Vec::new(),
            sysctls: Vec::new(),
            oom_score_adj: None,
            reaper: false,
            stop_signal: libc::SIGTERM,
            task_limit: None,
            resources: None,
            adds_up_memory: false,
            platform: None,
        }
    }
}

/// Who turns names into addresses, and how. What is empty is as on the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resolver {
    /// Whom to ask, in this order.
    pub servers: Vec<std::net::IpAddr>,
    /// Domains to look for names in; a single `.`: none.
    pub search: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

/// What of `/proc` and `/sys` a sandboxed process meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SystemPaths {
    /// What tells about the host is hidden, what changes it is read-only.
    #[default]
    Masked,
    /// All of it, as far as the capabilities reach.
    Open,
}

/// A device node inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Absolute path inside.
    pub path: String,
    /// A block device; else a character device.
    pub block: bool,
    /// Major and minor number.
    pub number: (u32, u32),
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
}

/// A resource limit (setrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceLimit {
    /// Of what, `RLIMIT_…`.
    pub resource: u32,
    /// The limit that counts; `None`: none.
    pub soft: Option<u64>,
    /// How far the process may raise it; `None`: none.
    pub hard: Option<u64>,
}

impl ResourceLimit {
    /// Size of core files.
    pub const CORE: u32 = 4;
    /// Number of open files.
    pub const OPEN_FILES: u32 = 7;

    /// By number, from 0 on (asm-generic/resource.h).
    const NAMES: [&'static str; 16] = [
        "cpu",
        "fsize",
        "data",
        "stack",
        "core",
        "rss",
        "nproc",
        "nofile",
        "memlock",
        "as",
        "locks",
        "sigpending",
        "msgqueue",
        "nice",
        "rtprio",
        "rttime",
    ];

    /// As docker's `--ulimit` calls it.
    pub fn name(self) -> &'static str {
        usize::try_from(self.resource).ok().and_then(|number| Self::NAMES.get(number)).unwrap_or(&"?")
    }

    /// The resource that docker's `--ulimit` calls `name`; `None` when there is none.
    pub fn resource(name: &str) -> Option<u32> {
        let number = Self::NAMES.iter().position(|known| *known == name)?;
        u32::try_from(number).ok()
    }
}

/// What a process and its children may use together. `None` everywhere: no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Control group to make the process's own in; `None`: kiln's.
    pub parent: Option<String>,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// Swap beside the memory; only with `memory_bytes`, and as much again when it is `None`.
    pub swap_bytes: Option<u64>,
    /// Memory that it is left when there is too little; above it is what the kernel takes first.
    #[serde(default)]
    pub memory_reservation_bytes: Option<u64>,
    /// Millionths of one processor's time: 1_500_000 is one and a half processors.
    pub cpu_millionths: Option<u64>,
    /// The microseconds over which that time is shared out; `None`: a tenth of a second.
    #[serde(default)]
    pub cpu_period_micros: Option<u64>,
    /// Share of processor time when there is too little, 2 to 262144; all others have 1024.
    pub cpu_shares: Option<u64>,
    /// Processors, such as `0-2,4`.
    pub cpus: Option<String>,
    /// Memory nodes, likewise.
    pub memory_nodes: Option<String>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Share of disk time, 10 to 1000.
    pub io_weight: Option<u64>,
}

impl Resources {
    /// The period that the kernel starts with, in microseconds.
    const CPU_PERIOD_MICROS: u64 = 100_000;

    /// Processor time as the kernel takes it: so many microseconds out of so many. `None`: no limit.
    pub fn cpu_time(&self) -> Option<(u64, u64)> {
        let period = self.cpu_period_micros.unwrap_or(Self::CPU_PERIOD_MICROS);
        // Rounded, so that a quota that was given as one comes out as that. The kernel takes none below a
        // millisecond.
        let quota = (u128::from(self.cpu_millionths?) * u128::from(period) + 500_000) / 1_000_000;
        Some((u64::try_from(quota).unwrap_or(u64::MAX).max(1000), period))
    }
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
    /// The one that comes with the [`Handles`].
    Given,
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
    /// The network namespace of [`Network::Given`].
    pub network: Option<OwnedFd>,
}

impl From<OwnedFd> for Handles {
    /// A root and nothing beside it.
    fn from(root: OwnedFd) -> Self {
        Self { root, inputs: Vec::new(), network: None }
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

/// How a process ended, and what it used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub exit: Exit,
    /// What it used.
    pub usage: Usage,
}

/// Without a word about what was used.
impl From<Exit> for Finished {
    fn from(exit: Exit) -> Self {
        Self { exit, usage: Usage::default() }
    }
}

/// What a process and its children used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time, user's and system's.
    pub cpu: Duration,
    /// Memory at the highest. In a control group that of all together, with what the kernel keeps of files for
    /// them. Else that of the largest process among those somebody waited for, or of all together whenever they
    /// were looked at ([`ProcessSpec::adds_up_memory`]) and had more.
    pub peak_memory_bytes: u64,
    /// Processes killed because the control group's memory was used up; 0 without one.
    pub oom_kills: u64,
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
    ) -> Result<Finished, ExecError>;

    /// A directory with the mount targets every container needs (`proc`, `etc/hosts`, …), to be
    /// the lowest layer of its root. So they exist without a change to the image
    /// (`docs/adr/0002-trees-travel-as-fds.md`).
    fn stub_dir(&self) -> &Path;
}
