//! Errors as users see them: text, hint, exit code.

mod registry;
mod shortage;
mod toolkit;
mod unfit;

use std::io::Write;
use std::process::ExitCode;

use kiln_build::{
    ARCHIVE_BYTES, BuildError, Dockerfile, Fault, LockError, NamedContextError, OpError, SourceError,
    WatchError,
};
use kiln_executor::{AuthorityError, ExecError};
use kiln_frontend::{Diagnostic, Severity, Span};
use kiln_layer::{CopyError, ScanError};
use kiln_llb::Location;
use kiln_oci::document::DocumentError;

use shortage::{Shortage, shortage};

/// Exit codes, the same for every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(u8);

impl Code {
    pub(crate) fn number(self) -> u8 {
        self.0
    }
}

pub(crate) mod exit {
    use super::Code;

    pub(crate) const RUN: Code = Code(1);
    pub(crate) const USAGE: Code = Code(2);
    pub(crate) const DOCKERFILE: Code = Code(3);
    pub(crate) const SOURCE: Code = Code(4);
    pub(crate) const NETWORK: Code = Code(5);
    pub(crate) const STORE: Code = Code(6);
    pub(crate) const POLICY: Code = Code(7);
    pub(crate) const LIMIT: Code = Code(8);
    pub(crate) const CONTAINER: Code = Code(125);
    pub(crate) const NOT_EXECUTABLE: Code = Code(126);
    pub(crate) const NOT_FOUND: Code = Code(127);
    pub(crate) const INTERRUPTED: Code = Code(130);
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        ExitCode::from(code.0)
    }
}

/// Writes to standard error, if anybody listens.
pub(crate) fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// A command that failed.
pub(crate) struct Failure {
    code: Code,
    /// Everything that goes in front of the hint, lines ended.
    text: String,
    hint: Option<String>,
}

impl Failure {
    fn new(code: Code, message: impl AsRef<str>) -> Self {
        Self { code, text: format!("error: {}\n", message.as_ref()), hint: None }
    }

    /// What to do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The command line asks for something that does not make sense.
    pub(crate) fn usage(message: impl AsRef<str>) -> Self {
        Self::new(exit::USAGE, message)
    }

    /// A `--build-context` that makes no sense, or that policy refuses.
    pub(crate) fn named_context(error: &NamedContextError) -> Self {
        let code = match error {
            NamedContextError::Source { source, .. } => source_code(source),
            _ => exit::USAGE,
        };
        Self { code, text: format!("error: {}", chain(error)), hint: None }
    }

    /// A file that shall hold certificates, and why it does not.
    pub(crate) fn certificates(path: &std::path::Path, error: &AuthorityError) -> Self {
        let code = if matches!(error, AuthorityError::Read(_)) { exit::SOURCE } else { exit::USAGE };
        let failure =
            Self::new(code, format!("certificates of {}: {}", path.display(), chain(error).trim_end()));
        match error {
            AuthorityError::None => failure
                .hint("`openssl x509 -inform der -in FILE -out FILE.pem` makes PEM of the other usual form"),
            _ => failure,
        }
    }

    /// The store holds something wrong.
    pub(crate) fn store(message: impl AsRef<str>) -> Self {
        Self::new(exit::STORE, message)
    }

    /// Standard output does not take what a command says.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        let code = if is_full(error) { exit::LIMIT } else { exit::SOURCE };
        Self::new(code, format!("cannot write to standard output: {error}"))
    }

    /// Somebody stopped the command, which had done a part of its work.
    pub(crate) fn interrupted(message: impl AsRef<str>) -> Self {
        Self::new(exit::INTERRUPTED, message)
    }

    /// Reading or writing a file of the user's.
    pub(crate) fn source(message: impl AsRef<str>) -> Self {
        Self::new(exit::SOURCE, message)
    }

    /// There is no such image.
    pub(crate) fn no_image(name: &str) -> Self {
        Self::new(exit::SOURCE, format!("there is no image {name:?} in the store")).hint(
            "`kiln images` lists what is there; `kiln build`, `kiln pull`, `kiln import` and `kiln load` make images",
        )
    }

    /// The same failure as `kiln run` answers it.
    pub(crate) fn in_container(mut self) -> Self {
        self.code = exit::CONTAINER;
        self
    }

    /// The message as it is printed.
    pub(crate) fn render(&self) -> String {
        let hint = self.hint.as_ref().map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
        format!("{}{hint}", self.text)
    }

    /// The same with another exit code.
    pub(crate) fn with_code(self, code: Code) -> Self {
        Self { code, ..self }
    }

    /// The exit code.
    pub(crate) fn exit_code(&self) -> Code {
        self.code
    }
}

