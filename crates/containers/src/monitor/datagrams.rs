//! Datagrams of a socket that has all addresses of the host: each answer leaves with the address that the
//! question came to. A sender who is told something by another address does not listen.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage,
    recvmsg, sendmsg, setsockopt, sockopt,
};

/// A datagram's length, who sent it, and to which address of the host if that can be told.
pub(super) type Received = (usize, SocketAddr, Option<IpAddr>);

/// Has the kernel tell the address that each datagram came to.
pub(super) fn tell_addresses(socket: &impl AsFd, is_ipv4: bool) -> nix::Result<()> {
    match is_ipv4 {
        true => setsockopt(socket, sockopt::Ipv4PacketInfo, &true),
        false => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true),
    }
}

/// Takes a datagram; `EAGAIN`: there is none.
pub(super) fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> nix::Result<Received> {
    let mut iov = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!(in_pktinfo, in6_pktinfo);
    let fd = socket.as_fd().as_raw_fd();
    let message = recvmsg::<SockaddrStorage>(fd, &mut iov, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let mut local = None;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                local = Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => local = Some(IpAddr::from(info.ipi6_addr.s6_addr)),
            _ => {}
        }
    }
    let from = message.address.as_ref().and_then(address).ok_or(nix::errno::Errno::EAFNOSUPPORT)?;
    Ok((message.bytes, from, local))
}

fn address(of: &SockaddrStorage) -> Option<SocketAddr> {
    match (of.as_sockaddr_in(), of.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::V4((*v4).into())),
        (None, Some(v6)) => Some(SocketAddr::V6((*v6).into())),
        (None, None) => None,
    }
}

/// Sends a datagram to `to` with `from` as its sender; `None`: what the route back has.
pub(super) fn answer(
    socket: &impl AsFd,
    bytes: &[u8],
    to: SocketAddr,
    from: Option<IpAddr>,
) -> nix::Result<usize> {
    let (iov, flags) = ([IoSlice::new(bytes)], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    let fd = socket.as_fd().as_raw_fd();
    match (to, from) {
        (SocketAddr::V4(to), Some(IpAddr::V4(from))) => {
            let source = in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
            let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: in_addr { s_addr: 0 } };
            let controls = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &iov, &controls, flags, Some(&SockaddrIn::from(to)))
        }
        (SocketAddr::V6(to), Some(IpAddr::V6(from))) => {
            // A link-local sender has the interface in its address.
            let source = in6_addr { s6_addr: from.octets() };
            let info = in6_pktinfo { ipi6_addr: source, ipi6_ifindex: to.scope_id() };
            let controls = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &iov, &controls, flags, Some(&SockaddrIn6::from(to)))
        }
        (SocketAddr::V4(to), _) => plain(fd, &iov, flags, &SockaddrIn::from(to)),
        (SocketAddr::V6(to), _) => plain(fd, &iov, flags, &SockaddrIn6::from(to)),
    }
}

fn plain(fd: i32, iov: &[IoSlice<'_>], flags: MsgFlags, to: &impl SockaddrLike) -> nix::Result<usize> {
    sendmsg(fd, iov, &[], flags, Some(to))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn answers_come_from_where_the_question_went() {
        let server = UdpSocket::bind("0.0.0.0:0").unwrap();
        tell_addresses(&server, true).unwrap();
        let port = server.local_addr().unwrap().port();
        // Connected: an answer from 127.0.0.1, which the route back has, would not be heard.
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(("127.0.0.7", port)).unwrap();
        client.send(b"ask").unwrap();
        let mut buffer = [0; 16];
        server.set_nonblocking(false).unwrap();
        server.peek_from(&mut buffer).unwrap();
        let (length, from, local) = receive(&server, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], local), (&b"ask"[..], Some("127.0.0.7".parse().unwrap())));
        answer(&server, b"answer", from, local).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 6);
    }
}
