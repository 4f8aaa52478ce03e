//! Files in `/etc` that are the container's own.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fchmod, openat};
use rustix::mount::MountAttrFlags;

use super::channel::Task;
use super::mounts::{SAFE, attach_aside, clone_tree, new_mount};
use super::sys;
use super::user_net::UserNetwork;
use crate::{ExecError, Network};

/// `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`, each as a read-only mount.
pub(super) fn own_files(task: &Task) -> Result<Vec<(&'static str, OwnedFd)>, ExecError> {
    let spec = &task.spec;
    let contents = [
        (
            "resolv.conf",
            task.user_network.as_ref().map_or_else(|| resolver(spec.network), UserNetwork::resolver),
        ),
        ("hosts", hosts(task)),
        ("hostname", format!("{}\n", spec.hostname)),
    ];
    let tmpfs = new_mount("tmpfs", &[("mode", "755"), ("size", "1m")], SAFE)?;
    for (name, text) in &contents {
        let failed = |errno| ExecError::start(format!("/etc/{name}"))(errno);
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&tmpfs, *name, flags, Mode::from_raw_mode(0o644)).map_err(failed)?;
        fchmod(&file, Mode::from_raw_mode(0o644)).map_err(failed)?;
        rustix::io::write(&file, text.as_bytes()).map_err(failed)?;
    }
    attach_aside(&tmpfs, task, "container files")?;
    contents
        .iter()
        .map(|(name, _)| {
            let file = clone_tree(&tmpfs, name, false).map_err(ExecError::start(format!("/etc/{name}")))?;
            sys::restrict_mount(file.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY)
                .map_err(ExecError::start(format!("/etc/{name}")))?;
            Ok((*name, file))
        })
        .collect()
}

/// The host's resolver configuration without servers that only the host can reach.
fn resolver(network: Network) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf");
    if network == Network::Host {
        return text;
    }
    let usable = reachable(&text);
    if usable.contains("nameserver") || !text.contains("nameserver") {
        return usable;
    }
    // systemd-resolved listens on loopback; what it asks itself stands here.
    reachable(&read("/run/systemd/resolve/resolv.conf"))
}

fn reachable(text: &str) -> String {
    let loopback = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words.next().is_some_and(|server| server.starts_with("127.") || server == "::1")
    };
    text.lines().filter(|line| !loopback(line)).map(|line| format!("{line}\n")).collect()
}

fn hosts(task: &Task) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let address = match (&task.lease, &task.user_network) {
        (Some(lease), _) => lease.address().to_string(),
        (None, Some(network)) => network.address().to_string(),
        (None, None) => "127.0.0.1".to_owned(),
    };
    text.push_str(&format!("{address}\t{}\n", task.spec.hostname));
    for (name, address) in &task.spec.extra_hosts {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_hosts_loopback_are_left_out() {
        let text = "search example.com\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions edns0\n";
        assert_eq!(reachable(text), "search example.com\nnameserver 10.0.0.2\noptions edns0\n");
    }
}
