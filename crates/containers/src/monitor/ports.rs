//! Published ports: taken before the process starts, held while it runs, led inside.
//!
//! Why both a proxy and rules: `docs/adr/0012-published-ports.md`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_executor::{ExecError, NetworkNamespace, PublishedPort, PublishedPorts, UserNetwork};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with, sockopt};

use super::proxy::{Door, Proxy};
use crate::config::Port;
use crate::state::BoundPort;
use crate::{ContainerId, Error};

/// How often another random port is tried.
const ATTEMPTS: u32 = 20;

/// Ports of the host that lead into a container.
pub(super) struct Ports {
    taken: Vec<Taken>,
    /// The container's address.
    address: Arc<AtomicU32>,
    proxy: Option<Proxy>,
    rules: Option<PublishedPorts>,
}

/// A port, and the sockets that keep others from it.
struct Taken {
    bound: Vec<BoundPort>,
    inside: u16,
    udp: bool,
    sockets: Vec<OwnedFd>,
}

impl Ports {
    /// Takes the ports; nothing leads inside yet.
    ///
    /// # Errors
    /// [`Error::PortInUse`], [`Error::PortRefused`].
    pub(super) fn take(wanted: &[Port]) -> Result<Self, Error> {
        let taken = wanted.iter().map(take_port).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { taken, address: Arc::default(), proxy: None, rules: None })
    }

    /// What they are, random ones included.
    pub(super) fn bound(&self) -> Vec<BoundPort> {
        self.taken.iter().flat_map(|taken| taken.bound.clone()).collect()
    }

    /// Leads them to the container's address, for the first time or to another one. Into a network that
    /// is `internal` nothing is let from outside but by way of the host.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn lead_to(
        &mut self,
        address: Ipv4Addr,
        internal: bool,
        id: &ContainerId,
    ) -> std::io::Result<()> {
        let before = self.address.swap(address.into(), Ordering::Relaxed);
        if self.taken.is_empty() || before == u32::from(address) {
            return Ok(());
        }
        if self.proxy.is_none() {
            self.proxy = Some(Proxy::start(self.doors(), None)?);
        }
        // Those that lead to the old address go first: they have the same name.
        self.rules = None;
        let rules = if internal { Vec::new() } else { self.rules_to(address) };
        if !rules.is_empty() {
            // Without them it is as good as with them, but that everybody seems to be the host.
            self.rules = PublishedPorts::add(id.short(), &rules).ok().flatten();
        }
        Ok(())
    }

    /// Leads them into the network of a user's process, which the host has no way to: what carries is
    /// inside, and its connections come from there.
    ///
    /// # Errors
    /// When that network cannot be entered, or no thread started.
    pub(super) fn lead_into(&mut self, process: i32) -> Result<(), ExecError> {
        if self.taken.is_empty() {
            return Ok(());
        }
        let network = NetworkNamespace::of_process(process)?;
        network.within(|| Ok(()))?;
        self.address.store(UserNetwork::address_inside().into(), Ordering::Relaxed);
        let failed = |source| ExecError::Start { step: "thread".to_owned(), source };
        self.proxy = Some(Proxy::start(self.doors(), Some(network)).map_err(failed)?);
        Ok(())
    }

    fn doors(&mut self) -> Vec<Door> {
        let mut doors = Vec::new();
        for taken in &mut self.taken {
            let door =
                |socket| Door { socket, udp: taken.udp, address: self.address.clone(), inside: taken.inside };
            doors.extend(taken.sockets.drain(..).map(door));
        }
        doors
    }

    fn rules_to(&self, address: Ipv4Addr) -> Vec<PublishedPort> {
        let mut rules = Vec::new();
        for taken in &self.taken {
            for bound in &taken.bound {
                let IpAddr::V4(at) = bound.address else { continue };
                // Other machines do not reach loopback.
                if !at.is_loopback() {
                    let wanted = (!at.is_unspecified()).then_some(at);
                    let to = (address, taken.inside);
                    rules.push(PublishedPort { udp: taken.udp, address: wanted, host: bound.host, to });
                }
            }
        }
        rules
    }
}

fn take_port(port: &Port) -> Result<Taken, Error> {
    let udp = port.protocol == "udp";
    let addresses: Vec<IpAddr> = match port.host_address.parse() {
        Ok(address) => vec![address],
        Err(_) => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    };
    let candidates: Vec<u16> = match port.host {
        Some(first) => (first..=port.host_last.unwrap_or(first).max(first)).collect(),
        None => vec![0; ATTEMPTS as usize],
    };
    let mut last = (0, addresses[0], Errno::ADDRINUSE);
    for candidate in candidates {
        match take_addresses(&addresses, candidate, udp) {
            Ok((sockets, bound)) => {
                let bound = bound.into_iter().map(|at| BoundPort {
                    address: at.ip(),
                    host: at.port(),
                    inside: port.inside,
                    protocol: port.protocol.clone(),
                });
                return Ok(Taken { bound: bound.collect(), inside: port.inside, udp, sockets });
            }
            Err((at, errno)) => last = (candidate, at, errno),
        }
        if last.2 != Errno::ADDRINUSE {
            break;
        }
    }
    let (number, address, errno) = last;
    let protocol = port.protocol.clone();
    Err(match errno {
        Errno::ADDRINUSE => Error::PortInUse { port: number, protocol, address },
        errno => Error::PortRefused { port: number, protocol, address, source: errno.into() },
    })
}

