//! `kiln exec`, `kiln attach`

use std::io::IsTerminal;
use std::os::fd::OwnedFd;

use kiln_containers::{AttachOptions, Status, attach as join, attach_terminal};
use kiln_executor::{Relay, Security};

use super::config::env_file;
use crate::args::containers::{AttachArgs, ExecArgs};
use crate::commands::pair;
use crate::commands::run::{Unheard, ended, pass_signals, shell_code};
use crate::errors::Failure;
use crate::session::Session;

pub(super) fn run(session: &Session, args: &ExecArgs) -> Result<u8, Failure> {
    let container = session.containers.find(&args.container)?;
    let config = container.config()?;
    if args.tty && !args.detach && args.interactive && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("-t needs a terminal as standard input"));
    }
    let mut process = config.process;
    process.args.clone_from(&args.command);
    process.mounts.clear();
    let mut given = Vec::new();
    for path in &args.env_file {
        given.extend(env_file(path)?);
    }
    for text in &args.env {
        given.extend(pair(text, "--env")?);
    }
    if args.tty && process.env.iter().all(|(name, _)| name != "TERM") {
        process.env.push(("TERM".to_owned(), "xterm".to_owned()));
    }
    for (name, value) in given {
        process.env.retain(|(known, _)| *known != name);
        process.env.push((name, value));
    }
    if args.privileged {
        process.security = Security::Insecure;
    }
    if args.user.is_some() {
        // Its home is not that of the container's user.
        process.user.clone_from(&args.user);
    }
    if let Some(dir) = &args.workdir {
        process.cwd.clone_from(dir);
        process.create_cwd = false;
    }
    let client = container.connect()?;
    let failed = |error: std::io::Error| Failure::store(format!("no descriptor is left: {error}"));
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let (streams, relay) = if args.detach || args.tty {
        ([null().map_err(failed)?, null().map_err(failed)?, null().map_err(failed)?], None)
    } else {
        let (streams, relay) = Relay::of_standard_streams(args.interactive).map_err(failed)?;
        (streams, Some(relay))
    };
    let started = client.exec(&process, &streams, args.tty)?;
    if args.detach {
        return Ok(0);
    }
    if let Some(master) = &started.terminal {
        pass_signals(session, &container, true, Unheard::LeaveIt);
        let options = AttachOptions {
            stdin: args.interactive,
            terminal: true,
            detach_keys: args.detach_keys.clone().unwrap_or_default(),
            start: false,
        };
        return ended(attach_terminal(&client, master, &options)?);
    }
    // docker: a signal ends this command, and the process goes on.
    session.proxy_signals(|signal| std::process::exit(128 + signal as i32));
    drop(streams);
    let code = client.exit_code()?;
    relay.into_iter().for_each(Relay::finish);
    Ok(shell_code(code))
}

pub(super) fn attach(session: &Session, args: &AttachArgs) -> Result<u8, Failure> {
    let container = session.containers.find(&args.container)?;
    let config = container.config()?;
    if container.state()?.status == Status::Paused {
        let name = config.name;
        return Err(kiln_containers::Error::WrongState { name, problem: "is paused" }.into());
    }
    let options = AttachOptions {
        stdin: config.open_stdin && !args.no_stdin,
        terminal: config.tty,
        detach_keys: args.detach_keys.clone().unwrap_or_default(),
        start: false,
    };
    let client = container.connect()?;
    if args.sig_proxy {
        pass_signals(session, &container, config.tty, Unheard::LeaveIt);
    }
    ended(join(&client, &options)?)
}
