//! Instructions that change the image config, and `kiln import -c`.

use kiln_llb::{File, FileAction, InputIndex, Mkdir, Op, Vertex};
use kiln_oci::image::{EmptyObject, History, ImageConfig};
use kiln_oci::{Platform, Reference};

use super::command::{listed, quoted, words};
use super::{Built, Lower, Options, Step, bare, entry, join, makes_layer};
use crate::ast::{Body, Definition, Instruction, Kind, Pair, Text};
use crate::healthcheck::Healthcheck;
use crate::outline::Wish;
use crate::scope::Scope;
use crate::stages::{Result, Stages, wrong};
use crate::words::split_blanks;
use crate::{Diagnostic, Rule, parse};

impl Lower<'_> {
    /// Applies one instruction; false while a base image is missing.
    pub(super) fn instruction(
        &mut self,
        step: &mut Step,
        built: &mut Built,
        at: &Instruction,
        title: &str,
    ) -> Result<bool> {
        match &at.body {
            Body::Add(files) | Body::Copy(files) => return self.copy(step, built, at, files, title),
            Body::Run(command) => return self.run_step(step, built, at, command, title),
            Body::Arg(definitions) => self.arg(built, at, definitions)?,
            Body::Cmd(command) => {
                self.again(&mut step.cmd, at);
                if built.config.config.shell.is_empty() && matches!(command, crate::ast::Command::Shell(_)) {
                    self.lint.shell_form(at);
                }
                let words = words(command, &built.config.config);
                built.note(format!("CMD {}", quoted(&words)));
                built.config.config.cmd = Some(words);
                built.config.config.args_escaped = true;
            }
            Body::Entrypoint(command) => {
                self.again(&mut step.entrypoint, at);
                if built.config.config.shell.is_empty() && matches!(command, crate::ast::Command::Shell(_)) {
                    self.lint.shell_form(at);
                }
                let words = words(command, &built.config.config);
                built.note(format!("ENTRYPOINT {}", quoted(&words)));
                built.config.config.entrypoint = Some(words).filter(|words| !words.is_empty());
                // An own ENTRYPOINT drops the command that came with the base.
                if step.cmd.is_none() {
                    built.config.config.cmd = None;
                }
            }
            Body::Env(pairs) => {
                let pairs = self.pairs(built, at, pairs)?;
                for (name, value) in &pairs {
                    built.image_env.replace(name, value.clone());
                    built.env.set(name, value.clone());
                }
                built.note(format!("ENV {}", shown(&pairs)));
            }
            Body::Label(pairs) => {
                let pairs = self.pairs(built, at, pairs)?;
                built.config.config.labels.extend(pairs.iter().cloned());
                built.note(format!("LABEL {}", shown(&pairs)));
            }
            Body::Expose(ports) => self.expose(built, at, ports)?,
            Body::Healthcheck(health) => {
                self.again(&mut step.healthcheck, at);
                Healthcheck::apply(health, &mut built.config.config);
                built.note(health.history());
            }
            Body::Maintainer(author) => {
                built.config.author = Some(author.value.clone());
                built.note(format!("MAINTAINER {}", author.value));
            }
            // Triggers leave no trace in the history (BuildKit).
            Body::Onbuild(_, stored) => built.config.config.on_build.push(stored.clone()),
            Body::Shell(shell) => {
                built.config.config.shell = shell.clone();
                built.note(format!("SHELL {}", listed(shell)));
            }
            Body::Stopsignal(signal) => {
                let value = self.expand(built, at, signal)?;
                if !is_signal(&value) {
                    let message = format!("{value:?} is no signal like SIGTERM or 9");
                    return wrong(at.text_span(signal), message);
                }
                built.note(format!("STOPSIGNAL {value}"));
                built.config.config.stop_signal = Some(value);
            }
            Body::User(user) => {
                let value = self.expand(built, at, user)?;
                check_user(&value).or_else(|message| wrong(at.text_span(user), message))?;
                built.note(format!("USER {value}"));
                built.config.config.user = value;
            }
            Body::Volume(paths) => {
                let mut volumes = Vec::new();
                for path in paths {
                    let value = self.expand(built, at, path)?;
                    if value.is_empty() {
                        return wrong(at.text_span(path), "VOLUME needs a path that is not empty");
                    }
                    volumes.push(value);
                }
                built.note(format!("VOLUME {}", listed(&volumes)));
                built.config.config.volumes.extend(volumes.into_iter().map(|path| (path, EmptyObject {})));
            }
            Body::Workdir(path) => self.workdir(step, built, at, path, title)?,
            Body::From(_) => {}
        }
        Ok(true)
    }

    fn again(&mut self, slot: &mut Option<Instruction>, at: &Instruction) {
        if let Some(earlier) = slot.replace(at.clone()) {
            self.lint.used_again(at.kind, &earlier);
        }
    }

    fn workdir(
        &mut self,
        step: &Step,
        built: &mut Built,
        at: &Instruction,
        path: &Text,
        title: &str,
    ) -> Result<()> {
        let value = self.expand(built, at, path)?;
        if value.contains('\0') {
            return wrong(at.text_span(path), "a path cannot hold a NUL byte");
        }
        if !built.workdir_set && !value.starts_with('/') {
            let message =
                format!("the first WORKDIR is relative: where {value:?} ends up depends on the base image");
            let hint = Some(format!("write WORKDIR /{value}"));
            self.lint.warn(Rule::WorkdirRelativePath, at, at.text_span(path), message, hint);
        }
        built.workdir_set = true;
        let path = join(&built.config.config.working_dir, &value);
        built.config.config.working_dir = path.clone();
        let created_by = format!("WORKDIR {path}");
        if path == "/" {
            built.note(created_by);
            return Ok(());
        }
        let owner = Some(built.config.config.user.clone()).filter(|user| !user.is_empty());
        let action = FileAction::Mkdir(Mkdir { path, mode: 0o755, owner, created: self.epoch });
        let base = built.tree.map(|_| InputIndex(0));
        let op = Op::File(File { base, actions: vec![action] });
        let vertex = Vertex { op, inputs: built.tree.into_iter().collect() };
        self.layer(built, at, step.title(title), vertex, created_by);
        Ok(())
    }

    fn arg(&mut self, built: &mut Built, at: &Instruction, definitions: &[Definition]) -> Result<()> {
        let mut shown = Vec::new();
        for Definition { name, default } in definitions {
            let name_text = name.value.clone();
            let passed = self.options.build_args.get(&name_text).cloned();
            let global = self.stages.globals.get(&name_text).cloned();
            // The outline then has the ARG in front of the first FROM.
            let inherited = default.is_none() && global.is_some();
            let value = match (passed, default) {
                (Some(value), _) => Some(value),
                (None, Some(default)) => Some(self.expand(built, at, default)?),
                (None, None) => global,
            };
            self.used_args.insert(name_text.clone());
            // These two speak to the builder, not to the steps.
            let is_env =
                !matches!(name_text.as_str(), "BUILDKIT_SBOM_SCAN_CONTEXT" | "BUILDKIT_SBOM_SCAN_STAGE");
            if let Some(value) = value.as_ref().filter(|_| is_env) {
                built.env.set(&name_text, value.clone());
            }
            if !inherited {
                self.wishes.push(Wish::arg(at, name, value.as_deref()));
            }
            shown.push(match &value {
                Some(value) => format!("{name_text}={value}"),
                None => name_text.clone(),
            });
            // One that is declared again keeps its place in the histories of RUN (BuildKit).
            built.args.replace(&name_text, value);
        }
        built.note(format!("ARG {}", shown.join(" ")));
        Ok(())
    }

    /// All words of one instruction see the variables as they were before it.
    fn pairs(&mut self, built: &Built, at: &Instruction, pairs: &[Pair]) -> Result<Vec<(String, String)>> {
        let mut out = Vec::new();
        for pair in pairs {
            let name = self.expand(built, at, &pair.name)?;
            if name.is_empty() {
                return wrong(
                    at.text_span(&pair.name),
                    "the name is empty after its variables were replaced",
                );
            }
            let value = self.expand(built, at, &pair.value)?;
            if name.contains('\0') || value.contains('\0') {
                return wrong(at.text_span(&pair.value), "a value cannot hold a NUL byte");
            }
            out.push((name, value));
        }
        Ok(out)
    }

    fn expose(&mut self, built: &mut Built, at: &Instruction, words: &[Text]) -> Result<()> {
        let mut ports = Vec::new();
        for word in words {
            let expanded = self.expand(built, at, word)?;
            for piece in split_blanks(&expanded, 0) {
                let spec = &expanded[piece.start..piece.end];
                let span = at.text_span(word);
                let port = Port::parse(spec).or_else(|message| wrong(span, message))?;
                if port.has_host {
                    let message = format!("EXPOSE {spec} has an address or a host port, which has no effect");
                    let hint = Some("publish ports when the container is run".to_owned());
                    self.lint.warn(Rule::ExposeInvalidFormat, at, span, message, hint);
                }
                if port.protocol != port.protocol.to_ascii_lowercase() {
                    let message = format!("the protocol {:?} of EXPOSE is not in lower case", port.protocol);
                    let hint = Some(format!("write `{}`", port.protocol.to_ascii_lowercase()));
                    self.lint.warn(Rule::ExposeProtoCasing, at, span, message, hint);
                }
                ports.extend(port.all());
            }
        }
        ports.sort();
        ports.dedup();
        built.note(format!("EXPOSE {}", listed(&ports)));
        built.config.config.exposed_ports.extend(ports.into_iter().map(|port| (port, EmptyObject {})));
        Ok(())
    }
}

