//! A Dockerfile as a tree of instructions.

use std::sync::Arc;

use crate::Span;
use crate::directive::Directives;
use crate::healthcheck::Healthcheck;
use crate::lexer::Line;
use crate::words::Piece;

/// A parsed Dockerfile. Its `Display` is a dump for tests and for the curious.
#[derive(Debug)]
pub struct Ast {
    pub(crate) directives: Directives,
    pub(crate) instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Debug, Clone)]
pub(crate) struct Instruction {
    pub(crate) kind: Kind,
    /// The keyword as written.
    pub(crate) keyword: String,
    /// `--name[=value]` words behind the keyword.
    pub(crate) flags: Vec<Flag>,
    pub(crate) body: Body,
    /// Everything behind keyword and flags.
    pub(crate) rest: Piece,
    pub(crate) line: Arc<Line>,
}

/// What an instruction says.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    Add(Files),
    Arg(Vec<Definition>),
    Cmd(Command),
    Copy(Files),
    Entrypoint(Command),
    Env(Vec<Pair>),
    Expose(Vec<Text>),
    From(From),
    Healthcheck(Healthcheck),
    Label(Vec<Pair>),
    Maintainer(Text),
    /// The trigger, and its text as it is stored in images.
    Onbuild(Box<Instruction>, String),
    Run(Command),
    Shell(Vec<String>),
    Stopsignal(Text),
    User(Text),
    Volume(Vec<Text>),
    Workdir(Text),
}

/// A piece of an instruction.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) value: String,
    /// Where it stands in the instruction's text.
    pub(crate) piece: Piece,
    /// `value` is that text byte for byte.
    pub(crate) exact: bool,
}

/// A flag; `value` is `None` without an equals sign.
#[derive(Debug, Clone)]
pub(crate) struct Flag {
    pub(crate) name: String,
    pub(crate) value: Option<Text>,
    /// All of `--name=value`.
    pub(crate) piece: Piece,
}

/// The base of a stage and its name.
#[derive(Debug, Clone)]
pub(crate) struct From {
    pub(crate) image: Text,
    /// `AS` as written, and the name as written.
    pub(crate) name: Option<(String, Text)>,
}

/// `name[=default]` of ARG.
#[derive(Debug, Clone)]
pub(crate) struct Definition {
    pub(crate) name: Text,
    pub(crate) default: Option<Text>,
}

/// `name=value` of ENV and LABEL.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) name: Text,
    pub(crate) value: Text,
    /// `name value`, the deprecated form.
    pub(crate) legacy: bool,
}

/// What RUN, CMD and ENTRYPOINT start.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// JSON: program and arguments.
    Exec(Vec<String>),
    /// Text for the shell.
    Shell(Text),
}

/// Sources and destination of COPY and ADD.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    pub(crate) paths: Vec<Text>,
    /// Positions in the line's heredocs.
    pub(crate) heredocs: Vec<usize>,
    pub(crate) destination: Text,
}

impl Instruction {
    /// Keyword, flags and arguments, without heredoc bodies.
    pub(crate) fn span(&self) -> Span {
        self.line.whole()
    }

    /// The keyword.
    pub(crate) fn keyword_span(&self) -> Span {
        let start = self.line.text.find(self.keyword.as_str()).unwrap_or(0);
        self.line.span(start, start + self.keyword.len())
    }

    pub(crate) fn rest_span(&self) -> Span {
        self.line.span(self.rest.start, self.rest.end)
    }

    pub(crate) fn text_span(&self, text: &Text) -> Span {
        self.line.span(text.piece.start, text.piece.end)
    }

    /// Bytes `start..end` of `text`, or all of it where it is not what the file says.
    pub(crate) fn part_span(&self, text: &Text, start: usize, end: usize) -> Span {
        if text.exact {
            self.line.span(text.piece.start + start, text.piece.start + end.min(text.value.len()))
        } else {
            self.text_span(text)
        }
    }

    pub(crate) fn flag(&self, name: &str) -> Option<&Flag> {
        self.flags.iter().find(|flag| flag.name == name)
    }

    /// A boolean flag; parsing has checked its value. `None`: not given.
    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        let flag = self.flag(name)?;
        Some(flag.value.as_ref().is_none_or(|value| value.value != "false"))
    }

    /// The instruction on one line, for progress and messages.
    pub(crate) fn title(&self) -> String {
        self.line.text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// The 18 instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Add,
    Arg,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Label,
    Maintainer,
    Onbuild,
    Run,
    Shell,
    Stopsignal,
    User,
    Volume,
    Workdir,
}

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlagValue {
    /// A text, once.
    Text,
    /// A text, any number of times.
    Texts,
    /// Nothing, `true` or `false`.
    Switch,
}

impl Kind {
    /// All with their names.
    pub(crate) const ALL: [(&'static str, Kind); 18] = [
        ("ADD", Kind::Add),
        ("ARG", Kind::Arg),
        ("CMD", Kind::Cmd),
        ("COPY", Kind::Copy),
        ("ENTRYPOINT", Kind::Entrypoint),
        ("ENV", Kind::Env),
        ("EXPOSE", Kind::Expose),
        ("FROM", Kind::From),
        ("HEALTHCHECK", Kind::Healthcheck),
        ("LABEL", Kind::Label),
        ("MAINTAINER", Kind::Maintainer),
        ("ONBUILD", Kind::Onbuild),
        ("RUN", Kind::Run),
        ("SHELL", Kind::Shell),
        ("STOPSIGNAL", Kind::Stopsignal),
        ("USER", Kind::User),
        ("VOLUME", Kind::Volume),
        ("WORKDIR", Kind::Workdir),
    ];

    /// In upper case.
    pub(crate) fn name(self) -> &'static str {
        Kind::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    /// Flags it takes.
    pub(crate) fn flags(self) -> &'static [(&'static str, FlagValue)] {
        use FlagValue::{Switch, Text, Texts};
        match self {
            Kind::Add => &[
                ("chown", Text),
                ("chmod", Text),
                ("link", Switch),
                ("exclude", Texts),
                ("checksum", Text),
                ("unpack", Switch),
                ("keep-git-dir", Switch),
            ],
            Kind::Copy => &[
                ("from", Text),
                ("chown", Text),
                ("chmod", Text),
                ("link", Switch),
                ("parents", Switch),
                ("exclude", Texts),
            ],
            Kind::From => &[("platform", Text)],
            Kind::Run => &[
                ("mount", Texts),
                ("network", Text),
                ("security", Text),
                ("device", Texts),
                ("cache-ttl", Text),
            ],
            Kind::Healthcheck => &[
                ("interval", Text),
                ("timeout", Text),
                ("start-period", Text),
                ("start-interval", Text),
                ("retries", Text),
            ],
            _ => &[],
        }
    }
}
