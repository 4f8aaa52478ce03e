//! From flags and image to a container's config.

use std::path::Path;
use std::time::Duration;

use kiln_containers::{
    Config, ContainerId, HealthCheck, LogOptions, MountKind, MountPoint, Time, Volumes, is_name,
    parse_duration, random_name, signal_number,
};
use kiln_executor::{Network, ProcessSpec};
use kiln_oci::image::{EmptyObject, RunConfig};
use serde_json::Value;

use super::{join, mounts};
use crate::args::RunArgs;
use crate::args::confinement::bytes;
use crate::commands::{confinement, pair};
use crate::errors::Failure;
use crate::session::Session;

/// The search path of an image that names none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What Docker waits, tries and allows unless it is told.
const HEALTH_SECONDS: u64 = 30;

pub(crate) fn of_args(session: &Session, args: &RunArgs) -> Result<Config, Failure> {
    let (image_name, command) =
        args.image_and_command.split_first().ok_or_else(|| Failure::usage("an image is missing"))?;
    let image = session.find(image_name)?;
    let life = &args.life;
    let mut settings = session.config(&image)?.config;
    let id = ContainerId::random().map_err(|error| Failure::store(error.to_string()))?;
    let name = match &life.name {
        Some(name) if is_name(name) => name.clone(),
        Some(name) => {
            return Err(Failure::usage(format!(
                "{name:?} is no name: letters, digits, `_`, `.` and `-`, at least two, the first a letter or digit"
            )));
        }
        None => free_name(session)?,
    };
    change(&mut settings, args, command)?;
    let arguments = [settings.entrypoint.clone(), settings.cmd.clone()].into_iter().flatten().flatten();
    let arguments: Vec<String> = arguments.collect();
    if arguments.is_empty() {
        return Err(Failure::usage("the image has no command and none was given"));
    }
    let choice = join::choose(session, &args.network)?;
    args.network.network_alias.iter().try_for_each(|alias| join::check_alias(alias))?;
    let hostname = match (&choice.shared_with, choice.process) {
        (Some(other), _) => session.containers.find(other.as_str())?.config()?.process.hostname,
        (None, Network::Host) if args.confinement.hostname.is_none() => host_name(),
        _ => args.confinement.hostname.clone().unwrap_or_else(|| id.short().to_owned()),
    };
    let mut confined = confinement::settings(&args.confinement, choice.process)?;
    let stop_signal = args.confinement.stop_signal.as_ref().or(settings.stop_signal.as_ref());
    if let Some(text) = stop_signal.filter(|text| !text.is_empty()) {
        confined.stop_signal =
            signal_number(text).ok_or_else(|| Failure::usage(format!("there is no signal {text:?}")))?;
    }
    join::names(&args.network, &mut confined)?;
    let process = ProcessSpec {
        args: arguments,
        env: environment(&settings, args.tty),
        cwd: if settings.working_dir.is_empty() { "/".to_owned() } else { settings.working_dir.clone() },
        create_cwd: true,
        user: Some(settings.user.clone()).filter(|user| !user.is_empty()),
        hostname,
        ..confined
    };
    let mut ports = Vec::new();
    for text in &life.publish {
        ports.extend(join::port(text)?);
    }
    if choice.shared_with.is_some() && (!ports.is_empty() || args.network.publish_all) {
        return Err(Failure::usage("ports are published by the container whose network this one shares"));
    }
    for port in &ports {
        settings.exposed_ports.insert(port.key(), EmptyObject {});
    }
    if args.network.publish_all {
        ports.extend(join::exposed(&settings, &ports));
    }
    crate::rootless::warn_of_network(choice.process == Network::Default);
    if !choice.takes_ports() {
        // docker: without a network that they could lead to they are as if they had not been given.
        ports.clear();
    }
    Ok(Config {
        version: 1,
        name,
        created: Time::now(),
        image: image.config,
        image_name: image_name.clone(),
        snapshot: image.snapshot.clone(),
        process,
        mounts: all_mounts(args, &settings)?,
        ports,
        networks: choice.attachments,
        network_of: choice.shared_with,
        publish_all: args.network.publish_all,
        tty: args.tty,
        open_stdin: args.interactive,
        stdin_once: args.interactive && !life.detach,
        auto_remove: args.rm,
        restart: life.restart,
        stop_timeout: life.stop_timeout,
        health: health(&mut settings, args)?,
        log: log_options(&life.log_driver, &life.log_opt)?,
        runtime: args.runtime.as_deref().map(crate::commands::runtime).transpose()?,
        settings,
        id,
    })
}

