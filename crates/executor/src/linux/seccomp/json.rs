//! Profiles as docker and podman users write them (`--security-opt seccomp=FILE`).

use rustix::thread::CapabilitySet;
use serde::Deserialize;

use super::arch::Arch;
use super::profile::{Action, Argument, Comparison, Profile, Rule};
use super::syscalls;
use crate::Capabilities;

/// A profile as its file says, conditions not yet decided.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    default_action: ActionName,
    #[serde(default)]
    default_errno_ret: Option<u16>,
    #[serde(default)]
    architectures: Option<Vec<Arch>>,
    #[serde(default)]
    arch_map: Option<Vec<Architectures>>,
    #[serde(default)]
    syscalls: Option<Vec<Entry>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Architectures {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: ActionName,
    #[serde(default)]
    errno_ret: Option<u16>,
    #[serde(default)]
    args: Option<Vec<ArgumentEntry>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArgumentEntry {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: Operation,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    arches: Option<Vec<String>>,
    caps: Option<Vec<String>>,
    min_kernel: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum ActionName {
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
}

impl ActionName {
    fn action(self, errno: Option<u16>) -> Action {
        let errno = errno.unwrap_or(libc::EPERM as u16);
        match self {
            ActionName::Allow => Action::Allow,
            ActionName::Log => Action::Log,
            ActionName::Errno => Action::Errno(errno),
            ActionName::Trace => Action::Trace(errno),
            ActionName::Trap => Action::Trap,
            ActionName::KillThread => Action::KillThread,
            ActionName::KillProcess => Action::KillProcess,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Operation {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    AtMost,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    AtLeast,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    Masked,
}

impl Document {
    /// Reads a profile, and refuses what would silently be something else than it says.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let document: Document = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if document.architectures.is_some() && document.arch_map.is_some() {
            return Err("`architectures` and `archMap` exclude each other".to_owned());
        }
        for entry in document.syscalls.iter().flatten() {
            if entry.name.is_some() && entry.names.is_some() {
                return Err("`name` and `names` exclude each other".to_owned());
            }
            if entry.name.is_none() && entry.names.is_none() {
                return Err("an entry of `syscalls` has no `names`".to_owned());
            }
            for argument in entry.args.iter().flatten() {
                if argument.index > 5 {
                    return Err(format!("a system call has no argument number {}", argument.index));
                }
            }
            for condition in [&entry.includes, &entry.excludes] {
                for name in condition.caps.iter().flatten() {
                    Capabilities::parse(name)?;
                }
                if let Some(kernel) = &condition.min_kernel {
                    version(kernel).ok_or_else(|| format!("{kernel:?} is no kernel version"))?;
                }
            }
        }
        Ok(document)
    }

    /// Names that no architecture has: most likely misspelt, or newer than kiln.
    pub(super) fn unknown_names(&self) -> impl Iterator<Item = &str> {
        self.syscalls.iter().flatten().flat_map(Entry::names).filter(|name| !syscalls::is_known(name))
    }

    /// The profile for a sandbox with these capabilities on this kernel.
    pub(super) fn decide(&self, capabilities: CapabilitySet, kernel: (u32, u32)) -> Profile {
        let native = Profile::native();
        let own = native.architectures.first().copied();
        let architectures = match (&self.architectures, &self.arch_map) {
            (Some(list), _) if !list.is_empty() => {
                // The machine's own is always meant.
                own.into_iter().chain(list.iter().copied().filter(|arch| Some(*arch) != own)).collect()
            }
            (_, Some(map)) => {
                let subs = map.iter().filter(|entry| Some(entry.architecture) == own);
                let subs = subs.flat_map(|entry| entry.sub_architectures.iter().flatten().copied());
                own.into_iter().chain(subs).collect()
            }
            _ => own.into_iter().collect(),
        };
        let default = self.default_action.action(self.default_errno_ret);
        let mut rules = Vec::new();
        for entry in self.syscalls.iter().flatten() {
            if !entry.applies(own, capabilities, kernel) {
                continue;
            }
            let action = entry.action.action(entry.errno_ret);
            for name in entry.names() {
                let rule = |arguments| Rule { name: name.to_owned().into(), action, arguments };
                rules.extend(entry.alternatives().into_iter().map(rule));
            }
        }
        Profile { default, architectures, rules }
    }
}

impl Entry {
    fn names(&self) -> impl Iterator<Item = &str> {
        self.name.iter().chain(self.names.iter().flatten()).map(String::as_str)
    }

    fn applies(&self, own: Option<Arch>, capabilities: CapabilitySet, kernel: (u32, u32)) -> bool {
        let own = own.map_or("", Arch::docker_name);
        let holds = |name: &String| {
            Capabilities::parse(name).is_ok_and(|capability| capabilities.contains(capability.set()))
        };
        let (with, without) = (&self.includes, &self.excludes);
        let included =
            with.arches.as_ref().is_none_or(|list| list.is_empty() || list.iter().any(|arch| arch == own))
                && with.caps.iter().flatten().all(holds)
                && with.min_kernel.as_deref().and_then(version).is_none_or(|least| kernel >= least);
        let excluded = without.arches.iter().flatten().any(|arch| arch == own)
            || without.caps.iter().flatten().any(holds)
            || without.min_kernel.as_deref().and_then(version).is_some_and(|least| kernel >= least);
        included && !excluded
    }

    /// Sets of arguments of which one has to match. All of an entry's arguments must hold, unless it
    /// names one argument twice: then each is meant by itself, as in every other runtime.
    fn alternatives(&self) -> Vec<Vec<Argument>> {
        let arguments: Vec<Argument> = self.args.iter().flatten().map(ArgumentEntry::argument).collect();
        let twice = arguments
            .iter()
            .enumerate()
            .any(|(position, one)| arguments[..position].iter().any(|other| other.index == one.index));
        if twice { arguments.into_iter().map(|one| vec![one]).collect() } else { vec![arguments] }
    }
}

impl ArgumentEntry {
    fn argument(&self) -> Argument {
        let (comparison, value) = match self.op {
            Operation::NotEqual => (Comparison::NotEqual, self.value),
            Operation::Less => (Comparison::Less, self.value),
            Operation::AtMost => (Comparison::AtMost, self.value),
            Operation::Equal => (Comparison::Equal, self.value),
            Operation::AtLeast => (Comparison::AtLeast, self.value),
            Operation::Greater => (Comparison::Greater, self.value),
            Operation::Masked => (Comparison::Masked(self.value), self.value_two),
        };
        Argument { index: self.index, comparison, value }
    }
}

/// Major and minor number of `4.8` or `6.18.44-something`.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
