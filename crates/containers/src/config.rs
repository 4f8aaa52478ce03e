//! What a container was asked to be: `config.json`.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use kiln_executor::ProcessSpec;
use kiln_oci::image::RunConfig;
use kiln_oci::{Digest, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::record::Record;
use crate::{ContainerId, Time};

/// The version of `config.json` that this kiln writes.
pub(crate) const CONFIG_VERSION: u32 = 1;

/// A container as it was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Of this record.
    pub version: u32,
    /// Which one.
    pub id: ContainerId,
    /// What users call it.
    pub name: String,
    /// When it was made.
    pub created: Time,
    /// The image it was made of.
    pub image: Digest,
    /// What the image was called.
    pub image_name: String,
    /// What its writable layer stands on; `None`: nothing.
    pub snapshot: Option<SnapshotId>,
    /// The process, but for what `mounts` adds.
    pub process: ProcessSpec,
    /// The image's settings with what the user changed, as docker shows them.
    pub settings: RunConfig,
    /// What is mounted.
    pub mounts: Vec<MountPoint>,
    /// Ports of the host that lead inside.
    pub ports: Vec<Port>,
    /// The networks it is in; none: what the process says.
    #[serde(default)]
    pub networks: Vec<Attachment>,
    /// The container whose network it shares.
    #[serde(default)]
    pub network_of: Option<ContainerId>,
    /// All ports that the image exposes are published.
    #[serde(default)]
    pub publish_all: bool,
    /// The process has a terminal.
    pub tty: bool,
    /// Its standard input is open.
    pub open_stdin: bool,
    /// Its standard input ends with the client that runs it.
    pub stdin_once: bool,
    /// It goes when it ends.
    pub auto_remove: bool,
    /// Whether it starts again by itself.
    pub restart: RestartPolicy,
    /// How long it may take then, in seconds; `None`: 10, and below 0: as long as it wants.
    pub stop_timeout: Option<i64>,
    /// How to tell whether it does its work.
    pub health: Option<HealthCheck>,
    /// Where its output goes.
    pub log: LogOptions,
    /// The OCI runtime that runs it; `None`: kiln does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<std::path::PathBuf>,
}

impl Record for Config {
    const VERSION: u32 = CONFIG_VERSION;

    fn version(&self) -> u32 {
        self.version
    }
}

impl Config {
    /// How long the process may take to end when it is asked to; `None`: as long as it wants.
    pub fn stop_grace(&self, asked: Option<i64>) -> Option<Duration> {
        let seconds = asked.or(self.stop_timeout).unwrap_or(10);
        u64::try_from(seconds).ok().map(Duration::from_secs)
    }
}

/// Something mounted in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    /// What it is.
    pub kind: MountKind,
    /// Absolute path inside.
    pub target: String,
    /// Writes are refused.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountKind {
    /// A path of the host.
    Bind(std::path::PathBuf),
    /// A named volume.
    Volume {
        /// Which.
        name: String,
        /// It was made for this container and goes with it.
        anonymous: bool,
        /// What the image has there goes into it while it is empty.
        fill: bool,
    },
    /// Memory.
    Tmpfs {
        /// How much at most.
        size_bytes: Option<u64>,
        /// Permission bits of its root.
        mode: Option<u32>,
        /// Programs in it may be executed.
        executable: bool,
    },
}

/// A container's place in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// What others in it may call the container beside its name and ID.
    pub aliases: Vec<String>,
    /// Its address; `None`: any.
    pub address: Option<Ipv4Addr>,
}

/// A port of the host that leads inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Address of the host; empty: all.
    pub host_address: String,
    /// Port of the host; `None`: any that is free.
    pub host: Option<u16>,
    /// The first from `host` up to this that is free; `None`: just `host`.
    #[serde(default)]
    pub host_last: Option<u16>,
    /// Port inside.
    pub inside: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
}

impl Port {
    /// `80/tcp`
    pub fn key(&self) -> String {
        format!("{}/{}", self.inside, self.protocol)
    }
}

/// Whether a container starts again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When it failed; at most so many times, 0: always.
    OnFailure(u32),
    /// Whenever it ends, unless it was stopped.
    Always,
    /// The same for a kiln without a daemon: nothing starts containers after a boot.
    UnlessStopped,
}

