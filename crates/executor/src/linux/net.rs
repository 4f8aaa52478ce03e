//! The container's network: a pair of interfaces, one end in the bridge `kiln0`, and address
//! translation to the outside.

use std::fs::{File, TryLockError};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::netlink::{Message, Socket, attribute, flag, word};
use super::nft;
use crate::ExecError;

/// The bridge all containers of this host share.
pub(super) const BRIDGE: &str = "kiln0";
/// Networks of /16 tried in this order until one is not in use on the host.
const CANDIDATES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 209, 0, 0),
    Ipv4Addr::new(10, 210, 0, 0),
    Ipv4Addr::new(172, 29, 0, 0),
    Ipv4Addr::new(192, 168, 0, 0),
];
/// Length of the network's prefix in bits.
pub(super) const PREFIX: u8 = 16;
/// Locks on addresses are files here, shared by all stores of this host.
const ADDRESS_DIR: &str = "/run/kiln/net";

/// rtnetlink(7) message types.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;

/// The bridge as it stands on this host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bridge {
    network: Ipv4Addr,
}

/// A container's address, as the helper is told of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Lease {
    network: Ipv4Addr,
    host: u16,
}

/// An address nobody else uses while this lives.
pub(super) struct Address {
    _lock: File,
}

impl Bridge {
    /// A free address for one container.
    pub(super) fn lease(&self) -> Result<(Lease, Address), ExecError> {
        take_address(self.network)
    }
}

impl Lease {
    /// The container's address.
    pub(super) fn address(&self) -> Ipv4Addr {
        at(self.network, self.host)
    }
}

fn at(network: Ipv4Addr, host: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(network) | u32::from(host))
}

