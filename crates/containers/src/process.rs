//! A container's processes, as the host sees them below `/proc`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use kiln_executor::signal_by_fd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The fields of `/proc/PID/stat` behind the program's name, from `state` on.
pub(crate) fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold blanks and parentheses.
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// When a process started, in clock ticks after boot.
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    stat_fields(pid)?.get(19)?.parse().ok()
}

/// A descriptor for a process that started at `ticks`; `None`: it is gone, and another one may have its
/// number.
pub(crate) fn open_process(pid: i32, ticks: u64) -> Option<OwnedFd> {
    let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    (start_ticks(pid) == Some(ticks)).then_some(fd)
}

/// Sends a signal, by its number.
pub(crate) fn send_signal(process: &OwnedFd, signal: i32) -> Result<(), Errno> {
    match signal_by_fd(process.as_fd(), signal) {
        // It ended just now.
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// All processes in the process namespace of `pid`, `pid` first.
pub(crate) fn processes_of(pid: i32) -> io::Result<Vec<i32>> {
    let own = namespace_of(pid)?;
    let mut found = vec![pid];
    for entry in fs::read_dir("/proc")? {
        let Some(other) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if other != pid && namespace_of(other).is_ok_and(|namespace| namespace == own) {
            found.push(other);
        }
    }
    Ok(found)
}

fn namespace_of(pid: i32) -> io::Result<(u64, u64)> {
    let namespace = fs::metadata(format!("/proc/{pid}/ns/pid"))?;
    Ok((namespace.dev(), namespace.ino()))
}

/// Whether a process has a handler for a signal: the kernel drops all others that process 1 gets.
pub fn handles_signal(pid: i32, signal: i32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return false };
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    caught >> (signal - 1) & 1 == 1
}

/// Signals by name, without `SIG`, as on every Linux but the odd architectures.
const SIGNALS: [(&str, i32); 32] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("POLL", 29),
];

/// The number of a signal given as `TERM`, `SIGTERM`, `sigterm` or `15`; `None`: there is none.
pub fn signal_number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    // The C library keeps the first two real-time signals for itself: 34 to 64 are everybody's.
    let real_time = |rest: &str, base: i32, sign: i32| {
        let offset = if rest.is_empty() { 0 } else { rest.parse::<i32>().ok()? };
        Some(base + sign * offset).filter(|number| (34..=64).contains(number))
    };
    let known = SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let above = || real_time(name.strip_prefix("RTMIN")?.trim_start_matches('+'), 34, 1);
    let below = || real_time(name.strip_prefix("RTMAX")?.trim_start_matches('-'), 64, -1);
    known.or_else(above).or_else(below)
}

/// `SIGTERM` for 15.
pub fn signal_name(number: i32) -> String {
    let name = SIGNALS.iter().find(|(_, known)| *known == number);
    name.map_or_else(|| number.to_string(), |(name, _)| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(signal_number(text), Some(15), "{text}");
        }
        for (text, expected) in [("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("rtmin", 34), ("64", 64)] {
            assert_eq!(signal_number(text), Some(expected), "{text}");
        }
        for text in ["0", "65", "NONE", "", "RTMIN+99"] {
            assert_eq!(signal_number(text), None, "{text}");
        }
        assert_eq!(signal_name(9), "SIGKILL");
    }

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = i32::try_from(std::process::id()).unwrap();
        let ticks = start_ticks(own).unwrap();
        assert!(open_process(own, ticks).is_some());
        assert!(open_process(own, ticks + 1).is_none());
        assert_eq!(processes_of(own).unwrap()[0], own);
    }
}
