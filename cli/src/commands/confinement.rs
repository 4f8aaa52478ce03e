//! From `kiln run`'s options to what the process is given and held to.

use kiln_containers::devices;
use kiln_executor::{
    Capabilities, Network, ProcessSpec, Resources, Seccomp, SeccompProfile, Security, SystemPaths,
    check_sysctl,
};

use crate::args::confinement::ConfinementArgs;
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
    let parent = args.cgroup_parent.clone();
    let resources = args.limits.over(&Resources { parent, ..Resources::default() })?;
    Ok((resources != Resources::default()).then_some(resources))
}
