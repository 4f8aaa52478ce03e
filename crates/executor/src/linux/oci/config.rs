//! `config.json` of a bundle (runtime-spec 1.0).

use std::path::PathBuf;

use kiln_oci::TmpfsMount;
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

use super::Runtime;
use crate::linux::channel::Task;
use crate::linux::limits::OPEN_FILES;
use crate::linux::mounts::{MASKED, READ_ONLY};
use crate::linux::user::UserIds;
use crate::linux::userns::{self, Ids};
use crate::{Network, ProcessSpec, ResourceLimit, Resources, Security, SystemPaths};

/// What stands ready for a container.
pub(super) struct Bundle {
    pub(super) root: PathBuf,
    pub(super) shown: Vec<Shown>,
    pub(super) ids: UserIds,
}

/// A mount below the root.
pub(super) enum Shown {
    /// Of something that is mounted in the helper's namespace.
    Bind {
        source: PathBuf,
        target: String,
        read_only: bool,
    },
    Tmpfs(TmpfsMount),
}

impl Bundle {
    pub(super) fn config(&self, task: &Task, runtime: &Runtime, id: &str) -> Value {
        let spec = &task.spec;
        json!({
            "ociVersion": "1.0.2",
            "process": self.process(task),
            "root": { "path": self.root, "readonly": spec.read_only },
            "hostname": spec.hostname,
            "mounts": self.mounts(spec),
            "linux": linux(spec, runtime, id),
        })
    }

    fn process(&self, task: &Task) -> Value {
        let spec = &task.spec;
        let mut env: Vec<String> = spec.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if spec.env.iter().all(|(name, _)| name != "HOME") {
            env.push(format!("HOME={}", self.ids.home));
        }
        if spec.env.iter().all(|(name, _)| name != "PATH") {
            env.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
        }
        let capabilities = capabilities(spec);
        // As the sandbox has it: only root has any of its own.
        let own: &[String] = if self.ids.uid == 0 { &capabilities } else { &[] };
        let mut process = json!({
            "terminal": task.terminal,
            "user": {
                "uid": self.ids.uid,
                "gid": self.ids.gid,
                "umask": 0o022,
                "additionalGids": self.ids.groups,
            },
            "args": spec.args,
            "env": env,
            "cwd": spec.cwd,
            "capabilities": {
                "bounding": capabilities,
                "effective": own,
                "permitted": own,
                "inheritable": [],
                "ambient": [],
            },
            "rlimits": rlimits(&spec.rlimits),
            "noNewPrivileges": spec.no_new_privileges,
        });
        if let Some(score) = spec.oom_score_adj {
            process["oomScoreAdj"] = score.into();
        }
        process
    }

    fn mounts(&self, spec: &ProcessSpec) -> Vec<Value> {
        let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
        let shm = format!("size={}", spec.shm_size_bytes);
        let writable = if spec.security == Security::Sandbox { "ro" } else { "rw" };
        let mut mounts = vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            match spec.network {
                // That of a network namespace which is not the user's own cannot be mounted anew.
                Network::Host if userns::ids() != Ids::Host => {
                    mount("/sys", "bind", "/sys", &["rbind", "rprivate", "nosuid", "noexec", "nodev", "ro"])
                }
                _ => mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", writable]),
            },
        ];
        for shown in &self.shown {
            mounts.push(match shown {
                Shown::Bind { source, target, read_only } => {
                    // Said again although the source has these attributes: some set all of them anew.
                    let mut options = vec!["rbind", "rprivate"];
                    options.extend(read_only.then_some("ro"));
                    options.extend((spec.security == Security::Sandbox).then_some("nodev"));
                    mount(target, "bind", &source.to_string_lossy(), &options)
                }
                Shown::Tmpfs(TmpfsMount { target, size_bytes, mode, executable }) => {
                    let size = size_bytes.map(|bytes| format!("size={bytes}"));
                    let mode = mode.map(|mode| format!("mode={mode:o}"));
                    let mut options = vec!["nosuid", "nodev"];
                    options.extend((!executable).then_some("noexec"));
                    options.extend(size.iter().chain(&mode).map(String::as_str));
                    mount(target, "tmpfs", "tmpfs", &options)
                }
            });
        }
        mounts
    }
}

fn linux(spec: &ProcessSpec, runtime: &Runtime, id: &str) -> Value {
    let masked = spec.security == Security::Sandbox && spec.system_paths == SystemPaths::Masked;
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    let sysctls: serde_json::Map<String, Value> =
        spec.sysctls.iter().map(|(name, value)| (name.replace('/', "."), json!(value))).collect();
    let devices = spec.devices.iter().map(|device| {
        json!({
            "path": device.path,
            "type": if device.block { "b" } else { "c" },
            "major": device.number.0,
            "minor": device.number.1,
            "fileMode": device.mode & 0o7777,
            "uid": device.owner.0,
            "gid": device.owner.1,
        })
    });
    let has_group = userns::ids() == Ids::Host;
    let parent = spec.resources.as_ref().and_then(|wanted| wanted.parent.as_deref()).unwrap_or("kiln");
    let mut value = json!({
        "namespaces": namespaces,
        "sysctl": sysctls,
        "devices": devices.collect::<Vec<_>>(),
        "maskedPaths": if masked { &MASKED[..] } else { &[] },
        "readonlyPaths": if masked { &READ_ONLY[..] } else { &[] },
    });
    // A user has none to make others below.
    if has_group {
        value["cgroupsPath"] = format!("/{}/{id}", parent.trim_matches('/')).into();
        value["resources"] = resources(spec);
    }
    if let Some(seccomp) = &runtime.seccomp {
        value["seccomp"] = seccomp.clone();
    }
    value
}

