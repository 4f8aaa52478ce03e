//! Why a step ran: values, and the one place where they become words.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::listing::{Difference, FileChange, FileChanges};

/// One reason why a step ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reason {
    /// This Dockerfile was never built from this context for this target and platform, as far as is known.
    NeverBuilt,
    /// There was such a build, and no such step in it.
    NewStep,
    /// `--no-cache`.
    NoCache,
    /// `--no-cache=STEP` or `--no-cache-filter` names this step.
    Asked {
        /// The option, with its value.
        option: String,
    },
    /// `RUN --cache-ttl`: there is a result that does not count any more.
    Expired {
        /// How long it counted.
        ttl_seconds: u64,
        /// When it was made, or was found to be what is made again; seconds since 1970.
        at_unix: i64,
    },
    /// The same step failed the last time, so there is no result.
    FailedBefore,
    /// There was a result.
    Evicted {
        /// Who removed it: `gc`, `prune`, `fsck`.
        by: String,
        /// When; seconds since 1970.
        at_unix: i64,
    },
    /// Nothing differs, and the store has no result: its index was lost, or it never came that far.
    NoResult,
    /// The instruction is another one.
    Instruction {
        /// As it was.
        from: String,
        /// As it is.
        to: String,
    },
    /// A variable of the step's environment.
    Variable {
        /// `ARG`, `ENV`.
        kind: VariableKind,
        /// Its name.
        name: String,
        /// What it was; `None`: it was not set.
        from: Option<String>,
        /// What it is; `None`: it is not set.
        to: Option<String>,
    },
    /// Something else that belongs to the step: its user, an option, a mount.
    Part {
        /// What.
        name: String,
        /// What it was; `None`: nothing.
        from: Option<String>,
        /// What it is; `None`: nothing.
        to: Option<String>,
    },
    /// Files that it reads.
    Files {
        /// Where from, as the progress calls that step.
        tree: String,
        /// Which; `None`: what they were is not kept any more.
        changes: Option<FileChanges>,
    },
    /// The image that it stands on.
    Base {
        /// The name that it was asked for by, then.
        from_name: String,
        /// Digest of its config, then.
        from: String,
        /// The name that it is asked for by.
        to_name: String,
        /// Digest of its config.
        to: String,
    },
    /// A step that it stands on ran in the same build, and left something else.
    Parent {
        /// Title of that step.
        step: String,
    },
    /// It stands on another result than before, which no step of this build has made.
    Stand {
        /// Title of the step that it stood on; `None`: on nothing.
        from: Option<String>,
        /// Title of the step that it stands on; `None`: on nothing.
        to: Option<String>,
    },
    /// Something about it that is not kept because there was a password in it.
    Hidden,
    /// What came of it: an earlier build had made the same layer, so nothing was copied.
    LayerKept,
}

/// Where a variable comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum VariableKind {
    /// `ARG`, or `--build-arg`.
    Arg,
    /// `ENV`, or the base image.
    Env,
}

impl Reason {
    /// Whether somebody who builds wants to hear it: that a step ran in a first build goes without saying.
    pub fn is_news(&self) -> bool {
        !matches!(self, Reason::NeverBuilt)
    }
}

/// All reasons in one line.
pub fn in_words(reasons: &[Reason]) -> String {
    reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("; ")
}

/// Texts of users are shown up to this many characters.
const SHOWN: usize = 80;

fn short(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() <= SHOWN {
        return text;
    }
    text.chars().take(SHOWN - 1).chain(['…']).collect()
}

fn quoted(text: &str) -> String {
    if text.chars().count() <= SHOWN {
        return format!("{text:?}");
    }
    format!("{:?}…", text.chars().take(SHOWN - 1).collect::<String>())
}

