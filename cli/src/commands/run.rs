//! `kiln run`

use std::io::IsTerminal;
use std::path::Path;

use kiln_containers::{RunRequest, Tty};
use kiln_executor::Network;
use kiln_oci::{BindMount, Mount};

use super::{confinement, pair};
use crate::args::{NetworkMode, RunArgs};
use crate::errors::Failure;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: RunArgs) -> Result<u8, Failure> {
    let (name, command) =
        args.image_and_command.split_first().ok_or_else(|| Failure::usage("an image is missing"))?;
    // docker: everything that keeps a container from starting is 125.
    let image = session.find(name).map_err(Failure::in_container)?;
    let config = session.config(&image)?;
    if args.tty && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("-t needs a terminal as standard input"));
    }
    let network = match args.network {
        NetworkMode::Default => Network::Default,
        NetworkMode::None => Network::None,
        NetworkMode::Host => Network::Host,
    };
    let mut settings = confinement::settings(&args.confinement, network)?;
    let stop_signal = args.confinement.stop_signal.as_deref().or(config.config.stop_signal.as_deref());
    if let Some(signal) = stop_signal.filter(|signal| !signal.is_empty()) {
        settings.stop_signal = confinement::signal(signal)?;
    }
    let volumes = args.volume.iter().map(|text| mount(text));
    let tmpfs = args.confinement.tmpfs.iter().map(|text| confinement::tmpfs(text));
    let mounts = volumes.chain(tmpfs).collect::<Result<_, _>>()?;
    let mut request = RunRequest {
        snapshot: image.snapshot.clone(),
        config: config.config,
        command: command.to_vec(),
        entrypoint: args.entrypoint,
        env: Vec::new(),
        user: args.user,
        workdir: args.workdir,
        mounts,
        hostname: args.confinement.hostname,
        settings,
        tty: match (args.tty, args.interactive) {
            (true, _) => Tty::Terminal,
            (false, true) => Tty::Streams,
            (false, false) => Tty::Output,
        },
    };
    for text in &args.env {
        request.env.extend(pair(text, "--env")?);
    }
    let engine = &session.engine;
    let lease = engine.store.lease()?;
    let finished = kiln_containers::run(
        &*engine.snapshots,
        &*engine.executor,
        &lease,
        &request,
        session.cancel.processes(),
    )?;
    if finished.usage.oom_kills > 0 {
        eprintln!(
            "warning: the container ran out of memory: the kernel killed {} of its processes; `--memory` is its limit",
            finished.usage.oom_kills
        );
    }
    Ok(u8::try_from(finished.exit.shell_code()).unwrap_or(255))
}

/// `HOST:INSIDE[:ro]`
fn mount(text: &str) -> Result<Mount, Failure> {
    let wrong = |reason: &str| Failure::usage(format!("--volume {text:?}: {reason}"));
    let mut parts = text.split(':');
    let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
        return Err(wrong("HOST:INSIDE[:ro] is expected"));
    };
    let read_only = match (parts.next(), parts.next()) {
        (None | Some("rw"), None) => false,
        (Some("ro"), None) => true,
        _ => return Err(wrong("only ro or rw may follow the path inside")),
    };
    if !source.contains('/') && !source.starts_with('.') {
        return Err(wrong("named volumes are not supported yet; give a path such as ./data"));
    }
    if !target.starts_with('/')
        || target.split('/').any(|part| part == "..")
        || target.trim_matches('/').is_empty()
    {
        return Err(wrong("the path inside must be absolute, without `..`, and not `/`"));
    }
    let source = Path::new(source).canonicalize().map_err(|error| wrong(&format!("{source}: {error}")))?;
    Ok(Mount::Bind(BindMount { source, target: target.to_owned(), read_only }))
}
