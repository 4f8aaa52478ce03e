//! start, stop, restart, kill, pause, unpause, wait, rename

use kiln_containers::{
    AttachOptions, Container, Containers, Error, MonitorProcess, Status, attach, is_name, signal_number,
};

use super::{each, each_at_once};
use crate::args::containers::{ContainersArgs, KillArgs, RenameArgs, StartArgs, StopArgs};
use crate::commands::print;
use crate::commands::run::{Unheard, ended, pass_signals};
use crate::errors::{Failure, exit, say};
use crate::session::Session;

fn number(signal: &str) -> Result<i32, Failure> {
    signal_number(signal).ok_or_else(|| Failure::usage(format!("{signal:?} is no signal")))
}

pub(super) fn start(session: &Session, args: &StartArgs) -> Result<u8, Failure> {
    if args.attach || args.interactive {
        let [name] = args.containers.as_slice() else {
            return Err(Failure::usage("only one container can be attached to"));
        };
        let container = session.containers.find(name)?;
        let config = container.config()?;
        let options = AttachOptions {
            stdin: args.interactive && config.open_stdin,
            terminal: config.tty,
            detach_keys: args.detach_keys.clone().unwrap_or_default(),
            start: true,
        };
        let client = container.prepare(&session.trusting(&[])?, session.backend)?;
        pass_signals(session, &container, config.tty, Unheard::LeaveIt);
        return ended(attach(&client, &options)?);
    }
    let containers = session.trusting(&[])?;
    each(&args.containers, |name| {
        let container = session.containers.find(name)?;
        match begin(session, &containers, &container) {
            Err(error @ (Error::Told { .. } | Error::Exec(_))) => {
                // docker's codes of programs that cannot be started are for whoever is attached to them.
                Err(Failure::from(error).with_code(exit::RUN))
            }
            other => Ok(other?),
        }
    })
}

/// Starts a container; one that runs is started.
fn begin(session: &Session, containers: &Containers, container: &Container) -> Result<(), Error> {
    let mut patience = 100;
    loop {
        let client = match container.prepare(containers, session.backend) {
            Err(Error::AlreadyRuns { .. }) => return Ok(()),
            other => other?,
        };
        match client.start() {
            // Its process ended between the two: the monitor is about to go.
            Err(Error::MonitorDied { .. } | Error::JustEnded) if patience > 0 => {
                patience -= 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Stops a container; one that does not run is stopped.
fn end(container: &Container, args: &StopArgs) -> Result<(), Failure> {
    let signal = args.signal.as_deref().map(number).transpose()?;
    match container.connect() {
        Ok(client) => match client.stop(signal, args.timeout) {
            // It ended, and its monitor with it, before it could answer: that is noted, should nobody have done
            // so. If it runs, somebody has started it since.
            Err(Error::MonitorDied { .. }) => {
                let _ = container.state();
                Ok(())
            }
            other => Ok(other?),
        },
        Err(Error::NotRunning { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn stop(session: &Session, args: &StopArgs) -> Result<u8, Failure> {
    each_at_once(&args.containers, |name| end(&session.containers.find(name)?, args))
}

pub(super) fn restart(session: &Session, args: &StopArgs) -> Result<u8, Failure> {
    let containers = session.trusting(&[])?;
    each_at_once(&args.containers, |name| {
        let container = session.containers.find(name)?;
        let signal = args.signal.as_deref().map(number).transpose()?;
        match container.connect() {
            Ok(client) => match client.restart(signal, args.timeout) {
                // It has ended by itself just now.
                Err(Error::MonitorDied { .. } | Error::JustEnded) => {
                    Ok(begin(session, &containers, &container)?)
                }
                other => Ok(other?),
            },
            Err(Error::NotRunning { .. }) => Ok(begin(session, &containers, &container)?),
            Err(error) => Err(error.into()),
        }
    })
}

pub(super) fn kill(session: &Session, args: &KillArgs) -> Result<u8, Failure> {
    let signal = number(&args.signal)?;
    each_at_once(&args.containers, |name| Ok(session.containers.find(name)?.connect()?.kill(signal)?))
}

pub(super) fn pause(session: &Session, args: &ContainersArgs) -> Result<u8, Failure> {
    each(&args.containers, |name| {
        if let Some(warning) = session.containers.find(name)?.connect()?.pause()? {
            say(&format!("warning: {warning}\n"));
        }
        Ok(())
    })
}

pub(super) fn unpause(session: &Session, args: &ContainersArgs) -> Result<u8, Failure> {
    each(&args.containers, |name| Ok(session.containers.find(name)?.connect()?.unpause()?))
}

pub(super) fn wait(session: &Session, args: &ContainersArgs) -> Result<u8, Failure> {
    let exit_code = |name: &str| -> Result<i32, Failure> {
        let container = session.containers.find(name)?;
        Ok(match container.connect() {
            Ok(client) => match client.wait() {
                Err(Error::MonitorDied { .. }) => container.state()?.exit_code,
                other => other?,
            },
            Err(Error::NotRunning { .. }) => container.state()?.exit_code,
            Err(error) => return Err(error.into()),
        })
    };
    let mut failed = false;
    for name in &args.containers {
        match exit_code(name) {
            Ok(code) => print(&format!("{code}\n"))?,
            Err(failure) => {
                say(&failure.render());
                failed = true;
            }
        }
    }
    Ok(u8::from(failed))
}

pub(super) fn rename(session: &Session, args: &RenameArgs) -> Result<u8, Failure> {
    if !is_name(&args.name) {
        return Err(Failure::usage(format!("{:?} is no name for a container", args.name)));
    }
    let container = session.containers.find(&args.container)?;
    let _lock = container.lock()?;
    session.containers.rename(&container, &args.name)?;
    reload(&container)?;
    Ok(0)
}

/// Has a monitor, if there is one, see what has changed.
pub(super) fn reload(container: &Container) -> Result<(), Failure> {
    match container.connect() {
        Ok(client) => Ok(client.reload()?),
        Err(Error::NotRunning { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Ends a container without asking it; the monitor, which has not yet ended by then.
pub(super) fn kill_now(container: &Container) -> Result<Option<MonitorProcess>, Failure> {
    match container.connect() {
        Ok(client) => {
            let monitor = client.process();
            match client.stop(Some(9), Some(0)) {
                Ok(()) | Err(Error::MonitorDied { .. }) => Ok(monitor),
                Err(error) => Err(error.into()),
            }
        }
        // One whose record is damaged or cannot be written: whether it runs, its lock tells.
        Err(Error::NotRunning { .. } | Error::Record { .. } | Error::Host { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a container runs, and is not held.
pub(super) fn is_running(container: &Container) -> bool {
    container.state().is_ok_and(|state| state.status == Status::Running)
}
