//! The container's network: a pair of interfaces, one end in the bridge `kiln0`, and address
//! translation to the outside.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::netlink::{Message, Socket, attribute, flag, word};
use super::nft;
use super::subnet::Subnet;
use crate::ExecError;

/// The bridge all containers of this host share.
pub(super) const BRIDGE: &str = "kiln0";
/// What the names of all bridges of kiln's begin with.
pub(super) const BRIDGES: &str = "kiln";
/// Networks of /16 tried in this order until one is not in use on the host.
const CANDIDATES: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 209, 0, 0),
    Ipv4Addr::new(10, 210, 0, 0),
    Ipv4Addr::new(172, 29, 0, 0),
    Ipv4Addr::new(192, 168, 0, 0),
];
/// Length of the network's prefix in bits.
pub(super) const PREFIX: u8 = 16;
/// Locks are here, shared by all stores of this host.
const LOCK_DIR: &str = "/run/kiln/net";
/// The file of which each byte is an address: who has locked it has the address.
const ADDRESSES: &str = "/run/kiln/net/addresses";

/// rtnetlink(7) message types.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
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
    pub(super) network: Ipv4Addr,
}

/// A container's address, as the helper is told of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Lease {
    network: Ipv4Addr,
    host: u16,
}

/// An address nobody else uses while this lives.
#[derive(Debug)]
pub struct Address {
    _lock: File,
}

impl Bridge {
    /// A free address for one container.
    pub(super) fn lease(&self) -> Result<(Lease, Address), ExecError> {
        take_address(self.network)
    }
}