const FROM_ELSEWHERE: &str = "the image is damaged, or somebody means harm: get it again from whom you trust";

/// An error and its causes, a line each.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = format!("{error}\n");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!("caused by: {error}\n"));
        cause = error.source();
    }
    text
}

/// Only the causes.
fn causes(error: &dyn std::error::Error) -> String {
    let all = chain(error);
    format!("caused by: {all}")
}

fn frame(message: String, at: Option<&(std::sync::Arc<Dockerfile>, Location)>) -> String {
    let Some((dockerfile, location)) = at else { return format!("error: {message}\n") };
    let start = line_start(&dockerfile.text, location.first_line);
    let end = line_start(&dockerfile.text, location.last_line + 1).max(start + 1) - 1;
    let diagnostic =
        Diagnostic { severity: Severity::Error, span: Span { start, end }, message, hint: None, rule: None };
    diagnostic.render(&dockerfile.name, &dockerfile.text)
}

fn line_start(text: &str, line: usize) -> usize {
    text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum()
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        let failure = Self::of_build(&error);
        failure.for_want_of(shortage(&error))
    }
}

impl Failure {
    fn of_build(error: &BuildError) -> Self {
        let plain = |code| Failure { code, text: format!("error: {}", chain(error)), hint: None };
        match error {
            BuildError::Dockerfile { dockerfile, diagnostics } => {
                let shown = diagnostics.iter().map(|d| d.render(&dockerfile.name, &dockerfile.text));
                let refused = diagnostics.iter().any(|found| found.severity == Severity::Refused);
                let code = if refused { exit::POLICY } else { exit::DOCKERFILE };
                Failure { code, text: shown.collect::<Vec<_>>().join("\n"), hint: None }
            }
            BuildError::NoDockerfile { .. } => plain(exit::SOURCE).hint("name the file with `-f FILE`"),
            BuildError::NoImage { reference, at, stages: Some(stages), .. } => {
                let name = reference.familiar();
                // FROM itself names no stage: it stands for a trigger that does.
                let of_trigger = at.as_ref().is_some_and(|(dockerfile, location)| {
                    let line = dockerfile.text.lines().nth(location.first_line.saturating_sub(1));
                    line.and_then(|line| line.split_whitespace().next())
                        .is_some_and(|word| word.eq_ignore_ascii_case("FROM"))
                });
                let asked = if of_trigger { ", which an ONBUILD trigger of this base asks for," } else { "" };
                let message = format!("{name}{asked} is neither a stage nor an image in the store");
                let failure =
                    Failure { code: exit::DOCKERFILE, text: frame(message, at.as_ref()), hint: None };
                let bare = name.trim_end_matches(":latest");
                match kiln_frontend::nearest(bare, stages.iter().map(String::as_str)) {
                    Some(near) => failure.hint(format!("did you mean stage `{near}`?")),
                    None => failure.hint(format!(
                        "name a stage by `FROM … AS {bare}`, or bring the image in with `kiln load -i ARCHIVE`"
                    )),
                }
            }
            BuildError::NoImage { reference, at, stages: None, similar } => {
                let message = format!("base image {} is not in the store", reference.familiar());
                let name = reference.familiar();
                let meant = similar.as_ref().map(|near| format!("did you mean `{near}`? If not, "));
                Failure { code: exit::SOURCE, text: frame(message, at.as_ref()), hint: None }.hint(format!(
                    "{}bring it in with `kiln pull {name}`, `kiln load -i ARCHIVE` or `kiln import ROOTFS.tar {name}`",
                    meant.unwrap_or_default()
                ))
            }
            BuildError::Pull { reference, at, similar, locked, source } => {
                let message =
                    format!("base image {} is not in the store, and cannot be pulled", reference.familiar());
                let within = Self::of_build(source);
                let text = format!("{}{}", frame(message, at.as_ref()), causes(source));
                let hint = match (similar, locked) {
                    (Some(near), _) => Some(format!("did you mean `{near}`?")),
                    (None, Some(file)) if registry::is_absent(source) => Some(format!(
                        "{file} pins it to that digest; `kiln build --lock=update` pins what the name leads to now"
                    )),
                    (None, _) => within.hint,
                };
                Failure { code: within.code, text, hint }
            }
            BuildError::OtherPlatform { reference, wanted, actual, at, source } => {
                let name = reference.familiar();
                let message =
                    format!("base image {name} is in the store for {actual} only, not for {wanted}");
                let text = frame(message, at.as_ref());
                match source {
                    Some(source) => {
                        let within = Self::of_build(source);
                        Failure { code: within.code, text: text + &causes(source), hint: within.hint }
                    }
                    None => Failure { code: exit::SOURCE, text, hint: None }.hint(format!(
                        "let it be pulled, without `--offline` and `--pull=never`; `FROM --platform={actual} {name}` \
                         means the one that is there"
                    )),
                }
            }
            BuildError::Registry(inner) => registry::of_registry(inner),
            BuildError::Lock(inner) => lock(inner, plain),
            BuildError::Step { title, at, source } => step(title, at.as_ref(), source),
            BuildError::Warnings { .. } => {
                plain(exit::DOCKERFILE).hint("mend what is warned of, or remove `error=true`")
            }
            BuildError::Cancelled => Failure::new(exit::INTERRUPTED, "the build was cancelled"),
            BuildError::Change { .. }
            | BuildError::BuildArg { .. }
            | BuildError::StdinTwice
            | BuildError::TwoDockerfiles => plain(exit::USAGE),
            BuildError::NoTime { .. } => plain(exit::SOURCE).hint("give it the seconds since 1970"),
            BuildError::Document { source, .. } if matches!(**source, DocumentError::Schema1) => {
                plain(exit::NETWORK).hint("`skopeo copy --format v2s2` makes an image of today of it")
            }
            BuildError::Document { source, .. } if source.is_limit() => {
                plain(exit::LIMIT).hint(FROM_ELSEWHERE)
            }
            BuildError::Document { .. } | BuildError::NotPromised { .. } => {
                plain(exit::STORE).hint(FROM_ELSEWHERE)
            }
            BuildError::ForeignLayer { .. } => {
                plain(exit::SOURCE).hint("save the image with all of its layers where it comes from")
            }
            BuildError::LargeDocument { .. } => plain(exit::LIMIT).hint(FROM_ELSEWHERE),
            BuildError::NoPlatform { .. } => plain(exit::NETWORK)
                .hint("`--platform` of `kiln load`, `kiln pull` and `kiln copy` chooses one of those that are there"),
            BuildError::Layer { source, .. } => {
                let Failure { code, hint, .. } = Self::of_build(source);
                let host = matches!(**source, BuildError::Apply(kiln_layer::ApplyError::Host { .. }));
                match hint {
                    Some(hint) => plain(code).hint(hint),
                    None if host => plain(code),
                    None => plain(code).hint(FROM_ELSEWHERE),
                }
            }
            BuildError::Output { source, .. } if is_full(source) => plain(exit::LIMIT),
            BuildError::Unreadable { .. }
            | BuildError::ContextKind { .. }
            | BuildError::Ignore { .. }
            | BuildError::Archive { .. }
            | BuildError::Output { .. } => plain(exit::SOURCE),
            BuildError::Store(kiln_content::Error::NotWritable { .. }) => {
                plain(exit::STORE).hint("choose another place with `--root DIR` or KILN_ROOT")
            }
            BuildError::Store(kiln_content::Error::Unsafe { .. }) => {
                plain(exit::POLICY).hint("choose a place of your own with `--root DIR` or KILN_ROOT")
            }
            BuildError::Snapshots(inner) => snapshots(inner, plain),
            BuildError::Exec(ExecError::Cancelled) => Failure::new(exit::INTERRUPTED, "cancelled"),
            BuildError::Apply(inner) => apply(inner, plain),
            BuildError::Extract(inner) => apply(&inner.0, plain),
            BuildError::Source(inner) => plain(source_code(inner)),
            BuildError::TooLarge { .. } => plain(exit::DOCKERFILE),
            BuildError::NoStep { steps, .. } if steps.is_empty() => plain(exit::USAGE),
            BuildError::NoStep { steps, .. } => {
                plain(exit::USAGE).hint(format!("there are:\n  {}", steps.join("\n  ")))
            }
            BuildError::Watch(error) => watch(error, plain),
            BuildError::LayerChanged { .. } | BuildError::OtherLayers { .. } => plain(exit::STORE)
                .hint("`kiln fsck --deep --repair` forgets what is damaged; then it is made or loaded anew"),
            BuildError::NothingBefore { .. } => plain(exit::USAGE).hint("leave out `--before`"),
            BuildError::NoCacheMount { .. } => {
                plain(exit::SOURCE).hint("`kiln cache-mount ls` lists what is there")
            }
            BuildError::ManyCacheMounts { .. } => plain(exit::USAGE).hint("choose one of them by its name"),
            BuildError::CacheMountExists { .. } => {
                plain(exit::USAGE).hint("`--force` replaces what is in it")
            }
            BuildError::CacheMountInUse { .. } => plain(exit::RUN).hint("try again when the build has ended"),
            BuildError::CacheTar { source, .. } => apply(&source.0, plain),
            _ => plain(exit::STORE),
        }
    }
}

