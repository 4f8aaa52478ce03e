//! `kiln shell`

use std::io::IsTerminal;
use std::process::Command as Process;
use std::sync::Arc;

use clap::Parser;
use kiln_build::{
    BuildError, BuildOrigin, LastBuild, ShellRequest, ShellState, ShellStep, WhichBuild, last_build, shell,
};

use super::run::shell_code;
use crate::args::{BuildArgs, Cli, Command, ShellArgs};
use crate::config;
use crate::config::Config;
use crate::errors::{Failure, exit, say};
use crate::progress::{Quiet, Shown};
use crate::session::Session;

pub(crate) fn run(session: &Session, args: ShellArgs) -> Result<u8, Failure> {
    open(session, args).map_err(|failure| match failure.exit_code() {
        exit::INTERRUPTED | exit::NOT_FOUND | exit::NOT_EXECUTABLE => failure,
        _ => failure.in_container(),
    })
}

fn open(session: &Session, args: ShellArgs) -> Result<u8, Failure> {
    let root = session.engine.store.root();
    let which = if args.step.is_some() { WhichBuild::Last } else { WhichBuild::Failed };
    let record = last_build(root, which)
        .map_err(|error| Failure::store(format!("the record of the last build: {error}")))?;
    let nothing = || match which {
        WhichBuild::Last => Failure::source("nothing was built in this store"),
        WhichBuild::Failed => Failure::source("no build has failed at a step in this store")
            .hint("`kiln shell --step N` is for any step of the last build"),
    };
    let record = record.ok_or_else(nothing)?;
    let build = command_line(&record)?;
    std::env::set_current_dir(&record.dir)
        .map_err(|error| Failure::source(format!("{}: {error}", record.dir.display())))?;
    let mut engine = session.engine.clone();
    engine.limits = config::limits(build.limits.max_layer, root)?;
    if let Some(name) = &build.runtime {
        engine.executor = session.linux_with(super::runtime(name)?)?;
    }
    let mut request = super::build::request(&build, Vec::new(), &Config::read()?)?;
    request.build_args = record.build_args;
    let step = match (args.step, record.failed) {
        (Some(number), _) => ShellStep::Number(number),
        (None, Some(failed)) => ShellStep::Failed(failed),
        (None, None) => return Err(nothing()),
    };
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let wanted = ShellRequest { step, before: args.before, command: args.command, terminal };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
    let runtime = runtime.map_err(|error| Failure::store(format!("threads cannot be started: {error}")))?;
    let progress = Arc::new(Shown::new(Quiet));
    let ended = runtime.block_on(shell(&engine, &request, &wanted, progress, &session.cancel));
    let (ended, state) = ended.map_err(|error| not_started(error, &wanted))?;
    match state {
        ShellState::Asked => {}
        ShellState::Unchanged => say("note: the step had written nothing when it failed\n"),
        ShellState::Gone => {
            say("note: what the failed step had written was removed; this was the state before it\n");
        }
    }
    if session.cancel.processes().is_cancelled() {
        return Ok(exit::INTERRUPTED.number());
    }
    Ok(shell_code(ended.shell_code()))
}

/// A command that cannot be started is answered for as `kiln run` does.
fn not_started(error: BuildError, wanted: &ShellRequest) -> Failure {
    use kiln_build::OpError;
    use kiln_executor::ExecError;
    match error {
        BuildError::Step { source, title, at } if !wanted.command.is_empty() => match *source {
            OpError::Exec(error @ (ExecError::NotFound { .. } | ExecError::NotExecutable { .. })) => {
                kiln_containers::Error::Exec(error).into()
            }
            source => BuildError::Step { title, at, source: Box::new(source) }.into(),
        },
        error => error.into(),
    }
}

/// The build as it was asked for.
fn command_line(record: &LastBuild) -> Result<BuildArgs, Failure> {
    if record.words.is_empty() {
        return Err(Failure::source("the build's command line had a password in it, and was not kept")
            .hint("pass it as a secret: docs/dockerfile.md says which"));
    }
    let words = std::iter::once("kiln").chain(record.words.iter().map(String::as_str));
    let Ok(Cli { command: Command::Build(args), .. }) = Cli::try_parse_from(words) else {
        return Err(Failure::store("the last build was another kiln's, and this one cannot read how")
            .hint("build again with this one"));
    };
    if args.context == "-" || args.file.as_deref() == Some("-") {
        return Err(Failure::source(
            "the build read its context or Dockerfile from standard input, which is gone",
        )
        .hint("build from files"));
    }
    Ok(*args)
}

/// How this process was asked for; `None`: nobody could ask the same again.
pub(super) fn origin() -> Option<BuildOrigin> {
    let words = std::env::args_os().skip(1).map(|word| word.into_string().ok());
    let words = without_caches(words.collect::<Option<_>>()?);
    Some(BuildOrigin { words, dir: std::env::current_dir().ok()? })
}

/// A command line without its caches: they may have passwords, and what came from them is in the store.
fn without_caches(words: Vec<String>) -> Vec<String> {
    const FLAGS: [&str; 2] = ["--cache-to", "--cache-from"];
    let mut is_value = false;
    let is_kept = |word: &String| {
        let is_flag = FLAGS.contains(&word.as_str());
        let is_both =
            FLAGS.iter().any(|flag| word.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')));
        !std::mem::replace(&mut is_value, is_flag) && !is_flag && !is_both
    };
    words.into_iter().filter(is_kept).collect()
}

/// `kiln build --on-error=shell`: says what went wrong, and opens a shell there if somebody is at a
/// terminal. The exit code is the build's.
pub(super) fn after(session: &Session, error: BuildError) -> Result<u8, Failure> {
    let failure = Failure::from(error);
    if !std::io::stdin().is_terminal() {
        return Err(failure.hint("standard input is no terminal: `kiln shell` opens the shell from one"));
    }
    say(&failure.render());
    say("a shell in the step's state; `exit` leaves it\n");
    // Another process: this one's work is cancelled, and so would be whatever it starts.
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut shell = Process::new(program);
    shell.arg("--root").arg(session.engine.store.root());
    shell.args(["--snapshotter", &session.backend.to_string(), "shell"]);
    if let Err(error) = shell.status() {
        say(&format!("warning: no shell can be started: {error}\n"));
    }
    Ok(failure.exit_code().number())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_caches_are_not_kept() {
        let words = "build --cache-to type=s3,secret=x -t a --cache-from=type=s3,secret=x --no-cache .";
        let kept = without_caches(words.split(' ').map(str::to_owned).collect());
        assert_eq!(kept.join(" "), "build -t a --no-cache .");
    }
}