fn resources(spec: &ProcessSpec) -> Value {
    let default = Resources::default();
    let wanted = spec.resources.as_ref().unwrap_or(&default);
    let mut value = json!({ "devices": device_rules(spec) });
    // What is not asked for is not said: a runtime has no limit then.
    let mut set = |pointer: [&str; 2], limit: Option<Value>| {
        if let Some(limit) = limit {
            value[pointer[0]][pointer[1]] = limit;
        }
    };
    let whole = |limit: u64| i64::try_from(limit).unwrap_or(-1);
    let swap = wanted.memory_bytes.map(|memory| {
        let swap = wanted.swap_bytes.unwrap_or(memory);
        whole(memory.saturating_add(swap))
    });
    set(["memory", "limit"], wanted.memory_bytes.map(|bytes| whole(bytes).into()));
    set(["memory", "swap"], swap.map(Value::from));
    set(["memory", "reservation"], wanted.memory_reservation_bytes.map(|bytes| whole(bytes).into()));
    if let Some((quota, period)) = wanted.cpu_time() {
        set(["cpu", "quota"], Some(quota.into()));
        set(["cpu", "period"], Some(period.into()));
    }
    set(["cpu", "shares"], wanted.cpu_shares.map(Value::from));
    set(["cpu", "cpus"], wanted.cpus.clone().map(Value::from));
    set(["cpu", "mems"], wanted.memory_nodes.clone().map(Value::from));
    set(["pids", "limit"], wanted.pids.or(spec.task_limit.map(u64::from)).map(|pids| whole(pids).into()));
    set(["blockIO", "weight"], wanted.io_weight.map(Value::from));
    value
}

/// What the device filter of a control group lets be opened: the harmless ones are the runtime's own.
fn device_rules(spec: &ProcessSpec) -> Vec<Value> {
    if spec.security == Security::Insecure {
        return vec![json!({ "allow": true, "access": "rwm" })];
    }
    let own = spec.devices.iter().map(|device| {
        json!({
            "allow": true,
            "type": if device.block { "b" } else { "c" },
            "major": device.number.0,
            "minor": device.number.1,
            "access": "rwm",
        })
    });
    std::iter::once(json!({ "allow": false, "access": "rwm" })).chain(own).collect()
}

/// Names of what a process may have at most: nobody can give what he does not have.
fn capabilities(spec: &ProcessSpec) -> Vec<String> {
    let own = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    let allowed = match spec.security {
        Security::Sandbox => spec.capabilities.mask() & own.bits(),
        Security::Insecure => own.bits(),
    };
    crate::Capabilities::of_mask(allowed).names().map(|name| format!("CAP_{name}")).collect()
}

fn rlimits(given: &[ResourceLimit]) -> Vec<Value> {
    let (soft, hard) = OPEN_FILES;
    let now = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let hard = now.maximum.map_or(hard, |now| now.min(hard));
    let usual = [
        ResourceLimit { resource: ResourceLimit::CORE, soft: Some(0), hard: Some(0) },
        ResourceLimit { resource: ResourceLimit::OPEN_FILES, soft: Some(soft.min(hard)), hard: Some(hard) },
    ];
    let usual = usual.into_iter().filter(|limit| given.iter().all(|other| other.resource != limit.resource));
    let limit = |limit: ResourceLimit| {
        json!({
            "type": format!("RLIMIT_{}", limit.name().to_ascii_uppercase()),
            "soft": limit.soft.unwrap_or(u64::MAX),
            "hard": limit.hard.unwrap_or(u64::MAX),
        })
    };
    usual.chain(given.iter().copied()).map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_in_the_units_of_the_specification() {
        let wanted = Resources {
            memory_bytes: Some(64 << 20),
            cpu_millionths: Some(1_500_000),
            pids: Some(10),
            ..Resources::default()
        };
        let json = resources(&ProcessSpec { resources: Some(wanted), ..ProcessSpec::default() });
        assert_eq!(json["memory"], json!({ "limit": 64 << 20, "swap": 128 << 20 }));
        assert_eq!(json["cpu"], json!({ "quota": 150_000, "period": 100_000 }));
        assert_eq!(json["pids"]["limit"], 10);
        assert!(json.get("blockIO").is_none());
        assert!(resources(&ProcessSpec::default()).get("memory").is_none());
    }

    #[test]
    fn a_limit_that_is_given_stands_in_the_place_of_the_usual_one() {
        let given = [ResourceLimit { resource: ResourceLimit::CORE, soft: Some(1), hard: None }];
        let json = rlimits(&given);
        assert_eq!(json.len(), 2);
        assert_eq!(json[1], json!({ "type": "RLIMIT_CORE", "soft": 1, "hard": u64::MAX }));
    }
}
