//! From `run`'s options to a container's networks, ports and names.

use std::net::{IpAddr, Ipv4Addr};

use kiln_containers::{Attachment, ContainerId, Networks, Port, USUAL_NETWORK, is_name};
use kiln_executor::{Ids, Network, ProcessSpec, Resolver};
use kiln_oci::image::RunConfig;

use crate::args::network::JoinArgs;
use crate::errors::Failure;
use crate::session::Session;

/// The networks that `--network` and its friends ask for.
pub(super) struct Choice {
    /// What the process is told.
    pub(super) process: Network,
    pub(super) attachments: Vec<Attachment>,
    pub(super) shared_with: Option<ContainerId>,
}

impl Choice {
    fn plain(process: Network) -> Self {
        Self { process, attachments: Vec::new(), shared_with: None }
    }

    /// Whether ports of the host can lead there.
    pub(super) fn takes_ports(&self) -> bool {
        self.process == Network::Default
    }
}

pub(super) fn choose(session: &Session, args: &JoinArgs) -> Result<Choice, Failure> {
    let wrong = |text: &str, reason: &str| Failure::usage(format!("--network {text}: {reason}"));
    let special = |name: &str| matches!(name, "none" | "host") || name.starts_with("container:");
    let named = |name: &String| !matches!(name.as_str(), "default" | USUAL_NETWORK) && !special(name);
    let choice = match args.networks.as_slice() {
        [] => Choice::plain(Network::Default),
        [name] if name == "none" => Choice::plain(Network::None),
        [name] if name == "host" => Choice::plain(Network::Host),
        [name] if !named(name) && !special(name) && args.ip.is_none() => Choice::plain(Network::Default),
        [name] if special(name) => {
            let other = session.containers.find(name.trim_start_matches("container:"))?;
            if other.config()?.network_of.is_some() {
                return Err(wrong(name, "that container shares another one's network itself"));
            }
            let shared_with = Some(other.id().clone());
            Choice { process: Network::None, attachments: Vec::new(), shared_with }
        }
        several => {
            if let Some(name) = several.iter().find(|name| special(name)) {
                return Err(wrong(name, "no other network goes with it"));
            }
            let mut attachments: Vec<Attachment> = Vec::new();
            for name in several {
                let network = match named(name) {
                    true => Networks::open(session.containers.root()).find(name)?.name,
                    false => USUAL_NETWORK.to_owned(),
                };
                if attachments.iter().any(|known| known.network == network) {
                    return Err(wrong(name, "it is given twice"));
                }
                attachments.push(Attachment { network, aliases: args.network_alias.clone(), address: None });
            }
            // docker: where several are given, it is the address in the first.
            attachments[0].address = args.ip;
            Choice { process: Network::Default, attachments, shared_with: None }
        }
    };
    if kiln_executor::ids() != Ids::Host && !choice.attachments.is_empty() {
        return Err(Failure::usage("networks with a bridge are made on the host: only root has them"));
    }
    let has_names = choice.attachments.iter().any(|known| known.network != USUAL_NETWORK);
    if !has_names && !args.network_alias.is_empty() {
        return Err(Failure::usage("--network-alias is for networks made by `kiln network create`"));
    }
    if choice.attachments.is_empty() && args.ip.is_some() {
        return Err(Failure::usage("--ip is for networks that have addresses: give --network"));
    }
    Ok(choice)
}

/// What `--dns…` and `--add-host` say.
pub(super) fn names(args: &JoinArgs, process: &mut ProcessSpec) -> Result<(), Failure> {
    process.resolver = Resolver {
        servers: args.dns.clone(),
        search: args.dns_search.clone(),
        options: args.dns_option.clone(),
    };
    let strange = |text: &&String| text.is_empty() || text.contains(char::is_whitespace);
    if let Some(text) = args.dns_search.iter().chain(&args.dns_option).find(strange) {
        return Err(Failure::usage(format!("{text:?} cannot stand in resolv.conf")));
    }
    for text in &args.add_host {
        process.extra_hosts.push(host(text)?);
    }
    Ok(())
}

/// `NAME:ADDRESS`, `NAME=ADDRESS`, `NAME:host-gateway`
pub(crate) fn host(text: &str) -> Result<(String, String), Failure> {
    let wrong = || Failure::usage(format!("--add-host {text:?} is not NAME:ADDRESS"));
    // Whichever comes first: addresses have colons as well.
    let at = text.find([':', '=']).ok_or_else(wrong)?;
    let (name, address) = (&text[..at], text[at + 1..].trim_start_matches('[').trim_end_matches(']'));
    if name.is_empty() || name.contains(char::is_whitespace) || name.contains('#') {
        return Err(wrong());
    }
    if address == ProcessSpec::HOST_GATEWAY {
        return Ok((name.to_owned(), address.to_owned()));
    }
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    Ok((name.to_owned(), address.to_string()))
}