impl From<WatchError> for Failure {
    fn from(error: WatchError) -> Self {
        BuildError::from(error).into()
    }
}

fn lock(error: &LockError, plain: impl Fn(Code) -> Failure) -> Failure {
    const OFF: &str = "`--lock=off` builds as if there were none";
    match error {
        LockError::Form { .. } => plain(exit::SOURCE).hint(format!(
            "mend the line, or remove the file and write it anew with `kiln build --lock`; {OFF}"
        )),
        LockError::Version { .. } => plain(exit::SOURCE).hint(format!("use the kiln that wrote it; {OFF}")),
        LockError::TooLarge { .. } => plain(exit::LIMIT).hint(OFF),
        LockError::Unreadable { .. } => plain(exit::SOURCE).hint(OFF),
        LockError::Unwritable { .. } => plain(exit::SOURCE).hint(
            "the Dockerfile's directory must be writable for `--lock`; without it the file is only read",
        ),
        LockError::NoPlace { .. } => {
            plain(exit::USAGE).hint("write it where the Dockerfile is a file: `kiln build --lock DIRECTORY`")
        }
        LockError::Missing { at, .. } => {
            let text = frame(error.to_string(), at.as_ref());
            Failure { code: exit::POLICY, text, hint: None }.hint(
                "`kiln build --lock` pins it; commit the file then. Without `--locked` it may be missing",
            )
        }
        _ => plain(exit::SOURCE),
    }
}

