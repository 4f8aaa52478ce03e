//! From flags and image to a container's config.

mod environment;
mod health;
mod log;
mod volumes;

use kiln_containers::{Config, ContainerId, Time, is_name, random_name, signal_number};
use kiln_executor::{Network, ProcessSpec};
use kiln_oci::image::EmptyObject;

use super::join;
use crate::args::RunArgs;
use crate::commands::confinement;
use crate::errors::Failure;
use crate::registries::image_to_run;
use crate::session::Session;

pub(super) use environment::env_file;
pub(super) use volumes::{volume_name, volume_of};

pub(crate) fn of_args(session: &Session, args: &RunArgs) -> Result<Config, Failure> {
    let (image_name, command) =
        args.image_and_command.split_first().ok_or_else(|| Failure::usage("an image is missing"))?;
    let image = image_to_run(session, image_name, &args.pull)?;
    let life = &args.life;
    let image_config = session.config(&image)?;
    let platform = image_config.platform();
    let mut settings = image_config.config;
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
    environment::change(&mut settings, args, command)?;
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
        env: environment::environment(&settings, args.tty),
        cwd: if settings.working_dir.is_empty() { "/".to_owned() } else { settings.working_dir.clone() },
        create_cwd: true,
        user: Some(settings.user.clone()).filter(|user| !user.is_empty()),
        hostname,
        platform: Some(platform),
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
        mounts: volumes::all_mounts(args, &settings)?,
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
        health: health::health(&mut settings, args)?,
        log: log::log_options(&life.log_driver, &life.log_opt)?,
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
