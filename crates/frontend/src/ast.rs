//! A Dockerfile as a tree of instructions.

use crate::Span;
use crate::lexer::Heredoc;

/// A parsed Dockerfile.
#[derive(Debug)]
pub struct Ast {
    pub(crate) escape: char,
    pub(crate) instructions: Vec<Instruction>,
}

/// One instruction.
#[derive(Debug, Clone)]
pub(crate) struct Instruction {
    pub(crate) kind: Kind,
    /// `--name[=value]` words behind the keyword.
    pub(crate) flags: Vec<Flag>,
    /// Everything behind keyword and flags, as written.
    pub(crate) rest: Text,
    /// The JSON list, where the rest is one and the instruction takes one.
    pub(crate) json: Option<Vec<String>>,
    pub(crate) heredocs: Vec<Heredoc>,
    /// The whole instruction on one line, for titles.
    pub(crate) title: String,
    pub(crate) span: Span,
    pub(crate) first_line: usize,
    pub(crate) last_line: usize,
}

/// Text with its place.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) value: String,
    pub(crate) span: Span,
}

/// A flag; `value` is `None` without an equals sign.
#[derive(Debug, Clone)]
pub(crate) struct Flag {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
    pub(crate) span: Span,
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

    /// Flags it takes, and whether kiln supports them yet.
    pub(crate) fn flags(self) -> &'static [(&'static str, bool)] {
        match self {
            Kind::Add => &[
                ("chown", true),
                ("chmod", false),
                ("link", false),
                ("exclude", false),
                ("checksum", false),
                ("unpack", false),
                ("keep-git-dir", false),
            ],
            Kind::Copy => &[
                ("from", true),
                ("chown", true),
                ("chmod", false),
                ("link", false),
                ("parents", false),
                ("exclude", false),
            ],
            Kind::From => &[("platform", true)],
            Kind::Run => &[("network", true), ("mount", false), ("security", false), ("device", false)],
            Kind::Healthcheck => &[
                ("interval", false),
                ("timeout", false),
                ("start-period", false),
                ("start-interval", false),
                ("retries", false),
            ],
            _ => &[],
        }
    }

    /// Whether its arguments may be a JSON list.
    pub(crate) fn takes_json(self) -> bool {
        matches!(
            self,
            Kind::Add | Kind::Cmd | Kind::Copy | Kind::Entrypoint | Kind::Run | Kind::Shell | Kind::Volume
        )
    }
}
