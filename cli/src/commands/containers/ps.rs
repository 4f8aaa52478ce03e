//! `kiln ps`

use std::net::SocketAddr;

use kiln_containers::{Config, Container, Health, State, Status, Time};
use kiln_snapshotter::content_bytes;
use regex_lite::Regex;
use serde_json::{Value, json};

use super::config::volume_of;
use crate::args::containers::PsArgs;
use crate::commands::{ago, human_size, print};
use crate::errors::Failure;
use crate::escape;
use crate::session::Session;
use crate::template::Listing;

/// A container that is shown.
struct Shown {
    container: Container,
    config: Config,
    state: State,
}

pub(crate) fn run(session: &Session, args: &PsArgs) -> Result<u8, Failure> {
    let usual = "{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.RunningFor}}\t{{.Status}}\t{{.Ports}}\t{{.Names}}";
    let usual = if args.size { format!("{usual}\t{{{{.Size}}}}") } else { usual.to_owned() };
    let listing = Listing::parse(args.format.as_deref(), &usual).map_err(wrong_format)?;
    let filters =
        args.filter.iter().map(|text| Filter::parse(session, text)).collect::<Result<Vec<_>, _>>()?;
    let by_state = filters.iter().any(|filter| matches!(filter, Filter::Status(_) | Filter::Exited(_)));
    let last = if args.latest { Some(1) } else { args.last };
    let all = args.all || by_state || last.is_some();
    let mut shown = Vec::new();
    for container in session.containers.list()? {
        // One that was removed meanwhile, or whose record is damaged.
        let (Ok(config), Ok(state)) = (container.config(), container.state()) else {
            if container.dir().exists() && all && filters.is_empty() {
                shown.push(Err(container));
            }
            continue;
        };
        let found = Shown { container, config, state };
        if (all || found.state.status.is_active()) && fits_all(&filters, session, &found)? {
            shown.push(Ok(found));
        }
    }
    shown.truncate(last.unwrap_or(usize::MAX));
    if args.quiet {
        let id = |shown: &Result<Shown, Container>| {
            let id = match shown {
                Ok(found) => found.container.id(),
                Err(container) => container.id(),
            };
            if args.no_trunc { format!("{id}\n") } else { format!("{}\n", id.short()) }
        };
        print(&shown.iter().map(id).collect::<String>())?;
        return Ok(0);
    }
    let needs_size = args.size || args.format.as_ref().is_some_and(|format| format.contains(".Size"));
    let entries: Vec<Value> = shown
        .iter()
        .map(|shown| match shown {
            Ok(found) => entry(session, found, args.no_trunc, needs_size),
            Err(container) => damaged(container, args.no_trunc),
        })
        .collect();
    print(&listing.render(&headers(), &entries).map_err(wrong_format)?)?;
    Ok(0)
}

pub(super) fn wrong_format(error: crate::template::TemplateError) -> Failure {
    Failure::usage(error.to_string())
}

fn headers() -> Value {
    json!({
        "ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "CreatedAt": "CREATED AT",
        "RunningFor": "CREATED", "Ports": "PORTS", "State": "STATE", "Status": "STATUS", "Size": "SIZE",
        "Names": "NAMES", "Labels": "LABELS", "Mounts": "MOUNTS", "Networks": "NETWORKS",
        "LocalVolumes": "LOCAL VOLUMES",
    })
}

fn damaged(container: &Container, whole: bool) -> Value {
    let id = if whole { container.id().as_str() } else { container.id().short() };
    json!({
        "ID": id, "Image": "", "Command": "", "CreatedAt": "", "RunningFor": "", "Ports": "",
        "State": "dead", "Status": "Dead (its record cannot be read)", "Size": "", "Names": "", "Labels": "",
        "Mounts": "", "Networks": "", "LocalVolumes": "0",
    })
}

fn entry(session: &Session, found: &Shown, whole: bool, with_size: bool) -> Value {
    let Shown { config, state, .. } = found;
    let command = config.process.args.join(" ");
    let command = if whole || command.chars().count() <= 20 {
        command
    } else {
        command.chars().take(19).chain(['…']).collect()
    };
    let labels = config.settings.labels.iter().map(|(name, value)| format!("{name}={value}"));
    let mounts: Vec<String> = config.mounts.iter().map(mount_source).collect();
    let volumes = config.mounts.iter().filter(|mount| volume_of(mount).is_some()).count();
    json!({
        "ID": if whole { config.id.as_str() } else { config.id.short() },
        "Image": config.image_name,
        // As it would be written: what it holds is the image's affair, not the terminal's.
        "Command": format!("\"{}\"", escape::quoted(&command)),
        "CreatedAt": config.created.to_string(),
        "RunningFor": ago(config.created.unix()),
        "Ports": ports(config, state),
        "State": state.status.name(),
        "Status": status(state),
        "Size": if with_size { size(session, config) } else { "0B".to_owned() },
        "Names": config.name,
        "Labels": labels.collect::<Vec<_>>().join(","),
        "_Labels": config.settings.labels,
        "Mounts": mounts.join(","),
        "Networks": networks(config).join(","),
        "LocalVolumes": volumes.to_string(),
    })
}

