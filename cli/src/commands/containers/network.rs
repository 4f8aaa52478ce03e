//! `kiln network …`

use std::collections::BTreeMap;

use kiln_containers::{
    Attachment, Container, Error, Network, Networks, NewNetwork, Time, USUAL_NETWORK, members,
};
use serde_json::{Map, Value, json};

use super::join::check_alias;
use super::ps::wrong_format;
use super::remove::ask;
use super::{each, inspect};
use crate::args::containers::InspectArgs;
use crate::args::network::{NetworkArgs, NetworkCommand};
use crate::commands::print;
use crate::errors::Failure;
use crate::session::Session;
use crate::template::Listing;

pub(crate) fn run(session: &Session, args: &NetworkArgs) -> Result<u8, Failure> {
    let networks = Networks::open(session.containers.root());
    match &args.command {
        NetworkCommand::Create { subnet, gateway, internal, ipv6, label, driver, name } => {
            if *ipv6 == Some(true) {
                let refused = "--ipv6: networks have IPv4 addresses only";
                let hint = "a container has IPv6 as its host has it with `--network host`; \
                            ports published with -p are reached by IPv6, too";
                return Err(Failure::usage(refused).hint(hint));
            }
            if driver != "bridge" {
                return Err(Failure::usage(format!("--driver {driver:?}: there is bridge")));
            }
            let pair = |label: &String| {
                let (name, value) = label.split_once('=').unwrap_or((label, ""));
                (name.to_owned(), value.to_owned())
            };
            let labels = label.iter().map(pair).collect();
            let wanted = NewNetwork { subnet: *subnet, gateway: *gateway, internal: *internal, labels };
            let network = networks.create(name, wanted)?;
            print(&format!("{}\n", network.id))?;
            Ok(0)
        }
        NetworkCommand::List { quiet, no_trunc, filter, format } => {
            list(session, &networks, *quiet, *no_trunc, filter, format.as_deref())
        }
        NetworkCommand::Inspect { format, names } => {
            let args = InspectArgs { format: format.clone(), kind: None, size: false, names: names.clone() };
            inspect::show(&args, |name| document(session, &networks, name))
        }
        NetworkCommand::Rm { force, names } => each(names, |name| {
            if is_special(name) {
                return Err(Failure::usage(format!("network {name} is always there")));
            }
            match networks.remove(name, &session.containers) {
                Err(Error::NoNetwork { .. }) if *force => Ok(()),
                other => Ok(other.map(drop)?),
            }
        }),
        NetworkCommand::Prune { force } => prune(session, &networks, *force),
        NetworkCommand::Connect { alias, ip, network, container } => {
            alias.iter().try_for_each(|alias| check_alias(alias))?;
            let name = name_of(&networks, network)?;
            let container = session.containers.find(container)?;
            let attachment = Attachment { network: name, aliases: alias.clone(), address: *ip };
            change(&container, |attachments| {
                if attachments.iter().any(|known| known.network == attachment.network) {
                    return Err(Failure::usage(format!("the container is in network {network} already")));
                }
                attachments.push(attachment);
                Ok(())
            })
        }
        NetworkCommand::Disconnect { force, network, container } => {
            let name = name_of(&networks, network)?;
            let container = session.containers.find(container)?;
            change(&container, |attachments| {
                let before = attachments.len();
                attachments.retain(|known| known.network != name);
                match attachments.len() == before && !*force {
                    true => Err(Failure::usage(format!("the container is not in network {network}"))),
                    false => Ok(()),
                }
            })
        }
    }
}

fn is_special(name: &str) -> bool {
    matches!(name, USUAL_NETWORK | "host" | "none")
}

fn name_of(networks: &Networks, text: &str) -> Result<String, Failure> {
    match text {
        USUAL_NETWORK => Ok(USUAL_NETWORK.to_owned()),
        "host" | "none" => Err(Failure::usage(format!("containers cannot enter or leave network {text}"))),
        text => Ok(networks.find(text)?.name),
    }
}

