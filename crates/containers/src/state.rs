//! What a container is doing: `state.json`, replaced at every change.

use std::net::{IpAddr, Ipv4Addr};

use kiln_executor::Subnet;
use serde::{Deserialize, Serialize};

use crate::Time;
use crate::record::Record;

/// The version of `state.json` that this kiln writes.
pub(crate) const STATE_VERSION: u32 = 1;

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Of this record.
    pub version: u32,
    /// In a word.
    pub status: Status,
    /// A monitor has begun to start it.
    pub begun: bool,
    /// Process 1 as the host sees it; 0: there is none.
    pub pid: i32,
    /// When that process started, in clock ticks after boot: another one may get its number.
    pub pid_start: u64,
    /// How it ended, as a shell shows it.
    pub exit_code: i32,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
    /// Why it did not start.
    pub error: String,
    /// When it last started.
    pub started: Time,
    /// When it last ended.
    pub finished: Time,
    /// How often it was started again by its policy.
    pub restarts: u32,
    /// Somebody asked it to end.
    pub stopped: bool,
    /// How it does, when there is a check.
    pub health: Option<Health>,
    /// Its address, when it has a network of its own.
    pub address: Option<Ipv4Addr>,
    /// Where it is in which network, in the order of its interfaces.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// Ports of the host that lead inside now.
    #[serde(default)]
    pub ports: Vec<BoundPort>,
    /// Processes were stopped one by one, because there is no freezer.
    pub paused_by_signals: bool,
}

impl Record for State {
    const VERSION: u32 = STATE_VERSION;

    fn version(&self) -> u32 {
        self.version
    }
}

impl State {
    /// Of a container that has not run yet.
    pub fn created() -> Self {
        Self {
            version: STATE_VERSION,
            status: Status::Created,
            begun: false,
            pid: 0,
            pid_start: 0,
            exit_code: 0,
            oom_killed: false,
            error: String::new(),
            started: Time::NEVER,
            finished: Time::NEVER,
            restarts: 0,
            stopped: false,
            health: None,
            address: None,
            endpoints: Vec::new(),
            ports: Vec::new(),
            paused_by_signals: false,
        }
    }
}

/// A running container's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The network's name.
    pub network: String,
    /// And its ID.
    pub network_id: String,
    /// What the interface is called inside.
    pub interface: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// The network's addresses.
    pub subnet: Subnet,
    /// The host's address in it.
    pub gateway: Ipv4Addr,
}

impl Endpoint {
    /// The interface's hardware address.
    pub fn hardware_address(&self) -> String {
        let [a, b, c, d] = self.address.octets();
        format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// A port of the host that leads into a running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundPort {
    /// Address of the host; unspecified: all.
    pub address: IpAddr,
    /// Port of the host.
    pub host: u16,
    /// Port inside.
    pub inside: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
}

impl BoundPort {
    /// `80/tcp`
    pub fn key(&self) -> String {
        format!("{}/{}", self.inside, self.protocol)
    }
}

/// What a container is doing, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It has not run yet.
    Created,
    /// It runs.
    Running,
    /// It runs and is held.
    Paused,
    /// It ended and will start again.
    Restarting,
    /// It ended.
    Exited,
    /// It is being removed, or cannot be.
    Dead,
}

impl Status {
    /// As docker calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Dead => "dead",
        }
    }

    /// Whether a monitor looks after it.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Restarting)
    }
}

/// How a container does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `starting`, `healthy` or `unhealthy`.
    pub status: String,
    /// Checks that failed in a row.
    pub failing: u32,
    /// The last few, oldest first.
    pub log: Vec<HealthResult>,
}

/// What one check said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResult {
    /// When it began.
    pub start: Time,
    /// When it was over.
    pub end: Time,
    /// 0: healthy; -1: it took too long.
    pub exit_code: i32,
    /// What it printed, at most 4 KiB.
    pub output: String,
}
