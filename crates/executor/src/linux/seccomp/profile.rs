//! What a filter is made of, capabilities and kernel versions already decided.

use std::borrow::Cow;

use super::arch::Arch;

/// Which system calls a process may make.
///
/// A rule without arguments decides over its call, the first of several. Otherwise the first rule
/// whose arguments all match decides. Calls without a rule get the default, except those with a
/// number beyond all named ones: they answer ENOSYS, so that programs fall back to older calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::linux) struct Profile {
    pub(in crate::linux) default: Action,
    /// Calls of any other architecture end the process.
    pub(in crate::linux) architectures: Vec<Arch>,
    pub(in crate::linux) rules: Vec<Rule>,
}

impl Profile {
    /// Without rules, for all that this machine runs.
    pub(in crate::linux) fn native() -> Self {
        let native = Arch::native();
        let others = native.map_or(&[][..], Arch::others).iter().copied();
        let architectures = native.into_iter().chain(others).collect();
        Self { default: Action::KillProcess, architectures, rules: Vec::new() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::linux) struct Rule {
    /// Of the system call; one that an architecture lacks is passed over there.
    pub(in crate::linux) name: Cow<'static, str>,
    pub(in crate::linux) action: Action,
    /// All must hold.
    pub(in crate::linux) arguments: Vec<Argument>,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::linux) enum Action {
    Allow,
    /// Allowed, and written to the audit log.
    Log,
    /// Fails with this errno.
    Errno(u16),
    /// SIGSYS.
    Trap,
    /// Asks the tracer; ENOSYS without one.
    Trace(u16),
    KillThread,
    KillProcess,
}

impl Action {
    /// `SECCOMP_RET_…` of linux/seccomp.h.
    pub(in crate::linux) fn bits(self) -> u32 {
        match self {
            Action::KillProcess => 0x8000_0000,
            Action::KillThread => 0,
            Action::Trap => 0x0003_0000,
            Action::Errno(errno) => 0x0005_0000 | u32::from(errno),
            Action::Trace(data) => 0x7ff0_0000 | u32::from(data),
            Action::Log => 0x7ffc_0000,
            Action::Allow => 0x7fff_0000,
        }
    }
}

/// One argument against a value, unsigned over 64 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::linux) struct Argument {
    /// 0 to 5.
    pub(in crate::linux) index: u8,
    pub(in crate::linux) comparison: Comparison,
    pub(in crate::linux) value: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::linux) enum Comparison {
    Equal,
    NotEqual,
    Less,
    AtMost,
    Greater,
    AtLeast,
    /// Equal in the bits of this mask.
    Masked(u64),
}