type Bound = (Vec<OwnedFd>, Vec<SocketAddr>);

/// Takes a port at all of these addresses; 0: one that is free.
fn take_addresses(addresses: &[IpAddr], port: u16, udp: bool) -> Result<Bound, (IpAddr, Errno)> {
    let (mut sockets, mut bound, mut port) = (Vec::new(), Vec::new(), port);
    for &address in addresses {
        match take_address(SocketAddr::new(address, port), udp) {
            Ok((socket, at)) => {
                port = at.port();
                sockets.push(socket);
                bound.push(at);
            }
            // A host without IPv6, where that was not asked for.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if !bound.is_empty() => {}
            Err(errno) => return Err((address, errno)),
        }
    }
    Ok((sockets, bound))
}

fn take_address(at: SocketAddr, udp: bool) -> Result<(OwnedFd, SocketAddr), Errno> {
    let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = if udp { SocketType::DGRAM } else { SocketType::STREAM };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if !udp {
        // Connections of a server that was there before do not count.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    if udp && at.ip().is_unspecified() {
        super::datagrams::tell_addresses(&socket, at.is_ipv4())
            .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    }
    bind(&socket, &at)?;
    if !udp {
        listen(&socket, 4096)?;
    }
    let at = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, at))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn port(address: &str, host: Option<u16>, inside: u16, protocol: &str) -> Port {
        Port { host_address: address.into(), host, host_last: None, inside, protocol: protocol.into() }
    }

    #[test]
    fn a_port_is_held_from_the_beginning_and_given_back() {
        let ports = Ports::take(&[port("", None, 80, "tcp")]).unwrap();
        let number = ports.bound()[0].host;
        assert!(number > 0 && ports.bound().iter().all(|bound| bound.host == number));
        let again = Ports::take(&[port("127.0.0.1", Some(number), 80, "tcp")]);
        let Err(Error::PortInUse { port: named, .. }) = again else { panic!("it was taken twice") };
        assert_eq!(named, number);
        let mut range = port("127.0.0.1", Some(number), 80, "tcp");
        range.host_last = Some(number.saturating_add(50));
        let other = Ports::take(&[range]).unwrap();
        assert!(other.bound()[0].host > number);
        drop(ports);
        // Somebody else on this machine may be quicker, once in a while.
        let again = || {
            let number = Ports::take(&[port("", None, 80, "tcp")]).unwrap().bound()[0].host;
            Ports::take(&[port("", Some(number), 80, "tcp")]).is_ok()
        };
        assert!((0..10).any(|_| again()), "a port that was given back can be had");
        let nowhere = Ports::take(&[port("203.0.113.77", Some(number), 80, "tcp")]);
        assert!(matches!(nowhere, Err(Error::PortRefused { .. })));
    }

    #[test]
    fn connections_are_carried_whole_and_end_one_way_at_a_time() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let inside = server.local_addr().unwrap().port();
        let mut ports = Ports::take(&[port("127.0.0.1", None, inside, "tcp")]).unwrap();
        let outside = ports.bound()[0].host;
        ports.lead_to(Ipv4Addr::LOCALHOST, false, &ContainerId::random().unwrap()).unwrap();
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            // Only now, when the other side has said all.
            stream.write_all(&all).unwrap();
            all.len()
        });
        let mut client = TcpStream::connect(("127.0.0.1", outside)).unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert_eq!(answer.join().unwrap(), sent.len());
        assert!(back == sent);
        // Nobody listens any more: whoever calls is hung up on, not left waiting.
        let mut late = TcpStream::connect(("127.0.0.1", outside)).unwrap();
        assert!(matches!(late.read(&mut [0; 1]), Ok(0) | Err(_)));
        drop(ports);
        assert!(TcpStream::connect(("127.0.0.1", outside)).is_err());
    }

    #[test]
    fn datagrams_find_their_way_back_to_each_sender() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let inside = server.local_addr().unwrap().port();
        let mut ports = Ports::take(&[port("127.0.0.1", None, inside, "udp")]).unwrap();
        let outside = ports.bound()[0].host;
        ports.lead_to(Ipv4Addr::LOCALHOST, false, &ContainerId::random().unwrap()).unwrap();
        let clients: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        for (at, client) in clients.iter().enumerate() {
            client.send_to(format!("from {at}").as_bytes(), ("127.0.0.1", outside)).unwrap();
        }
        for _ in 0..3 {
            let mut buffer = [0; 100];
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..length], from).unwrap();
        }
        for (at, client) in clients.iter().enumerate() {
            let mut buffer = [0; 100];
            let (length, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from.port()), (format!("from {at}").as_bytes(), outside));
        }
    }
}
