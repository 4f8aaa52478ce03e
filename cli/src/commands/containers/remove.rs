//! `kiln rm`, `kiln container prune`

use std::io::{BufRead, Write};

use kiln_containers::{Container, Error, remove};
use kiln_snapshotter::disk_bytes;

use super::each_at_once;
use super::life::kill_now;
use crate::args::containers::{PruneContainersArgs, RmArgs};
use crate::commands::{human_size, print};
use crate::errors::Failure;
use crate::session::Session;

pub(super) fn run(session: &Session, args: &RmArgs) -> Result<u8, Failure> {
    each_at_once(&args.containers, |name| {
        let container = match session.containers.find(name) {
            Err(Error::NotFound { .. }) if args.force => return Ok(()),
            other => other?,
        };
        let monitor = if args.force { kill_now(&container)? } else { None };
        match remove_soon(session, &container, args) {
            Err(Error::Gone { .. }) if args.force => {}
            other => other?,
        }
        if let Some(monitor) = monitor {
            // Whoever looks afterwards finds no process of it.
            monitor.wait_for_end();
        }
        Ok(())
    })
}

/// Removes a container that has ended, or has been told to. A monitor that has said that all is over may
/// not have let go of its lock; and one whose container goes with its end removes it by itself.
fn remove_soon(session: &Session, container: &Container, args: &RmArgs) -> Result<(), Error> {
    let ended = || container.state().is_ok_and(|state| !state.status.is_active());
    let mut patience = 200;
    loop {
        match remove(&session.containers, &*session.engine.snapshots, container, args.volumes) {
            Err(Error::WrongState { .. }) if patience > 0 && (args.force || ended()) => {
                patience -= 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

pub(super) fn prune(session: &Session, args: &PruneContainersArgs) -> Result<u8, Failure> {
    if !args.force && !ask("WARNING! This will remove all containers that do not run.")? {
        return Ok(0);
    }
    let (mut removed, mut freed) = (String::new(), 0);
    for container in session.containers.list()? {
        if container.state().is_ok_and(|state| state.status.is_active()) {
            continue;
        }
        let place = session.engine.store.root().join("snapshots/active").join(container.id().as_str());
        let bytes = disk_bytes(&place).unwrap_or(0);
        let args = RmArgs { force: false, volumes: false, containers: Vec::new() };
        match remove_soon(session, &container, &args) {
            Ok(()) => {
                removed.push_str(&format!("{}\n", container.id()));
                freed += bytes;
            }
            // Started, or removed by somebody else.
            Err(Error::WrongState { .. } | Error::Gone { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !removed.is_empty() {
        print(&format!("Deleted Containers:\n{removed}\n"))?;
    }
    print(&format!("Total reclaimed space: {}\n", human_size(freed)))?;
    Ok(0)
}

/// Asks on standard output, and takes the answer from standard input.
pub(super) fn ask(question: &str) -> Result<bool, Failure> {
    let mut out = std::io::stdout();
    let _ = write!(out, "{question}\nAre you sure you want to continue? [y/N] ").and_then(|()| out.flush());
    let mut answer = String::new();
    match std::io::stdin().lock().read_line(&mut answer) {
        Ok(0) | Err(_) => {
            Err(Failure::usage("nobody answers on standard input; use --force not to be asked"))
        }
        Ok(_) => Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")),
    }
}
