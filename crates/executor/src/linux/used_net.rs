//! Network namespaces that a process left as it found them, for the next one.
//!
//! Making a namespace, its interfaces and their way to the outside is the dearest part of a short step,
//! and the kernel takes as long again to throw them away. A process that has no right to configure its
//! network can leave nothing there but sockets that still wait for somebody else: where the kernel
//! counts none, the namespace is as good as new. BuildKit keeps such a pool as well.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::net::{Address, Lease};
use crate::{Capabilities, Network, ProcessSpec, Security, SystemPaths};

/// So many wait at most: their addresses are nobody else's meanwhile.
const KEPT: usize = 16;

/// A namespace with its network up.
pub(super) struct UsedNetwork {
    pub(super) namespace: OwnedFd,
    /// Its address on the bridge; `None`: loopback alone.
    pub(super) leased: Option<(Lease, Address)>,
}

/// Those that nobody is in.
#[derive(Default)]
pub(super) struct UsedNetworks {
    idle: Mutex<Vec<UsedNetwork>>,
}

impl UsedNetworks {
    /// One for this process; `None`: it needs one of its own making.
    pub(super) fn take(&self, network: Network) -> Option<UsedNetwork> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = |used: &UsedNetwork| used.leased.is_some() == (network == Network::Default);
        let at = idle.iter().rposition(is_like)?;
        Some(idle.swap_remove(at))
    }

    /// Keeps what the helper gave back.
    pub(super) fn put(&self, used: UsedNetwork) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(used);
        }
    }
}

/// Whether a process leaves its network namespace as it was: it may neither configure interfaces nor
/// write below `/proc/sys/net`, and nothing was configured for it alone.
pub(super) fn leaves_unchanged(spec: &ProcessSpec) -> bool {
    let (more, _) = spec.capabilities.differences();
    matches!(spec.network, Network::Default | Network::None)
        && spec.security == Security::Sandbox
        && spec.system_paths == SystemPaths::Masked
        && spec.sysctls.is_empty()
        && more == Capabilities::NONE
}

/// In the helper, when all processes of its network namespace have ended: the namespace, if no socket is
/// left in it. One that waits for late segments (TIME_WAIT) would keep its port from the next process.
pub(super) fn give_back() -> Option<OwnedFd> {
    let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}"));
    let v6 = match read("sockstat6") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.ok()?,
    };
    // A line for each socket below a heading.
    let is_named = read("unix").ok()?.lines().nth(1).is_some();
    if is_named || !is_unused(&read("sockstat").ok()?) || !is_unused(&v6) {
        return None;
    }
    openat(CWD, "/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Whether the tables of `/proc/net/sockstat` have no socket of this namespace. The numbers of `orphan`,
/// `alloc` and `mem` are the whole host's; `used` counts for a moment more what is closed already.
fn is_unused(sockstat: &str) -> bool {
    sockstat.lines().all(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        words.windows(2).all(|pair| !matches!(pair[0], "inuse" | "tw") || pair[1] == "0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: &str = "sockets: used 0\nTCP: inuse 0 orphan 0 tw 0 alloc 3 mem 1\nUDP: inuse 0 mem 2\n\
        UDPLITE: inuse 0\nRAW: inuse 0\nFRAG: inuse 0 memory 0\n";

    #[test]
    fn a_namespace_is_used_while_a_socket_of_it_is_there() {
        assert!(is_unused(NEW));
        assert!(!is_unused(&NEW.replace("tw 0", "tw 1")));
        assert!(is_unused(&NEW.replace("used 0", "used 7")));
        assert!(!is_unused(&NEW.replace("FRAG: inuse 0", "FRAG: inuse 1")));
        assert!(is_unused("TCP6: inuse 0\nUDP6: inuse 0\nFRAG6: inuse 0 memory 0\n"));
    }

    #[test]
    fn who_may_configure_a_network_leaves_none() {
        let plain = ProcessSpec { network: Network::None, ..ProcessSpec::default() };
        assert!(leaves_unchanged(&plain));
        let more = Capabilities::changed(&[Capabilities::parse("NET_ADMIN").unwrap()], &[]);
        let others = [
            ProcessSpec { capabilities: more, ..plain.clone() },
            ProcessSpec { security: Security::Insecure, ..plain.clone() },
            ProcessSpec { system_paths: SystemPaths::Open, ..plain.clone() },
            ProcessSpec { sysctls: vec![("net.core.somaxconn".into(), "1".into())], ..plain.clone() },
            ProcessSpec { network: Network::Host, ..plain.clone() },
            ProcessSpec { network: Network::Given, ..plain },
        ];
        assert!(!others.iter().any(leaves_unchanged));
    }
}
