//! Limits and settings of process 1 itself, all of them before its identity changes.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::paths::open_inside;
use super::sys;
use crate::{ExecError, Network, ProcessSpec, ResourceLimit};

/// Open files: programs that close everything they may have open take long with a million.
pub(super) const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Resource limits: no core files, as many open files as are sane, and what was asked for.
pub(super) fn set_limits(spec: &ProcessSpec) -> Result<(), ExecError> {
    let core = ResourceLimit { resource: ResourceLimit::CORE, soft: Some(0), hard: Some(0) };
    let given = |resource: u32| spec.rlimits.iter().any(|limit| limit.resource == resource);
    let failed = |what: &str| {
        let step = format!("limit of {what}");
        move |errno: Errno| ExecError::Start { step, source: errno.into() }
    };
    if !given(core.resource) {
        sys::set_limit(core).map_err(failed("core files"))?;
    }
    let files = ResourceLimit::OPEN_FILES;
    if !given(files) {
        let (soft, hard) = OPEN_FILES;
        let now = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let hard = now.maximum.map_or(hard, |now| now.min(hard));
        let limit = ResourceLimit { resource: files, soft: Some(soft.min(hard)), hard: Some(hard) };
        sys::set_limit(limit).map_err(failed("open files"))?;
    }
    for limit in &spec.rlimits {
        sys::set_limit(*limit).map_err(|errno| ExecError::BadSetting {
            setting: format!("--ulimit {}", limit.name()),
            reason: match errno {
                Errno::PERM => "the hard limit is above kiln's own, which only CAP_SYS_RESOURCE may raise",
                _ => "the kernel does not take it; the soft limit must not be above the hard one",
            }
            .to_owned(),
        })?;
    }
    Ok(())
}

/// Says whether a container may set the kernel setting `name`: only what its own namespaces keep.
///
/// # Errors
/// [`ExecError::BadSetting`].
pub fn check_sysctl(name: &str, network: Network) -> Result<(), ExecError> {
    const OWN: [&str; 11] = [
        "kernel/domainname",
        "kernel/hostname",
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shm_rmid_forced",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/msg_next_id",
    ];
    let path = sysctl_path(name);
    let clean = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    let reason = if !clean {
        "that is no name of a setting"
    } else if path.starts_with("net/") {
        match network {
            Network::Host => "the network is the host's",
            Network::Default | Network::None | Network::Given => return Ok(()),
        }
    } else if path.starts_with("fs/mqueue/") || OWN.contains(&path.as_str()) {
        return Ok(());
    } else {
        "the setting is the whole host's; a container has its own of net.*, fs.mqueue.*, and of kernel.* \
         those for messages, semaphores and shared memory"
    };
    Err(ExecError::BadSetting { setting: format!("--sysctl {name}"), reason: reason.to_owned() })
}

/// Dots separate, unless there are slashes: interface names have dots.
fn sysctl_path(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { name.replace('.', "/") }
}

/// Writes what belongs below `/proc`, on the container's own `proc` before anything covers it.
pub(super) fn write_settings(spec: &ProcessSpec, proc: &OwnedFd) -> Result<(), ExecError> {
    if let Some(limit) = spec.task_limit.filter(|_| has_own_pid_max()) {
        write(proc.as_fd(), "sys/kernel/pid_max", &limit.max(MIN_PID_MAX).to_string())
            .map_err(ExecError::start("number of processes"))?;
    }
    for (name, value) in &spec.sysctls {
        check_sysctl(name, spec.network)?;
        write(proc.as_fd(), &format!("sys/{}", sysctl_path(name)), value).map_err(|errno| {
            let setting = format!("--sysctl {name}={value}");
            ExecError::BadSetting { setting, reason: std::io::Error::from(errno).to_string() }
        })?;
    }
    if let Some(score) = spec.oom_score_adj {
        write(proc.as_fd(), "1/oom_score_adj", &score.to_string()).map_err(|errno| {
            let setting = format!("--oom-score-adj {score}");
            let reason = match errno {
                Errno::ACCESS => "below kiln's own only with CAP_SYS_RESOURCE".to_owned(),
                errno => std::io::Error::from(errno).to_string(),
            };
            ExecError::BadSetting { setting, reason }
        })?;
    }
    Ok(())
}

fn write(proc: BorrowedFd<'_>, path: &str, value: &str) -> Result<(), Errno> {
    let file = open_inside(proc, path, OFlags::WRONLY | OFlags::NOFOLLOW)?;
    let written = File::from(file).write_all(value.as_bytes());
    written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// The kernel's own lower bound: reserved numbers and one more.
const MIN_PID_MAX: u32 = 301;

/// Since Linux 6.14 each PID namespace has its own `pid_max`. Before, writing it would change the
/// host's.
fn has_own_pid_max() -> bool {
    super::seccomp::kernel() >= (6, 14)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_of_the_containers_own_are_taken() {
        let ok = |name: &str, network| check_sysctl(name, network).is_ok();
        for name in
            ["net.ipv4.ip_forward", "net/ipv4/conf/eth0.1/forwarding", "kernel.shmmax", "fs.mqueue.msg_max"]
        {
            assert!(ok(name, Network::Default), "{name}");
        }
        assert!(ok("kernel.sem", Network::Host) && !ok("net.ipv4.ip_forward", Network::Host));
        for name in [
            "kernel.core_pattern",
            "vm.overcommit_memory",
            "net/../kernel/core_pattern",
            "",
            "net.",
            "kernel",
        ] {
            assert!(!ok(name, Network::Default), "{name}");
        }
    }
}
