//! Control groups, versions 1 and 2 and both side by side: what a container may use, and what it
//! used.
//!
//! A container has one only when it was asked for a limit: joining costs the kernel more than all
//! the rest of a step. Groups are directories `kiln/NAME` below kiln's own groups, or below the
//! parent that was asked for. The name tells who made it, so that a later kiln can remove what a
//! killed one left.

mod layout;
mod scope;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use self::layout::{Controller, Hierarchy, Layout, OWN_PARENT};
use super::sys;
use crate::{ExecError, Resources, Usage};

/// Makes groups.
pub(super) struct Groups {
    /// Lists, a line each, the directories groups were ever made in: where to sweep.
    register: PathBuf,
    made: AtomicU64,
}

/// A container's group: a directory in each hierarchy it needs. Removed with this value.
pub(super) struct Group {
    places: Vec<Place>,
}

struct Place {
    hierarchy: Hierarchy,
    dir: PathBuf,
}

impl Groups {
    pub(super) fn new(state: &Path) -> Self {
        Self { register: state.join("cgroups"), made: AtomicU64::new(0) }
    }

    /// Makes a group with these limits.
    ///
    /// # Errors
    /// [`ExecError::BadSetting`] when this machine cannot hold a container to one of them.
    pub(super) fn make(&self, wanted: &Resources) -> Result<Group, ExecError> {
        self.sweep();
        let layout = Layout::of_machine().map_err(no_groups)?;
        if wanted.parent.is_none() && !layout.is_ours_to_divide() {
            own_part().map_err(no_groups)?;
            return self.make_in(&Layout::of_machine().map_err(no_groups)?, wanted);
        }
        self.make_in(&layout, wanted)
    }

    fn make_in(&self, layout: &Layout, wanted: &Resources) -> Result<Group, ExecError> {
        let name =
            format!("{}-{}", own_name().map_err(no_groups)?, self.made.fetch_add(1, Ordering::Relaxed));
        let mut group = Group { places: Vec::new() };
        for (hierarchy, settings) in assign(layout, wanted)? {
            let parent = match &wanted.parent {
                Some(parent) => hierarchy.below(parent)?,
                None => hierarchy.own_parent(),
            };
            let dir = parent.join(&name);
            // systemd removes what is below a scope with the scope.
            if !hierarchy.is_stepped_down() {
                self.note(&parent);
            }
            let needed: Vec<&str> = settings.iter().map(Setting::controller).collect();
            make_below(hierarchy, &parent, &dir, &needed)?;
            group.places.push(Place { hierarchy: hierarchy.clone(), dir: dir.clone() });
            for setting in settings {
                setting.write(&dir)?;
            }
        }
        Ok(group)
    }

    /// Removes groups of kilns that are gone. A group that is still in use does not let itself be
    /// removed, whatever its name says.
    fn sweep(&self) {
        let Ok(list) = fs::read_to_string(&self.register) else { return };
        for parent in list.lines() {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                if is_left_behind(&entry.file_name().to_string_lossy()) {
                    let _ = fs::remove_dir(entry.path());
                }
            }
            remove_own_parent(Path::new(parent));
        }
    }

    /// Remembers where to sweep. Two at once may write the same line: it is swept twice.
    fn note(&self, parent: &Path) {
        let parent = parent.display().to_string();
        let known = fs::read_to_string(&self.register).unwrap_or_default();
        if !known.lines().any(|line| line == parent) {
            let file = fs::File::options().create(true).append(true).open(&self.register);
            let _ =
                file.and_then(|mut file| io::Write::write_all(&mut file, format!("{parent}\n").as_bytes()));
        }
    }
}

