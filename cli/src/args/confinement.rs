//! What a container is held back by and held to, under docker's names.

use clap::Args;
use kiln_executor::{Capabilities, ResourceLimit};

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
    /// Memory that the container may use
    #[arg(short, long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) memory: Option<u64>,
    /// Memory and swap together; -1 is as much swap as there is [default: twice the memory]
    #[arg(long, value_name = "BYTES", requires = "memory", allow_negative_numbers = true,
          value_parser = bytes_or_all)]
    pub(crate) memory_swap: Option<u64>,
    /// Processors that the container may keep busy, such as 1.5
    #[arg(long, value_name = "NUMBER", value_parser = processors)]
    pub(crate) cpus: Option<u64>,
    /// Share of processor time where there is too little; others have 1024
    #[arg(short, long, value_name = "SHARES", value_parser = clap::value_parser!(u64).range(2..=262_144))]
    pub(crate) cpu_shares: Option<u64>,
    /// Processors to run on, such as 0-2,4
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_mems: Option<String>,
    /// Processes and threads that there may be; -1 is no limit
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Share of disk time, 10 to 1000
    #[arg(long, value_name = "WEIGHT", value_parser = clap::value_parser!(u64).range(10..=1000))]
    pub(crate) blkio_weight: Option<u64>,
    /// Control group to make the container's in
    #[arg(long, value_name = "GROUP")]
    pub(crate) cgroup_parent: Option<String>,
}

/// `64m` as docker means it: powers of 1024.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write 1048576, 1024k, 64m or 2g");
    let lower = text.to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn bytes_or_all(text: &str) -> Result<u64, String> {
    if text == "-1" { Ok(u64::MAX) } else { bytes(text) }
}

/// `1.5` in millionths.
fn processors(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of processors; write 2 or 0.5");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 6 || !(whole.to_owned() + part).bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let number = |text: &str| if text.is_empty() { Ok(0) } else { text.parse::<u64>().map_err(|_| wrong()) };
    let millionths = number(whole)?.checked_mul(1_000_000).ok_or_else(wrong)?;
    let millionths = millionths.saturating_add(number(&format!("{part:0<6}"))?);
    if millionths == 0 { Err(wrong()) } else { Ok(millionths) }
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
    fn sizes_are_dockers() {
        for (text, expected) in
            [("1048576", 1 << 20), ("64m", 64 << 20), ("2G", 2 << 30), ("1kb", 1024), ("3MiB", 3 << 20)]
        {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "m", "1x", "-1", "1.5g", "99999999999t"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!(bytes_or_all("-1"), Ok(u64::MAX));
    }

    #[test]
    fn processors_are_counted_in_millionths() {
        for (text, expected) in [("1", 1_000_000), ("1.5", 1_500_000), (".25", 250_000), ("0.000001", 1)] {
            assert_eq!(processors(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "-1", "1e3", "1.2.3", "0.0000001", "99999999999999999"] {
            assert!(processors(text).is_err(), "{text}");
        }
    }

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
