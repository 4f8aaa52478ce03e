//! What a container is held back by and held to, under docker's names.

use clap::Args;
use kiln_executor::{Capabilities, ResourceLimit};

use super::limits::{LimitArgs, bytes};

#[derive(Args)]
pub(crate) struct ConfinementArgs {
    /// Capability to have beside the usual ones, or ALL
    #[arg(long, value_name = "CAPABILITY", value_parser = Capabilities::parse)]
    pub(crate) cap_add: Vec<Capabilities>,
    /// Capability not to have, or ALL
    #[arg(long, value_name = "CAPABILITY", value_parser = Capabilities::parse)]
    pub(crate) cap_drop: Vec<Capabilities>,
    /// Hold nothing back: all capabilities and system calls, all devices, /proc and /sys writable.
    /// Whoever controls such a container controls the host
    #[arg(long)]
    pub(crate) privileged: bool,
    /// seccomp=unconfined|FILE, no-new-privileges, systempaths=unconfined, apparmor=unconfined,
    /// label=disable
    #[arg(long, value_name = "OPTION")]
    pub(crate) security_opt: Vec<String>,
    /// Let nothing be written but to mounts
    #[arg(long)]
    pub(crate) read_only: bool,
    /// An empty file system in memory; options: size, mode, exec
    #[arg(long, value_name = "DIR[:OPTION,…]")]
    pub(crate) tmpfs: Vec<String>,
    /// Size of /dev/shm [default: 64m]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) shm_size: Option<u64>,
    /// Resource limit, such as nofile=1024:4096; -1 is no limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = ulimit)]
    pub(crate) ulimit: Vec<ResourceLimit>,
    /// Device of the host, or directory of devices
    #[arg(long, value_name = "HOST[:INSIDE]")]
    pub(crate) device: Vec<String>,
    /// Run an init as process 1, which passes signals on and reaps
    #[arg(long)]
    pub(crate) init: bool,
    /// Host name inside [default: the container's ID]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Group beside the user's own
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<String>,
    /// Kernel setting of the container's own namespaces
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) sysctl: Vec<String>,
    /// How willingly the kernel kills the container when memory runs out
    #[arg(long, value_name = "-1000…1000", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub(crate) oom_score_adj: Option<i16>,
    /// Signal that asks the container to end [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Control group to make the container's in
    #[arg(long, value_name = "GROUP")]
    pub(crate) cgroup_parent: Option<String>,
}

fn ulimit(text: &str) -> Result<ResourceLimit, String> {
    let wrong = || format!("{text:?} is not NAME=SOFT or NAME=SOFT:HARD");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let resource = ResourceLimit::resource(name).ok_or_else(|| format!("there is no limit {name:?}"))?;
    let value = |text: &str| match text {
        "-1" | "unlimited" => Ok(None),
        number => number.parse().map(Some).map_err(|_| wrong()),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let limit = ResourceLimit { resource, soft: value(soft)?, hard: value(hard)? };
    if limit.soft.unwrap_or(u64::MAX) > limit.hard.unwrap_or(u64::MAX) {
        return Err(format!("{text:?}: the soft limit is above the hard one"));
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_a_name_and_one_or_two_values() {
        let limit = |text| ulimit(text).map(|limit| (limit.resource, limit.soft, limit.hard));
        assert_eq!(limit("nofile=10:20"), Ok((7, Some(10), Some(20))));
        assert_eq!(limit("core=-1"), Ok((4, None, None)));
        for text in ["nofile", "nofile=", "files=1", "nofile=20:10", "nofile=-1:10", "nofile=1:2:3"] {
            assert!(ulimit(text).is_err(), "{text}");
        }
    }
}
