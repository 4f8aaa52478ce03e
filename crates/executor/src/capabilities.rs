//! Sets of capabilities, by name.

use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

/// A set of capabilities: what a process, and all that it starts, may at most have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities(u64);

/// By number, from 0 on (capabilities(7)).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The 14 of docker and BuildKit.
impl Default for Capabilities {
    fn default() -> Self {
        let set = CapabilitySet::CHOWN
            | CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::FSETID
            | CapabilitySet::FOWNER
            | CapabilitySet::MKNOD
            | CapabilitySet::NET_RAW
            | CapabilitySet::SETGID
            | CapabilitySet::SETUID
            | CapabilitySet::SETFCAP
            | CapabilitySet::SETPCAP
            | CapabilitySet::NET_BIND_SERVICE
            | CapabilitySet::SYS_CHROOT
            | CapabilitySet::KILL
            | CapabilitySet::AUDIT_WRITE;
        Self(set.bits())
    }
}

impl Capabilities {
    /// What this set has beside the default, and what it lacks of it.
    pub fn differences(self) -> (Self, Self) {
        let usual = Self::default().0;
        (Self(self.0 & !usual), Self(usual & !self.0))
    }

    /// Their names, without `CAP_`, by number.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().enumerate().filter(move |(at, _)| self.0 >> at & 1 == 1).map(|(_, name)| *name)
    }

    /// The empty set.
    pub(crate) const NONE: Self = Self(0);

    /// All that have a name.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// One of them, or all of them: `NET_ADMIN`, `cap_net_admin`, `ALL`.
    ///
    /// # Errors
    /// A sentence when there is no such capability.
    pub fn parse(name: &str) -> Result<Self, String> {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" {
            return Ok(Self::ALL);
        }
        let number = NAMES.iter().position(|known| *known == bare);
        number.map(|number| Self(1 << number)).ok_or_else(|| format!("there is no capability {name:?}"))
    }

    /// The default set changed as docker does: with `ALL` dropped only what is added remains, with
    /// `ALL` added everything but what is dropped; otherwise first the added, then the dropped.
    pub fn changed(add: &[Self], drop: &[Self]) -> Self {
        let union = |sets: &[Self]| sets.iter().fold(0, |all, set| all | set.0);
        let one_by_one =
            |sets: &[Self]| union(&sets.iter().copied().filter(|set| *set != Self::ALL).collect::<Vec<_>>());
        match (add.contains(&Self::ALL), drop.contains(&Self::ALL)) {
            (true, _) => Self(Self::ALL.0 & !one_by_one(drop)),
            (false, true) => Self(union(add)),
            (false, false) => Self((Self::default().0 | union(add)) & !union(drop)),
        }
    }

    /// The mask as `/proc/PID/status` shows it.
    pub fn mask(self) -> u64 {
        self.0
    }

    /// Those in a mask.
    pub(crate) fn of_mask(mask: u64) -> Self {
        Self(mask)
    }

    pub(crate) fn set(self) -> CapabilitySet {
        CapabilitySet::from_bits_retain(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(add: &str, drop: &str) -> u64 {
        let sets = |text: &str| -> Vec<Capabilities> {
            text.split_whitespace().map(|name| Capabilities::parse(name).unwrap()).collect()
        };
        Capabilities::changed(&sets(add), &sets(drop)).mask()
    }

    #[test]
    fn names_have_the_kernels_numbers() {
        for (name, mask) in
            [("chown", 1), ("CAP_SYS_ADMIN", 1 << 21), ("Bpf", 1 << 39), ("all", (1 << 41) - 1)]
        {
            assert_eq!(Capabilities::parse(name).unwrap().mask(), mask, "{name}");
        }
        assert!(Capabilities::parse("CAP_SYS_NONSENSE").is_err());
    }

    #[test]
    fn adding_and_dropping_is_dockers() {
        assert_eq!(changed("", ""), 0xa804_25fb);
        assert_eq!(changed("SYS_ADMIN", "CAP_MKNOD"), (0xa804_25fb | 1 << 21) & !(1 << 27));
        assert_eq!(changed("", "ALL"), 0);
        assert_eq!(changed("CHOWN", "ALL"), 1);
        assert_eq!(changed("ALL", "CHOWN"), ((1 << 41) - 1) & !1);
        assert_eq!(changed("MKNOD", "MKNOD"), 0xa804_25fb & !(1 << 27));
    }
}
