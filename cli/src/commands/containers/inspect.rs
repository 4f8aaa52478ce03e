//! `kiln inspect`: containers, images and volumes, as docker shows them.

use kiln_containers::{
    Attachment, Config, Container, Endpoint, Error, MountKind, Networks, State, USUAL_NETWORK, Volumes,
    signal_name,
};
use serde_json::{Map, Value, json};

use super::host_config::host_config;
use super::ps::{network, sizes, wrong_format};
use crate::args::NamesArgs;
use crate::args::containers::InspectArgs;
use crate::commands::{inspect, print};
use crate::errors::{Failure, say};
use crate::session::Session;
use crate::template::Template;

pub(crate) fn run(session: &Session, args: &InspectArgs) -> Result<u8, Failure> {
    show(args, |name| match args.kind.as_deref() {
        Some("container") => container(session, name, args.size),
        Some("image") => image(session, name),
        Some("volume") => volume(session, name),
        Some("network") => {
            super::network::document(session, &Networks::open(session.containers.root()), name)
        }
        Some(other) => {
            Err(Failure::usage(format!("--type {other:?} is none of container, image, volume, network")))
        }
        None => match session.containers.find(name) {
            Ok(found) => of_container(session, &found, args.size),
            Err(Error::NotFound { .. }) => image(session, name),
            Err(error) => Err(error.into()),
        },
    })
}

pub(super) fn run_containers(session: &Session, args: &InspectArgs) -> Result<u8, Failure> {
    show(args, |name| container(session, name, args.size))
}

/// Prints what `look` finds: an array, or a line each as `--format` says.
pub(super) fn show(
    args: &InspectArgs,
    mut look: impl FnMut(&str) -> Result<Value, Failure>,
) -> Result<u8, Failure> {
    let template = match args.format.as_deref() {
        None | Some("json") => None,
        Some(text) => Some(Template::parse(text).map_err(wrong_format)?),
    };
    let (mut found, mut failed) = (Vec::new(), None);
    for name in &args.names {
        let value = match look(name) {
            Ok(value) => value,
            Err(failure) => {
                say(&failure.render());
                failed = Some(failure.exit_code());
                continue;
            }
        };
        match &template {
            Some(template) => {
                print(&format!("{}\n", template.render(&value).map_err(wrong_format)?))?;
            }
            None => found.push(value),
        }
    }
    match (&template, args.format.as_deref()) {
        (Some(_), _) => {}
        (None, Some(_)) => print(&found.iter().map(|value| format!("{value}\n")).collect::<String>())?,
        (None, None) => print(&format!("{:#}\n", Value::Array(found)))?,
    }
    Ok(failed.map_or(0, |code| code.number()))
}

fn image(session: &Session, name: &str) -> Result<Value, Failure> {
    let mut found = inspect::documents(session, &NamesArgs { names: vec![name.to_owned()] })?;
    Ok(found.swap_remove(0))
}

fn volume(session: &Session, name: &str) -> Result<Value, Failure> {
    super::volume::document(&Volumes::open(session.containers.root()), name)
}

fn container(session: &Session, name: &str, size: bool) -> Result<Value, Failure> {
    of_container(session, &session.containers.find(name)?, size)
}

fn of_container(session: &Session, container: &Container, size: bool) -> Result<Value, Failure> {
    let (config, state) = (container.config()?, container.state()?);
    let (path, arguments) =
        config.process.args.split_first().map_or(("", &[][..]), |(path, rest)| (path.as_str(), rest));
    let mut document = json!({
        "Id": config.id,
        "Created": config.created.to_string(),
        "Path": path,
        "Args": arguments,
        "State": state_document(&state),
        "Image": config.image,
        "ResolvConfPath": "",
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": container.dir().join("log"),
        "Name": format!("/{}", config.name),
        "RestartCount": state.restarts,
        "Driver": "kiln",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": null,
        "HostConfig": host_config(session, &config),
        "GraphDriver": { "Name": "kiln", "Data": null },
        "Mounts": mounts(session, &config),
        "Config": settings(&config),
        "NetworkSettings": network_settings(&config, &state),
    });
    if size {
        let (written, all) = sizes(session, &config);
        (document["SizeRw"], document["SizeRootFs"]) = (written.into(), all.into());
    }
    Ok(document)
}

fn state_document(state: &State) -> Value {
    use kiln_containers::Status;
    let mut document = json!({
        "Status": state.status.name(),
        "Running": matches!(state.status, Status::Running | Status::Paused | Status::Restarting),
        "Paused": state.status == Status::Paused,
        "Restarting": state.status == Status::Restarting,
        "OOMKilled": state.oom_killed,
        "Dead": state.status == Status::Dead,
        "Pid": state.pid,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": state.started.to_string(),
        "FinishedAt": state.finished.to_string(),
    });
    if let Some(health) = &state.health {
        let log = health.log.iter().map(|result| {
            json!({
                "Start": result.start.to_string(),
                "End": result.end.to_string(),
                "ExitCode": result.exit_code,
                "Output": result.output,
            })
        });
        document["Health"] = json!({
            "Status": health.status,
            "FailingStreak": health.failing,
            "Log": log.collect::<Vec<_>>(),
        });
    }
    document
}