/// Makes a group and the parent it needs, which somebody else's last group may take away meanwhile.
fn make_below(hierarchy: &Hierarchy, parent: &Path, dir: &Path, needed: &[&str]) -> Result<(), ExecError> {
    let mut tries = 0;
    loop {
        match hierarchy.prepare(parent, needed).and_then(|()| fs::create_dir(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 100 => tries += 1,
            other => return other.map_err(|error| unusable(dir, error)),
        }
    }
}

/// Has a user's process be in a part of the tree that is his to divide; asked for once in its life.
///
/// # Errors
/// When there is nobody to give one.
fn own_part() -> io::Result<()> {
    static RESULT: OnceLock<Result<(), String>> = OnceLock::new();
    let result = RESULT.get_or_init(|| {
        let begin = || {
            scope::enter()?;
            Layout::of_machine()?.unified().ok_or(io::ErrorKind::NotFound)?.step_down()
        };
        begin().map_err(|error: io::Error| error.to_string())
    });
    result.clone().map_err(|reason| {
        io::Error::new(io::ErrorKind::PermissionDenied, format!("this user may not make any ({reason})"))
    })
}

/// Removes the parent that kiln made for its groups, unless there are others in it.
fn remove_own_parent(parent: &Path) {
    if parent.file_name().is_some_and(|name| name == OWN_PARENT) {
        let _ = fs::remove_dir(parent);
    }
}

/// `kiln-NAMESPACE-PID-START`: the kiln that made a group, never to come again as long as the
/// machine is up.
pub(super) fn own_name() -> io::Result<String> {
    let namespace = fs::metadata("/proc/self/ns/pid")?.ino();
    let pid = std::process::id();
    let start = start_time(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(format!("kiln-{namespace}-{pid}-{start}"))
}

fn is_left_behind(name: &str) -> bool {
    let mut parts = name.split('-');
    let (Some("kiln"), Some(namespace), Some(pid), Some(start)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    // Only in our own process namespace does a number say who is alive.
    let ours = fs::metadata("/proc/self/ns/pid").is_ok_and(|file| file.ino().to_string() == namespace);
    ours && pid.parse().is_ok_and(|pid| start_time(pid).is_none_or(|now| now.to_string() != start))
}

/// When a process started, in clock ticks since the machine did (proc_pid_stat(5), field 22).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl Group {
    /// The files through which a process joins.
    pub(super) fn doors(&self) -> Vec<String> {
        self.places.iter().map(|place| place.dir.join("cgroup.procs").display().to_string()).collect()
    }

    /// What was used, where a group counts it; `otherwise` for the rest.
    pub(super) fn usage(&self, otherwise: Usage) -> Usage {
        let mut usage = otherwise;
        for place in &self.places {
            let number = |file: &str| -> Option<u64> {
                fs::read_to_string(place.dir.join(file)).ok()?.trim().parse().ok()
            };
            let field = |file: &str, name: &str| -> Option<u64> {
                let text = fs::read_to_string(place.dir.join(file)).ok()?;
                text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
            };
            let (peak, cpu, kills) = if place.hierarchy.unified {
                let cpu = field("cpu.stat", "usage_usec").map(Duration::from_micros);
                (number("memory.peak"), cpu, field("memory.events", "oom_kill"))
            } else {
                let cpu = number("cpuacct.usage").map(Duration::from_nanos);
                (number("memory.max_usage_in_bytes"), cpu, field("memory.oom_control", "oom_kill"))
            };
            usage.peak_memory_bytes = peak.unwrap_or(usage.peak_memory_bytes);
            usage.cpu = cpu.unwrap_or(usage.cpu);
            usage.oom_kills = kills.unwrap_or(usage.oom_kills);
        }
        usage
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for place in &self.places {
            // EBUSY: the kernel is still taking the last process apart, which ended before this.
            for _ in 0..100 {
                match fs::remove_dir(&place.dir) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => std::thread::yield_now(),
                    _ => break,
                }
            }
            place.dir.parent().into_iter().for_each(remove_own_parent);
        }
    }
}

/// The files through which a process joins the groups that `pid` is in and this process is not.
///
/// # Errors
/// When the process is gone.
pub(super) fn doors_of(pid: i32) -> io::Result<Vec<String>> {
    let Ok(own) = Layout::of_machine() else { return Ok(Vec::new()) };
    let theirs = Layout::of_process(pid)?;
    let doors: Vec<PathBuf> = theirs.made_and_not_of(&own).collect();
    // The kernel asks who may move a process between two groups at the one above both.
    if !doors.is_empty() && !own.is_ours_to_divide() {
        own_part()?;
    }
    Ok(doors.into_iter().map(|dir| dir.join("cgroup.procs").display().to_string()).collect())
}

/// Has this process join the groups, and makes them the root of what it sees.
pub(super) fn join(doors: &[String]) -> Result<(), ExecError> {
    if doors.is_empty() {
        return Ok(());
    }
    for door in doors {
        fs::write(door, "0")
            .map_err(|source| ExecError::Start { step: format!("write to {door}"), source })?;
    }
    sys::unshare(UnshareFlags::NEWCGROUP).map_err(ExecError::start("cgroup namespace"))
}

/// A file of a group and what to write to it.
struct Setting {
    /// As the user knows it.
    option: &'static str,
    file: &'static str,
    value: String,
    /// Kernels without it hold nobody to it, and that is all right.
    optional: bool,
}

impl Setting {
    /// Version 2's name of the controller whose file it is.
    fn controller(&self) -> &'static str {
        self.file.split_once('.').map_or(self.file, |(name, _)| name)
    }

    fn write(&self, dir: &Path) -> Result<(), ExecError> {
        match fs::write(dir.join(self.file), &self.value) {
            Ok(()) => Ok(()),
            Err(_) if self.optional => Ok(()),
            Err(error) => {
                let setting = format!("{} ({} = {})", self.option, self.file, self.value);
                Err(ExecError::BadSetting { setting, reason: reason(&error) })
            }
        }
    }
}

