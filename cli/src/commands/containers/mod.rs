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
mod life;
mod logs;
mod mounts;
pub(crate) mod ps;
mod remove;
mod use_;
pub(crate) mod volume;

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
        LifeCommand::Update(args) => life::update(session, args),
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
    let mut failed = None;
    for name in names {
        match work(name) {
            Ok(()) => super::print(&format!("{name}\n"))?,
            Err(failure) if names.len() == 1 => return Err(failure),
            Err(failure) => {
                say(&failure.render());
                failed = Some(failure.exit_code());
            }
        }
    }
    Ok(failed.map_or(0, |_| 1))
}
