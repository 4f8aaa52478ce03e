//! What a process inside a sandbox can find out about it, by trying.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{dev, sys};
use crate::Capabilities;

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// What a sound sandbox answers.
    pub expected: String,
    /// What this one did.
    pub found: String,
}

impl Check {
    /// A check by its parts.
    pub fn new(name: &str, expected: impl ToString, found: impl ToString) -> Self {
        Self { name: name.to_owned(), expected: expected.to_string(), found: found.to_string() }
    }

    /// Whether it came out as it should.
    pub fn holds(&self) -> bool {
        self.expected == self.found
    }
}

/// Tries everything, from inside a sandbox with the default profile: a container that asked for
/// nothing, run by root. Changes nothing where the sandbox is sound; elsewhere the attempts are ones
/// that do no harm when they succeed.
pub fn probe_sandbox() -> Vec<Check> {
    let mut checks = identity();
    checks.extend(system_calls());
    checks.extend(file_systems());
    checks.extend(surroundings());
    checks
}

fn identity() -> Vec<Check> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or("unknown").trim().to_owned()
    };
    let (default, none) = (format!("{:016x}", Capabilities::default().mask()), "0".repeat(16));
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let map = map.split_whitespace().collect::<Vec<_>>().join(" ");
    vec![
        Check::new("capabilities, bounding", &default, field("CapBnd")),
        Check::new("capabilities, effective", &default, field("CapEff")),
        Check::new("capabilities, inheritable", &none, field("CapInh")),
        Check::new("capabilities, ambient", &none, field("CapAmb")),
        Check::new("seccomp filter", "2", field("Seccomp")),
        // Off as in docker and BuildKit, so that setuid programs work.
        Check::new("no_new_privs", "0", field("NoNewPrivs")),
        Check::new("user map", "0 0 4294967295", map),
    ]
}

/// Which errno a call gives; all of them get arguments that do no harm.
fn errno(number: libc::c_long, first: usize, second: usize) -> String {
    match sys::probe_call(number, first, second) {
        Ok(()) => "allowed".to_owned(),
        Err(Errno::PERM) => "EPERM".to_owned(),
        Err(Errno::NOSYS) => "ENOSYS".to_owned(),
        Err(errno) => format!("errno {}", errno.raw_os_error()),
    }
}

fn system_calls() -> Vec<Check> {
    const NEW_USER: usize = 0x1000_0000;
    const NEW_MOUNTS: usize = 0x2_0000;
    const ALG: usize = 38;
    const VSOCK: usize = 40;
    let refused = |name: &str, number, first, second| Check::new(name, "EPERM", errno(number, first, second));
    vec![
        refused("mount", libc::SYS_mount, 0, 0),
        refused("umount", libc::SYS_umount2, 0, 0),
        refused("pivot_root", libc::SYS_pivot_root, 0, 0),
        refused("fsopen", libc::SYS_fsopen, 0, 0),
        refused("unshare, mounts", libc::SYS_unshare, NEW_MOUNTS, 0),
        refused("unshare, users", libc::SYS_unshare, NEW_USER, 0),
        refused("setns", libc::SYS_setns, usize::MAX, 0),
        refused("keyctl", libc::SYS_keyctl, usize::MAX, 0),
        refused("add_key", libc::SYS_add_key, 0, 0),
        refused("bpf", libc::SYS_bpf, usize::MAX, 0),
        refused("perf_event_open", libc::SYS_perf_event_open, 0, 0),
        refused("userfaultfd", libc::SYS_userfaultfd, usize::MAX, 0),
        refused("io_uring_setup", libc::SYS_io_uring_setup, 0, 0),
        refused("kexec_load", libc::SYS_kexec_load, usize::MAX, usize::MAX),
        refused("init_module", libc::SYS_init_module, 0, 0),
        refused("open_by_handle_at", libc::SYS_open_by_handle_at, usize::MAX, 0),
        refused("socket, AF_ALG", libc::SYS_socket, ALG, usize::MAX),
        refused("socket, AF_VSOCK", libc::SYS_socket, VSOCK, usize::MAX),
        refused("personality, no randomization", libc::SYS_personality, 0x4_0000, 0),
        Check::new("clone3", "ENOSYS", errno(libc::SYS_clone3, 0, 0)),
    ]
}

fn file_systems() -> Vec<Check> {
    let mut checks = Vec::new();
    for path in ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/interrupts", "/proc/sched_debug"] {
        checks.push(Check::new(path, "hidden", hidden_file(path)));
    }
    for path in ["/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"] {
        let found = if names(path).is_empty() { "hidden" } else { "visible" };
        checks.push(Check::new(path, "hidden", found));
    }
    // Opened for writing, nothing written.
    for path in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"] {
        let writable = match path {
            // Covered by /dev/null, which swallows what is written to it; not every kernel has it.
            "/proc/sysrq-trigger" => fs::exists(path).unwrap_or(true) && !is_null(path),
            _ => fs::File::options().write(true).open(path).is_ok(),
        };
        checks.push(Check::new(
            &format!("{path}, writing"),
            "refused",
            if writable { "possible" } else { "refused" },
        ));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let options = |at: &str| {
        let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let found = fields.rfind(|fields| fields.get(4) == Some(&at));
        found.and_then(|fields| fields.get(5).map(|options| (*options).to_owned())).unwrap_or_default()
    };
    let sys_is =
        if options("/sys").split(',').any(|option| option == "ro") { "read-only" } else { "writable" };
    checks.push(Check::new("/sys", "read-only", sys_is));
    let nodev = if options("/").split(',').any(|option| option == "nodev") { "refused" } else { "possible" };
    checks.push(Check::new("devices on the root", "refused", nodev));
    let devices: BTreeSet<String> = names("/dev").into_iter().collect();
    let expected: BTreeSet<String> =
        dev::NAMES.iter().map(|name| (*name).to_owned()).chain(["shm".to_owned()]).collect();
    let list = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(" ");
    checks.push(Check::new("devices", list(&expected), list(&devices)));
    checks
}

fn hidden_file(path: &str) -> &'static str {
    let mut byte = [0];
    match fs::File::open(path).and_then(|mut file| file.read(&mut byte)) {
        Ok(0) | Err(_) => "hidden",
        Ok(_) => "visible",
    }
}

fn is_null(path: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |path: &str| fs::metadata(path).map(|file| file.rdev());
    matches!((of(path), of("/dev/null")), (Ok(one), Ok(other)) if one == other)
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn surroundings() -> Vec<Check> {
    // The list itself is read through a descriptor, which is gone again when it is looked at.
    let mut open = names("/proc/self/fd");
    open.retain(|number| fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok());
    open.sort();
    let processes =
        names("/proc").iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).count();
    let net = names("/sys/class/net").join(" ");
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let outside = groups.lines().filter(|line| !line.ends_with(":/")).count();
    let nofile = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let core = rustix::process::getrlimit(rustix::process::Resource::Core).maximum;
    vec![
        Check::new("open descriptors", "0 1 2", open.join(" ")),
        Check::new("processes in sight", "1", processes),
        Check::new("own number", "1", std::process::id()),
        Check::new("network devices", "lo", net),
        Check::new("control groups seen from outside", "0", outside),
        Check::new("open files at most 65536", "yes", if nofile <= 65_536 { "yes" } else { "no" }),
        Check::new("core files", "none", if core == Some(0) { "none" } else { "possible" }),
        Check::new("environment", "HOME PATH", {
            let mut names: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
            names.sort();
            names.join(" ")
        }),
    ]
}
