//! Networks that users make: a bridge and a table of rules each.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;

use super::net::{
    self, Address, PREFIX, add_bridge, ensure_bridge, lock_setup, remove_link, route_socket, routes,
};
use super::subnet::Subnet;
use super::{nft, rules};
use crate::ExecError;

/// A network of the host's that containers are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Name of the bridge and of its table: `kiln` and at most 11 characters.
    pub name: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// The host's.
    pub gateway: Ipv4Addr,
    /// Nothing gets out, and nothing in but from the host.
    pub internal: bool,
}

/// A network no route of the host leads to, and none of `taken` overlaps.
///
/// # Errors
/// When there is none, or the host's routes cannot be read.
pub fn free_subnet(taken: &[Subnet]) -> Result<Subnet, ExecError> {
    let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
    let routes = routes(&socket).map_err(ExecError::network("list of routes"))?;
    let candidates = [
        Subnet::new(Ipv4Addr::new(10, 211, 0, 0), 16),
        Subnet::new(Ipv4Addr::new(172, 30, 0, 0), 16),
        Subnet::new(Ipv4Addr::new(192, 168, 0, 0), 16),
    ];
    let all =
        candidates.into_iter().flat_map(|wide| (0..256).map(move |at| Subnet::new(wide.nth(at << 8), 24)));
    let free = |subnet: &Subnet| !taken.iter().chain(&routes).any(|other| other.overlaps(*subnet));
    all.into_iter().find(free).ok_or_else(|| {
        ExecError::network("every network kiln could use is in use; choose one with --subnet")(
            Errno::ADDRINUSE,
        )
    })
}

/// Whether a route of the host leads into this network.
///
/// # Errors
/// When the host's routes cannot be read.
pub fn is_subnet_routed(subnet: Subnet) -> Result<bool, ExecError> {
    let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
    let routes = routes(&socket).map_err(ExecError::network("list of routes"))?;
    Ok(routes.iter().any(|route| route.overlaps(subnet)))
}

impl Bridge {
    /// The network of all containers that ask for none, made where it is missing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn usual() -> Result<Self, ExecError> {
        let subnet = Self::usual_subnet(ensure_bridge()?.network);
        Ok(Self { name: net::BRIDGE.to_owned(), subnet, gateway: subnet.nth(1), internal: false })
    }

    /// The subnet of that network, as somebody in it sees it.
    pub fn usual_subnet(address: Ipv4Addr) -> Subnet {
        Subnet::new(address, PREFIX)
    }

    /// Whether this is the network of all containers that ask for none.
    fn is_usual(&self) -> bool {
        self.name == net::BRIDGE
    }

    /// Makes sure that bridge, address, forwarding and rules are there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn ensure(&self) -> Result<(), ExecError> {
        if self.is_usual() {
            return Self::usual().map(drop);
        }
        let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
        let _setup = lock_setup()?;
        // Whoever came first may have been killed half-way: what is there is left as it is.
        add_bridge(&socket, &self.name, self.gateway, self.subnet.prefix())?;
        net::switch_on_forwarding()?;
        rules::ensure_network(self)?;
        if self.internal { Ok(()) } else { nft::ensure_forwarding() }
    }

    /// Removes bridge and rules; what is not there is removed. No container may be in it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self) -> Result<(), ExecError> {
        let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
        let _setup = lock_setup()?;
        rules::remove_table(&self.name)?;
        remove_link(&socket, &self.name).map_err(ExecError::network(format!("remove {}", self.name)))
    }

    /// An address in it that nobody else has, `wanted` if that is free.
    ///
    /// # Errors
    /// When it is taken, or all are.
    pub fn lease(&self, wanted: Option<Ipv4Addr>) -> Result<(Ipv4Addr, Address), ExecError> {
        if let Some(wanted) = wanted {
            let taken = || ExecError::network(format!("the address {wanted}"))(Errno::ADDRINUSE);
            let free =
                Some(wanted).filter(|wanted| *wanted != self.gateway).map(Address::take).transpose()?;
            return free.flatten().map(|address| (wanted, address)).ok_or_else(taken);
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // A small network has no room for the luck of another place each time; see `take_address`.
        let start = match self.subnet.hosts() {
            0..=254 => 0,
            _ => std::process::id().wrapping_mul(16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)),
        };
        let hosts = self.subnet.hosts();
        for offset in 0..hosts {
            let address = self.subnet.nth(1 + start.wrapping_add(offset) % hosts);
            if address == self.gateway {
                continue;
            }
            if let Some(taken) = Address::take(address)? {
                return Ok((address, taken));
            }
        }
        Err(ExecError::network(format!("all addresses of {} are in use", self.subnet))(Errno::ADDRNOTAVAIL))
    }
}