impl Lease {
    /// The host's address in its network.
    pub(super) fn gateway(&self) -> Ipv4Addr {
        at(self.network, 1)
    }

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
fn address_header(index: u32, prefix: u8) -> [u8; 8] {
    let mut header = [AF_INET, prefix, 0, 0, 0, 0, 0, 0];
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

pub(super) fn route_socket() -> Result<Socket, Errno> {
    Socket::open(None)
}

/// The index of an interface; `None` when there is none of that name.
pub(super) fn link_index(socket: &Socket, name: &str) -> Result<Option<u32>, Errno> {
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
    switch_on_forwarding()?;
    nft::ensure_translation(network)?;
    nft::ensure_forwarding()?;
    Ok(Bridge { network })
}

pub(super) fn switch_on_forwarding() -> Result<(), ExecError> {
    let forward = "/proc/sys/net/ipv4/ip_forward";
    if std::fs::read_to_string(forward).is_ok_and(|on| on.trim() == "0") {
        std::fs::write(forward, "1")
            .map_err(|source| ExecError::Network { step: "switch on ip_forward".to_owned(), source })?;
    }
    Ok(())
}

fn make_bridge(socket: &Socket) -> Result<Ipv4Addr, ExecError> {
    let network = free_network(socket).map_err(ExecError::network("list of routes"))?;
    let network = network.ok_or_else(|| ExecError::Network {
        step: "every network kiln could use is in use on this host; try --network host".to_owned(),
        source: Errno::ADDRINUSE.into(),
    })?;
    add_bridge(socket, BRIDGE, at(network, 1), PREFIX)?;
    Ok(network)
}

/// A bridge with its address, as far as it is not there.
pub(super) fn add_bridge(
    socket: &Socket,
    name: &str,
    address: Ipv4Addr,
    prefix: u8,
) -> Result<(), ExecError> {
    let create = Message::new(RTM_NEWLINK, flag::ACK | flag::CREATE | flag::EXCL, &link_header(0, IFF_UP))
        .put_text(IFLA_IFNAME, name)
        // Else it is the lowest one among those of its ports: with each container that comes or goes it may be
        // another, and what the others send goes nowhere until they ask again, many seconds later.
        .put(IFLA_ADDRESS, &hardware_address(address))
        .nest(IFLA_LINKINFO, |info| info.put_text(IFLA_INFO_KIND, "bridge"));
    match socket.request(create) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(ExecError::network(format!("make bridge {name}"))(errno)),
    }
    let index = link_index(socket, name).map_err(ExecError::network(format!("look up {name}")))?;
    let index = index.ok_or_else(|| ExecError::network(format!("bridge {name} vanished"))(Errno::NODEV))?;
    add_address(socket, index, address, prefix).map_err(ExecError::network(format!("address of {name}")))?;
    set_up(socket, index).map_err(ExecError::network(format!("bring up {name}")))
}

/// Removes an interface; one that is not there is removed.
pub(super) fn remove_link(socket: &Socket, name: &str) -> Result<(), Errno> {
    let message = Message::new(RTM_DELLINK, flag::ACK, &link_header(0, 0)).put_text(IFLA_IFNAME, name);
    match socket.request(message) {
        Err(Errno::NODEV) => Ok(()),
        other => other,
    }
}

/// The first candidate that overlaps no route of the host.
fn free_network(socket: &Socket) -> Result<Option<Ipv4Addr>, Errno> {
    let taken = routes(socket)?;
    let free = |network: &Ipv4Addr| !taken.iter().any(|route| route.overlaps(Subnet::new(*network, PREFIX)));
    Ok(CANDIDATES.into_iter().find(free))
}

/// What the host has routes to, but for the default route.
pub(super) fn routes(socket: &Socket) -> Result<Vec<Subnet>, Errno> {
    let mut header = route_header();
    header[4..8].fill(0);
    let routes = socket.dump(Message::new(RTM_GETROUTE, flag::DUMP, &header))?;
    let destination = |body: &Vec<u8>| {
        let value = attribute(body.get(12..)?, RTA_DST)?;
        Some(Subnet::new(word(value, 0).into(), body[1].min(32)))
    };
    let of_ipv4 = routes.iter().filter(|body| body.first() == Some(&AF_INET));
    Ok(of_ipv4.filter_map(destination).filter(|route| route.prefix() > 0).collect())
}

fn bridge_address(socket: &Socket, index: u32) -> Result<Option<Ipv4Addr>, Errno> {
    let answers = socket.dump(Message::new(RTM_GETADDR, flag::DUMP, &address_header(0, PREFIX)))?;
    let ours = answers.iter().find(|body| body.len() >= 8 && u32::from_ne_bytes(word(body, 4)) == index);
    Ok(ours.and_then(|body| attribute(&body[8..], IFA_LOCAL)).map(|value| word(value, 0).into()))
}

pub(super) fn add_address(socket: &Socket, index: u32, address: Ipv4Addr, prefix: u8) -> Result<(), Errno> {
    let header = address_header(index, prefix);
    let message = Message::new(RTM_NEWADDR, flag::ACK | flag::CREATE | flag::EXCL, &header)
        .put(IFA_LOCAL, &address.octets())
        .put(IFA_ADDRESS, &address.octets());
    match socket.request(message) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

pub(super) fn set_up(socket: &Socket, index: u32) -> Result<(), Errno> {
    socket.request(Message::new(RTM_NEWLINK, flag::ACK, &link_header(index, IFF_UP)))
}

/// Brings loopback up in the network namespace of this thread.
pub(super) fn loopback_up() -> Result<(), ExecError> {
    let socket = route_socket().map_err(ExecError::network("netlink socket"))?;
    // Loopback is interface 1 of every network namespace.
    set_up(&socket, 1).map_err(ExecError::network("bring up loopback"))
}

pub(super) fn lock_setup() -> Result<File, ExecError> {
    let failed = |source| ExecError::Network { step: LOCK_DIR.to_owned(), source };
    std::fs::create_dir_all(LOCK_DIR).map_err(failed)?;
    let file = File::create(format!("{LOCK_DIR}/lock")).map_err(failed)?;
    file.lock().map_err(failed)?;
    Ok(file)
}

/// Takes an address that nobody holds the lock of. Locks go with their process.
///
/// The search starts at another place each time: the kernel takes a dead container's interface
/// away some time after its process, and until then the address is better left alone.
fn take_address(network: Ipv4Addr) -> Result<(Lease, Address), ExecError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
    // Neither the network itself, nor the bridge, nor the broadcast address.
    const HOSTS: u32 = u16::MAX as u32 - 2;
    for offset in 0..HOSTS {
        let host = 2 + u16::try_from(start.wrapping_add(offset) % HOSTS).unwrap_or(0);
        if let Some(address) = Address::take(at(network, host))? {
            return Ok((Lease { network, host }, address));
        }
    }
    Err(ExecError::network("all 65533 addresses are in use")(Errno::ADDRNOTAVAIL))
}

impl Address {
    /// Takes this one; `None`: somebody has it.
    pub(super) fn take(address: Ipv4Addr) -> Result<Option<Self>, ExecError> {
        let failed = |source| ExecError::Network { step: ADDRESSES.to_owned(), source };
        let open = || File::options().write(true).create(true).truncate(false).open(ADDRESSES);
        let file = match open() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                std::fs::create_dir_all(LOCK_DIR).and_then(|()| open())
            }
            other => other,
        };
        let file = file.map_err(failed)?;
        Ok(lock_byte(&file, u32::from(address)).map_err(failed)?.then_some(Self { _lock: file }))
    }
}

