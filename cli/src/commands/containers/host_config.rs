//! The part `HostConfig` of `kiln inspect`.

use kiln_containers::{Config, MountKind, Volumes};
use kiln_executor::{Capabilities, ProcessSpec, Seccomp, Security, SystemPaths};
use serde_json::{Map, Value, json};

use super::ps::network;
use crate::session::Session;

/// What docker shows of how a container is run.
pub(super) fn host_config(session: &Session, config: &Config) -> Value {
    let volumes = Volumes::open(session.containers.root());
    let binds = config.mounts.iter().filter_map(|mount| {
        let source = match &mount.kind {
            MountKind::Bind(path) => path.display().to_string(),
            MountKind::Volume { name, anonymous: false, .. } => {
                volumes.find(name).map_or_else(|_| name.clone(), |volume| volume.name)
            }
            _ => return None,
        };
        Some(format!("{source}:{}{}", mount.target, if mount.read_only { ":ro" } else { "" }))
    });
    let mut bindings: Map<String, Value> = Map::new();
    for port in &config.ports {
        let host = port.host.map_or_else(String::new, |host| host.to_string());
        let binding = json!({ "HostIp": port.host_address, "HostPort": host });
        let list = bindings.entry(port.key()).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.push(binding);
        }
    }
    let (max_size, max_file) = (config.log.max_bytes, config.log.max_files);
    let mut log = Map::new();
    if let Some(bytes) = max_size {
        log.insert("max-size".to_owned(), bytes.to_string().into());
        log.insert("max-file".to_owned(), max_file.to_string().into());
    }
    let process = &config.process;
    let (added, dropped) = process.capabilities.differences();
    let capabilities = |set: Capabilities| set.names().map(|name| format!("CAP_{name}")).collect::<Vec<_>>();
    let tmpfs = config.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Tmpfs { size_bytes, mode, executable } => {
            let size = size_bytes.map(|bytes| format!("size={bytes}"));
            let mode = mode.map(|mode| format!("mode={mode:o}"));
            let options: Vec<_> =
                size.into_iter().chain(mode).chain(executable.then(|| "exec".to_owned())).collect();
            Some((mount.target.clone(), options.join(",").into()))
        }
        _ => None,
    });
    let tmpfs: Map<String, Value> = tmpfs.collect();
    let devices = process.devices.iter().filter(|_| process.security == Security::Sandbox);
    let devices = devices.map(|device| {
        json!({ "PathOnHost": device.path, "PathInContainer": device.path, "CgroupPermissions": "rwm" })
    });
    let limits = process.rlimits.iter().map(|limit| {
        let value = |limit: Option<u64>| limit.map_or(json!(-1), |limit| json!(limit));
        json!({ "Name": limit.name(), "Soft": value(limit.soft), "Hard": value(limit.hard) })
    });
    let sysctls: Map<String, Value> =
        process.sysctls.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let rest = json!({
        "CapAdd": capabilities(added),
        "CapDrop": capabilities(dropped),
        "ReadonlyRootfs": process.read_only,
        "ShmSize": process.shm_size_bytes,
        "Devices": devices.collect::<Vec<_>>(),
        "Tmpfs": tmpfs,
        "Init": process.reaper,
        "OomScoreAdj": process.oom_score_adj.unwrap_or(0),
        "GroupAdd": process.more_groups,
        "SecurityOpt": security_options(process),
        "Ulimits": limits.collect::<Vec<_>>(),
        "Sysctls": sysctls,
        "PidMode": "",
        "IpcMode": "private",
        "UTSMode": "",
        "UsernsMode": "",
        "VolumesFrom": null,
        "Runtime": "kiln",
        "Binds": binds.collect::<Vec<_>>(),
        "ContainerIDFile": "",
        "LogConfig": { "Type": if config.log.none { "none" } else { "json-file" }, "Config": log },
        "NetworkMode": network(config),
        "PortBindings": bindings,
        "RestartPolicy": { "Name": config.restart.name(), "MaximumRetryCount": config.restart.maximum() },
        "AutoRemove": config.auto_remove,
        "ExtraHosts": config.process.extra_hosts.iter().map(|(name, at)| format!("{name}:{at}")).collect::<Vec<_>>(),
        "Privileged": config.process.security == kiln_executor::Security::Insecure,
        "PublishAllPorts": config.publish_all,
        "Dns": config.process.resolver.servers,
        "DnsSearch": config.process.resolver.search,
        "DnsOptions": config.process.resolver.options,
    });
    let mut document = resources(process);
    if let (Value::Object(all), Value::Object(rest)) = (&mut document, rest) {
        all.extend(rest);
    }
    document
}

/// What the container may use of the machine.
fn resources(process: &ProcessSpec) -> Value {
    let usage = process.resources.clone().unwrap_or_default();
    let memory = usage.memory_bytes.unwrap_or(0);
    let both = usage.memory_bytes.map_or(0, |memory| {
        usage.swap_bytes.map_or(memory.saturating_mul(2), |swap| memory.saturating_add(swap))
    });
    // docker: -1 is as much as there is.
    let both = i64::try_from(both).unwrap_or(-1);
    // As it was asked for: in processors, or as a quota.
    let (nano_cpus, quota, period) = match (usage.cpu_period_micros, usage.cpu_time()) {
        (None, _) => (usage.cpu_millionths.unwrap_or(0).saturating_mul(1000), 0, 0),
        (Some(period), time) => (0, time.map_or(0, |(quota, _)| quota), period),
    };
    json!({
        "Memory": memory,
        "MemorySwap": both,
        "MemoryReservation": usage.memory_reservation_bytes.unwrap_or(0),
        "NanoCpus": nano_cpus,
        "CpuPeriod": period,
        "CpuQuota": quota,
        "CpuShares": usage.cpu_shares.unwrap_or(0),
        "CpusetCpus": usage.cpus.unwrap_or_default(),
        "CpusetMems": usage.memory_nodes.unwrap_or_default(),
        "PidsLimit": usage.pids,
        "BlkioWeight": usage.io_weight.unwrap_or(0),
        "CgroupParent": usage.parent.unwrap_or_default(),
    })
}

fn security_options(process: &ProcessSpec) -> Vec<String> {
    let mut options = Vec::new();
    if process.no_new_privileges {
        options.push("no-new-privileges".to_owned());
    }
    match &process.seccomp {
        Seccomp::Default => {}
        Seccomp::Unconfined => options.push("seccomp=unconfined".to_owned()),
        Seccomp::Profile(profile) => options.push(format!("seccomp={}", String::from(profile.clone()))),
    }
    if process.system_paths == SystemPaths::Open {
        options.push("systempaths=unconfined".to_owned());
    }
    options
}
