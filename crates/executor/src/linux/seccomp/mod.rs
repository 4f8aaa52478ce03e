//! System call filters: a profile as data becomes a program for the kernel.
//!
//! Read [`profile`] first, then [`default`] (the profile itself), [`bpf`] (the compiler) and
//! [`json`] (profiles of users). The caller compiles, once a set of capabilities; the helper only
//! loads what it was given.

mod arch;
mod bpf;
mod default;
mod json;
pub(super) mod profile;
mod syscalls;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

pub(super) use self::bpf::{Program, stop_calls};
use crate::{ExecError, ProcessSpec, Security};

/// Which system calls a process may make.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Seccomp {
    /// The default profile, docker's: what programs need and no more. See `default.rs`.
    #[default]
    Default,
    /// All of them.
    Unconfined,
    /// What somebody wrote down.
    Profile(SeccompProfile),
}

/// A profile in docker's JSON format, checked. It is kept as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SeccompProfile {
    text: String,
    document: json::Document,
}

impl TryFrom<String> for SeccompProfile {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Ok(Self { document: json::Document::parse(&text)?, text })
    }
}

impl From<SeccompProfile> for String {
    fn from(profile: SeccompProfile) -> Self {
        profile.text
    }
}

impl SeccompProfile {
    /// Reads a profile.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned())
    }

    /// System calls it names that kiln does not know: those rules do nothing.
    pub fn unknown_names(&self) -> impl Iterator<Item = &str> {
        self.document.unknown_names()
    }
}

/// Programs by the capabilities that the default profile was asked for with.
#[derive(Default)]
pub(super) struct Compiled(Mutex<HashMap<u64, Arc<Program>>>);

impl Compiled {
    /// The program for a process; `None`: no filter.
    pub(super) fn program(&self, spec: &ProcessSpec) -> Result<Option<Arc<Program>>, ExecError> {
        if spec.security == Security::Insecure {
            return Ok(None);
        }
        let capabilities = spec.capabilities.set();
        let made = match &spec.seccomp {
            Seccomp::Unconfined => return Ok(None),
            Seccomp::Profile(SeccompProfile { document, .. }) => {
                Arc::new(compile(&document.decide(capabilities, kernel()))?)
            }
            Seccomp::Default => {
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                match known.get(&capabilities.bits()) {
                    Some(program) => Arc::clone(program),
                    None => {
                        let program = Arc::new(compile_default(capabilities)?);
                        known.insert(capabilities.bits(), Arc::clone(&program));
                        program
                    }
                }
            }
        };
        Ok(Some(made))
    }
}

/// The profile of a process, its capabilities considered; `None`: no filter.
pub(super) fn decided(spec: &ProcessSpec) -> Option<profile::Profile> {
    let capabilities = spec.capabilities.set();
    match &spec.seccomp {
        _ if spec.security == Security::Insecure => None,
        Seccomp::Unconfined => None,
        Seccomp::Profile(SeccompProfile { document, .. }) => Some(document.decide(capabilities, kernel())),
        Seccomp::Default => Some(default::profile(capabilities, kernel())),
    }
}

fn compile_default(capabilities: CapabilitySet) -> Result<Program, ExecError> {
    compile(&default::profile(capabilities, kernel()))
}

fn compile(profile: &profile::Profile) -> Result<Program, ExecError> {
    // A machine whose numbers are not in the table runs nothing unless told to do without.
    if profile.architectures.is_empty() {
        return Err(ExecError::start("seccomp: kiln has no profile for this architecture")(Errno::NOSYS));
    }
    bpf::compile(profile).ok_or_else(|| ExecError::start("seccomp: the profile is too long")(Errno::TOOBIG))
}

/// Major and minor version of the running kernel.
pub(super) fn kernel() -> (u32, u32) {
    json::version(&rustix::system::uname().release().to_string_lossy()).unwrap_or((0, 0))
}