fn reason(error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => "this kernel does not have it".to_owned(),
        Some(Errno::INVAL) => "the kernel does not take the value".to_owned(),
        _ => error.to_string(),
    }
}

fn no_groups(error: io::Error) -> ExecError {
    ExecError::BadSetting {
        setting: "a limit".to_owned(),
        reason: format!("no control groups here: {error}"),
    }
}

fn unusable(dir: &Path, error: io::Error) -> ExecError {
    let reason = format!("the control group {} cannot be used: {error}", dir.display());
    ExecError::BadSetting { setting: "a limit".to_owned(), reason }
}

/// The period over which processor time is shared out, in microseconds: the kernel's default.
const PERIOD: u64 = 100_000;

/// Which settings go to which hierarchy. Memory and processor time are counted wherever a group is
/// made at all.
fn assign<'a>(
    layout: &'a Layout,
    wanted: &Resources,
) -> Result<Vec<(&'a Hierarchy, Vec<Setting>)>, ExecError> {
    let mut assigned: Vec<(&Hierarchy, Vec<Setting>)> = Vec::new();
    for controller in Controller::ALL {
        let needed = is_needed(wanted, controller);
        let hierarchy = match layout.with(controller) {
            Some(hierarchy) => hierarchy,
            None if needed.is_none() => continue,
            None => {
                let setting = needed.unwrap_or_default().to_owned();
                let reason = format!("this machine has no control groups for {}", controller.name());
                return Err(ExecError::BadSetting { setting, reason });
            }
        };
        // Counting alone is no reason to join another hierarchy, but for memory and time.
        let counts = matches!(controller, Controller::Memory | Controller::CpuTime);
        if needed.is_none() && !counts {
            continue;
        }
        let settings =
            if hierarchy.unified { unified(wanted, controller) } else { split(wanted, controller) };
        match assigned.iter_mut().find(|(known, _)| known.mount == hierarchy.mount) {
            Some((_, known)) => known.extend(settings),
            None => assigned.push((hierarchy, settings)),
        }
    }
    Ok(assigned)
}

/// The option that needs this controller, if one was given.
fn is_needed(wanted: &Resources, controller: Controller) -> Option<&'static str> {
    let given = match controller {
        Controller::Memory => (wanted.memory_bytes.is_some(), "--memory"),
        Controller::Cpu if wanted.cpu_millionths.is_some() => (true, "--cpus"),
        Controller::Cpu => (wanted.cpu_shares.is_some(), "--cpu-shares"),
        Controller::CpuSet => (wanted.cpus.is_some() || wanted.memory_nodes.is_some(), "--cpuset-cpus"),
        Controller::Pids => (wanted.pids.is_some(), "--pids-limit"),
        Controller::Io => (wanted.io_weight.is_some(), "--blkio-weight"),
        Controller::CpuTime => (false, ""),
    };
    given.0.then_some(given.1)
}