/// `struct ifinfomsg`.
fn link_header(index: u32, flags: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// `struct ifaddrmsg`.
fn address_header(index: u32) -> [u8; 8] {
    let mut header = [AF_INET, PREFIX, 0, 0, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

/// `struct rtmsg` for a unicast route of the main table.
fn route_header() -> [u8; 12] {
    const RT_TABLE_MAIN: u8 = 254;
    const RTPROT_BOOT: u8 = 3;
    const RTN_UNICAST: u8 = 1;
    [AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0]
}

fn route_socket() -> Result<Socket, Errno> {
    Socket::open(None)
}

/// The index of an interface; `None` when there is none of that name.
fn link_index(socket: &Socket, name: &str) -> Result<Option<u32>, Errno> {
    let message = Message::new(RTM_GETLINK, flag::ACK, &link_header(0, 0)).put_text(IFLA_IFNAME, name);
    match socket.dump(message) {
        Ok(answers) => Ok(answers.first().map(|body| u32::from_ne_bytes(word(body, 4)))),
        Err(Errno::NODEV) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Makes sure that bridge, address, forwarding and translation are there. Costs a few netlink
/// round trips when they are.
pub(super) fn ensure_bridge() -> Result<Bridge, ExecError> {
    let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
    // Two processes that come first at once: the lock makes it one after the other.
    let _setup = lock_setup()?;
    let known = link_index(&socket, BRIDGE).map_err(ExecError::network("look up kiln0"))?;
    let existing = match known {
        Some(index) => bridge_address(&socket, index).map_err(ExecError::network("address of kiln0"))?,
        None => None,
    };
    let network = match existing {
        Some(address) => Ipv4Addr::from(u32::from(address) & 0xffff_0000),
        None => make_bridge(&socket)?,
    };
    let forward = "/proc/sys/net/ipv4/ip_forward";
    if std::fs::read_to_string(forward).is_ok_and(|on| on.trim() == "0") {
        std::fs::write(forward, "1")
            .map_err(|source| ExecError::Network { step: "switch on ip_forward".to_owned(), source })?;
    }
    nft::ensure_translation(network)?;
    nft::ensure_forwarding()?;
    Ok(Bridge { network })
}

fn make_bridge(socket: &Socket) -> Result<Ipv4Addr, ExecError> {
    let network = free_network(socket).map_err(ExecError::network("list of routes"))?;
    let network = network.ok_or_else(|| ExecError::Network {
        step: "every network kiln could use is in use on this host; try --network host".to_owned(),
        source: Errno::ADDRINUSE.into(),
    })?;
    let create = Message::new(RTM_NEWLINK, flag::ACK | flag::CREATE | flag::EXCL, &link_header(0, IFF_UP))
        .put_text(IFLA_IFNAME, BRIDGE)
        .nest(IFLA_LINKINFO, |info| info.put_text(IFLA_INFO_KIND, "bridge"));
    match socket.request(create) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(ExecError::network("make bridge kiln0")(errno)),
    }
    let index = link_index(socket, BRIDGE).map_err(ExecError::network("look up kiln0"))?;
    let index = index.ok_or_else(|| ExecError::network("bridge kiln0 vanished")(Errno::NODEV))?;
    add_address(socket, index, at(network, 1)).map_err(ExecError::network("address of kiln0"))?;
    set_up(socket, index).map_err(ExecError::network("bring up kiln0"))?;
    Ok(network)
}

/// The first candidate that overlaps no route of the host.
fn free_network(socket: &Socket) -> Result<Option<Ipv4Addr>, Errno> {
    let mut header = route_header();
    header[4..8].fill(0);
    let routes = socket.dump(Message::new(RTM_GETROUTE, flag::DUMP, &header))?;
    let taken: Vec<(u32, u8)> = routes
        .iter()
        .filter(|body| body.first() == Some(&AF_INET) && body.len() >= 12)
        .filter_map(|body| {
            let destination = attribute(&body[12..], RTA_DST)?;
            Some((u32::from_be_bytes(word(destination, 0)), body[1]))
        })
        .collect();
    let overlaps = |network: Ipv4Addr| {
        taken.iter().any(|&(destination, length)| {
            let bits = length.min(PREFIX);
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            bits > 0 && destination & mask == u32::from(network) & mask
        })
    };
    Ok(CANDIDATES.into_iter().find(|&network| !overlaps(network)))
}

fn bridge_address(socket: &Socket, index: u32) -> Result<Option<Ipv4Addr>, Errno> {
    let answers = socket.dump(Message::new(RTM_GETADDR, flag::DUMP, &address_header(0)))?;
    let ours = answers.iter().find(|body| body.len() >= 8 && u32::from_ne_bytes(word(body, 4)) == index);
    Ok(ours.and_then(|body| attribute(&body[8..], IFA_LOCAL)).map(|value| word(value, 0).into()))
}

fn add_address(socket: &Socket, index: u32, address: Ipv4Addr) -> Result<(), Errno> {
    let message = Message::new(RTM_NEWADDR, flag::ACK | flag::CREATE | flag::EXCL, &address_header(index))
        .put(IFA_LOCAL, &address.octets())
        .put(IFA_ADDRESS, &address.octets());
    match socket.request(message) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

fn set_up(socket: &Socket, index: u32) -> Result<(), Errno> {
    socket.request(Message::new(RTM_NEWLINK, flag::ACK, &link_header(index, IFF_UP)))
}

/// Brings loopback up in the network namespace of this thread.
pub(super) fn loopback_up() -> Result<(), ExecError> {
    let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
    // Loopback is interface 1 of every network namespace.
    set_up(&socket, 1).map_err(ExecError::network("bring up loopback"))
}

fn lock_setup() -> Result<File, ExecError> {
    let failed = |source| ExecError::Network { step: ADDRESS_DIR.to_owned(), source };
    std::fs::create_dir_all(ADDRESS_DIR).map_err(failed)?;
    let file = File::create(format!("{ADDRESS_DIR}/lock")).map_err(failed)?;
    file.lock().map_err(failed)?;
    Ok(file)
}

/// Takes an address whose file nobody holds a lock on. Locks go with their process.
///
/// The search starts at another place each time: the kernel takes a dead container's interface
/// away some time after its process, and until then the address is better left alone.
fn take_address(network: Ipv4Addr) -> Result<(Lease, Address), ExecError> {
    let failed = |source| ExecError::Network { step: ADDRESS_DIR.to_owned(), source };
    std::fs::create_dir_all(ADDRESS_DIR).map_err(failed)?;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
    // Neither the network itself, nor the bridge, nor the broadcast address.
    const HOSTS: u32 = u16::MAX as u32 - 2;
    for offset in 0..HOSTS {
        let host = 2 + u16::try_from(start.wrapping_add(offset) % HOSTS).unwrap_or(0);
        let file = File::create(format!("{ADDRESS_DIR}/{}", at(network, host))).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => return Ok((Lease { network, host }, Address { _lock: file })),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
    }
    Err(ExecError::network("all 65533 addresses are in use")(Errno::ADDRNOTAVAIL))
}

/// The host's side of the helper, opened before it left the host's network namespace.
pub(super) struct HostSide {
    socket: Socket,
    bridge: u32,
}

impl HostSide {
    pub(super) fn open() -> Result<Self, ExecError> {
        let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
        let bridge = link_index(&socket, BRIDGE).map_err(ExecError::network("look up kiln0"))?;
        let bridge = bridge.ok_or_else(|| ExecError::network("bridge kiln0 vanished")(Errno::NODEV))?;
        Ok(Self { socket, bridge })
    }

    /// Joins the network namespace this thread is in now to the bridge. Interfaces go with the
    /// namespace, so there is nothing to undo.
    pub(super) fn connect(&self, lease: &Lease) -> Result<(), ExecError> {
        let namespace = openat(CWD, "/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(ExecError::network("open the network namespace"))?;
        let inside = route_socket().map_err(ExecError::network("netlink socket"))?;
        let namespace = u32::try_from(namespace.as_fd().as_raw_fd()).map(|fd| (namespace, fd));
        let (_namespace, fd) = namespace.map_err(|_| ExecError::network("namespace")(Errno::BADF))?;
        let octets = lease.address().octets();
        // Like docker: a hardware address made of the IP address needs no luck to be unique.
        let hardware = [0x02, 0x42, octets[0], octets[1], octets[2], octets[3]];
        let create =
            Message::new(RTM_NEWLINK, flag::ACK | flag::CREATE | flag::EXCL, &link_header(0, IFF_UP))
                .put_text(IFLA_IFNAME, &format!("kiln{:x}", std::process::id()))
                .put_u32(IFLA_MASTER, self.bridge)
                .nest(IFLA_LINKINFO, |info| {
                    info.put_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                        data.nest(VETH_INFO_PEER, |peer| {
                            // Not up yet: the pair is joined only after this end was made.
                            peer.raw(&link_header(0, 0))
                                .put_text(IFLA_IFNAME, "eth0")
                                .put(IFLA_ADDRESS, &hardware)
                                .put_u32(IFLA_NET_NS_FD, fd)
                        })
                    })
                });
        self.socket.request(create).map_err(ExecError::network("make the interface pair"))?;
        set_up(&inside, 1).map_err(ExecError::network("bring up loopback"))?;
        let eth0 = link_index(&inside, "eth0").map_err(ExecError::network("look up eth0"))?;
        let eth0 = eth0.ok_or_else(|| ExecError::network("eth0 vanished")(Errno::NODEV))?;
        add_address(&inside, eth0, lease.address()).map_err(ExecError::network("address of eth0"))?;
        set_up(&inside, eth0).map_err(ExecError::network("bring up eth0"))?;
        let route = Message::new(RTM_NEWROUTE, flag::ACK | flag::CREATE, &route_header())
            .put(RTA_GATEWAY, &at(lease.network, 1).octets())
            .put_u32(RTA_OIF, eth0);
        inside.request(route).map_err(ExecError::network("default route"))
    }
}
