//! `kiln`: builds container images from Dockerfiles, runs them, and moves them.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod config;
mod errors;
mod escape;
mod platforms;
mod progress;
mod registries;
mod rootless;
mod session;
mod template;

use std::process::ExitCode;

use clap::Parser;
use kiln_build::streams::given_up;
use nix::sys::signal::{SigSet, Signal};
use rustix::fs::Mode;
use rustix::process::umask;

use crate::args::builds::HistoryCommand;
use crate::args::store::LimitArgs;
use crate::args::{Cli, Command, SelftestArgs};
use crate::errors::{Failure, exit, say};
use crate::session::Session;

fn main() -> ExitCode {
    // A container's helper is this program again, under another name.
    kiln_executor::init_if_asked();
    // So is the process that looks after one.
    kiln_containers::monitor_if_asked();
    kiln_executor::close_inherited_at_exec();
    // What a mask forbids to others stays forbidden; one that forbids the owner makes nobody safer.
    let mask = umask(Mode::empty());
    umask(mask & (Mode::RWXG | Mode::RWXO));
    // A file beyond the limit is an error like any other, EFBIG, unless the signal kills first.
    let mut too_large = SigSet::empty();
    too_large.add(Signal::SIGXFSZ);
    let _ = too_large.thread_block();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.use_stderr() {
                true if starts_process() => exit::CONTAINER.into(),
                true => exit::USAGE.into(),
                false => ExitCode::SUCCESS,
            };
        }
    };
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            let failure = if given_up() { Failure::interrupted("interrupted") } else { failure };
            say(&failure.render());
            failure.exit_code().into()
        }
    }
}

/// Whether the command line asks for a process in a container: what is wrong with it then must not look
/// like that process's exit code.
fn starts_process() -> bool {
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--root" | "--snapshotter" => drop(words.next()),
            "container" => {}
            word if word.starts_with('-') => {}
            word => return matches!(word, "run" | "create" | "exec" | "shell"),
        }
    }
    false
}

/// What a command that unpacks says about how much.
fn limits_of(command: &Command) -> Option<&LimitArgs> {
    match command {
        Command::Build(args) => Some(&args.limits),
        Command::Import(args) => Some(&args.limits),
        Command::Load(args) => Some(&args.limits),
        Command::Pull(args) => Some(&args.limits),
        Command::Copy(args) => Some(&args.limits),
        Command::Mutate(args) => Some(&args.limits),
        Command::CacheMount(args) => args.limits(),
        _ => None,
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    if let Command::Selftest(SelftestArgs { inside: Some(what), .. }) = &cli.command {
        // There is no store where this runs.
        return commands::selftest::inside(*what);
    }
    if let Command::Doctor(args) = &cli.command {
        return commands::doctor::run(&cli, args);
    }
    match &cli.command {
        // Credentials are the user's, not the store's.
        Command::Login(args) => return commands::login::login(args),
        Command::Logout(args) => return commands::login::logout(args),
        // A registry has a directory of its own, or the store's images.
        Command::Registry { command } if !commands::registry_serve::needs_store(command)? => {
            return commands::registry_serve::run(None, command);
        }
        _ => {}
    }
    rootless::enter(cli.root.as_deref())?;
    let anew = matches!(&cli.command, Command::Fsck(args) if args.rebuild);
    let mut session = Session::open(cli.root, cli.snapshotter, anew)?;
    if let Some(args) = limits_of(&cli.command) {
        session.engine.limits = config::limits(args.max_layer, session.engine.store.root())?;
    }
    match cli.command {
        Command::Build(args) => commands::build::run(&session, *args),
        Command::Shell(args) => commands::shell::run(&session, args),
        Command::Import(args) => commands::import::run(&session, args),
        Command::Images(args) => commands::images::run(&session, &args),
        Command::Image(args) => commands::image::run(&session, &args),
        Command::Inspect(args) => commands::containers::inspect::run(&session, &args),
        Command::History(args) => match (args.builds, args.image) {
            (Some(HistoryCommand::Builds(args)), _) => commands::builds::run(&session, &args),
            (None, Some(image)) => commands::history::run(&session, &image),
            (None, None) => Err(Failure::usage("`kiln history` needs an image's name, or `builds`")),
        },
        Command::Why(args) => commands::why::run(&session, &args),
        Command::Log(args) => commands::builds::log(&session, &args),
        Command::Rmi(args) => commands::rmi::run(&session, &args),
        Command::Tag(args) => commands::tag::run(&session, &args),
        Command::Run(args) => commands::run::run(&session, *args),
        Command::Create(args) => commands::run::create(&session, *args),
        Command::Ps(args) => commands::containers::ps::run(&session, &args),
        Command::Life(command) => commands::containers::life(&session, &command),
        Command::Container { command } => commands::containers::run(&session, command),
        Command::Volume(args) => commands::containers::volume::run(&session, &args),
        Command::Network(args) => commands::containers::network::run(&session, &args),
        Command::Save(args) => commands::save::run(&session, &args),
        Command::Load(args) => commands::load::run(&session, &args),
        Command::Pull(args) => commands::pull::run(&session, &args),
        Command::Push(args) => commands::push::run(&session, &args),
        Command::Search(args) => commands::search::run(&session, &args),
        Command::Copy(args) => commands::copy::run(&session, &args),
        Command::Manifest(args) => commands::manifest::run(&session, &args.command),
        Command::Export(args) => commands::export::run(&session, &args),
        Command::Layer(args) => commands::layer::run(&session, args.command),
        Command::Diff(args) => commands::diff::run(&session, &args),
        Command::Cp(args) => commands::cp::run(&session, &args),
        Command::Mutate(args) => commands::mutate::run(&session, args),
        Command::Flatten(args) => commands::flatten::run(&session, &args),
        Command::CacheMount(args) => commands::cache_mount::run(&session, args.command),
        Command::Du(args) => commands::du::run(&session, &args),
        Command::Gc(args) => commands::gc::run(&session, &args),
        Command::Prune(args) => commands::prune::run(&session, &args),
        // They have no store either.
        Command::Doctor(_) | Command::Login(_) | Command::Logout(_) => Ok(0),
        Command::Registry { command } => commands::registry_serve::run(Some(&session), &command),
        Command::Selftest(args) => commands::selftest::run(&session, &args),
        Command::Fsck(args) => commands::fsck::run(&session, &args),
    }
}