fn settings(config: &Config) -> Value {
    let run = &config.settings;
    let some = |object: Map<String, Value>| if object.is_empty() { Value::Null } else { object.into() };
    let keys = |keys: Vec<&String>| some(keys.into_iter().map(|key| (key.clone(), json!({}))).collect());
    let env = config.process.env.iter().map(|(name, value)| format!("{name}={value}"));
    let mut document = json!({
        "Hostname": config.process.hostname,
        "Domainname": "",
        "User": run.user,
        "AttachStdin": config.stdin_once,
        "AttachStdout": true,
        "AttachStderr": true,
        "ExposedPorts": keys(run.exposed_ports.keys().collect()),
        "Tty": config.tty,
        "OpenStdin": config.open_stdin,
        "StdinOnce": config.stdin_once,
        "Env": env.collect::<Vec<_>>(),
        "Cmd": run.cmd,
        "Image": config.image_name,
        "Volumes": keys(run.volumes.keys().collect()),
        "WorkingDir": run.working_dir,
        "Entrypoint": run.entrypoint,
        "OnBuild": null,
        "Labels": run.labels,
        "StopSignal": signal_name(config.process.stop_signal),
        "StopTimeout": config.stop_timeout,
    });
    if let Some(health) = &run.healthcheck {
        document["Healthcheck"] = health.clone();
    }
    document
}

fn mounts(session: &Session, config: &Config) -> Vec<Value> {
    let volumes = Volumes::open(session.containers.root());
    let document = |mount: &kiln_containers::MountPoint| {
        let (kind, name, source) = match &mount.kind {
            MountKind::Bind(path) => ("bind", None, path.display().to_string()),
            MountKind::Volume { name, .. } => {
                let data = volumes.data(name).map(|path| path.display().to_string());
                ("volume", Some(name), data.unwrap_or_default())
            }
            MountKind::Tmpfs { .. } => ("tmpfs", None, String::new()),
        };
        let mut document = json!({
            "Type": kind,
            "Source": source,
            "Destination": mount.target,
            "Mode": if mount.read_only { "ro" } else { "" },
            "RW": !mount.read_only,
            "Propagation": if kind == "bind" { "rprivate" } else { "" },
        });
        if let Some(name) = name {
            (document["Name"], document["Driver"]) = (name.clone().into(), "local".into());
        }
        document
    };
    config.mounts.iter().map(document).collect()
}

fn network_settings(config: &Config, state: &State) -> Value {
    let mut ports: Map<String, Value> = Map::new();
    for key in config.settings.exposed_ports.keys() {
        let key = if key.contains('/') { key.clone() } else { format!("{key}/tcp") };
        ports.insert(key, Value::Null);
    }
    for port in state.ports.iter().filter(|_| state.pid != 0) {
        let binding = json!({ "HostIp": port.address.to_string(), "HostPort": port.host.to_string() });
        match ports.entry(port.key()).or_insert(Value::Null) {
            Value::Array(list) => list.push(binding),
            other => *other = json!([binding]),
        }
    }
    if state.pid == 0 {
        ports.clear();
    }
    let entry = |place: Option<&Endpoint>, attachment: Option<&Attachment>| {
        let own = |text: fn(&Endpoint) -> String| place.map_or_else(String::new, text);
        json!({
            "IPAMConfig": attachment.and_then(|known| known.address).map(|at| json!({ "IPv4Address": at })),
            "Aliases": attachment.map(|known| known.aliases.clone()),
            "NetworkID": own(|place| place.network_id.clone()),
            "IPAddress": own(|place| place.address.to_string()),
            "IPPrefixLen": place.map_or(0, |place| place.subnet.prefix()),
            "Gateway": own(|place| place.gateway.to_string()),
            "MacAddress": own(Endpoint::hardware_address),
        })
    };
    let mut networks = Map::new();
    if config.networks.is_empty() && config.network_of.is_none() {
        networks.insert(network(config), entry(state.endpoints.first(), None));
    }
    for attachment in &config.networks {
        let place = state.endpoints.iter().find(|place| place.network == attachment.network);
        networks.insert(attachment.network.clone(), entry(place, Some(attachment)));
    }
    // docker: these are of the usual network, and the scripts that read them know no other.
    let usual = state.endpoints.iter().find(|place| place.network == USUAL_NETWORK);
    let mut settings = entry(usual, None);
    settings["Ports"] = ports.into();
    settings["Networks"] = networks.into();
    settings
}
