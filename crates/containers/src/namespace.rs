//! Whose user namespace a user's command is to be in.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The process of a monitor of the store at `root`, as this process sees it; `None` when no container
/// runs. Costs a few system calls for each container there is.
///
/// All of a user's containers, and all commands while one runs, are in one user namespace: from another
/// one of the same user nobody may look into a container.
pub fn monitor_process(root: &Path) -> Option<i32> {
    let containers = fs::read_dir(root.join("containers")).ok()?;
    containers.flatten().find_map(|entry| {
        // A socket's path has at most 107 bytes; the store's may be longer.
        let dir = File::open(entry.path()).ok()?;
        let address = format!("/proc/self/fd/{}/socket", dir.as_raw_fd());
        let address = SocketAddrUnix::new(address.as_str()).ok()?;
        let kind = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let socket = socket_with(AddressFamily::UNIX, kind.0, kind.1, None).ok()?;
        connect(&socket, &address).ok()?;
        Some(socket_peercred(&socket).ok()?.pid.as_raw_nonzero().get())
    })
}