fn mount_source(mount: &kiln_containers::MountPoint) -> String {
    use kiln_containers::MountKind;
    match &mount.kind {
        MountKind::Bind(path) => path.display().to_string(),
        MountKind::Volume { name, .. } => name.clone(),
        MountKind::Tmpfs { .. } => String::new(),
    }
}

/// The network that a container was given first.
pub(super) fn network(config: &Config) -> String {
    match &config.network_of {
        Some(other) => format!("container:{other}"),
        None => networks(config).into_iter().next().unwrap_or_default(),
    }
}

fn networks(config: &Config) -> Vec<String> {
    if config.network_of.is_some() {
        return Vec::new();
    }
    if !config.networks.is_empty() {
        return config.networks.iter().map(|attachment| attachment.network.clone()).collect();
    }
    let name = match config.process.network {
        kiln_executor::Network::Host => "host",
        kiln_executor::Network::None => "none",
        kiln_executor::Network::Default | kiln_executor::Network::Given => "bridge",
    };
    vec![name.to_owned()]
}

/// `0.0.0.0:8080->80/tcp, 443/tcp`, as long as it runs.
fn ports(config: &Config, state: &State) -> String {
    if state.pid == 0 {
        return String::new();
    }
    let mut shown: Vec<String> = state
        .ports
        .iter()
        .map(|port| format!("{}->{}", SocketAddr::new(port.address, port.host), port.key()))
        .collect();
    for key in config.settings.exposed_ports.keys() {
        let key = if key.contains('/') { key.clone() } else { format!("{key}/tcp") };
        if state.ports.iter().all(|port| port.key() != key) {
            shown.push(key);
        }
    }
    shown.join(", ")
}

/// What a container has written, and its whole tree, in bytes.
pub(super) fn sizes(session: &Session, config: &Config) -> (u64, u64) {
    let engine = &session.engine;
    let written = engine.store.root().join("snapshots/active").join(config.id.as_str()).join("fs");
    let written = content_bytes(&written).unwrap_or(0);
    let image = session.find(&config.image.to_string()).map(|image| image.size_bytes);
    // What an image was that is no more, its snapshots tell.
    let image = image.unwrap_or_else(|_| {
        let chain = config.snapshot.as_ref().and_then(|top| engine.snapshots.chain(top).ok());
        chain.iter().flatten().filter_map(|layer| engine.snapshots.disk_bytes(layer).ok()).sum()
    });
    (written, written.saturating_add(image))
}

fn size(session: &Session, config: &Config) -> String {
    let (written, all) = sizes(session, config);
    format!("{} (virtual {})", human_size(written), human_size(all))
}

/// `Up 3 minutes (healthy)`, `Exited (0) 2 hours ago`
fn status(state: &State) -> String {
    let since = |time: Time| ago(time.unix());
    let up = || format!("Up {}", since(state.started).trim_end_matches(" ago"));
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => match &state.health {
            Some(Health { status, .. }) if status == "starting" => format!("{} (health: starting)", up()),
            Some(Health { status, .. }) => format!("{} ({status})", up()),
            None => up(),
        },
        Status::Paused => format!("{} (Paused)", up()),
        Status::Restarting => format!("Restarting ({}) {}", state.exit_code, since(state.finished)),
        Status::Exited => format!("Exited ({}) {}", state.exit_code, since(state.finished)),
        Status::Dead => "Dead".to_owned(),
    }
}

/// `--filter`. Several of one kind: one must fit; all kinds must.
enum Filter {
    Id(String),
    Name(Regex),
    Label(String, Option<String>),
    Status(String),
    Exited(i32),
    Ancestor(Option<kiln_oci::Digest>, String),
    Volume(String),
    Network(String),
    Publish(Ports),
    Expose(Ports),
    Health(String),
    Before(Time),
    Since(Time),
}