/// `[[ADDRESS:]PORT:]INSIDE[/PROTOCOL]`, with ranges.
pub(super) fn port(text: &str) -> Result<Vec<Port>, Failure> {
    let wrong = || Failure::usage(format!("--publish {text:?} is not [[ADDRESS:]PORT:]INSIDE[/PROTOCOL]"));
    let (rest, protocol) = text.rsplit_once('/').unwrap_or((text, "tcp"));
    if !matches!(protocol, "tcp" | "udp") {
        return Err(wrong());
    }
    let (rest, inside) = rest.rsplit_once(':').unwrap_or(("", rest));
    let (address, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let inside = range(inside).ok_or_else(wrong)?;
    let host = if host.is_empty() { None } else { Some(range(host).ok_or_else(wrong)?) };
    let count = inside.1 - inside.0;
    // docker: one port inside takes any that is free of a range outside.
    let any = host.filter(|(first, last)| count == 0 && first != last).map(|(_, last)| last);
    if any.is_none() && host.is_some_and(|(first, last)| last - first != count) {
        return Err(wrong());
    }
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<IpAddr>().is_err() {
        return Err(wrong());
    }
    let port = |nth: u16| Port {
        host_address: if address == Ipv4Addr::UNSPECIFIED.to_string() { "0.0.0.0" } else { address }
            .to_owned(),
        host: host.map(|(first, _)| first + nth),
        host_last: any,
        inside: inside.0 + nth,
        protocol: protocol.to_owned(),
    };
    Ok((0..=count).map(port).collect())
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first > 0 && first <= last).then_some((first, last))
}

/// The ports that the image or the user exposes and nobody has published, each on any that is free.
pub(super) fn exposed(settings: &RunConfig, published: &[Port]) -> Vec<Port> {
    let mut found = Vec::new();
    for key in settings.exposed_ports.keys() {
        let (inside, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
        let Some((first, last)) = range(inside) else { continue };
        for inside in first..=last {
            if published.iter().all(|port| port.inside != inside || port.protocol != protocol) {
                found.push(Port {
                    host_address: String::new(),
                    host: None,
                    host_last: None,
                    inside,
                    protocol: protocol.to_owned(),
                });
            }
        }
    }
    found.retain(|port| matches!(port.protocol.as_str(), "tcp" | "udp"));
    found
}

/// A name that others may call a container by.
pub(super) fn check_alias(alias: &str) -> Result<(), Failure> {
    match is_name(alias) || alias.len() == 1 {
        true => Ok(()),
        false => Err(Failure::usage(format!("{alias:?} is no name"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        let shown = |text: &str| {
            port(text).map_err(|error| error.render()).map(|ports| {
                let one = |port: &Port| {
                    let last = port.host_last.map_or(String::new(), |last| format!("-{last}"));
                    format!("{}:{:?}{last}:{}", port.host_address, port.host, port.key())
                };
                ports.iter().map(one).collect::<Vec<_>>().join(" ")
            })
        };
        assert_eq!(shown("80").unwrap(), ":None:80/tcp");
        assert_eq!(shown("8080:80/udp").unwrap(), ":Some(8080):80/udp");
        assert_eq!(shown("127.0.0.1:8080:80").unwrap(), "127.0.0.1:Some(8080):80/tcp");
        assert_eq!(shown("127.0.0.1::80").unwrap(), "127.0.0.1:None:80/tcp");
        assert_eq!(shown("[::1]:1:2").unwrap(), "::1:Some(1):2/tcp");
        assert_eq!(shown("8000-8001:80-81").unwrap(), ":Some(8000):80/tcp :Some(8001):81/tcp");
        assert_eq!(shown("8000-8009:80").unwrap(), ":Some(8000)-8009:80/tcp");
        for bad in ["", "0", "70000", "80/icmp", "x:80", "1-3:80-81", "host:1:2"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_are_read_as_docker_reads_them() {
        let shown = |text: &str| host(text).map(|(name, at)| format!("{name} {at}")).unwrap_or_default();
        for (text, found) in [
            ("db:10.0.0.1", "db 10.0.0.1"),
            ("db=::1", "db ::1"),
            ("db:[::1]", "db ::1"),
            ("db:host-gateway", "db host-gateway"),
        ] {
            assert_eq!(shown(text), found);
        }
        for bad in ["db", ":1.1.1.1", "db:", "db:elsewhere", "d b:1.1.1.1"] {
            assert!(host(bad).is_err(), "{bad}");
        }
    }
}
