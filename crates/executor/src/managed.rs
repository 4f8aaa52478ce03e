//! Processes whose streams and life somebody else looks after: a container's.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// How a process is run for somebody who wants to know when it started, and as what.
pub struct Managed<'a> {
    /// Standard input, output and error; `None`: a terminal inside the container.
    pub streams: Option<[OwnedFd; 3]>,
    /// Called once the program runs: `execve` has succeeded. Not called when it fails.
    pub started: &'a mut (dyn FnMut(Started) + Send),
}

/// A process that has started.
#[derive(Debug)]
pub struct Started {
    /// Its number as the host sees it.
    pub pid: i32,
    /// The master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
    /// Its address, when it has a network of its own.
    pub address: Option<Ipv4Addr>,
}
