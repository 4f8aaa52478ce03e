//! What the process is told and called: environment, labels, user, program.

use std::path::Path;

use kiln_oci::image::RunConfig;

use crate::args::RunArgs;
use crate::commands::{pair, proxies};
use crate::errors::Failure;

/// The search path of an image that names none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The image's settings with what the flags say.
pub(super) fn change(settings: &mut RunConfig, args: &RunArgs, command: &[String]) -> Result<(), Failure> {
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
    // docker: what its config file says of proxies stands above the image, and below the user's own.
    let proxies = proxies::of_config_file();
    for (name, value) in proxies.iter().filter(|(name, _)| given.iter().all(|(known, _)| known != name)) {
        set_env(&mut settings.env, name, value);
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
pub(in crate::commands::containers) fn env_file(path: &Path) -> Result<Vec<(String, String)>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("--env-file {}: {error}", path.display())))?;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        found.extend(pair(line, "--env-file")?);
    }
    Ok(found)
}

pub(super) fn environment(settings: &RunConfig, terminal: bool) -> Vec<(String, String)> {
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
