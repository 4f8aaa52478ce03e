//! What a container may use of the machine, under docker's names.

use clap::Args;
use kiln_executor::Resources;

use crate::errors::Failure;

#[derive(Args)]
pub(crate) struct LimitArgs {
    /// Memory that the container may use
    #[arg(short, long, value_name = "BYTES", value_parser = bytes)]
    memory: Option<u64>,
    /// Memory and swap together; -1 is as much swap as there is [default: twice the memory]
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = bytes_or_all)]
    memory_swap: Option<u64>,
    /// Memory that the container is left when there is too little
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory_reservation: Option<u64>,
    /// Processors that the container may keep busy, such as 1.5
    #[arg(long, value_name = "NUMBER", value_parser = processors)]
    cpus: Option<u64>,
    /// Microseconds of processor time in each period; -1 is no limit
    #[arg(long, value_name = "MICROSECONDS", conflicts_with = "cpus", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i64).range(-1..))]
    cpu_quota: Option<i64>,
    /// Microseconds of a period, 1000 to 1000000 [default: 100000]
    #[arg(long, value_name = "MICROSECONDS", conflicts_with = "cpus",
          value_parser = clap::value_parser!(u64).range(1000..=1_000_000))]
    cpu_period: Option<u64>,
    /// Share of processor time where there is too little; others have 1024
    #[arg(short, long, value_name = "SHARES", value_parser = clap::value_parser!(u64).range(2..=262_144))]
    cpu_shares: Option<u64>,
    /// Processors to run on, such as 0-2,4
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Processes and threads that there may be; -1 is no limit
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i64).range(-1..))]
    pids_limit: Option<i64>,
    /// Share of disk time, 10 to 1000
    #[arg(long, value_name = "WEIGHT", value_parser = clap::value_parser!(u64).range(10..=1000))]
    blkio_weight: Option<u64>,
}

/// The kernel's own period, in microseconds.
const PERIOD: u64 = 100_000;

impl LimitArgs {
    /// Whether none was given.
    pub(crate) fn is_empty(&self) -> bool {
        let Self {
            memory,
            memory_swap,
            memory_reservation,
            cpus,
            cpu_quota,
            cpu_period,
            cpu_shares,
            cpuset_cpus,
            cpuset_mems,
            pids_limit,
            blkio_weight,
        } = self;
        let numbers = [memory, memory_swap, memory_reservation, cpus, cpu_period, cpu_shares, blkio_weight];
        numbers.iter().all(|number| number.is_none())
            && cpu_quota.is_none()
            && pids_limit.is_none()
            && cpuset_cpus.is_none()
            && cpuset_mems.is_none()
    }

    /// `known` with what was given in its place.
    pub(crate) fn over(&self, known: &Resources) -> Result<Resources, Failure> {
        let mut limits = known.clone();
        self.set_memory(known, &mut limits)?;
        self.set_processors(known, &mut limits);
        limits.memory_reservation_bytes = self.memory_reservation.or(known.memory_reservation_bytes);
        limits.cpu_shares = self.cpu_shares.or(known.cpu_shares);
        limits.cpus = self.cpuset_cpus.clone().or_else(|| known.cpus.clone());
        limits.memory_nodes = self.cpuset_mems.clone().or_else(|| known.memory_nodes.clone());
        limits.io_weight = self.blkio_weight.or(known.io_weight);
        if let Some(limit) = self.pids_limit {
            limits.pids = u64::try_from(limit).ok().filter(|limit| *limit > 0);
        }
        if limits.memory_reservation_bytes > limits.memory_bytes && limits.memory_bytes.is_some() {
            return Err(Failure::usage("--memory-reservation cannot be more than --memory"));
        }
        Ok(limits)
    }

