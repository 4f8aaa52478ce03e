//! Control groups, versions 1 and 2 and both side by side: what a container may use, and what it
//! used.
//!
//! A container has one only when it was asked for a limit: joining costs the kernel more than all
//! the rest of a step. Groups are directories `kiln/NAME` below kiln's own groups, or below the
//! parent that was asked for. The name tells who made it, so that a later kiln can remove what a
//! killed one left.

mod layout;
mod live;
mod scope;
mod settings;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::UnshareFlags;

use self::layout::{Hierarchy, Layout, OWN_PARENT, inherit_cpu_sets};
pub use self::live::MoreGroups;
use self::settings::{Setting, Wanted, write_all};
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

    /// Makes a group with these limits; one to be paused, too, when it is `freezable`.
    ///
    /// # Errors
    /// [`ExecError::BadSetting`] when this machine cannot hold a container to one of them.
    pub(super) fn make(&self, limits: &Resources, freezable: bool) -> Result<Group, ExecError> {
        self.sweep();
        let layout = Layout::of_machine().map_err(no_groups)?;
        let wanted = Wanted { limits, freezable };
        if limits.parent.is_none() && !layout.is_ours_to_divide() {
            own_part().map_err(no_groups)?;
            return self.make_in(&Layout::of_machine().map_err(no_groups)?, &wanted);
        }
        self.make_in(&layout, &wanted)
    }

    fn make_in(&self, layout: &Layout, wanted: &Wanted<'_>) -> Result<Group, ExecError> {
        let mut group = Group { places: Vec::new() };
        let name = self.next_name()?;
        for (hierarchy, settings) in wanted.assign(layout)? {
            self.add_place(&mut group, hierarchy, &name, wanted.limits, settings)?;
        }
        Ok(group)
    }

    fn next_name(&self) -> Result<String, ExecError> {
        let own = own_name().map_err(no_groups)?;
        Ok(format!("{own}-{}", self.made.fetch_add(1, Ordering::Relaxed)))
    }

    /// Makes a group's directory in one hierarchy.
    fn add_place(
        &self,
        group: &mut Group,
        hierarchy: &Hierarchy,
        name: &str,
        limits: &Resources,
        settings: Vec<Setting>,
    ) -> Result<(), ExecError> {
        let parent = match &limits.parent {
            Some(parent) => hierarchy.below(parent)?,
            None => hierarchy.own_parent(),
        };
        let dir = parent.join(name);
        // systemd removes what is below a scope with the scope.
        if !hierarchy.is_stepped_down() {
            self.note(&parent);
        }
        let needed: Vec<&str> = settings.iter().map(Setting::controller).collect();
        make_below(hierarchy, &parent, &dir, &needed)?;
        group.places.push(Place { hierarchy: hierarchy.clone(), dir: dir.clone() });
        write_all(&dir, settings)?;
        if hierarchy.has_version_1_cpu_sets() {
            // What was not given is as above; without processors and nodes no process may join.
            inherit_cpu_sets(&dir).map_err(|error| unusable(&dir, error))?;
        }
        Ok(())
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
        usage_in(&self.places, otherwise)
    }
}

/// The groups of a process that somebody else put there, to read from what was used.
#[derive(Default)]
pub(super) struct Counted {
    places: Vec<Place>,
}

impl Counted {
    /// Those that `pid` is in and this process is not: what others use is not counted. None when they
    /// cannot be told, as of a process that is gone.
    pub(super) fn of_process(pid: i32) -> Self {
        let places = || -> io::Result<Vec<Place>> {
            let (own, theirs) = (Layout::of_machine()?, Layout::of_process(pid)?);
            let place = |(hierarchy, dir): (&Hierarchy, PathBuf)| Place { hierarchy: hierarchy.clone(), dir };
            Ok(theirs.differing(&own).map(place).collect())
        };
        Self { places: places().unwrap_or_default() }
    }

    /// What was used, where a group counts it; `otherwise` for the rest.
    pub(super) fn usage(&self, otherwise: Usage) -> Usage {
        usage_in(&self.places, otherwise)
    }
}

fn usage_in(places: &[Place], otherwise: Usage) -> Usage {
    let mut usage = otherwise;
    for place in places {
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

impl Drop for Group {
    fn drop(&mut self) {
        for place in &self.places {
            remove(&place.dir);
            place.dir.parent().into_iter().for_each(remove_own_parent);
        }
    }
}

/// Removes a group. Process 1 took the container's processes with it when it ended, before this; whoever
/// is in the group all the same (a helper that joined it and got no further) is ended.
fn remove(dir: &Path) {
    let is_busy = || fs::remove_dir(dir).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy);
    for _ in 0..100 {
        // The kernel is still taking the last process apart.
        if !is_busy() {
            return;
        }
        std::thread::yield_now();
    }
    for _ in 0..100 {
        end_members(dir);
        std::thread::sleep(Duration::from_millis(1));
        if !is_busy() {
            return;
        }
    }
}

/// Kills all that is in a group: at once where the kernel does that (`cgroup.kill`, since 5.14), one by one
/// in version 1, where a new one may be made meanwhile.
fn end_members(dir: &Path) {
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // What is frozen does not even die.
    let _ = fs::write(dir.join("freezer.state"), "THAWED");
    for member in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        // 0 stands for one that this process' namespace does not show.
        let member = member.parse().ok().and_then(rustix::process::Pid::from_raw);
        let _ = member.map(|member| rustix::process::kill_process(member, rustix::process::Signal::KILL));
    }
}

/// The files through which a process joins the groups that `pid` is in and this process is not.
///
/// # Errors
/// When the process is gone.
pub(super) fn doors_of(pid: i32) -> io::Result<Vec<String>> {
    let Ok(own) = Layout::of_machine() else { return Ok(Vec::new()) };
    let theirs = Layout::of_process(pid)?;
    let made = theirs.differing(&own).filter(|(hierarchy, _)| hierarchy.is_made());
    let doors: Vec<PathBuf> = made.map(|(_, dir)| dir.join("cgroup.procs")).collect();
    // The kernel asks who may move a process between two groups at the one above both.
    if !doors.is_empty() && !own.is_ours_to_divide() {
        own_part()?;
    }
    Ok(doors.into_iter().map(|door| door.display().to_string()).collect())
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
