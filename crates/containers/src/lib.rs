//! Containers: processes on a writable layer of their own above an image.
//!
//! Read [`Config`] and [`State`] first (what a container is), then [`Containers`] (where they are), then
//! `monitor/` (the process that looks after one while it runs) and [`Client`] (how commands talk to it).
//!
//! # Invariants
//! - Writes never reach the image: the process sees an active snapshot, whose key is the container's ID.
//! - There is no daemon. A container runs while its monitor has the lock on its directory; the kernel ends
//!   the container with the monitor, and the next look at the lock notices.
//! - What a container is and does stands in its directory, replaced file by file in one step; whenever a
//!   command is killed, what is there can be listed and removed.

#![forbid(unsafe_code)]

pub mod devices;
mod error;
mod id;
mod record;
mod time;

mod config;
mod networks;
mod state;
mod store;
mod volumes;

mod dns;
mod log;
mod process;
mod wire;

mod monitor;

mod attach;
mod client;
mod entry;
mod keys;
mod live;
mod namespace;
mod remove;

pub mod fsck;

#[cfg(test)]
mod testing;

pub use attach::{AttachOptions, Attached, Ended, attach, attach_terminal};
pub use client::{Client, MonitorProcess, StartedExec};
pub use config::{
    Attachment, Config, HealthCheck, Labels, LogOptions, MountKind, MountPoint, Port, RestartPolicy,
};
pub use entry::monitor_if_asked;
pub use error::Error;
pub use id::{ContainerId, is_name, random_name};
pub use keys::DetachKeys;
pub use live::{Process, Usage, processes, usage};
pub use log::{LogLine, LogReader};
pub use namespace::monitor_process;
pub use networks::{Network, Networks, NewNetwork, USUAL_NETWORK, members};
pub use process::{handles_signal, signal_name, signal_number};
pub use remove::{remove, sweep};
pub use state::{BoundPort, Endpoint, Health, HealthResult, State, Status};
pub use store::{Container, Containers};
pub use time::{Time, TimeError, parse_duration};
pub use volumes::{Volume, Volumes, user_of};