    fn set_memory(&self, known: &Resources, limits: &mut Resources) -> Result<(), Failure> {
        limits.memory_bytes = self.memory.or(known.memory_bytes);
        let Some(memory) = limits.memory_bytes else {
            return match self.memory_swap {
                None => Ok(()),
                Some(_) => Err(Failure::usage(
                    "--memory-swap is for a container with a limit: give --memory as well",
                )),
            };
        };
        // Both together, as they were asked for before: what is memory now is no swap any more.
        let before = known.swap_bytes.map(|swap| known.memory_bytes.unwrap_or(0).saturating_add(swap));
        limits.swap_bytes = match (self.memory_swap, before) {
            (Some(u64::MAX), _) | (None, Some(u64::MAX)) => Some(u64::MAX),
            (Some(both), _) => Some(both.checked_sub(memory).ok_or_else(|| {
                Failure::usage("--memory-swap is memory and swap together: it cannot be less than --memory")
            })?),
            (None, Some(both)) => Some(both.checked_sub(memory).ok_or_else(|| {
                Failure::usage(
                    "that is more than memory and swap together may be: give --memory-swap as well",
                )
            })?),
            (None, None) => None,
        };
        Ok(())
    }

    fn set_processors(&self, known: &Resources, limits: &mut Resources) {
        if let Some(cpus) = self.cpus {
            (limits.cpu_millionths, limits.cpu_period_micros) = (Some(cpus), None);
        }
        if self.cpu_quota.is_none() && self.cpu_period.is_none() {
            return;
        }
        let period = self.cpu_period.or(known.cpu_period_micros).unwrap_or(PERIOD);
        let quota = match self.cpu_quota {
            Some(quota) => u64::try_from(quota).ok().filter(|quota| *quota > 0),
            None => known.cpu_time().map(|(quota, _)| quota),
        };
        limits.cpu_period_micros = Some(period);
        limits.cpu_millionths =
            quota.map(|quota| (quota.saturating_mul(1_000_000).saturating_add(period / 2)) / period);
    }
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        limits: LimitArgs,
    }

    fn given(flags: &[&str]) -> LimitArgs {
        Flags::try_parse_from([&["x"], flags].concat()).map(|flags| flags.limits).unwrap()
    }

    #[test]
    fn what_is_given_takes_the_place_of_what_was() {
        assert!(given(&[]).is_empty() && !given(&["--pids-limit", "-1"]).is_empty());
        let first = given(&["-m", "64m", "--memory-swap", "128m", "--cpus", "1.5", "--pids-limit", "9"]);
        let first = first.over(&Resources::default()).map_err(|failure| failure.render()).unwrap();
        assert_eq!((first.memory_bytes, first.swap_bytes), (Some(64 << 20), Some(64 << 20)));
        let then = given(&["-m", "96m", "--pids-limit", "-1"])
            .over(&first)
            .map_err(|failure| failure.render())
            .unwrap();
        assert_eq!((then.memory_bytes, then.swap_bytes), (Some(96 << 20), Some(32 << 20)));
        assert_eq!((then.pids, then.cpu_millionths), (None, Some(1_500_000)));
        assert!(given(&["-m", "256m"]).over(&first).is_err());
        assert!(given(&["--memory-swap", "32m"]).over(&first).is_err());
        assert!(given(&["--memory-swap", "32m"]).over(&Resources::default()).is_err());
        assert!(given(&["--memory-reservation", "65m"]).over(&first).is_err());
        let all = given(&["-m", "256m", "--memory-swap", "-1"])
            .over(&first)
            .map_err(|failure| failure.render())
            .unwrap();
        assert_eq!(
            given(&["-m", "1g"]).over(&all).map_err(|failure| failure.render()).unwrap().swap_bytes,
            Some(u64::MAX)
        );
    }

    #[test]
    fn quotas_come_out_as_they_were_given() {
        for (period, quota) in
            [("100000", "50000"), ("70000", "33333"), ("1000", "1000"), ("999983", "1234567")]
        {
            let limits = given(&["--cpu-period", period, "--cpu-quota", quota]);
            let limits = limits.over(&Resources::default()).map_err(|failure| failure.render()).unwrap();
            assert_eq!(limits.cpu_time(), Some((quota.parse().unwrap(), period.parse().unwrap())));
            // A quota stays the same in another period.
            let other =
                given(&["--cpu-period", "50000"]).over(&limits).map_err(|failure| failure.render()).unwrap();
            assert_eq!(other.cpu_time().unwrap().0, quota.parse::<u64>().unwrap());
            assert_eq!(
                given(&["--cpu-quota", "-1"])
                    .over(&limits)
                    .map_err(|failure| failure.render())
                    .unwrap()
                    .cpu_time(),
                None
            );
        }
    }

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
}
