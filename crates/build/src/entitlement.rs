//! What a step may ask for only when the user said so.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use kiln_llb as llb;

use crate::OpError;

/// A right that a build does not have by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entitlement {
    /// `RUN --network=host`: the host's network, its loopback services included.
    NetworkHost,
    /// `RUN --security=insecure`: all capabilities; such a step can take over the host.
    SecurityInsecure,
}

impl Entitlement {
    /// As in `--allow`.
    pub fn name(self) -> &'static str {
        match self {
            Entitlement::NetworkHost => "network.host",
            Entitlement::SecurityInsecure => "security.insecure",
        }
    }
}

impl fmt::Display for Entitlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no entitlement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of network.host, security.insecure")]
pub struct EntitlementError(String);

impl FromStr for Entitlement {
    type Err = EntitlementError;

    fn from_str(text: &str) -> Result<Self, EntitlementError> {
        [Entitlement::NetworkHost, Entitlement::SecurityInsecure]
            .into_iter()
            .find(|known| known.name() == text)
            .ok_or_else(|| EntitlementError(text.chars().take(80).collect()))
    }
}

/// The one place that says whether `exec` may run with what it asks for.
pub(crate) fn check(exec: &llb::Exec, allowed: &BTreeSet<Entitlement>) -> Result<(), OpError> {
    let network = match exec.network {
        llb::Network::Host => Some(Entitlement::NetworkHost),
        llb::Network::Default | llb::Network::None => None,
    };
    let security = match exec.security {
        llb::Security::Insecure => Some(Entitlement::SecurityInsecure),
        llb::Security::Sandbox => None,
    };
    match network.into_iter().chain(security).find(|needed| !allowed.contains(needed)) {
        Some(entitlement) => Err(OpError::NotAllowed { entitlement }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_buildx_names() {
        assert_eq!("network.host".parse(), Ok(Entitlement::NetworkHost));
        assert_eq!("security.insecure".parse(), Ok(Entitlement::SecurityInsecure));
        assert!("Network.Host".parse::<Entitlement>().is_err());
        assert!("".parse::<Entitlement>().is_err());
    }
}