fn shown(pairs: &[(String, String)]) -> String {
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

/// `80`, `80/udp`, `8000-8010`, `127.0.0.1:8080:80/tcp`.
struct Port<'a> {
    low: u16,
    high: u16,
    protocol: &'a str,
    has_host: bool,
}

impl<'a> Port<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        let unknown = || format!("{text:?} is no port like 80, 80/udp or 8000-8010");
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        if !matches!(protocol.to_ascii_lowercase().as_str(), "tcp" | "udp" | "sctp") {
            return Err(format!("{protocol:?} is no protocol: tcp, udp or sctp is expected"));
        }
        let (host, container) = match ports.rsplit_once(':') {
            Some((host, container)) => (Some(host), container),
            None => (None, ports),
        };
        let (low, high) = Self::range(container).ok_or_else(unknown)?;
        if let Some(host) = host {
            let (address, port) =
                host.rsplit_once(':').map_or((None, host), |(address, port)| (Some(address), port));
            let address_holds = address.is_none_or(|address| {
                let bare = address.trim_start_matches('[').trim_end_matches(']');
                address.is_empty() || bare.parse::<std::net::IpAddr>().is_ok()
            });
            let sizes_fit = port.is_empty()
                || Self::range(port).is_some_and(|(from, to)| to - from == high - low || low == high);
            if !address_holds || !sizes_fit {
                return Err(unknown());
            }
        }
        Ok(Self { low, high, protocol, has_host: host.is_some() })
    }

    fn range(text: &str) -> Option<(u16, u16)> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u16>().ok().filter(|&port| digits && port > 0)
        };
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let (low, high) = (number(low)?, number(high)?);
        (low <= high).then_some((low, high))
    }

    fn all(&self) -> Vec<String> {
        let protocol = self.protocol.to_ascii_lowercase();
        (self.low..=self.high).map(|port| format!("{port}/{protocol}")).collect()
    }
}

