//! Why something with a container did not work.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use kiln_executor::{ExecError, Unfit};

/// Why something with a container did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No container is called so.
    #[error("there is no container {text:?}")]
    NotFound {
        /// As it was asked for.
        text: String,
    },
    /// Several IDs begin so.
    #[error("{text:?} is the beginning of {count} container IDs")]
    Ambiguous {
        /// As it was asked for.
        text: String,
        /// How many.
        count: usize,
    },
    /// Another container has the name.
    #[error("the name {name:?} is taken by container {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// It was removed meanwhile.
    #[error("container {id} is gone")]
    Gone {
        /// Which.
        id: String,
    },
    /// It does not run.
    #[error("container {name} is not running")]
    NotRunning {
        /// Which.
        name: String,
    },
    /// It runs.
    #[error("container {name} is running already")]
    AlreadyRuns {
        /// Which.
        name: String,
    },
    /// It is not in the state that this needs.
    #[error("container {name} {problem}")]
    WrongState {
        /// Which.
        name: String,
        /// What stands against it.
        problem: &'static str,
    },
    /// A record cannot be understood.
    #[error("{} cannot be used: {problem}", path.display())]
    Record {
        /// Where.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// There is no such volume.
    #[error("there is no volume {name:?}")]
    NoVolume {
        /// As it was asked for.
        name: String,
    },
    /// Something keeps a volume.
    #[error("volume {name:?} is used by container {container}")]
    VolumeInUse {
        /// Which.
        name: String,
        /// By whom.
        container: String,
    },
    /// There is no such network.
    #[error("there is no network {text:?}")]
    NoNetwork {
        /// As it was asked for.
        text: String,
    },
    /// A network of that name is there, or one that has some of its addresses.
    #[error("{problem}")]
    NetworkTaken {
        /// What stands against it.
        problem: String,
    },
    /// Containers that run keep a network.
    #[error("network {name:?} is used by {}", users.join(", "))]
    NetworkInUse {
        /// Which.
        name: String,
        /// By whom, as far as they can be told.
        users: Vec<String>,
    },
    /// Somebody listens on a port of the host.
    #[error("port {port} of the host is in use ({protocol}, {address})")]
    PortInUse {
        /// Which; 0: all that could be tried.
        port: u16,
        /// `tcp` or `udp`.
        protocol: String,
        /// At which address.
        address: IpAddr,
    },
    /// A port of the host cannot be listened on.
    #[error("port {port} of the host cannot be used ({protocol}, {address}{})", first_port(source))]
    PortRefused {
        /// Which.
        port: u16,
        /// `tcp` or `udp`.
        protocol: String,
        /// At which address.
        address: IpAddr,
        /// Why not.
        source: io::Error,
    },
    /// What the container's monitor, or the process beside it, could not do; told by another process.
    #[error("{message}")]
    Told {
        /// Its words.
        message: String,
        /// docker's exit code for it: 125, 126 or 127.
        code: u8,
        /// What is wrong with a program that is there and cannot be executed; the words say it, too.
        unfit: Option<Box<Unfit>>,
    },
    /// It ended between two questions.
    #[error("the container has just ended")]
    JustEnded,
    /// The monitor ended without a word.
    #[error("the monitor of container {name} died")]
    MonitorDied {
        /// Whose.
        name: String,
    },
    /// The kernel refuses something.
    #[error("cannot {call} {}", path.display())]
    Host {
        /// What was to be done.
        call: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Snapshots.
    #[error(transparent)]
    Snapshots(#[from] kiln_snapshotter::Error),
    /// The process could not be started.
    #[error(transparent)]
    Exec(#[from] ExecError),
}

/// Where ports begin that need no privilege, for who has none and asked for one before.
fn first_port(source: &io::Error) -> String {
    let setting = "net.ipv4.ip_unprivileged_port_start";
    let first = std::fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/")));
    match (source.kind(), first) {
        (io::ErrorKind::PermissionDenied, Ok(first)) => {
            format!("; a user's begin at {}, which is {setting}", first.trim())
        }
        _ => String::new(),
    }
}

impl Error {
    /// What another process says: words, and docker's exit code for them.
    pub(crate) fn told(message: impl Into<String>, code: u8) -> Self {
        Self::Told { message: message.into(), code, unfit: None }
    }

    /// What is wrong with a program that is there and cannot be executed.
    pub fn unfit(&self) -> Option<&Unfit> {
        match self {
            Self::Told { unfit, .. } => unfit.as_deref(),
            Self::Exec(ExecError::NotExecutable { why, .. }) => Some(why),
            _ => None,
        }
    }

    /// docker's exit code for a container or process that did not start.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Told { code, .. } => *code,
            Error::Exec(ExecError::NotFound { .. }) => 127,
            Error::Exec(ExecError::NotExecutable { .. }) => 126,
            _ => 125,
        }
    }
}
