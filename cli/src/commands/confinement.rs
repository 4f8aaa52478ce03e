//! From `kiln run`'s options to what the process is given and held to.

use kiln_containers::devices;
use kiln_executor::{
    Capabilities, Network, ProcessSpec, Resources, Seccomp, SeccompProfile, Security, SystemPaths,
    check_sysctl,
};
use kiln_oci::{Mount, TmpfsMount};

use crate::args::confinement::{ConfinementArgs, bytes};
use crate::errors::Failure;

/// The settings that a container gets whatever its image says.
pub(super) fn settings(args: &ConfinementArgs, network: Network) -> Result<ProcessSpec, Failure> {
    let mut spec = ProcessSpec {
        network,
        capabilities: Capabilities::changed(&args.cap_add, &args.cap_drop),
        read_only: args.read_only,
        rlimits: args.ulimit.clone(),
        reaper: args.init,
        more_groups: args.group_add.clone(),
        oom_score_adj: args.oom_score_adj,
        resources: resources(args)?,
        ..ProcessSpec::default()
    };
    if let Some(size) = args.shm_size {
        spec.shm_size_bytes = size;
    }
    for text in &args.sysctl {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| Failure::usage(format!("--sysctl {text:?} is not NAME=VALUE")))?;
        check_sysctl(name, network).map_err(|error| Failure::usage(error.to_string()))?;
        spec.sysctls.push((name.to_owned(), value.to_owned()));
    }
    for text in &args.device {
        spec.devices.extend(device(text)?);
    }
    if args.privileged {
        spec.security = Security::Insecure;
        spec.devices.extend(devices::of_host());
    }
    for option in &args.security_opt {
        security_option(option, &mut spec)?;
    }
    Ok(spec)
}

/// `HOST[:INSIDE[:rwm]]`
fn device(text: &str) -> Result<Vec<kiln_executor::Device>, Failure> {
    let wrong = |reason: String| Failure::usage(format!("--device {text:?}: {reason}"));
    let mut parts = text.split(':');
    let host = parts.next().unwrap_or_default();
    let inside = parts.next().unwrap_or(host);
    match (parts.next(), parts.next()) {
        (None | Some("rwm" | "rw"), None) => {}
        _ => {
            return Err(wrong(
                "a device is given as it is, with `rwm`; its mode bits hold inside".to_owned(),
            ));
        }
    }
    if !inside.starts_with('/') || inside.split('/').any(|part| part == "..") {
        return Err(wrong("the path inside must be absolute, without `..`".to_owned()));
    }
    devices::at(host.as_ref(), inside).map_err(|error| wrong(error.to_string()))
}

fn security_option(text: &str, spec: &mut ProcessSpec) -> Result<(), Failure> {
    let (name, value) = text.split_once(['=', ':']).map_or((text, None), |(name, value)| (name, Some(value)));
    let wrong = |reason: &str| Failure::usage(format!("--security-opt {text:?}: {reason}"));
    match (name, value) {
        ("no-new-privileges", None | Some("true")) => spec.no_new_privileges = true,
        ("no-new-privileges", Some("false")) => spec.no_new_privileges = false,
        ("seccomp", Some("unconfined")) => spec.seccomp = Seccomp::Unconfined,
        ("seccomp", Some("builtin")) => spec.seccomp = Seccomp::Default,
        ("seccomp", Some(file)) => {
            let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
            let profile = SeccompProfile::parse(&text).map_err(|reason| wrong(&reason))?;
            spec.seccomp = Seccomp::Profile(profile);
        }
        ("systempaths", Some("unconfined")) => spec.system_paths = SystemPaths::Open,
        // kiln uses neither of the two, so that there is nothing to switch off.
        ("apparmor", Some("unconfined")) | ("label", Some("disable")) => {}
        ("apparmor", Some(_)) => {
            return Err(wrong("kiln does not use AppArmor; only `unconfined` can be asked for"));
        }
        ("label", Some(_)) => {
            return Err(wrong("kiln does not use SELinux labels; only `disable` can be asked for"));
        }
        _ => {
            return Err(wrong(
                "there are seccomp=, no-new-privileges, systempaths=unconfined, apparmor=, label=",
            ));
        }
    }
    Ok(())
}

