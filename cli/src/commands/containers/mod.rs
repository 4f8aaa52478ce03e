//! `kiln container …`, and the same commands alone.

pub(crate) mod config;
pub(crate) mod copy;
mod copy_in;
mod copy_out;
mod exec;
pub(crate) mod files;
pub(crate) mod fill;
mod host_config;
pub(crate) mod inspect;
pub(super) mod join;
mod life;
mod logs;
mod mounts;
pub(crate) mod network;
pub(crate) mod ps;
mod remove;
mod update;
mod use_;
pub(crate) mod volume;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::args::containers::{ContainerCommand, LifeCommand};
use crate::errors::{Failure, say};
use crate::session::Session;

use super::{cp, diff, export};

pub(crate) fn run(session: &Session, command: ContainerCommand) -> Result<u8, Failure> {
    match command {
        ContainerCommand::List(args) => ps::run(session, &args),
        ContainerCommand::Inspect(args) => inspect::run_containers(session, &args),
        ContainerCommand::Run(args) => super::run::run(session, *args),
        ContainerCommand::Create(args) => super::run::create(session, *args),
        ContainerCommand::Export(args) => export::run(session, &args),
        ContainerCommand::Diff(args) => diff::run(session, &args),
        ContainerCommand::Cp(args) => cp::run(session, &args),
        ContainerCommand::Prune(args) => remove::prune(session, &args),
        ContainerCommand::Other(command) => life(session, &command),
    }
}

pub(crate) fn life(session: &Session, command: &LifeCommand) -> Result<u8, Failure> {
    match command {
        LifeCommand::Start(args) => life::start(session, args),
        LifeCommand::Stop(args) => life::stop(session, args),
        LifeCommand::Restart(args) => life::restart(session, args),
        LifeCommand::Kill(args) => life::kill(session, args),
        LifeCommand::Pause(args) => life::pause(session, args),
        LifeCommand::Unpause(args) => life::unpause(session, args),
        LifeCommand::Wait(args) => life::wait(session, args),
        LifeCommand::Rm(args) => remove::run(session, args),
        LifeCommand::Rename(args) => life::rename(session, args),
        LifeCommand::Update(args) => update::run(session, args),
        LifeCommand::Logs(args) => logs::run(session, args),
        LifeCommand::Exec(args) => exec::run(session, args),
        LifeCommand::Attach(args) => exec::attach(session, args),
        LifeCommand::Top(args) => use_::top(session, args),
        LifeCommand::Stats(args) => use_::stats(session, args),
        LifeCommand::Port(args) => use_::port(session, args),
        LifeCommand::Commit(args) => files::commit(session, args),
    }
}

/// Does the same with each, goes on after a failure, and prints the name of each with which it worked.
fn each(names: &[String], mut work: impl FnMut(&str) -> Result<(), Failure>) -> Result<u8, Failure> {
    tell(names, names.iter().map(|name| work(name)))
}

/// So many are worked on at once, as by docker.
const AT_ONCE: usize = 50;

/// As [`each`], side by side: what waits for a container does not wait for the others.
fn each_at_once(names: &[String], work: impl Fn(&str) -> Result<(), Failure> + Sync) -> Result<u8, Failure> {
    if let [_] = names {
        return each(names, work);
    }
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<(), Failure>>>> = names.iter().map(|_| Mutex::new(None)).collect();
    let run = || {
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let (Some(name), Some(place)) = (names.get(nth), results.get(nth)) else { return };
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(work(name));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..names.len().min(AT_ONCE) {
            scope.spawn(run);
        }
        run();
    });
    tell(
        names,
        results.into_iter().filter_map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner)),
    )
}

/// Says of each what came of it, in the order in which they were named.
fn tell(names: &[String], results: impl Iterator<Item = Result<(), Failure>>) -> Result<u8, Failure> {
    let mut failed = false;
    for (name, result) in names.iter().zip(results) {
        match result {
            Ok(()) => super::print(&format!("{name}\n"))?,
            Err(failure) if names.len() == 1 => return Err(failure),
            Err(failure) => {
                say(&failure.render());
                failed = true;
            }
        }
    }
    Ok(u8::from(failed))
}
