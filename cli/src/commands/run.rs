//! `kiln run`, `kiln create`

use std::io::{IsTerminal, Write};

use kiln_containers::{
    AttachOptions, Attached, Config, Container, Containers, Ended, RestartPolicy, attach, handles_signal,
    remove,
};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::containers::{config, fill};
use super::print;
use crate::args::RunArgs;
use crate::errors::{Failure, exit, say};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: RunArgs) -> Result<u8, Failure> {
    // docker: everything that keeps a container from starting is 125.
    run_container(session, args).map_err(|failure| match failure.exit_code() {
        exit::INTERRUPTED | exit::NOT_FOUND | exit::NOT_EXECUTABLE => failure,
        _ => failure.in_container(),
    })
}

fn run_container(session: &Session, args: RunArgs) -> Result<u8, Failure> {
    if args.rm && args.life.restart != RestartPolicy::No {
        return Err(Failure::usage("--rm and --restart exclude each other"));
    }
    if args.tty && args.interactive && !args.life.detach && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("-t needs a terminal as standard input"));
    }
    let containers = session.trusting(&args.ca_cert)?;
    let config = config::of_args(session, &args)?;
    let container = make(session, &config, &args)?;
    let ended = start(session, &containers, &container, &config, &args);
    if ended.is_err() && args.rm {
        // Where it came to no monitor, nobody else removes it.
        let _ = remove(&session.containers, &*session.engine.snapshots, &container, true);
    }
    ended
}

/// Starts a new container, and looks after it unless it is in the background.
fn start(
    session: &Session,
    containers: &Containers,
    container: &Container,
    config: &Config,
    args: &RunArgs,
) -> Result<u8, Failure> {
    if args.life.detach {
        container.prepare(containers, session.backend)?.start()?;
        print(&format!("{}\n", config.id))?;
        return Ok(0);
    }
    if can_run_here(args, config) {
        match args.life.sig_proxy {
            true => proxy(session, container),
            false => end_by_signals(session),
        }
        let snapshots = session.engine.snapshots.clone();
        let linux = match config.runtime.clone() {
            Some(runtime) => session.linux_with(runtime)?,
            None => session.linux.clone(),
        };
        let cancel = session.cancel.processes();
        let ended = container.run_here(containers, snapshots, linux, cancel)?;
        return match session.cancel.processes().is_cancelled() {
            true => Ok(exit::INTERRUPTED.number()),
            false => Ok(code_of(ended)),
        };
    }
    let options = AttachOptions {
        stdin: args.interactive,
        terminal: args.tty,
        detach_keys: args.life.detach_keys.clone().unwrap_or_default(),
        start: true,
    };
    let client = container.prepare(containers, session.backend)?;
    match args.life.sig_proxy {
        true => pass_signals(session, container, args.tty, Unheard::EndIt),
        false => end_by_signals(session),
    }
    ended(attach(&client, &options)?)
}

/// The exit code of a command whose process ended, or that the user has left.
pub(super) fn ended(attached: Attached) -> Result<u8, Failure> {
    match attached {
        Attached::Exited(ended) => Ok(code_of(ended)),
        // As if SIGPIPE had ended it, like every command in a pipe; the container goes on.
        Attached::Unheard => Ok(141),
        Attached::Detached => {
            let _ = std::io::stderr().write_all(b"\r\n");
            Ok(0)
        }
    }
}

fn code_of(ended: Ended) -> u8 {
    if ended.oom_killed {
        say(
            "warning: the container ran out of memory: the kernel killed processes in it; `--memory` is its limit\n",
        );
    }
    shell_code(ended.code)
}

pub(super) fn shell_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(255)
}

/// Whether nobody can tell that no monitor looks after the container: nothing of it stays, and nobody
/// can leave it.
fn can_run_here(args: &RunArgs, config: &Config) -> bool {
    let life = &args.life;
    args.rm
        && !life.detach
        && !args.tty
        && life.name.is_none()
        && config.health.is_none()
        && config.ports.is_empty()
}