fn resources(args: &ConfinementArgs) -> Result<Option<Resources>, Failure> {
    let swap_bytes = match (args.memory_swap, args.memory) {
        (Some(both), Some(memory)) => Some(both.checked_sub(memory).ok_or_else(|| {
            Failure::usage("--memory-swap is memory and swap together: it cannot be less than --memory")
        })?),
        _ => None,
    };
    let pids = match args.pids_limit {
        None | Some(-1 | 0) => None,
        Some(limit) => Some(
            u64::try_from(limit).map_err(|_| Failure::usage(format!("--pids-limit {limit} is no limit")))?,
        ),
    };
    let resources = Resources {
        parent: args.cgroup_parent.clone(),
        memory_bytes: args.memory,
        swap_bytes,
        cpu_millionths: args.cpus,
        cpu_shares: args.cpu_shares,
        cpus: args.cpuset_cpus.clone(),
        memory_nodes: args.cpuset_mems.clone(),
        pids,
        io_weight: args.blkio_weight,
    };
    Ok((resources != Resources::default()).then_some(resources))
}

/// `DIR[:OPTION,…]`
pub(super) fn tmpfs(text: &str) -> Result<Mount, Failure> {
    let wrong = |reason: String| Failure::usage(format!("--tmpfs {text:?}: {reason}"));
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    if !target.starts_with('/')
        || target.split('/').any(|part| part == "..")
        || target.trim_matches('/').is_empty()
    {
        return Err(wrong("the path must be absolute, without `..`, and not `/`".to_owned()));
    }
    // docker's own: anybody may write, nothing may be executed.
    let mut mount =
        TmpfsMount { target: target.to_owned(), size_bytes: None, mode: Some(0o1777), executable: false };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("size", size) => mount.size_bytes = Some(bytes(size).map_err(wrong)?),
            ("mode", mode) => {
                let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o7777);
                mount.mode = Some(mode.ok_or_else(|| wrong(format!("{option:?} is no mode")))?);
            }
            ("exec", "") => mount.executable = true,
            ("noexec", "") => mount.executable = false,
            // As it always is.
            ("rw" | "nosuid" | "nodev", "") => {}
            _ => return Err(wrong(format!("there is no option {option:?}; there are size, mode and exec"))),
        }
    }
    Ok(Mount::Tmpfs(mount))
}

/// `SIGTERM`, `TERM` or `15`.
pub(super) fn signal(text: &str) -> Result<i32, Failure> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let wrong = || Failure::usage(format!("there is no signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(wrong()) };
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    // The C library keeps the first two for itself: 34 to 64 are everybody's.
    let real_time = |rest: Option<&str>, base: i32, sign: i32| {
        let offset = rest.filter(|rest| !rest.is_empty()).map_or(Ok(0), str::parse::<i32>);
        offset.ok().map(|offset| base + sign * offset).filter(|number| (34..=64).contains(number))
    };
    let known = NAMES.iter().position(|name| *name == bare).and_then(|at| i32::try_from(at + 1).ok());
    let from_min =
        bare.strip_prefix("RTMIN").and_then(|rest| real_time(Some(rest.trim_start_matches('+')), 34, 1));
    let from_max =
        bare.strip_prefix("RTMAX").and_then(|rest| real_time(Some(rest.trim_start_matches('-')), 64, -1));
    known.or(from_min).or(from_max).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_name_and_number() {
        for (text, expected) in
            [("SIGTERM", 15), ("int", 2), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("SIGSYS", 31)]
        {
            assert_eq!(signal(text).ok(), Some(expected), "{text}");
        }
        for text in ["", "SIG", "0", "65", "NONSENSE", "RTMIN+99"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