fn changed(f: &mut fmt::Formatter<'_>, name: &str, from: Option<&str>, to: Option<&str>) -> fmt::Result {
    match (from, to) {
        (Some(from), Some(to)) => write!(f, "{name} changed from {} to {}", quoted(from), quoted(to)),
        (None, Some(to)) => write!(f, "{name} added: {}", quoted(to)),
        (Some(from), None) => write!(f, "{name} removed, was {}", quoted(from)),
        (None, None) => write!(f, "{name} changed"),
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NeverBuilt => f.write_str("never built before"),
            Reason::NewStep => f.write_str("a new step"),
            Reason::NoCache => f.write_str("--no-cache"),
            Reason::Asked { option } => f.write_str(option),
            Reason::Expired { ttl_seconds, at_unix } => {
                let made = ago(crate::engine::now_unix() - at_unix);
                write!(f, "its result was made {made}, and counts for {}", span(*ttl_seconds))
            }
            Reason::FailedBefore => f.write_str("it failed the last time"),
            Reason::Evicted { by, at_unix } => {
                write!(f, "its result was removed by {by} {}", ago(crate::engine::now_unix() - at_unix))
            }
            Reason::NoResult => f.write_str("nothing differs, but the store has no result of it any more"),
            Reason::Instruction { from, to } => {
                write!(f, "the instruction changed: {} -> {}", short(from), short(to))
            }
            Reason::Variable { kind, name, from, to } => {
                let kind = match kind {
                    VariableKind::Arg => "ARG",
                    VariableKind::Env => "ENV",
                };
                changed(f, &format!("{kind} {name}"), from.as_deref(), to.as_deref())
            }
            Reason::Part { name, from, to } => changed(f, name, from.as_deref(), to.as_deref()),
            Reason::Files { tree, changes } => {
                files(f, changes.as_ref())?;
                if tree.starts_with("[internal]") { Ok(()) } else { write!(f, " (of {})", place(tree)) }
            }
            Reason::Base { from_name, from, to_name, to } if from_name == to_name => {
                write!(f, "base {to_name} moved from {from} to {to}")
            }
            Reason::Base { from_name, to_name, .. } => {
                write!(f, "the base changed: {from_name} -> {to_name}")
            }
            Reason::Parent { step } => write!(f, "{} ran again", place(step)),
            Reason::Stand { from: Some(from), to: Some(to) } if from == to => {
                write!(f, "{} left something else than before", place(to))
            }
            Reason::Stand { from, to } => {
                let name = |step: &Option<String>| step.as_deref().map_or("nothing".to_owned(), place);
                write!(f, "it stands on {} now, not on {}", name(to), name(from))
            }
            Reason::Hidden => f.write_str("something changed that is not kept: there is a password in it"),
            Reason::LayerKept => f.write_str("its layer was there already and is kept"),
        }
    }
}

