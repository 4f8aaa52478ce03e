//! Files in `/etc` that are the container's own.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fchmod, openat};
use rustix::mount::MountAttrFlags;

use super::channel::Task;
use super::mounts::{SAFE, attach_aside, clone_tree, new_mount};
use super::sys;
use crate::{ExecError, Network, ProcessSpec, Resolver};

/// `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname`, each as a read-only mount.
pub(super) fn own_files(task: &Task) -> Result<Vec<(&'static str, OwnedFd)>, ExecError> {
    let spec = &task.spec;
    let contents = [
        ("resolv.conf", resolver_of(task)),
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

fn resolver(spec: &ProcessSpec) -> String {
    let host = match spec.network {
        Network::Host => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        _ => host_resolver(),
    };
    changed(&host, &spec.resolver)
}

/// The host's resolver configuration without servers that only the host can reach.
pub fn host_resolver() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf");
    let usable = reachable(&text);
    if usable.contains("nameserver") || !text.contains("nameserver") {
        return usable;
    }
    // systemd-resolved listens on loopback; what it asks itself stands here.
    reachable(&read("/run/systemd/resolve/resolv.conf"))
}

/// `host` with the lines that `wanted` says otherwise.
fn changed(host: &str, wanted: &Resolver) -> String {
    let replaced = |line: &&str| match line.split_whitespace().next() {
        Some("nameserver") => !wanted.servers.is_empty(),
        Some("search" | "domain") => !wanted.search.is_empty(),
        Some("options") => !wanted.options.is_empty(),
        _ => false,
    };
    let mut text: String =
        host.lines().filter(|line| !replaced(line)).map(|line| format!("{line}\n")).collect();
    for server in &wanted.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !wanted.search.is_empty() && wanted.search != ["."] {
        text.push_str(&format!("search {}\n", wanted.search.join(" ")));
    }
    if !wanted.options.is_empty() {
        text.push_str(&format!("options {}\n", wanted.options.join(" ")));
    }
    text
}

fn reachable(text: &str) -> String {
    let loopback = |line: &str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words.next().is_some_and(|server| server.starts_with("127.") || server == "::1")
    };
    text.lines().filter(|line| !loopback(line)).map(|line| format!("{line}\n")).collect()
}

fn resolver_of(task: &Task) -> String {
    match &task.user_network {
        Some(network) => changed(&network.resolver(), &task.spec.resolver),
        None => resolver(&task.spec),
    }
}

fn hosts(task: &Task) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let lease = task.lease.as_ref();
    let address = match (lease, &task.user_network) {
        (Some(lease), _) => lease.address().to_string(),
        (None, Some(network)) => network.address().to_string(),
        (None, None) => "127.0.0.1".to_owned(),
    };
    // Whoever made the network knows the addresses in it.
    if task.spec.network != Network::Given {
        text.push_str(&format!("{address}\t{}\n", task.spec.hostname));
    }
    for (name, address) in &task.spec.extra_hosts {
        let gateway = match address.as_str() {
            ProcessSpec::HOST_GATEWAY => lease.map(|lease| lease.gateway().to_string()),
            _ => Some(address.clone()),
        };
        // Without a network there is no way to the host but loopback, which is its only for its own.
        text.push_str(&format!("{}\t{name}\n", gateway.as_deref().unwrap_or("127.0.0.1")));
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

    #[test]
    fn only_what_is_wanted_otherwise_is_changed() {
        let host = "search example.com\nnameserver 10.0.0.2\noptions edns0\n";
        let wanted = |servers: &[&str], search: &[&str], options: &[&str]| Resolver {
            servers: servers.iter().map(|server| server.parse().unwrap()).collect(),
            search: search.iter().map(|&name| name.to_owned()).collect(),
            options: options.iter().map(|&name| name.to_owned()).collect(),
        };
        assert_eq!(changed(host, &Resolver::default()), host);
        let servers = wanted(&["1.1.1.1", "::2"], &[], &[]);
        let text = "search example.com\noptions edns0\nnameserver 1.1.1.1\nnameserver ::2\n";
        assert_eq!(changed(host, &servers), text);
        let others = wanted(&[], &["a", "b"], &["ndots:2"]);
        assert_eq!(changed(host, &others), "nameserver 10.0.0.2\nsearch a b\noptions ndots:2\n");
        assert_eq!(changed(host, &wanted(&[], &["."], &[])), "nameserver 10.0.0.2\noptions edns0\n");
    }
}