impl Filter {
    fn parse(session: &Session, text: &str) -> Result<Self, Failure> {
        let wrong = |reason: &str| Failure::usage(format!("--filter {text}: {reason}"));
        let (what, value) = text.split_once('=').ok_or_else(|| wrong("it is not WHAT=VALUE"))?;
        let created = |name: &str| Ok::<_, Failure>(session.containers.find(name)?.config()?.created);
        let own = value.to_owned();
        Ok(match what {
            "id" => Self::Id(own),
            "name" => Self::Name(pattern(value).map_err(|reason| wrong(&reason))?),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(own, None),
            },
            "status" => match value {
                "created" | "running" | "paused" | "restarting" | "exited" | "dead" | "removing" => {
                    Self::Status(own)
                }
                _ => return Err(wrong("there are created, running, paused, restarting, exited, dead")),
            },
            "exited" => Self::Exited(value.parse().map_err(|_| wrong("it takes an exit code"))?),
            "ancestor" => Self::Ancestor(session.find(value).ok().map(|image| image.config), own),
            "volume" => Self::Volume(own),
            "network" => Self::Network(own),
            "publish" => {
                Self::Publish(Ports::parse(value).ok_or_else(|| wrong("it takes PORT[-PORT][/PROTOCOL]"))?)
            }
            "expose" => {
                Self::Expose(Ports::parse(value).ok_or_else(|| wrong("it takes PORT[-PORT][/PROTOCOL]"))?)
            }
            "health" => Self::Health(own),
            "before" => Self::Before(created(value)?),
            "since" => Self::Since(created(value)?),
            _ => {
                return Err(wrong(
                    "there are id, name, label, status, exited, ancestor, volume, network, publish, expose, \
                     health, before, since",
                ));
            }
        })
    }

    fn fits(&self, found: &Shown) -> bool {
        let Shown { config, state, .. } = found;
        match self {
            Self::Id(id) => config.id.as_str().starts_with(id.as_str()),
            // docker keeps names with a slash in front: both ways of writing them are in use.
            Self::Name(pattern) => {
                pattern.is_match(&config.name) || pattern.is_match(&format!("/{}", config.name))
            }
            Self::Label(name, value) => {
                let label = config.settings.labels.get(name);
                label.is_some_and(|label| value.as_ref().is_none_or(|value| value == label))
            }
            Self::Status(status) => state.status.name() == status,
            Self::Exited(code) => state.status == Status::Exited && state.exit_code == *code,
            Self::Ancestor(image, name) => *image == Some(config.image) || config.image_name == *name,
            Self::Volume(volume) => {
                config.mounts.iter().any(|mount| mount.target == *volume || mount_source(mount) == *volume)
            }
            Self::Network(wanted) => {
                let id = |known: &kiln_containers::Endpoint| {
                    !known.network_id.is_empty() && known.network_id.starts_with(wanted.as_str())
                };
                networks(config).contains(wanted) || state.endpoints.iter().any(id)
            }
            Self::Publish(wanted) => state.ports.iter().any(|port| wanted.have(port.host, &port.protocol)),
            Self::Expose(wanted) => config.settings.exposed_ports.keys().any(|key| {
                let (port, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
                port.parse().is_ok_and(|port| wanted.have(port, protocol))
            }),
            Self::Health(wanted) => {
                let health = state.health.as_ref().map_or("none", |health| health.status.as_str());
                health == wanted
            }
            Self::Before(time) => config.created < *time,
            Self::Since(time) => config.created > *time,
        }
    }
}

/// `80`, `80/udp`, `8000-8080/tcp`
struct Ports {
    first: u16,
    last: u16,
    protocol: String,
}

impl Ports {
    fn parse(text: &str) -> Option<Self> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then(|| Self { first, last, protocol: protocol.to_owned() })
    }

    fn have(&self, port: u16, protocol: &str) -> bool {
        (self.first..=self.last).contains(&port) && self.protocol == protocol
    }
}

/// What `--filter name=` takes: a regular expression that fits anywhere in the name.
pub(super) fn pattern(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| format!("it is no regular expression: {error}"))
}

fn fits_all(filters: &[Filter], _: &Session, found: &Shown) -> Result<bool, Failure> {
    let kind = |filter: &Filter| std::mem::discriminant(filter);
    Ok(filters.iter().all(|filter| {
        // Labels must all be there; of the others one is enough.
        matches!(filter, Filter::Label(..)) && filter.fits(found)
            || !matches!(filter, Filter::Label(..))
                && filters.iter().any(|other| kind(other) == kind(filter) && other.fits(found))
    }))
}
