//! Architectures a filter tells apart.

use serde::Deserialize;

#[cfg(test)]
use super::syscalls;
use super::syscalls::Row;

/// An architecture, as a running process's system calls show it to a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(in crate::linux) enum Arch {
    #[serde(rename = "SCMP_ARCH_X86_64")]
    X86_64,
    #[serde(rename = "SCMP_ARCH_X86")]
    X86,
    /// x86-64 with 32-bit pointers: the same token as x86-64, and a bit in the number.
    #[serde(rename = "SCMP_ARCH_X32")]
    X32,
    #[serde(rename = "SCMP_ARCH_AARCH64")]
    Aarch64,
    #[serde(rename = "SCMP_ARCH_ARM")]
    Arm,
    /// One that this machine does not run.
    #[serde(other)]
    Foreign,
}

/// `__X32_SYSCALL_BIT` of asm/unistd.h.
pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Arch {
    /// This machine's; `None` where kiln has no numbers.
    pub(super) fn native() -> Option<Arch> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Arch::X86_64),
            "aarch64" => Some(Arch::Aarch64),
            _ => None,
        }
    }

    /// Those whose programs it runs beside its own.
    pub(super) fn others(self) -> &'static [Arch] {
        match self {
            Arch::X86_64 => &[Arch::X86, Arch::X32],
            Arch::Aarch64 => &[Arch::Arm],
            _ => &[],
        }
    }

    /// As libseccomp names it; `None`: it has no name there.
    pub(in crate::linux) fn library_name(self) -> Option<&'static str> {
        match self {
            Arch::X86_64 => Some("SCMP_ARCH_X86_64"),
            Arch::X86 => Some("SCMP_ARCH_X86"),
            Arch::X32 => Some("SCMP_ARCH_X32"),
            Arch::Aarch64 => Some("SCMP_ARCH_AARCH64"),
            Arch::Arm => Some("SCMP_ARCH_ARM"),
            Arch::Foreign => None,
        }
    }

    /// As docker's profiles name it in `includes` and `excludes`.
    pub(super) fn docker_name(self) -> &'static str {
        match self {
            Arch::X86_64 => "amd64",
            Arch::X86 => "x86",
            Arch::X32 => "x32",
            Arch::Aarch64 => "arm64",
            Arch::Arm => "arm",
            Arch::Foreign => "",
        }
    }

    /// `AUDIT_ARCH_…` of linux/audit.h.
    pub(super) fn token(self) -> Option<u32> {
        match self {
            Arch::X86_64 | Arch::X32 => Some(0xc000_003e),
            Arch::X86 => Some(0x4000_0003),
            Arch::Aarch64 => Some(0xc000_00b7),
            Arch::Arm => Some(0x4000_0028),
            Arch::Foreign => None,
        }
    }

    /// The number a filter sees for the call `name`; `None` when the architecture lacks it.
    #[cfg(test)]
    pub(super) fn number(self, name: &str) -> Option<u32> {
        self.number_in(syscalls::row(name)?)
    }

    /// The same for a call whose row of the table is known.
    pub(super) fn number_in(self, row: &Row) -> Option<u32> {
        let column = match self {
            Arch::X86_64 => 0,
            Arch::X86 => 1,
            Arch::X32 => 2,
            Arch::Aarch64 => 3,
            Arch::Arm => 4,
            Arch::Foreign => return None,
        };
        let number = u32::try_from(row[column]).ok()?;
        Some(if self == Arch::X32 { number | X32_BIT } else { number })
    }
}
