//! Other limits for a container that runs.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;

use super::layout::{Controller, Layout};
use super::settings::{changes, write_all};
use super::{Group, Groups, Wanted, no_groups, start_time, unusable};
use crate::linux::join::process_of;
use crate::{ExecError, Linux, Resources, Usage};

/// Control groups that a container was given while it ran. Kept until it has ended: they go with this.
pub struct MoreGroups {
    group: Group,
}

impl MoreGroups {
    /// Moves all processes of the container here, those too that have joined it since and had looked for its
    /// groups before.
    ///
    /// # Errors
    /// As [`Linux::change_limits`].
    pub fn gather(&self, container: BorrowedFd<'_>) -> Result<(), ExecError> {
        process_of(container).map_or(Ok(()), |pid| move_all(pid, &self.group))
    }

    /// Processes killed because their memory was used up.
    pub fn oom_kills(&self) -> u64 {
        self.group.usage(Usage::default()).oom_kills
    }
}

impl Linux {
    /// Holds a running container, whose process 1 `container` is a pidfd of, to other limits. Where it has a
    /// control group for one of them, that is changed; where it has none, because it was asked for no such
    /// limit before, it gets one, and all its processes move there. That is then in the answer.
    ///
    /// # Errors
    /// [`ExecError::BadSetting`] when the kernel refuses a limit, such as memory below what is in use; the
    /// others are as they were then, as far as the kernel takes them back.
    pub fn change_limits(
        &self,
        container: BorrowedFd<'_>,
        before: &Resources,
        wanted: &Resources,
    ) -> Result<Option<MoreGroups>, ExecError> {
        let Some(pid) = process_of(container) else { return Ok(None) };
        let layouts = Layout::of_machine().and_then(|own| Ok((own, Layout::of_process(pid)?)));
        let (own, theirs) = layouts.map_err(no_groups)?;
        let group = self.groups.change((&own, &theirs), before, wanted)?;
        if group.places.is_empty() {
            return Ok(None);
        }
        move_all(pid, &group)?;
        Ok(Some(MoreGroups { group }))
    }
}

impl Groups {
    /// Writes to the groups that there are, and makes those that there are not.
    pub(super) fn change(
        &self,
        (own, theirs): (&Layout, &Layout),
        before: &Resources,
        wanted: &Resources,
    ) -> Result<Group, ExecError> {
        let mut group = Group { places: Vec::new() };
        let name = self.next_name()?;
        let mut done = Vec::new();
        for controller in Controller::ALL {
            let Some(hierarchy) = own.with(controller) else {
                // A controller that the machine lacks: what is asked of it is an error as at the start.
                Wanted { limits: wanted, freezable: false }.assign(own)?;
                continue;
            };
            let settings = changes(hierarchy, controller, before, wanted);
            if settings.is_empty() {
                continue;
            }
            let result = match theirs.group_in(hierarchy) {
                Some(dir) => {
                    done.push((dir.clone(), changes(hierarchy, controller, wanted, before)));
                    write_all(&dir, settings)
                }
                None => match group.places.iter().find(|place| place.hierarchy.mount == hierarchy.mount) {
                    Some(place) => write_all(&place.dir, settings),
                    None => self.add_place(&mut group, hierarchy, &name, wanted, settings),
                },
            };
            if let Err(error) = result {
                for (dir, settings) in done {
                    let _ = write_all(&dir, settings);
                }
                return Err(error);
            }
        }
        Ok(group)
    }
}

/// Moves all processes of the container of `pid` into a group: again and again until no new ones appear,
/// for one that was started by a process that had not been moved is where that was.
fn move_all(pid: i32, group: &Group) -> Result<(), ExecError> {
    let mut moved = HashSet::new();
    loop {
        let all = processes_with(pid).map_err(|source| ExecError::Start {
            step: "list of the container's processes".to_owned(),
            source,
        })?;
        let new: Vec<u32> = all.into_iter().filter(|pid| moved.insert((*pid, start_time(*pid)))).collect();
        if new.is_empty() {
            return Ok(());
        }
        for (pid, door) in new.iter().flat_map(|pid| group.doors().into_iter().map(move |door| (pid, door))) {
            match fs::write(&door, pid.to_string()) {
                // It has ended.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => {}
                other => other.map_err(|error| unusable(door.as_ref(), error))?,
            }
        }
    }
}

/// The processes in the process namespace of `pid`, and what those have started.
fn processes_with(pid: i32) -> io::Result<Vec<u32>> {
    let namespace =
        |pid: u32| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|file| (file.dev(), file.ino()));
    let own = namespace(u32::try_from(pid).unwrap_or(0))?;
    let (mut found, mut parents) = (HashSet::new(), HashMap::new());
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if namespace(pid).is_ok_and(|theirs| theirs == own) {
            found.insert(pid);
        } else if let Some(parent) = parent_of(pid) {
            parents.insert(pid, parent);
        }
    }
    loop {
        let more: Vec<u32> =
            parents.iter().filter(|(_, parent)| found.contains(parent)).map(|(pid, _)| *pid).collect();
        if more.is_empty() {
            return Ok(found.into_iter().collect());
        }
        for pid in more {
            parents.remove(&pid);
            found.insert(pid);
        }
    }
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