/// A number, or a name with or without `SIG` (signal(7)).
fn is_signal(text: &str) -> bool {
    const NAMES: [&str; 36] = [
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
        "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
        "TTIN", "TTOU", "UNUSED", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN",
    ];
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    // Real-time signals: RTMIN+n and RTMAX-n.
    let offset = |prefix: &str, most: u8| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.parse::<u8>().is_ok_and(|n| n <= most))
    };
    NAMES.contains(&name) || name == "RTMAX" || offset("RTMIN+", 15) || offset("RTMAX-", 14)
}

/// Numbers must be users that can exist; names are looked up when a process starts.
fn check_user(user: &str) -> Result<(), String> {
    let (name, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    for part in std::iter::once(name).chain(group) {
        let digits = part.strip_prefix('-').unwrap_or(part);
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if is_number && !part.parse::<u32>().is_ok_and(|id| id < u32::MAX) {
            return Err(format!("{part} is no user or group number: 0 to 4294967294 can be used"));
        }
    }
    match group {
        Some(group) if group.contains(':') => Err(format!("{user:?} has more than one colon")),
        _ if user.contains(['\0', '\n']) => Err("a user cannot hold control characters".to_owned()),
        _ => Ok(()),
    }
}

/// An instruction given on the command line is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("instruction `{instruction}`: {message}")]
pub struct ChangeError {
    /// As it was given.
    pub instruction: String,
    /// What is wrong.
    pub message: String,
}

/// Applies instructions such as `CMD ["bash"]` to an image config; the history entries they make,
/// without times.
///
/// # Errors
/// The first instruction that cannot be read, or that would change files.
pub fn apply_changes(
    config: &mut ImageConfig,
    instructions: &[String],
    platform: &Platform,
) -> std::result::Result<Vec<History>, ChangeError> {
    let base = "FROM scratch\n";
    let options = Options::new(platform.clone());
    let images = Default::default();
    let mut history = Vec::new();
    for text in instructions {
        let wrong = |message: &str| ChangeError { instruction: text.clone(), message: message.to_owned() };
        let (alone, diagnostics) = parse(text);
        if let Some(diagnostic) = diagnostics.first() {
            return Err(wrong(&diagnostic.message));
        }
        let [instruction] = alone.instructions.as_slice() else {
            return Err(wrong("exactly one instruction is expected"));
        };
        // WORKDIR alone makes no directory here: the tree is what was imported.
        if instruction.kind == Kind::From
            || (makes_layer(instruction.kind) && instruction.kind != Kind::Workdir)
        {
            return Err(wrong("only instructions that change no files are allowed"));
        }
        let (ast, _) = parse(base);
        let mut lint = crate::lint::Lint::new(Default::default());
        let failed = |error: Box<Diagnostic>| wrong(&error.message);
        let stages = Stages::find(&ast, &options, &mut lint).map_err(failed)?;
        let mut lower = Lower::new(&ast, &options, &images, stages, &mut lint);
        let env = Scope::of(&config.config.env);
        let mut built = Built { image_env: env.clone(), env, ..bare(config.clone()) };
        let mut step = Step {
            stage: 0,
            label: String::new(),
            number: 0,
            total: 0,
            cmd: None,
            entrypoint: None,
            healthcheck: None,
        };
        let _ = lower.instruction(&mut step, &mut built, instruction, "").map_err(failed)?;
        *config = built.config;
        config.config.env = built.image_env.to_entries();
        let made = built.history.into_iter().next().map(|entry| entry.history.created_by.unwrap_or_default());
        history.extend(made.map(entry));
    }
    Ok(history)
}

/// What stands in for an image whose config nobody could read.
impl super::BaseImage {
    /// An image of which nothing is known, so that a check can go on without it.
    pub fn unknown(reference: &Reference, platform: &Platform) -> Self {
        let config = ImageConfig::empty(platform);
        let config_digest = kiln_oci::Digest::of(reference.to_string().as_bytes());
        Self { config_digest, config, unknown: true }
    }
}