fn watch(error: &WatchError, plain: impl Fn(Code) -> Failure) -> Failure {
    match error {
        WatchError::Elsewhere { .. } => {
            plain(exit::USAGE).hint("`kiln build --watch` needs a directory, and a Dockerfile in a file")
        }
        WatchError::TooMany { .. } => plain(exit::SOURCE).hint(
            "raise the limit with `sysctl fs.inotify.max_user_watches=1000000`, or leave directories out with \
             an ignore file",
        ),
        WatchError::TooManyWatchers { .. } => {
            plain(exit::SOURCE).hint("raise the limit with `sysctl fs.inotify.max_user_instances=1024`")
        }
        _ => plain(exit::SOURCE),
    }
}

fn is_full(error: &std::io::Error) -> bool {
    shortage(error) == Some(Shortage::Space)
}

fn apply(error: &kiln_layer::ApplyError, plain: impl Fn(Code) -> Failure) -> Failure {
    use kiln_layer::{ApplyError, CONTENT_BYTES, DensityError, TAR_BYTES};
    let failure = plain(apply_code(error));
    match error {
        ApplyError::Density(DensityError::Ratio { .. })
        | ApplyError::Limit { what: TAR_BYTES | CONTENT_BYTES | ARCHIVE_BYTES, .. } => failure.hint(
            "if it is honest, allow it with `--max-layer SIZE`, or with max-layer in the configuration file",
        ),
        _ => failure,
    }
}

