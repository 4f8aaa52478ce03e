//! `kiln doctor`: what of this machine kiln can use, what is in the way, and what helps.
//!
//! Nothing is guessed that can be tried: a snapshot is mounted, a container is started up to the point
//! where its program would be executed, and all of it is taken away again.

mod host;
mod trial;

use serde::Serialize;

use super::print;
use crate::args::{Cli, DoctorArgs, DoctorFormat};
use crate::errors::{Failure, exit};
use crate::session::root_of;

/// How a rung of the ladder bears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// As good as it gets.
    Ok,
    /// Something does not work, or not as well; builds do.
    Limited,
    /// Builds cannot run.
    Blocked,
    /// Nothing needs it here.
    Unused,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Rung {
    name: &'static str,
    state: State,
    /// What there is, or what is in the way.
    found: String,
    /// The one command that lifts the obstacle.
    help: Option<String>,
}

impl Rung {
    fn new(name: &'static str, state: State, found: impl Into<String>) -> Self {
        Self { name, state, found: found.into(), help: None }
    }

    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, State::Ok, found)
    }

    fn help(mut self, command: impl Into<String>) -> Self {
        self.help = Some(command.into());
        self
    }
}

#[derive(Serialize)]
struct Report<'a> {
    /// Builds can run.
    ok: bool,
    rungs: &'a [Rung],
}

/// Looks, tries and shows. Makes a directory beside the store's place and removes it.
pub(crate) fn run(cli: &Cli, args: &DoctorArgs) -> Result<u8, Failure> {
    let mut rungs = host::before();
    // Everything from here on is seen from where builds run.
    let entered = crate::rootless::enter_own();
    rungs.extend(host::namespaces(entered.as_ref().err()));
    if entered.is_ok() {
        rungs.extend(trial::rungs(&root_of(cli.root.clone())?));
    }
    rungs.extend(host::after());
    let ok = rungs.iter().all(|rung| rung.state != State::Blocked);
    print(&match args.format {
        DoctorFormat::Table => table(&rungs, ok),
        DoctorFormat::Json => {
            let report = serde_json::to_string_pretty(&Report { ok, rungs: &rungs });
            report.map_err(|error| Failure::source(error.to_string()))? + "\n"
        }
    })?;
    Ok(if ok { 0 } else { exit::RUN.number() })
}

fn table(rungs: &[Rung], ok: bool) -> String {
    let width = rungs.iter().map(|rung| rung.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for rung in rungs {
        let state = match rung.state {
            State::Ok => "ok",
            State::Limited => "limited",
            State::Blocked => "BLOCKED",
            State::Unused => "-",
        };
        let line = format!("{:width$}  {state:7}  {}", rung.name, rung.found);
        text.push_str(line.trim_end());
        text.push('\n');
        if let Some(help) = &rung.help {
            text.push_str(&format!("{:width$}           helps: {help}\n", ""));
        }
    }
    text.push_str(if ok { "builds can run\n" } else { "builds cannot run\n" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_helps_stands_below_what_is_in_the_way() {
        let rungs = [Rung::ok("kernel", "6.1"), Rung::new("ids", State::Limited, "one").help("usermod x")];
        let shown = "kernel  ok       6.1\nids     limited  one\n                 helps: usermod x\n";
        assert_eq!(table(&rungs, true), format!("{shown}builds can run\n"));
    }
}