/// Changes the networks that a container is in, at once when it runs. When that fails, nothing has
/// changed.
fn change(
    container: &Container,
    work: impl FnOnce(&mut Vec<Attachment>) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    use kiln_executor::Network;
    let _lock = container.lock()?;
    let before = container.config()?;
    if before.network_of.is_some() || before.process.network == Network::Host {
        return Err(Failure::usage("the container has no network of its own"));
    }
    let mut after = before.clone();
    if after.networks.is_empty() && after.process.network == Network::Default {
        // Where it is without having been asked to.
        after.networks.push(Attachment {
            network: USUAL_NETWORK.to_owned(),
            aliases: Vec::new(),
            address: None,
        });
    }
    work(&mut after.networks)?;
    after.process.network = if after.networks.is_empty() { Network::None } else { Network::Default };
    container.write_config(&after)?;
    if !container.state()?.status.is_active() {
        return Ok(0);
    }
    let adjusted = match container.connect() {
        Ok(client) => client.reload(),
        // It has ended meanwhile.
        Err(Error::NotRunning { .. }) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = adjusted {
        container.write_config(&before)?;
        if let Ok(client) = container.connect() {
            let _ = client.reload();
        }
        return Err(error.into());
    }
    Ok(0)
}

/// A network that is always there.
fn special(name: &str) -> Value {
    let driver = if name == "none" { "null" } else { name };
    json!({ "Name": name, "ID": name, "Driver": driver, "Scope": "local", "Internal": "false",
            "Labels": "", "_Labels": {}, "IPv6": "false", "CreatedAt": Time::NEVER.to_string() })
}

fn list(
    session: &Session,
    networks: &Networks,
    quiet: bool,
    whole: bool,
    filters: &[String],
    format: Option<&str>,
) -> Result<u8, Failure> {
    let usual = "{{.ID}}\t{{.Name}}\t{{.Driver}}\t{{.Scope}}";
    let listing = Listing::parse(format, usual).map_err(wrong_format)?;
    let mut entries = Vec::new();
    let own = networks.list()?;
    let mut names: Vec<&str> = [USUAL_NETWORK, "host", "none"].to_vec();
    names.extend(own.iter().map(|network| network.name.as_str()));
    names.sort_unstable();
    for name in names {
        let network = own.iter().find(|network| network.name == name);
        if !fits(session, name, network, filters)? {
            continue;
        }
        let Some(network) = network else {
            entries.push(special(name));
            continue;
        };
        let labels = network.labels.iter().map(|(name, value)| format!("{name}={value}"));
        entries.push(json!({
            "Name": network.name,
            "ID": if whole { network.id.as_str() } else { network.short() },
            "Driver": "bridge",
            "Scope": "local",
            "Internal": network.internal.to_string(),
            "Labels": labels.collect::<Vec<_>>().join(","),
            "_Labels": network.labels,
            "IPv6": "false",
            "CreatedAt": network.created.to_string(),
        }));
    }
    if quiet {
        let ids = entries.iter().map(|entry| format!("{}\n", entry["ID"].as_str().unwrap_or_default()));
        print(&ids.collect::<String>())?;
        return Ok(0);
    }
    let headers = json!({
        "ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Scope": "SCOPE", "Internal": "INTERNAL",
        "Labels": "LABELS", "IPv6": "IPV6", "CreatedAt": "CREATED AT",
    });
    print(&listing.render(&headers, &entries).map_err(wrong_format)?)?;
    Ok(0)
}

fn fits(
    session: &Session,
    name: &str,
    network: Option<&Network>,
    filters: &[String],
) -> Result<bool, Failure> {
    let none = BTreeMap::new();
    let labels = network.map_or(&none, |network| &network.labels);
    for text in filters {
        let wrong = |reason: &str| Failure::usage(format!("--filter {text}: {reason}"));
        let (what, value) = text.split_once('=').ok_or_else(|| wrong("it is not WHAT=VALUE"))?;
        let fits = match what {
            "name" => name.contains(value),
            "id" => network.is_some_and(|network| network.id.starts_with(value)),
            "driver" => value == if name == "none" { "null" } else { network.map_or(name, |_| "bridge") },
            "type" => match value {
                "custom" => network.is_some(),
                "builtin" => network.is_none(),
                _ => return Err(wrong("there are custom and builtin")),
            },
            "label" => match value.split_once('=') {
                Some((name, value)) => labels.get(name).is_some_and(|known| known == value),
                None => labels.contains_key(value),
            },
            "dangling" => {
                let unused = network.is_some() && !is_wanted(session, name)?;
                matches!(value, "true" | "1") == unused
            }
            _ => return Err(wrong("there are id, name, label, driver, dangling, type")),
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a container, running or not, is in a network.
fn is_wanted(session: &Session, name: &str) -> Result<bool, Failure> {
    let containers = session.containers.list()?;
    let mut configs = containers.iter().filter_map(|container| container.config().ok());
    Ok(configs.any(|config| config.networks.iter().any(|known| known.network == name)))
}

pub(super) fn document(session: &Session, networks: &Networks, name: &str) -> Result<Value, Failure> {
    let mut containers = Map::new();
    let network = match name {
        USUAL_NETWORK | "host" | "none" => None,
        name => Some(networks.find(name)?),
    };
    let known = network.as_ref().map_or(name, |network| network.name.as_str());
    let mut subnet = None;
    for (config, _, endpoint) in members(known, &session.containers)? {
        subnet = Some((endpoint.subnet, endpoint.gateway));
        let entry = json!({
            "Name": config.name,
            "EndpointID": "",
            "MacAddress": endpoint.hardware_address(),
            "IPv4Address": format!("{}/{}", endpoint.address, endpoint.subnet.prefix()),
            "IPv6Address": "",
        });
        containers.insert(config.id.to_string(), entry);
    }
    let subnet = network.as_ref().map(|network| (network.subnet, network.gateway)).or(subnet);
    let addresses: Vec<Value> = subnet
        .iter()
        .map(|(subnet, gateway)| json!({ "Subnet": subnet.to_string(), "Gateway": gateway.to_string() }))
        .collect();
    Ok(json!({
        "Name": known,
        "Id": network.as_ref().map_or(name, |network| network.id.as_str()),
        "Created": network.as_ref().map_or(Time::NEVER, |network| network.created).to_string(),
        "Scope": "local",
        "Driver": if known == "none" { "null" } else if known == "host" { "host" } else { "bridge" },
        "EnableIPv6": false,
        "IPAM": { "Driver": "default", "Options": null, "Config": addresses },
        "Internal": network.as_ref().is_some_and(|network| network.internal),
        "Attachable": false,
        "Ingress": false,
        "ConfigFrom": { "Network": "" },
        "ConfigOnly": false,
        "Containers": containers,
        "Options": {},
        "Labels": network.as_ref().map(|network| network.labels.clone()).unwrap_or_default(),
    }))
}

fn prune(session: &Session, networks: &Networks, force: bool) -> Result<u8, Failure> {
    if !force && !ask("WARNING! This will remove all networks that no container is in.")? {
        return Ok(0);
    }
    let mut removed = String::new();
    for network in networks.list()? {
        if is_wanted(session, &network.name)? {
            continue;
        }
        match networks.remove(&network.name, &session.containers) {
            Ok(_) => removed.push_str(&format!("{}\n", network.name)),
            Err(Error::NetworkInUse { .. } | Error::NoNetwork { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !removed.is_empty() {
        print(&format!("Deleted Networks:\n{removed}\n"))?;
    }
    Ok(0)
}