fn free_name(session: &Session) -> Result<String, Failure> {
    for attempt in 0..100 {
        let name = random_name(attempt > 5).map_err(|error| Failure::store(error.to_string()))?;
        if session.containers.find(&name).is_err() {
            return Ok(name);
        }
    }
    Err(Failure::usage("no free name was found; give one with --name"))
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The image's settings with what the flags say.
fn change(settings: &mut RunConfig, args: &RunArgs, command: &[String]) -> Result<(), Failure> {
    if let Some(program) = &args.entrypoint {
        settings.entrypoint = (!program.is_empty()).then(|| vec![program.clone()]);
        settings.cmd = None;
    }
    if !command.is_empty() {
        settings.cmd = Some(command.to_vec());
    }
    let mut given = Vec::new();
    for path in &args.life.env_file {
        given.extend(env_file(path)?);
    }
    for text in &args.env {
        given.extend(pair(text, "--env")?);
    }
    for (name, value) in given {
        set_env(&mut settings.env, &name, &value);
    }
    for label in &args.life.label {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        settings.labels.insert(name.to_owned(), value.to_owned());
    }
    if let Some(user) = &args.user {
        settings.user.clone_from(user);
    }
    if let Some(dir) = &args.workdir {
        if !dir.starts_with('/') {
            return Err(Failure::usage(format!("--workdir {dir:?} is no absolute path")));
        }
        settings.working_dir.clone_from(dir);
    }
    if let Some(signal) = &args.confinement.stop_signal {
        settings.stop_signal = Some(signal.clone());
    }
    Ok(())
}

fn set_env(env: &mut Vec<String>, name: &str, value: &str) {
    let entry = format!("{name}={value}");
    match env.iter_mut().find(|known| known.split_once('=').is_some_and(|(known, _)| known == name)) {
        Some(known) => *known = entry,
        None => env.push(entry),
    }
}

/// `NAME=VALUE` lines; one without a value takes that of the environment.
pub(super) fn env_file(path: &Path) -> Result<Vec<(String, String)>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("--env-file {}: {error}", path.display())))?;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        found.extend(pair(line, "--env-file")?);
    }
    Ok(found)
}