impl RestartPolicy {
    /// As docker calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::OnFailure(_) => "on-failure",
            Self::Always => "always",
            Self::UnlessStopped => "unless-stopped",
        }
    }

    /// How often it may start again; 0: always.
    pub fn maximum(self) -> u32 {
        if let Self::OnFailure(maximum) = self { maximum } else { 0 }
    }

    /// How long to wait before the next start; `None`: it stays ended. `restarts` says how often it
    /// has been started again in a row, `ran` how long the last time, and `last` how long the wait
    /// before that was.
    pub fn pause(self, code: i32, restarts: u32, ran: Duration, last: Duration) -> Option<Duration> {
        const FIRST: Duration = Duration::from_millis(100);
        const LONGEST: Duration = Duration::from_secs(60);
        /// A container that ran this long has not failed at its start.
        const LONG: Duration = Duration::from_secs(10);
        let again = match self {
            Self::No => false,
            Self::OnFailure(maximum) => code != 0 && (maximum == 0 || restarts < maximum),
            Self::Always | Self::UnlessStopped => true,
        };
        let next = if ran >= LONG || last.is_zero() { FIRST } else { (last * 2).min(LONGEST) };
        again.then_some(next)
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, maximum) = text.split_once(':').map_or((text, None), |(name, max)| (name, Some(max)));
        let policy = match (name, maximum) {
            ("no" | "", None) => Self::No,
            ("always", None) => Self::Always,
            ("unless-stopped", None) => Self::UnlessStopped,
            ("on-failure", None) => Self::OnFailure(0),
            ("on-failure", Some(max)) => {
                Self::OnFailure(max.parse().map_err(|_| format!("{max:?} is no number of times"))?)
            }
            _ => {
                return Err(format!("{text:?} is none of no, on-failure[:TIMES], always, unless-stopped"));
            }
        };
        Ok(policy)
    }
}

/// How to tell whether a container does its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Program and arguments.
    pub args: Vec<String>,
    /// As docker writes them: `CMD` or `CMD-SHELL` in front.
    pub test: Vec<String>,
    /// From the end of one to the start of the next.
    pub interval: Duration,
    /// How long one may take.
    pub timeout: Duration,
    /// How long failures do not count at first.
    pub start_period: Duration,
    /// The interval during that.
    pub start_interval: Duration,
    /// So many failures in a row make it unhealthy.
    pub retries: u32,
}

/// Where output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// Nowhere.
    pub none: bool,
    /// A log that has so many bytes is put aside; `None`: never.
    pub max_bytes: Option<u64>,
    /// How many there are, the one that is written included.
    pub max_files: u32,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { none: false, max_bytes: None, max_files: 1 }
    }
}

/// What users gave, for whoever searches by it.
pub type Labels = BTreeMap<String, String>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_as_docker_reads_them() {
        assert_eq!("on-failure:3".parse(), Ok(RestartPolicy::OnFailure(3)));
        assert_eq!("unless-stopped".parse(), Ok(RestartPolicy::UnlessStopped));
        for bad in ["sometimes", "always:3", "on-failure:x", "no:1"] {
            assert!(bad.parse::<RestartPolicy>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_begin_anew_after_a_good_run() {
        let (short, always) = (Duration::from_secs(1), RestartPolicy::Always);
        let mut pause = Duration::ZERO;
        let mut pauses = Vec::new();
        for restarts in 0..12 {
            pause = always.pause(0, restarts, short, pause).unwrap();
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses[..4], [100, 200, 400, 800]);
        assert_eq!(pauses[10..], [60_000, 60_000]);
        assert_eq!(always.pause(0, 12, Duration::from_secs(11), pause).unwrap().as_millis(), 100);
        let on_failure = RestartPolicy::OnFailure(2);
        assert!(on_failure.pause(0, 0, short, Duration::ZERO).is_none());
        assert!(on_failure.pause(1, 1, short, Duration::ZERO).is_some());
        assert!(on_failure.pause(1, 2, short, Duration::ZERO).is_none());
        assert!(RestartPolicy::No.pause(1, 0, short, Duration::ZERO).is_none());
    }
}
