//! Network namespaces that are made before a container and outlive its process.
//!
//! A step's helper makes its own on the way (`outer.rs`), which is cheaper. These are for containers
//! that share one, are in several networks, or need somebody inside before they start.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::net::{End, default_route, join, link_index, loopback_up, remove_link, route_socket};
use super::sys;
use crate::ExecError;

/// A network namespace; it lives at least as long as this.
#[derive(Debug)]
pub struct NetworkNamespace {
    fd: OwnedFd,
}

/// An interface that leads out of a network namespace.
#[derive(Debug, Clone)]
pub struct Plug<'a> {
    /// The host's bridge at its other end.
    pub bridge: &'a str,
    /// What it is called inside.
    pub interface: &'a str,
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// The way to everything else; `None`: this is not the way.
    pub gateway: Option<Ipv4Addr>,
}

fn own() -> Result<OwnedFd, ExecError> {
    openat(CWD, "/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(ExecError::network("open the network namespace"))
}

/// Works in a thread of its own: namespaces are a thread's.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T, ExecError> + Send) -> Result<T, ExecError> {
    let lost = || ExecError::network("a thread")(rustix::io::Errno::AGAIN);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("network".to_owned()).spawn_scoped(scope, work);
        thread.map_err(|_| lost())?.join().map_err(|_| lost())?
    })
}

impl NetworkNamespace {
    /// A new one with nothing but loopback.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new() -> Result<Self, ExecError> {
        in_thread(|| {
            sys::unshare(UnshareFlags::NEWNET).map_err(ExecError::network("network namespace"))?;
            loopback_up()?;
            own().map(|fd| Self { fd })
        })
    }

    /// The one of a running process.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of_process(pid: i32) -> Result<Self, ExecError> {
        let path = format!("/proc/{pid}/ns/net");
        let fd = openat(CWD, &path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Ok(Self { fd: fd.map_err(ExecError::network(path))? })
    }

    /// A descriptor of it, for [`Handles`](crate::Handles).
    ///
    /// # Errors
    /// When there are too many.
    pub fn handle(&self) -> Result<OwnedFd, ExecError> {
        rustix::io::fcntl_dupfd_cloexec(&self.fd, 3).map_err(ExecError::network("network namespace"))
    }

    /// Does something inside, in a thread of its own. What it opens stays of this namespace.
    ///
    /// # Errors
    /// What `work` says, or when the namespace cannot be entered.
    pub fn within<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, ExecError> + Send,
    ) -> Result<T, ExecError> {
        in_thread(|| {
            move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(ExecError::network("enter the network namespace"))?;
            work()
        })
    }

    /// Joins it to a bridge of the host. The interface goes with the namespace.
    ///
    /// # Errors
    /// When there is no such bridge, or the kernel refuses.
    pub fn plug(&self, plug: &Plug<'_>) -> Result<(), ExecError> {
        let host = route_socket().map_err(ExecError::network("netlink socket"))?;
        let found = link_index(&host, plug.bridge);
        let found = found.map_err(ExecError::network(format!("look up {}", plug.bridge)))?;
        let bridge = found.ok_or_else(|| {
            ExecError::network(format!("bridge {} vanished", plug.bridge))(rustix::io::Errno::NODEV)
        })?;
        self.within(|| {
            let (interface, address, prefix) = (plug.interface, plug.address, plug.prefix);
            // The kernel finds the number.
            let outside = "kilnv%d";
            join(&host, &End { bridge, outside, inside: interface, address, prefix, gateway: plug.gateway })
        })
    }

    /// Makes an interface the way to everything else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_gateway(&self, interface: &str, gateway: Ipv4Addr) -> Result<(), ExecError> {
        self.within(|| {
            let inside = route_socket().map_err(ExecError::network("netlink socket"))?;
            let index = link_index(&inside, interface).map_err(ExecError::network("look up"))?;
            let index = index.ok_or_else(|| ExecError::network(interface)(rustix::io::Errno::NODEV))?;
            default_route(&inside, index, gateway)
        })
    }

    /// Removes an interface; one that is not there is removed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unplug(&self, interface: &str) -> Result<(), ExecError> {
        self.within(|| {
            let inside = route_socket().map_err(ExecError::network("netlink socket"))?;
            remove_link(&inside, interface).map_err(ExecError::network(format!("remove {interface}")))
        })
    }
}