/// Passes the signals that would end this command on to a container that runs here. One that process 1
/// does not handle would never reach it: then all ends.
fn proxy(session: &Session, container: &Container) {
    let container = container.clone();
    session.proxy_signals(move |signal| {
        let Ok(state) = container.state() else { return false };
        let number = signal as i32;
        state.pid != 0 && handles_signal(state.pid, number) && container.send_signal(number).unwrap_or(false)
    });
}

/// A signal ends this command, and is nothing to the container.
fn end_by_signals(session: &Session) {
    session.proxy_signals(|signal| std::process::exit(128 + signal as i32));
}

/// What becomes of a container whose process 1 does not listen to a signal: the kernel would drop it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unheard {
    /// It is this command's, and ends with it: nobody could end the command otherwise.
    EndIt,
    /// It is somebody else's, and goes on without this command.
    LeaveIt,
}

/// Passes signals on to a container that its monitor looks after. With a terminal, what its keys make
/// signals of reaches the process anyway, and others end only this command.
pub(super) fn pass_signals(session: &Session, container: &Container, terminal: bool, unheard: Unheard) {
    if terminal {
        let saved = tcgetattr(std::io::stdin()).ok();
        session.proxy_signals(move |signal| {
            if let Some(saved) = &saved {
                let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, saved);
            }
            std::process::exit(128 + signal as i32);
        });
        return;
    }
    let container = container.clone();
    session.proxy_signals(move |signal| {
        let Ok(state) = container.state() else { return false };
        if state.pid == 0 {
            return false;
        }
        let number = signal as i32;
        let heard = [number, 15].into_iter().find(|number| handles_signal(state.pid, *number));
        match (heard, unheard) {
            (Some(number), _) => container.send_signal(number).unwrap_or(false),
            (None, Unheard::EndIt) => container.send_signal(9).unwrap_or(false),
            (None, Unheard::LeaveIt) => std::process::exit(128 + number),
        }
    });
}

pub(crate) fn create(session: &Session, args: RunArgs) -> Result<u8, Failure> {
    if args.life.detach {
        return Err(Failure::usage("`kiln create` starts nothing that could run in the background"));
    }
    if !args.ca_cert.is_empty() {
        return Err(Failure::usage("--ca-cert is for one start, and `kiln create` keeps nothing of it")
            .hint("`ca-certificates` in the configuration is for every start"));
    }
    let config = config::of_args(session, &args)?;
    make(session, &config, &args)?;
    print(&format!("{}\n", config.id))?;
    Ok(0)
}

/// Makes the container: directory, volumes, layer, and the file with its ID.
fn make(session: &Session, config: &Config, args: &RunArgs) -> Result<Container, Failure> {
    if let Some(path) = &args.life.cidfile {
        let new = std::fs::File::options().write(true).create_new(true).open(path);
        let written = new.and_then(|mut file| file.write_all(config.id.as_str().as_bytes()));
        written.map_err(|error| Failure::usage(format!("--cidfile {}: {error}", path.display())))?;
    }
    let made = make_all(session, config);
    if made.is_err()
        && let Some(path) = &args.life.cidfile
    {
        let _ = std::fs::remove_file(path);
    }
    made
}

fn make_all(session: &Session, config: &Config) -> Result<Container, Failure> {
    // Garbage collection looks for the container's directory; until that is there, this holds its files.
    if let Some(snapshot) = &config.snapshot {
        session.engine.store.hold_snapshot(snapshot)?;
    }
    // First of all, so that what is made next is somebody's: `volume prune` leaves it alone, and whoever
    // finds it after this was killed can remove it.
    let (container, whole) = session.containers.create(config)?;
    let fill = || -> Result<(), Failure> {
        fill::volumes(session, config)?;
        Ok(session.engine.snapshots.prepare(&config.id.key(), config.snapshot.as_ref())?)
    };
    let filled = fill();
    drop(whole);
    if let Err(failure) = filled {
        let _ = remove(&session.containers, &*session.engine.snapshots, &container, true);
        return Err(failure);
    }
    Ok(container)
}
