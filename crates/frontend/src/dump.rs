//! What was parsed and lowered, as text for tests and for the curious.

use std::fmt;

use crate::ast::{Ast, Body, Command, Files, Instruction, Pair, Text};
use crate::{Lowered, Severity};

impl fmt::Display for Ast {
    /// A line a directive and an instruction: lines of the file, keyword, flags, what it says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.directives.written {
            writeln!(f, "directive {name} {value:?}")?;
        }
        for instruction in &self.instructions {
            let line = &instruction.line;
            write!(f, "{}-{} ", line.first_line, line.last_line)?;
            head(f, instruction)?;
            writeln!(f)?;
            for comment in &line.comments {
                writeln!(f, "    comment {comment:?}")?;
            }
            for heredoc in &line.heredocs {
                let form = match (heredoc.expand, heredoc.strip_tabs) {
                    (true, false) => "expand",
                    (true, true) => "expand tabs",
                    (false, false) => "literal",
                    (false, true) => "literal tabs",
                };
                writeln!(f, "    heredoc {:?} {form} {:?}", heredoc.name, heredoc.body)?;
            }
        }
        Ok(())
    }
}

fn head(f: &mut fmt::Formatter<'_>, instruction: &Instruction) -> fmt::Result {
    write!(f, "{}", instruction.kind.name())?;
    for flag in &instruction.flags {
        match &flag.value {
            Some(value) => write!(f, " --{}={:?}", flag.name, value.value)?,
            None => write!(f, " --{}", flag.name)?,
        }
    }
    match &instruction.body {
        Body::Add(Files { paths, heredocs, destination })
        | Body::Copy(Files { paths, heredocs, destination }) => {
            texts(f, paths)?;
            for heredoc in heredocs {
                write!(f, " heredoc({heredoc})")?;
            }
            write!(f, " to {:?}", destination.value)
        }
        Body::Arg(definitions) => definitions.iter().try_for_each(|arg| match &arg.default {
            Some(default) => write!(f, " {:?}={:?}", arg.name.value, default.value),
            None => write!(f, " {:?}", arg.name.value),
        }),
        Body::Cmd(command) | Body::Entrypoint(command) | Body::Run(command) => match command {
            Command::Exec(words) => write!(f, " exec {words:?}"),
            Command::Shell(text) => write!(f, " shell {:?}", text.value),
        },
        Body::Env(pairs) | Body::Label(pairs) => pairs.iter().try_for_each(|Pair { name, value, legacy }| {
            let form = if *legacy { "legacy " } else { "" };
            write!(f, " {form}{:?}={:?}", name.value, value.value)
        }),
        Body::Expose(words) | Body::Volume(words) => texts(f, words),
        Body::From(from) => {
            write!(f, " {:?}", from.image.value)?;
            from.name.iter().try_for_each(|(_, name)| write!(f, " as {:?}", name.value))
        }
        Body::Healthcheck(health) => write!(
            f,
            " {:?} interval={} timeout={} start-period={} start-interval={} retries={}",
            health.test,
            health.interval,
            health.timeout,
            health.start_period,
            health.start_interval,
            health.retries
        ),
        Body::Maintainer(text) | Body::Stopsignal(text) | Body::User(text) | Body::Workdir(text) => {
            write!(f, " {:?}", text.value)
        }
        Body::Onbuild(trigger, stored) => {
            write!(f, " {stored:?} is ")?;
            head(f, trigger)
        }
        Body::Shell(words) => write!(f, " {words:?}"),
    }
}

fn texts(f: &mut fmt::Formatter<'_>, words: &[Text]) -> fmt::Result {
    words.iter().try_for_each(|word| write!(f, " {:?}", word.value))
}

impl fmt::Display for Lowered {
    /// The vertices, which of them is the result, the history and the warnings.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.definition)?;
        match self.result {
            Some(id) => writeln!(f, "result {}", id.0)?,
            None => writeln!(f, "result none")?,
        }
        if let Some(epoch) = self.epoch {
            writeln!(f, "epoch {epoch}")?;
        }
        for entry in &self.history {
            let vertex = entry.vertex.map_or_else(|| "-".to_owned(), |id| id.0.to_string());
            writeln!(f, "history {vertex} {:?}", entry.history.created_by.as_deref().unwrap_or_default())?;
        }
        for warning in &self.warnings {
            let rule = warning.rule.map_or("", |rule| rule.name());
            let kind = if warning.severity == Severity::Warning { "warning" } else { "error" };
            writeln!(f, "{kind} {rule} {:?}", warning.message)?;
        }
        Ok(())
    }
}