fn environment(settings: &RunConfig, terminal: bool) -> Vec<(String, String)> {
    let mut env = vec![format!("PATH={DEFAULT_PATH}")];
    if terminal {
        set_env(&mut env, "TERM", "xterm");
    }
    for entry in &settings.env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        set_env(&mut env, name, value);
    }
    env.iter().filter_map(|entry| entry.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

fn all_mounts(args: &RunArgs, settings: &RunConfig) -> Result<Vec<MountPoint>, Failure> {
    let mut found: Vec<MountPoint> = Vec::new();
    for text in &args.volume {
        found.push(mounts::of_volume_flag(text)?);
    }
    for text in &args.life.mount {
        found.push(mounts::of_mount_flag(text)?);
    }
    for text in &args.confinement.tmpfs {
        found.push(mounts::of_tmpfs_flag(text)?);
    }
    for target in settings.volumes.keys() {
        // What the user mounts there takes its place.
        if found.iter().all(|mount| mount.target.trim_end_matches('/') != target.trim_end_matches('/')) {
            let target = mounts::target(target)
                .map_err(|reason| Failure::usage(format!("the image's VOLUME {target:?}: {reason}")))?;
            found.push(mounts::anonymous(target, false, true)?);
        }
    }
    for (at, mount) in found.iter().enumerate() {
        let same =
            |other: &MountPoint| other.target.trim_end_matches('/') == mount.target.trim_end_matches('/');
        if found[..at].iter().any(same) {
            return Err(Failure::usage(format!("{:?} is mounted on twice", mount.target)));
        }
    }
    Ok(found)
}

/// The flags' check, or the image's with what the flags change.
fn health(settings: &mut RunConfig, args: &RunArgs) -> Result<Option<HealthCheck>, Failure> {
    let life = &args.life;
    if life.no_healthcheck {
        settings.healthcheck = Some(serde_json::json!({ "Test": ["NONE"] }));
        return Ok(None);
    }
    let image = settings.healthcheck.clone().unwrap_or(Value::Null);
    let test: Vec<String> = match &life.health_cmd {
        Some(command) => vec!["CMD-SHELL".to_owned(), command.clone()],
        None => serde_json::from_value(image["Test"].clone()).unwrap_or_default(),
    };
    let shell = if settings.shell.is_empty() {
        vec!["/bin/sh".to_owned(), "-c".to_owned()]
    } else {
        settings.shell.clone()
    };
    let arguments: Vec<String> = match test.split_first() {
        Some((kind, rest)) if kind == "CMD" && !rest.is_empty() => rest.to_vec(),
        Some((kind, [command])) if kind == "CMD-SHELL" => {
            shell.into_iter().chain([command.clone()]).collect()
        }
        _ => return Ok(None),
    };
    let time = |flag: &Option<String>, key: &str, usual: u64| match flag {
        Some(text) => match parse_duration(text) {
            // docker: 0 is what there is without the flag.
            Some(Duration::ZERO) => Ok(Duration::from_secs(usual)),
            Some(time) if time < Duration::from_millis(1) => {
                Err(Failure::usage(format!("{text:?} is too short: a millisecond is the least")))
            }
            Some(time) => Ok(time),
            None => Err(Failure::usage(format!("{text:?} is no duration such as 30s or 1m30s"))),
        },
        None => Ok(match image[key].as_u64() {
            Some(nanos) if nanos > 0 => Duration::from_nanos(nanos),
            _ => Duration::from_secs(usual),
        }),
    };
    let retries = life.health_retries.or(image["Retries"].as_u64().and_then(|n| u32::try_from(n).ok()));
    let check = HealthCheck {
        args: arguments,
        interval: time(&life.health_interval, "Interval", HEALTH_SECONDS)?,
        timeout: time(&life.health_timeout, "Timeout", HEALTH_SECONDS)?,
        start_period: time(&life.health_start_period, "StartPeriod", 0)?,
        start_interval: time(&life.health_start_interval, "StartInterval", 5)?,
        retries: retries.filter(|retries| *retries > 0).unwrap_or(3),
        test,
    };
    settings.healthcheck = Some(serde_json::json!({
        "Test": check.test,
        "Interval": nanos(check.interval),
        "Timeout": nanos(check.timeout),
        "StartPeriod": nanos(check.start_period),
        "Retries": check.retries,
    }));
    Ok(Some(check))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn log_options(driver: &str, options: &[String]) -> Result<LogOptions, Failure> {
    let mut log = LogOptions::default();
    match driver {
        "json-file" | "local" => {}
        "none" => log.none = true,
        other => return Err(Failure::usage(format!("--log-driver {other:?}: there are json-file and none"))),
    }
    for option in options {
        let wrong =
            || Failure::usage(format!("--log-opt {option:?}: there are max-size=SIZE, max-file=COUNT"));
        match option.split_once('=').ok_or_else(wrong)? {
            ("max-size", size) => log.max_bytes = Some(bytes(size).map_err(|_| wrong())?),
            ("max-file", count) => {
                log.max_files = count.parse().ok().filter(|count| *count > 0).ok_or_else(wrong)?;
            }
            _ => return Err(wrong()),
        }
    }
    Ok(log)
}

/// The name of a volume that was given none.
pub(super) fn volume_name() -> Result<String, Failure> {
    Volumes::random_name().map_err(|error| Failure::store(error.to_string()))
}

/// Whether a mount is a volume.
pub(super) fn volume_of(mount: &MountPoint) -> Option<(&str, bool)> {
    match &mount.kind {
        MountKind::Volume { name, anonymous, .. } => Some((name, *anonymous)),
        _ => None,
    }
}
