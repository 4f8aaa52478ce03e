//! What is written to which file of a group, in either version.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::layout::{Controller, Hierarchy, Layout};
use crate::{ExecError, Resources};

/// A file of a group and what to write to it.
pub(super) struct Setting {
    /// As the user knows it.
    option: &'static str,
    pub(super) file: &'static str,
    pub(super) value: String,
    /// Kernels without it hold nobody to it, and that is all right.
    optional: bool,
}

impl Setting {
    /// Version 2's name of the controller whose file it is.
    pub(super) fn controller(&self) -> &'static str {
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

/// Writes settings in order. What the kernel does not take before another one has changed, as two limits
/// of which one must not be below the other, is written once more at the end.
pub(super) fn write_all(dir: &Path, settings: Vec<Setting>) -> Result<(), ExecError> {
    let refused: Vec<Setting> = settings
        .into_iter()
        .filter(|setting| fs::write(dir.join(setting.file), &setting.value).is_err())
        .collect();
    refused.iter().try_for_each(|setting| setting.write(dir))
}

/// What a group is for.
pub(super) struct Wanted<'a> {
    pub(super) limits: &'a Resources,
    /// All its processes can be held together.
    pub(super) freezable: bool,
}

impl Wanted<'_> {
    /// Which settings go to which hierarchy. Memory and processor time are counted wherever a group is
    /// made at all.
    pub(super) fn assign<'l>(
        &self,
        layout: &'l Layout,
    ) -> Result<Vec<(&'l Hierarchy, Vec<Setting>)>, ExecError> {
        let mut assigned: Vec<(&Hierarchy, Vec<Setting>)> = Vec::new();
        for controller in Controller::ALL {
            let needed = is_needed(self.limits, controller);
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
            let counts = match controller {
                Controller::Memory | Controller::CpuTime => true,
                Controller::Freezer => self.freezable,
                _ => false,
            };
            if needed.is_none() && !counts {
                continue;
            }
            let settings = settings(hierarchy, self.limits, controller);
            match assigned.iter_mut().find(|(known, _)| known.mount == hierarchy.mount) {
                Some((_, known)) => known.extend(settings),
                None => assigned.push((hierarchy, settings)),
            }
        }
        Ok(assigned)
    }
}

fn settings(hierarchy: &Hierarchy, wanted: &Resources, controller: Controller) -> Vec<Setting> {
    if hierarchy.unified { unified(wanted, controller) } else { split(wanted, controller) }
}

/// The option that needs this controller, if one was given.
fn is_needed(wanted: &Resources, controller: Controller) -> Option<&'static str> {
    let given = match controller {
        Controller::Memory if wanted.memory_bytes.is_some() => (true, "--memory"),
        Controller::Memory => (wanted.memory_reservation_bytes.is_some(), "--memory-reservation"),
        Controller::Cpu if wanted.cpu_millionths.is_some() => (true, "--cpus"),
        Controller::Cpu => (wanted.cpu_shares.is_some(), "--cpu-shares"),
        Controller::CpuSet => (wanted.cpus.is_some() || wanted.memory_nodes.is_some(), "--cpuset-cpus"),
        Controller::Pids => (wanted.pids.is_some(), "--pids-limit"),
        Controller::Io => (wanted.io_weight.is_some(), "--blkio-weight"),
        Controller::CpuTime | Controller::Freezer => (false, ""),
    };
    given.0.then_some(given.1)
}

/// Version 2.
fn unified(wanted: &Resources, controller: Controller) -> Vec<Setting> {
    let set = |option, file, value: String| Setting { option, file, value, optional: false };
    match controller {
        Controller::Memory => {
            let limits = wanted.memory_bytes.map(|memory| {
                let swap = wanted.swap_bytes.unwrap_or(memory).to_string();
                [
                    set("--memory", "memory.max", memory.to_string()),
                    // Kernels without swap accounting have no such file.
                    Setting {
                        optional: wanted.swap_bytes.is_none(),
                        ..set("--memory-swap", "memory.swap.max", swap)
                    },
                ]
            });
            let reserved = wanted
                .memory_reservation_bytes
                .map(|bytes| set("--memory-reservation", "memory.low", bytes.to_string()));
            limits.into_iter().flatten().chain(reserved).collect()
        }
        Controller::Cpu => {
            let time = wanted
                .cpu_time()
                .map(|(quota, period)| set("--cpus", "cpu.max", format!("{quota} {period}")));
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
        Controller::CpuTime | Controller::Freezer => Vec::new(),
    }
}

/// Version 1.
fn split(wanted: &Resources, controller: Controller) -> Vec<Setting> {
    let set = |option, file, value: String| Setting { option, file, value, optional: false };
    match controller {
        Controller::Memory => {
            let limits = wanted.memory_bytes.map(|memory| {
                // One limit for both together, which must not be below the first at any time.
                let both = memory.saturating_add(wanted.swap_bytes.unwrap_or(memory)).to_string();
                [
                    set("--memory", "memory.limit_in_bytes", memory.to_string()),
                    Setting {
                        optional: wanted.swap_bytes.is_none(),
                        ..set("--memory-swap", "memory.memsw.limit_in_bytes", both)
                    },
                ]
            });
            let reserved = wanted
                .memory_reservation_bytes
                .map(|bytes| set("--memory-reservation", "memory.soft_limit_in_bytes", bytes.to_string()));
            limits.into_iter().flatten().chain(reserved).collect()
        }
        Controller::Cpu => {
            let time = wanted.cpu_time().map(|(quota, period)| {
                [
                    set("--cpus", "cpu.cfs_period_us", period.to_string()),
                    set("--cpus", "cpu.cfs_quota_us", quota.to_string()),
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
        Controller::CpuTime | Controller::Freezer => Vec::new(),
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

/// What has to be written to a group with limits `before` for it to have `wanted`.
pub(super) fn changes(
    hierarchy: &Hierarchy,
    controller: Controller,
    before: &Resources,
    wanted: &Resources,
) -> Vec<Setting> {
    let old = settings(hierarchy, before, controller);
    let mut new = settings(hierarchy, wanted, controller);
    new.retain(|setting| old.iter().all(|known| known.file != setting.file || known.value != setting.value));
    if controller == Controller::Pids && before.pids.is_some() && wanted.pids.is_none() {
        let value = "max".to_owned();
        new.push(Setting { option: "--pids-limit", file: "pids.max", value, optional: false });
    }
    if controller == Controller::Cpu && before.cpu_time().is_some() && wanted.cpu_time().is_none() {
        let (file, value) = if hierarchy.unified { ("cpu.max", "max") } else { ("cpu.cfs_quota_us", "-1") };
        new.push(Setting { option: "--cpu-quota", file, value: value.to_owned(), optional: false });
    }
    new
}