fn apply_code(error: &kiln_layer::ApplyError) -> Code {
    match error {
        kiln_layer::ApplyError::Cancelled => exit::INTERRUPTED,
        kiln_layer::ApplyError::Refused { .. } => exit::POLICY,
        kiln_layer::ApplyError::Host { source, .. } if shortage(source).is_some() => exit::LIMIT,
        kiln_layer::ApplyError::Limit { .. } | kiln_layer::ApplyError::Density(_) => exit::LIMIT,
        _ => exit::STORE,
    }
}

fn snapshots(error: &kiln_snapshotter::Error, plain: impl Fn(Code) -> Failure) -> Failure {
    match error {
        kiln_snapshotter::Error::OtherForm { .. } => plain(exit::STORE)
            .hint("leave the choice to `--snapshotter auto`, or choose another place with `--root DIR`"),
        kiln_snapshotter::Error::Fuse { .. } => {
            plain(exit::STORE).hint("install fuse-overlayfs, or choose `--snapshotter copy`")
        }
        kiln_snapshotter::Error::TooDeep { .. } => {
            plain(exit::LIMIT).hint("start a new stage with `FROM scratch` and `COPY --from` the old one")
        }
        _ => plain(exit::STORE),
    }
}

fn source_code(error: &SourceError) -> Code {
    match error.fault() {
        Fault::Source => exit::SOURCE,
        Fault::Network => exit::NETWORK,
        Fault::Integrity | Fault::Store => exit::STORE,
        Fault::Refused => exit::POLICY,
        Fault::Limit => exit::LIMIT,
        Fault::Cancelled => exit::INTERRUPTED,
    }
}

fn step(title: &str, at: Option<&(std::sync::Arc<Dockerfile>, Location)>, source: &OpError) -> Failure {
    let instruction = title.split_once("] ").map_or(title, |(_, instruction)| instruction);
    let text = frame(format!("step `{instruction}` failed"), at) + &causes(source);
    let plain = |code| Failure { code, text: text.clone(), hint: None };
    match source {
        OpError::Exit { .. } => plain(exit::RUN),
        OpError::ExitOnFullDisk { .. } => plain(exit::LIMIT).for_want_of(Some(Shortage::Space)),
        OpError::Exec(ExecError::NotFound { .. }) => plain(exit::RUN),
        OpError::Exec(ExecError::NotExecutable { why, .. }) => plain(exit::RUN).for_unfit(Some(why)),
        OpError::Exec(ExecError::BadUser { .. } | ExecError::BadCwd { .. }) => plain(exit::RUN),
        OpError::Exec(ExecError::Network { .. }) => {
            plain(exit::NETWORK).hint("a step that needs no network builds with `RUN --network=none`")
        }
        OpError::Exec(ExecError::Refused { .. }) => plain(exit::POLICY),
        OpError::NotAllowed { entitlement } => {
            plain(exit::POLICY).hint(format!("allow it with `--allow {entitlement}`"))
        }
        OpError::NoSecret { id } => plain(exit::RUN)
            .hint(format!("pass it with `--secret id={id},src=FILE` or `--secret id={id},env=NAME`")),
        OpError::NoAgent { id } => plain(exit::RUN).hint(format!("pass it with `--ssh {id}`")),
        OpError::CacheMount { .. } => plain(exit::STORE),
        OpError::NoShell => plain(exit::RUN)
            .hint("install busybox-static, or name a program of the image: `kiln shell -- PROGRAM`"),
        OpError::NoEmulator(foreign) => plain(exit::STORE).hint(format!(
            "{}; or build the step for this machine with `FROM --platform=$BUILDPLATFORM`, and copy what it makes",
            unfit::register(&foreign.platform)
        )),
        OpError::Exec(ExecError::Cancelled) => Failure::new(exit::INTERRUPTED, "the build was cancelled"),
        OpError::Exec(_) => plain(exit::STORE),
        OpError::NoSource { ignored_by: Some(rule), .. } => {
            plain(exit::SOURCE).hint(format!("{rule} excludes it"))
        }
        OpError::NoSource { similar: Some(similar), .. } => {
            plain(exit::SOURCE).hint(format!("did you mean {similar:?}?"))
        }
        OpError::NoSource { path, .. } => {
            let failure = plain(exit::SOURCE);
            match missing_hint(title, path) {
                Some(hint) => failure.hint(hint),
                None => failure,
            }
        }
        OpError::Scan(ScanError::ChangedWhileReading { path })
        | OpError::Copy(CopyError::ChangedWhileReading { path }) => {
            let advice = "build again when it rests, or list it in .dockerignore";
            plain(exit::SOURCE).hint(format!("something writes to {path}: {advice}"))
        }
        OpError::Owner { .. } => plain(exit::DOCKERFILE),
        OpError::ManyToOne { destination } => plain(exit::DOCKERFILE)
            .hint(format!("end the destination with a slash to copy into it: {destination}/")),
        OpError::Unpack { source, .. } => apply(&source.0, plain),
        OpError::Source(inner) => plain(source_code(inner)),
        OpError::Build(inner) => match &**inner {
            BuildError::Snapshots(error) => snapshots(error, plain),
            BuildError::Apply(error) => apply(error, plain),
            BuildError::Extract(error) => apply(&error.0, plain),
            _ => plain(exit::STORE),
        },
        _ => plain(exit::SOURCE),
    }
}

