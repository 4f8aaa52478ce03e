//! Where a machine keeps its control groups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::userns::{self, Ids};
use crate::ExecError;

/// What a container can be held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Memory,
    Cpu,
    /// Version 1 counts processor time by itself.
    CpuTime,
    CpuSet,
    Pids,
    Io,
    /// Version 1's alone: in version 2 every group can be held.
    Freezer,
}

impl Controller {
    pub(super) const ALL: [Controller; 7] = [
        Controller::Memory,
        Controller::Cpu,
        Controller::CpuTime,
        Controller::CpuSet,
        Controller::Pids,
        Controller::Io,
        Controller::Freezer,
    ];

    /// Version 1's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Cpu => "cpu",
            Controller::CpuTime => "cpuacct",
            Controller::CpuSet => "cpuset",
            Controller::Pids => "pids",
            Controller::Io => "blkio",
            Controller::Freezer => "freezer",
        }
    }

    /// Version 2's name.
    fn unified_name(self) -> &'static str {
        match self {
            Controller::CpuTime => "cpu",
            Controller::Io => "io",
            other => other.name(),
        }
    }
}

/// One mounted tree of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) mount: PathBuf,
    /// Version 2.
    pub(super) unified: bool,
    /// By the version's own names.
    controllers: Vec<String>,
    /// This process's group, from the mount on.
    own: PathBuf,
}

/// The group that kiln makes its containers' in.
pub(super) const OWN_PARENT: &str = "kiln";

/// How the names of groups begin that were made for a container.
pub(super) const MADE: &str = "kiln-";
/// The group that kiln goes to in a part of the tree that is its own.
const OWN_PLACE: &str = "kiln-itself";

/// All of a machine's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout(Vec<Hierarchy>);

impl Layout {
    pub(super) fn of_machine() -> io::Result<Self> {
        let layout = Self::of("/proc/self/cgroup".as_ref())?;
        if layout.0.is_empty() { Err(io::Error::from(io::ErrorKind::NotFound)) } else { Ok(layout) }
    }

    /// The same with the groups of another process.
    pub(super) fn of_process(pid: i32) -> io::Result<Self> {
        Self::of(format!("/proc/{pid}/cgroup").as_ref())
    }

    fn of(groups: &Path) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?, &fs::read_to_string(groups)?))
    }

    /// The groups that are not those of `other`, with their directories.
    pub(super) fn differing(&self, other: &Self) -> impl Iterator<Item = (&Hierarchy, PathBuf)> {
        let differs = |hierarchy: &&Hierarchy| {
            !other.0.iter().any(|known| known.mount == hierarchy.mount && known.own == hierarchy.own)
        };
        self.0.iter().filter(differs).map(|hierarchy| (hierarchy, hierarchy.mount.join(&hierarchy.own)))
    }

    /// From the texts of `/proc/self/mountinfo` and `/proc/self/cgroup`.
    pub(super) fn parse(mounts: &str, own: &str) -> Self {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mounts.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let (before, after): (Vec<&str>, Vec<&str>) =
                (before.split(' ').collect(), after.split(' ').collect());
            let (&[_, _, _, root, mount, ..], &[kind, _, options, ..]) = (&before[..], &after[..]) else {
                continue;
            };
            let unified = match kind {
                "cgroup" => false,
                "cgroup2" => true,
                _ => continue,
            };
            let mount = PathBuf::from(mount);
            let options: Vec<&str> = options.split(',').collect();
            // ID:CONTROLLERS:PATH, without controllers for version 2.
            let path = own.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (names, path) = (parts.next()?, parts.next()?);
                let same = match unified {
                    true => names.is_empty(),
                    false => !names.is_empty() && names.split(',').all(|name| options.contains(&name)),
                };
                same.then(|| path.to_owned())
            });
            let Some(path) = path else { continue };
            let controllers = match unified {
                true => read_words(&mount.join("cgroup.controllers")),
                false => options.iter().map(|&option| option.to_owned()).collect(),
            };
            let own = Path::new(&path).strip_prefix(root).unwrap_or(Path::new("")).to_owned();
            if !found.iter().any(|known| known.mount == mount) {
                found.push(Hierarchy { mount, unified, controllers, own });
            }
        }
        Self(found)
    }

    /// That of version 2.
    pub(super) fn unified(&self) -> Option<&Hierarchy> {
        self.0.iter().find(|hierarchy| hierarchy.unified)
    }

    /// Whether this process may make groups beside its own: always on a machine without controllers in
    /// version 2, and as root; a user may in what was delegated to him.
    pub(super) fn is_ours_to_divide(&self) -> bool {
        let may_write = |path: &Path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
        let unified = self.unified().filter(|hierarchy| !hierarchy.controllers.is_empty());
        userns::ids() == Ids::Host
            || unified.is_none_or(|hierarchy| {
                let above = hierarchy.own_parent();
                above.parent().is_some_and(|dir| may_write(dir) && may_write(&dir.join("cgroup.procs")))
            })
    }

    /// The group that kiln made for a process, whose layout this is, in the hierarchy of another layout.
    pub(super) fn group_in(&self, hierarchy: &Hierarchy) -> Option<PathBuf> {
        let same = self.0.iter().find(|known| known.mount == hierarchy.mount)?;
        (same.is_made() && same.own != hierarchy.own).then(|| same.mount.join(&same.own))
    }

    /// The hierarchy that has a controller. On a hybrid machine each is in one of them only.
    pub(super) fn with(&self, controller: Controller) -> Option<&Hierarchy> {
        self.0.iter().find(|hierarchy| {
            let name = if hierarchy.unified { controller.unified_name() } else { controller.name() };
            hierarchy.controllers.iter().any(|known| known == name)
        })
    }
}