/// Locks one byte of a file that need not have it, for as long as the file is open (fcntl(2), "Open file
/// description locks"); false when another one has it.
fn lock_byte(file: &File, at: u32) -> std::io::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at.into(),
        l_len: 1,
        l_pid: 0,
    };
    match nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
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
        let end = End {
            bridge: self.bridge,
            outside: &format!("kiln{:x}", std::process::id()),
            inside: "eth0",
            address: lease.address(),
            prefix: PREFIX,
            gateway: Some(lease.gateway()),
        };
        let inside = route_socket().map_err(ExecError::network("netlink socket"))?;
        set_up(&inside, 1).map_err(ExecError::network("bring up loopback"))?;
        join(&self.socket, &end)
    }
}

/// An interface in a network namespace, and where its other end is.
pub(super) struct End<'a> {
    /// The bridge's number on the host.
    pub(super) bridge: u32,
    /// Name on the host.
    pub(super) outside: &'a str,
    /// Name in the namespace.
    pub(super) inside: &'a str,
    pub(super) address: Ipv4Addr,
    pub(super) prefix: u8,
    /// Where the rest of the world is; `None`: nowhere.
    pub(super) gateway: Option<Ipv4Addr>,
}

/// Like docker: a hardware address made of the IP address needs no luck to be unique.
fn hardware_address(address: Ipv4Addr) -> [u8; 6] {
    let octets = address.octets();
    [0x02, 0x42, octets[0], octets[1], octets[2], octets[3]]
}

/// Joins the network namespace this thread is in to a bridge of the host, whose socket `host` is.
pub(super) fn join(host: &Socket, end: &End<'_>) -> Result<(), ExecError> {
    let namespace = openat(CWD, "/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(ExecError::network("open the network namespace"))?;
    let inside = route_socket().map_err(ExecError::network("netlink socket"))?;
    let namespace = u32::try_from(namespace.as_fd().as_raw_fd()).map(|fd| (namespace, fd));
    let (_namespace, fd) = namespace.map_err(|_| ExecError::network("namespace")(Errno::BADF))?;
    let hardware = hardware_address(end.address);
    let create = Message::new(RTM_NEWLINK, flag::ACK | flag::CREATE | flag::EXCL, &link_header(0, IFF_UP))
        .put_text(IFLA_IFNAME, end.outside)
        .put_u32(IFLA_MASTER, end.bridge)
        .nest(IFLA_LINKINFO, |info| {
            info.put_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |peer| {
                    // Not up yet: the pair is joined only after this end was made.
                    peer.raw(&link_header(0, 0))
                        .put_text(IFLA_IFNAME, end.inside)
                        .put(IFLA_ADDRESS, &hardware)
                        .put_u32(IFLA_NET_NS_FD, fd)
                })
            })
        });
    host.request(create).map_err(ExecError::network("make the interface pair"))?;
    let name = end.inside;
    let index = link_index(&inside, name).map_err(ExecError::network(format!("look up {name}")))?;
    let index = index.ok_or_else(|| ExecError::network(format!("{name} vanished"))(Errno::NODEV))?;
    add_address(&inside, index, end.address, end.prefix)
        .map_err(ExecError::network(format!("address of {name}")))?;
    set_up(&inside, index).map_err(ExecError::network(format!("bring up {name}")))?;
    end.gateway.map_or(Ok(()), |gateway| default_route(&inside, index, gateway))
}

/// Sends everything that has no route of its own to a gateway.
pub(super) fn default_route(inside: &Socket, index: u32, gateway: Ipv4Addr) -> Result<(), ExecError> {
    let route = Message::new(RTM_NEWROUTE, flag::ACK | flag::CREATE, &route_header())
        .put(RTA_GATEWAY, &gateway.octets())
        .put_u32(RTA_OIF, index);
    inside.request(route).map_err(ExecError::network("default route"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_one_byte_that_one_has_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let (one, other) = (open(), open());
        assert!(lock_byte(&one, u32::MAX).unwrap());
        assert!(lock_byte(&one, 7).unwrap());
        assert!(!lock_byte(&other, u32::MAX).unwrap());
        assert!(lock_byte(&other, u32::MAX - 1).unwrap());
        drop(one);
        assert!(lock_byte(&other, u32::MAX).unwrap() && lock_byte(&other, 7).unwrap());
        // Neither names nor bytes pile up.
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