/// `24 hours`, `90 minutes`: in the largest unit that fits.
fn span(seconds: u64) -> String {
    let (count, unit) = match seconds {
        s if s % 3600 == 0 => (s / 3600, "hour"),
        s if s % 60 == 0 => (s / 60, "minute"),
        s => (s, "second"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// `[build 2/5] RUN make` in the middle of a sentence.
fn place(title: &str) -> String {
    let numbered = title.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    let Some((label, text)) = numbered else { return short(title) };
    let Some((front, _)) = label.rsplit_once('/') else { return short(text) };
    let (stage, number) = front.rsplit_once(' ').unwrap_or(("", front));
    let stage = if stage.trim().is_empty() { String::new() } else { format!("{}:", stage.trim()) };
    format!("step {stage}{number} ({})", short(text))
}

fn files(f: &mut fmt::Formatter<'_>, changes: Option<&FileChanges>) -> fmt::Result {
    let Some(FileChanges { count, of, first }) = changes else { return f.write_str("files differ") };
    if *count == 0 {
        return f.write_str("files differ in how they are named or linked");
    }
    let name = |change: &FileChange| {
        let path = if change.path.is_empty() { "." } else { &change.path };
        let path: String = path.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        match change.what {
            Difference::Content => path,
            Difference::Added => format!("{path} added"),
            Difference::Removed => format!("{path} removed"),
            Difference::Type => format!("{path} is of another type"),
            Difference::Mode => format!("{path} has another mode"),
            Difference::Attributes => format!("{path} has another owner or other attributes"),
        }
    };
    let names: Vec<String> = first.iter().map(name).collect();
    let more = match count - names.len().min(*count) {
        0 => String::new(),
        more => format!(", +{more} more"),
    };
    let verb = if *count == 1 { "differs" } else { "differ" };
    let noun = if *of == 1 { "file" } else { "files" };
    write!(f, "{count} of {of} {noun} {verb}: {}{more}", names.join(", "))
}

fn ago(seconds: i64) -> String {
    let (count, unit) = match seconds.max(0) {
        seconds @ 0..120 => (seconds, "second"),
        seconds @ 120..7200 => (seconds / 60, "minute"),
        seconds @ 7200..172_800 => (seconds / 3600, "hour"),
        seconds => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(reason: Reason, expected: &str) {
        assert_eq!(reason.to_string(), expected);
        let json = serde_json::to_string(&reason).unwrap();
        assert_eq!(serde_json::from_str::<Reason>(&json).unwrap(), reason, "{json}");
    }

    #[test]
    fn reasons_are_one_short_line() {
        let text = |text: &str| Some(text.to_owned());
        check(Reason::NoCache, "--no-cache");
        check(Reason::Asked { option: "--no-cache=build:2".to_owned() }, "--no-cache=build:2");
        let expired =
            |ttl_seconds| Reason::Expired { ttl_seconds, at_unix: crate::engine::now_unix() - 7200 };
        check(expired(3600), "its result was made 2 hours ago, and counts for 1 hour");
        check(expired(5400), "its result was made 2 hours ago, and counts for 90 minutes");
        check(expired(61), "its result was made 2 hours ago, and counts for 61 seconds");
        check(Reason::FailedBefore, "it failed the last time");
        let at_unix = crate::engine::now_unix() - 2 * 86_400;
        check(Reason::Evicted { by: "gc".into(), at_unix }, "its result was removed by gc 2 days ago");
        check(
            Reason::Instruction { from: "RUN a".into(), to: "RUN  b\n".into() },
            "the instruction changed: RUN a -> RUN b",
        );
        let variable = |kind, from, to| Reason::Variable { kind, name: "V".into(), from, to };
        check(variable(VariableKind::Arg, text("1"), text("2")), "ARG V changed from \"1\" to \"2\"");
        check(variable(VariableKind::Env, None, text("x")), "ENV V added: \"x\"");
        check(variable(VariableKind::Env, text("x"), None), "ENV V removed, was \"x\"");
        let base = |to_name: &str| Reason::Base {
            from_name: "debian:bookworm".into(),
            from: "sha256:1".into(),
            to_name: to_name.into(),
            to: "sha256:2".into(),
        };
        check(base("debian:bookworm"), "base debian:bookworm moved from sha256:1 to sha256:2");
        check(base("debian:trixie"), "the base changed: debian:bookworm -> debian:trixie");
        check(
            Reason::Parent { step: "[build  3/12] COPY src /src".into() },
            "step build:3 (COPY src /src) ran again",
        );
        check(Reason::Parent { step: "[3/4] RUN x".into() }, "step 3 (RUN x) ran again");
        check(
            Reason::Stand { from: text("[2/4] RUN a"), to: text("[2/4] RUN b") },
            "it stands on step 2 (RUN b) now, not on step 2 (RUN a)",
        );
        let change = |path: &str, what| FileChange { path: path.into(), what };
        let first = vec![
            change("src/a.c", Difference::Content),
            change("src/b.c", Difference::Added),
            change("c\u{1b}", Difference::Mode),
        ];
        let files = |tree: &str, count| Reason::Files {
            tree: tree.into(),
            changes: Some(FileChanges { count, of: 200, first: first.clone() }),
        };
        check(
            files("[internal] load build context", 5),
            "5 of 200 files differ: src/a.c, src/b.c added, c\u{fffd} has another mode, +2 more",
        );
        check(
            files("[build 2/3] RUN make", 3),
            "3 of 200 files differ: src/a.c, src/b.c added, c\u{fffd} has another mode (of step build:2 (RUN make))",
        );
        check(Reason::Files { tree: "[internal] x".into(), changes: None }, "files differ");
        let long = "x".repeat(500);
        check(
            Reason::Part { name: "user".into(), from: Some(long.clone()), to: text("y") },
            &format!("user changed from \"{}\"… to \"y\"", &long[..79]),
        );
    }
}