fn read_words(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

impl Hierarchy {
    /// Whether the process is in a group that was made for a container. Where one has none, it is in
    /// that of whoever started it, which may be another session's and is nobody's to enter.
    pub(super) fn is_made(&self) -> bool {
        let name = |part: std::path::Component<'_>| part.as_os_str().to_string_lossy().into_owned();
        let mut parts = self.own.components().map(name);
        parts.any(|part| part.starts_with(MADE) && part != OWN_PLACE && !part.ends_with(".scope"))
    }

    /// The directory for groups that nobody chose a parent for. Version 1: below kiln's own group,
    /// so that limits on kiln hold for what it starts. Version 2 allows no processes beside groups:
    /// there it is a neighbour of kiln's own.
    pub(super) fn own_parent(&self) -> PathBuf {
        let own = self.mount.join(&self.own);
        match self.own.parent() {
            Some(above) if self.unified => self.mount.join(above).join(OWN_PARENT),
            _ => own.join(OWN_PARENT),
        }
    }

    /// The group that a user named, from the hierarchy's top on.
    pub(super) fn below(&self, parent: &str) -> Result<PathBuf, ExecError> {
        let relative = parent.trim_matches('/');
        if relative.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            let setting = format!("--cgroup-parent {parent}");
            return Err(ExecError::BadSetting { setting, reason: "that is no name of a group".to_owned() });
        }
        Ok(self.mount.join(relative))
    }

    /// Makes the parent of a group, ready to have groups with limits in it. Version 2: limits of the
    /// controllers `needed`, by name; memory is counted where that can be had.
    pub(super) fn prepare(&self, parent: &Path, needed: &[&str]) -> io::Result<()> {
        fs::create_dir_all(parent)?;
        let steps = parent.strip_prefix(&self.mount).unwrap_or(Path::new(""));
        let mut dirs: Vec<&Path> = steps.ancestors().collect();
        dirs.reverse();
        let dirs = dirs.into_iter().map(|step| self.mount.join(step));
        if self.unified {
            dirs.into_iter().try_for_each(|dir| hand_down(&dir, needed))
        } else {
            if self.has_version_1_cpu_sets() {
                dirs.skip(1).try_for_each(|dir| inherit_cpu_sets(&dir))?;
            }
            Ok(())
        }
    }

    pub(super) fn has_version_1_cpu_sets(&self) -> bool {
        !self.unified && self.controllers.iter().any(|name| name == "cpuset")
    }

    /// Whether this process has done [`Hierarchy::step_down`].
    pub(super) fn is_stepped_down(&self) -> bool {
        self.own.file_name().is_some_and(|name| name == OWN_PLACE)
    }

    /// Version 2, when this process is alone in its group and the group is its own to divide: goes to a
    /// group below it, so that there can be others beside that.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn step_down(&self) -> io::Result<()> {
        let below = self.mount.join(&self.own).join(OWN_PLACE);
        fs::create_dir_all(&below)?;
        fs::write(below.join("cgroup.procs"), "0")
    }
}

/// Version 2: has a group's children get the controllers `needed`, and of the others, which limits may need
/// that are set later, those that can be had.
fn hand_down(dir: &Path, needed: &[&str]) -> io::Result<()> {
    let there = read_words(&dir.join("cgroup.controllers"));
    let given = read_words(&dir.join("cgroup.subtree_control"));
    for name in ["memory", "cpu", "cpuset", "pids", "io"] {
        if given.iter().any(|known| known == name) {
            continue;
        }
        let result = match there.iter().any(|known| known == name) {
            // One by one: of several, none is handed down when one is refused.
            true => fs::write(dir.join("cgroup.subtree_control"), format!("+{name}")),
            false => Err(io::Error::other("it was not handed down to here")),
        };
        if needed.contains(&name) {
            result.map_err(|error| refused(dir, name, error))?;
        }
    }
    Ok(())
}

/// Why a group's children do not get a controller, as far as can be told.
fn refused(dir: &Path, name: &str, error: io::Error) -> io::Error {
    let why = match error.kind() {
        io::ErrorKind::ResourceBusy => {
            "there are processes in it beside groups, which version 2 does not allow".to_owned()
        }
        _ => error.to_string(),
    };
    io::Error::new(error.kind(), format!("no controller {name} from {}: {why}", dir.display()))
}

/// Version 1: a new group has no processors and no memory nodes, and takes no process until it has.
pub(super) fn inherit_cpu_sets(dir: &Path) -> io::Result<()> {
    let Some(above) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(dir.join(file))?.trim().is_empty() {
            fs::write(dir.join(file), fs::read_to_string(above.join(file))?.trim())?;
        }
    }
    Ok(())
}