/// What people expect of a COPY that it does not do.
fn missing_hint(title: &str, path: &str) -> Option<String> {
    let words: Vec<&str> = title.split_whitespace().collect();
    if path.starts_with("--") && words.contains(&path) {
        return Some("flags stand in front of the sources".to_owned());
    }
    let climbs = |word: &&str| word.split('/').any(|part| part == "..");
    let from_context = !words.iter().any(|word| word.starts_with("--from="));
    if from_context && words.iter().take(words.len().saturating_sub(1)).any(climbs) {
        return Some(
            "`..` does not lead out of the build context: build with a directory above, or pass the files by `--build-context`"
                .to_owned(),
        );
    }
    let is_pattern = path.contains(['*', '?', '[']);
    is_pattern.then(|| "nothing matches the pattern; `*` does not match a slash".to_owned())
}

impl From<kiln_content::Error> for Failure {
    fn from(error: kiln_content::Error) -> Self {
        BuildError::from(error).into()
    }
}

impl From<kiln_snapshotter::Error> for Failure {
    fn from(error: kiln_snapshotter::Error) -> Self {
        BuildError::from(error).into()
    }
}

impl From<ExecError> for Failure {
    fn from(error: ExecError) -> Self {
        BuildError::from(error).into()
    }
}

/// Containers are answered for as docker does: 127 not found, 126 not executable, 125 all else that keeps
/// a process from starting.
impl From<kiln_containers::Error> for Failure {
    fn from(error: kiln_containers::Error) -> Self {
        use kiln_containers::Error;
        let code = match &error {
            Error::Exec(ExecError::Cancelled) => exit::INTERRUPTED,
            // docker: 1 for all that is not there or not in the state for it.
            Error::NotFound { .. }
            | Error::NoVolume { .. }
            | Error::NoNetwork { .. }
            | Error::Gone { .. }
            | Error::NameTaken { .. }
            | Error::NetworkInUse { .. } => exit::RUN,
            Error::NetworkTaken { .. } => exit::USAGE,
            Error::Ambiguous { .. } => exit::USAGE,
            Error::AlreadyRuns { .. }
            | Error::JustEnded
            | Error::NotRunning { .. }
            | Error::WrongState { .. }
            | Error::VolumeInUse { .. } => exit::RUN,
            Error::Exec(_) | Error::Told { .. } => Code(error.exit_code()),
            _ => exit::STORE,
        };
        let failure = Failure { code, text: format!("error: {}", chain(&error)), hint: None };
        match error {
            Error::NotFound { .. } => failure.hint("`kiln ps -a` lists what is there"),
            Error::NotRunning { .. } => failure.hint("`kiln start` starts it"),
            Error::VolumeInUse { .. } => failure.hint("`kiln rm` removes the container"),
            Error::NoNetwork { .. } => failure.hint("`kiln network ls` lists what is there"),
            Error::NetworkInUse { .. } => failure.hint("`kiln network disconnect` takes them out of it"),
            Error::Told { .. } | Error::Exec(_) => failure.for_unfit(error.unfit()),
            _ => failure,
        }
    }
}