fn quota(millionths: u64) -> u64 {
    // The kernel takes no quota below a millisecond.
    (millionths * PERIOD / 1_000_000).max(1000)
}

/// Version 2.
fn unified(wanted: &Resources, controller: Controller) -> Vec<Setting> {
    let set = |option, file, value: String| Setting { option, file, value, optional: false };
    match controller {
        Controller::Memory => {
            let Some(memory) = wanted.memory_bytes else { return Vec::new() };
            let swap = wanted.swap_bytes.unwrap_or(memory).to_string();
            vec![
                set("--memory", "memory.max", memory.to_string()),
                // Kernels without swap accounting have no such file.
                Setting {
                    optional: wanted.swap_bytes.is_none(),
                    ..set("--memory-swap", "memory.swap.max", swap)
                },
            ]
        }
        Controller::Cpu => {
            let time = wanted
                .cpu_millionths
                .map(|time| set("--cpus", "cpu.max", format!("{} {PERIOD}", quota(time))));
            let shares = wanted.cpu_shares.map(|shares| {
                // 2 to 262144 become 1 to 10000, as every runtime does it.
                let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
                set("--cpu-shares", "cpu.weight", weight.to_string())
            });
            time.into_iter().chain(shares).collect()
        }
        Controller::CpuSet => cpu_sets(wanted),
        Controller::Pids => pids(wanted),
        Controller::Io => {
            let weight = |weight: u64| 1 + (weight.clamp(10, 1000) - 10) * 9999 / 990;
            let weight = wanted.io_weight.map(weight);
            weight.map(|weight| set("--blkio-weight", "io.weight", weight.to_string())).into_iter().collect()
        }
        Controller::CpuTime => Vec::new(),
    }
}

/// Version 1.
fn split(wanted: &Resources, controller: Controller) -> Vec<Setting> {
    let set = |option, file, value: String| Setting { option, file, value, optional: false };
    match controller {
        Controller::Memory => {
            let Some(memory) = wanted.memory_bytes else { return Vec::new() };
            // One limit for both together, which must not be below the first at any time.
            let both = memory.saturating_add(wanted.swap_bytes.unwrap_or(memory)).to_string();
            vec![
                set("--memory", "memory.limit_in_bytes", memory.to_string()),
                Setting {
                    optional: wanted.swap_bytes.is_none(),
                    ..set("--memory-swap", "memory.memsw.limit_in_bytes", both)
                },
            ]
        }
        Controller::Cpu => {
            let time = wanted.cpu_millionths.map(|time| {
                [
                    set("--cpus", "cpu.cfs_period_us", PERIOD.to_string()),
                    set("--cpus", "cpu.cfs_quota_us", quota(time).to_string()),
                ]
            });
            let shares =
                wanted.cpu_shares.map(|shares| set("--cpu-shares", "cpu.shares", shares.to_string()));
            time.into_iter().flatten().chain(shares).collect()
        }
        Controller::CpuSet => cpu_sets(wanted),
        Controller::Pids => pids(wanted),
        Controller::Io => {
            let weight = wanted.io_weight.map(|weight| weight.to_string());
            weight.map(|weight| set("--blkio-weight", "blkio.bfq.weight", weight)).into_iter().collect()
        }
        Controller::CpuTime => Vec::new(),
    }
}

fn cpu_sets(wanted: &Resources) -> Vec<Setting> {
    let set = |option, file, value: &Option<String>| {
        value.clone().map(|value| Setting { option, file, value, optional: false })
    };
    let cpus = set("--cpuset-cpus", "cpuset.cpus", &wanted.cpus);
    cpus.into_iter().chain(set("--cpuset-mems", "cpuset.mems", &wanted.memory_nodes)).collect()
}

fn pids(wanted: &Resources) -> Vec<Setting> {
    let pids = wanted.pids.map(|pids| pids.to_string());
    let setting = |value| Setting { option: "--pids-limit", file: "pids.max", value, optional: false };
    pids.map(setting).into_iter().collect()
}
