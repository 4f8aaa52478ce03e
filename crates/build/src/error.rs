//! What can go wrong, in the terms a user can act on.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_executor::{ExecError, Exit, Foreign};
use kiln_frontend::Diagnostic;
use kiln_frontend::ignore::RulePlace;
use kiln_llb::Location;
use kiln_oci::document::DocumentError;
use kiln_oci::{DiffId, Digest, Platform, Reference};

use crate::lock::LockError;
use crate::watch::WatchError;
use crate::{Dockerfile, Entitlement, SourceError};

/// An error and its causes in one line.
pub(crate) fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Why a build, import, load or export ended without a result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The Dockerfile is wrong; the diagnostics say where.
    #[error("the Dockerfile has errors")]
    Dockerfile { dockerfile: Arc<Dockerfile>, diagnostics: Vec<Diagnostic> },
    /// There is no Dockerfile.
    #[error("no Dockerfile at {path}")]
    NoDockerfile { path: PathBuf },
    /// The context, the Dockerfile or `.dockerignore` cannot be read.
    #[error("cannot read {path}")]
    Unreadable { path: PathBuf, source: io::Error },
    /// Checking the store takes reading what this process cannot read, which proves nothing about it.
    #[error("cannot read {path}")]
    Unchecked { path: PathBuf, source: io::Error },
    /// The context is no directory.
    #[error("the build context {path} is not a directory")]
    ContextKind { path: PathBuf },
    /// A rule of `.dockerignore` is wrong.
    #[error("{file}:{line}: {message}")]
    Ignore { file: String, line: usize, message: String },
    /// A Dockerfile or the like is larger than any honest one.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge { what: String, limit_bytes: u64 },
    /// A base image is not in the store.
    #[error("image {} is not in the store", reference.familiar())]
    NoImage {
        reference: Box<Reference>,
        at: Option<(Arc<Dockerfile>, Location)>,
        /// It was named by a `from`, which might have meant one of these stages.
        stages: Option<Vec<String>>,
        /// The stage or image that was meant, perhaps.
        similar: Option<String>,
    },
    /// A base image could not be pulled.
    #[error("base image {} is not in the store and cannot be pulled", reference.familiar())]
    Pull {
        reference: Box<Reference>,
        at: Option<(Arc<Dockerfile>, Location)>,
        /// The stage or image that was meant, perhaps.
        similar: Option<String>,
        /// The lock file that the digest comes from.
        locked: Option<String>,
        source: Box<BuildError>,
    },
    /// A base image is in the store for another platform, and for the right one it is nowhere.
    #[error("base image {} is in the store for {actual} only, not for {wanted}", reference.familiar())]
    OtherPlatform {
        reference: Box<Reference>,
        wanted: Box<Platform>,
        actual: Box<Platform>,
        at: Option<(Arc<Dockerfile>, Location)>,
        /// Why it could not be pulled; `None`: nobody was to be asked.
        source: Option<Box<BuildError>>,
    },
    /// The lock file.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A registry.
    #[error(transparent)]
    Registry(Arc<kiln_registry::Error>),
    /// Standard input cannot be the context and the Dockerfile.
    #[error("standard input cannot be both the context and the Dockerfile")]
    StdinTwice,
    /// The context turned out to be a Dockerfile, and `-f` names another one.
    #[error("the context is a single Dockerfile, and `-f` names another one")]
    TwoDockerfiles,
    /// A build argument that speaks to the builder has a value that it does not take.
    #[error("--build-arg {name} takes true or false, not {value:?}")]
    BuildArg { name: &'static str, value: String },
    /// What `SOURCE_DATE_EPOCH` names has no time of its own.
    #[error("SOURCE_DATE_EPOCH={name}: neither a commit nor a Last-Modified of a server says a time")]
    NoTime { name: String },
    /// `# check=error=true`, and there are warnings.
    #[error("{}", warnings_are_errors(*count))]
    Warnings { count: usize },
    /// A step failed.
    #[error("step `{title}` failed")]
    Step { title: String, at: Option<(Arc<Dockerfile>, Location)>, source: Box<OpError> },
    /// Ctrl-C, or the same by a signal.
    #[error("the build was cancelled")]
    Cancelled,
    /// A bug in kiln.
    #[error("kiln itself failed: {what}")]
    Bug { what: String },
    /// An instruction given on the command line is wrong.
    #[error("{message}")]
    Change { message: String },
    /// An archive is not an image archive, or is damaged.
    #[error("{path}: {reason}")]
    Archive { path: PathBuf, reason: String },
    /// A document of an image in an archive or a layout is refused.
    #[error("{path}: {member} is refused")]
    Document { path: PathBuf, member: String, source: Box<DocumentError> },
    /// A document in an archive or a layout is larger than any honest one, or all together are.
    #[error("{path}: {member} has {size_bytes} bytes, {limit_bytes} are allowed")]
    LargeDocument { path: PathBuf, member: String, size_bytes: u64, limit_bytes: u64 },
    /// A document in an archive or a layout has another digest or size than whoever points to it says.
    #[error("{path}: {member} is not what its descriptor says")]
    NotPromised { path: PathBuf, member: String, source: Box<kiln_content::Error> },
    /// None of an archive's or a layout's images is for this platform.
    #[error("{path}: holds no image for {wanted}, only {}", available.join(", "))]
    NoPlatform { path: PathBuf, wanted: Box<Platform>, available: Vec<String> },
    /// A layer that its manifest only says URLs of.
    #[error("{path}: layer {digest} is not in it, and the urls it has instead are never fetched")]
    ForeignLayer { path: PathBuf, digest: Digest },
    /// A layer of an archive or a layout.
    #[error("{path}: the layer {member} cannot be loaded")]
    Layer { path: PathBuf, member: String, source: Box<BuildError> },
    /// Archive content is not what its image config promises.
    #[error("layer content is {actual}, but the image promises {expected}")]
    WrongDiffId { expected: DiffId, actual: DiffId },
    /// A stored layer no longer gives the bytes it was recorded with.
    #[error("the stored layer {expected} now reads as {actual}")]
    LayerChanged { expected: DiffId, actual: DiffId },
    /// A stored image lacks layers, or has others than it should: what its layers stand on was damaged.
    #[error("the stored layers of {image} are not those that its config lists")]
    OtherLayers { image: String },
    /// Image JSON does not parse.
    #[error("{what} {digest} is not valid")]
    Json { what: &'static str, digest: Digest, source: serde_json::Error },
    /// The output cannot be written.
    #[error("cannot write {path}")]
    Output { path: PathBuf, source: io::Error },
    /// The store.
    #[error(transparent)]
    Store(#[from] kiln_content::Error),
    /// Snapshots.
    #[error(transparent)]
    Snapshots(#[from] kiln_snapshotter::Error),
    /// Writing a layer.
    #[error("cannot read a layer out of its snapshot")]
    Diff(#[from] kiln_layer::DiffError),
    /// Unpacking a layer.
    #[error("cannot unpack a layer")]
    Apply(#[from] kiln_layer::ApplyError),
    /// Unpacking a build context.
    #[error("cannot unpack the build context")]
    Extract(#[from] kiln_layer::ExtractError),
    /// A tree from outside.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Processes.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The step that a shell was asked for is not in the build any more, or never was.
    #[error("there is no step {what} in this build")]
    NoStep { what: String, steps: Vec<String> },
    /// What a build reads cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// There is nothing before a step that a shell could be opened in.
    #[error("{title} stands on nothing")]
    NothingBefore { title: String },
    /// No cache mount has this ID or name.
    #[error("there is no cache mount {id:?}")]
    NoCacheMount { id: String },
    /// Several cache mounts are meant: of one ID, with other modes, owners or seeds.
    #[error("{id:?} means several cache mounts: {}", names.join(", "))]
    ManyCacheMounts { id: String, names: Vec<String> },
    /// There is a cache mount of this ID already.
    #[error("there is a cache mount {id:?}")]
    CacheMountExists { id: String },
    /// A step uses the cache mount.
    #[error("a build is using the cache mount {id:?}")]
    CacheMountInUse { id: String },
    /// A cache mount cannot be read or written.
    #[error("cannot use the cache mount {id:?}")]
    CacheMount { id: String, source: io::Error },
    /// A tar does not become a cache mount.
    #[error("cannot unpack the archive into the cache mount {id:?}")]
    CacheTar { id: String, source: kiln_layer::ExtractError },
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The process of a `RUN` ended with a failure.
    #[error("process {}", describe(exit))]
    Exit { exit: Exit },
    /// It did, and had no room to write to. What its own code is says nothing then.
    #[error("process {}, and the file system of the store is full", describe(exit))]
    ExitOnFullDisk { exit: Exit },
    /// The process of a `RUN` did not start.
    #[error("the process could not be started")]
    Exec(#[from] ExecError),
    /// A source of `COPY` or `ADD` does not exist.
    #[error("{path:?} does not exist in {place}")]
    NoSource { path: String, place: String, ignored_by: Option<RulePlace>, similar: Option<String> },
    /// A source of `COPY` or `ADD` is a symbolic link to nothing.
    #[error("{path:?} is a link to {target:?}, which does not exist in {place}")]
    Dangling { path: String, target: String, place: String },
    /// A source of `COPY` or `ADD` is a FIFO, a socket or an overlayfs whiteout.
    #[error("{path:?} is neither a file nor a directory, it cannot be copied")]
    NotCopied { path: String },
    /// A pattern of `COPY` or `ADD` is malformed.
    #[error("{pattern:?} is not a valid pattern")]
    Pattern { pattern: String },
    /// Several files would become one.
    #[error("several files match, but {destination:?} is not a directory")]
    ManyToOne { destination: String },
    /// A user or group of `--chown` or `USER` is unknown.
    #[error("unknown owner {owner:?}")]
    Owner { owner: String, source: ExecError },
    /// A source cannot be read.
    #[error("cannot read {path:?}")]
    Read { path: String, source: io::Error },
    /// A heredoc's file cannot be written.
    #[error("cannot write {path:?}")]
    Write { path: String, source: io::Error },
    /// Scanning the source.
    #[error("cannot read the files to copy")]
    Scan(#[from] kiln_layer::ScanError),
    /// Copying.
    #[error(transparent)]
    Copy(#[from] kiln_layer::CopyError),
    /// Making directories below the root.
    #[error("cannot make directory {path:?}")]
    Mkdir { path: String, source: kiln_layer::BeneathError },
    /// A step asks for more than the build may do.
    #[error("the step asks for {entitlement}, which this build does not allow")]
    NotAllowed { entitlement: Entitlement },
    /// A required secret was not given, or its variable is not set.
    #[error("the step needs the secret {id:?}, which was not given")]
    NoSecret { id: String },
    /// A secret cannot be used.
    #[error("cannot use the secret {id:?}")]
    Secret { id: String, source: io::Error },
    /// A required ssh agent was not given.
    #[error("the step needs the ssh agent {id:?}, which was not given")]
    NoAgent { id: String },
    /// An ssh agent cannot be used.
    #[error("cannot use the ssh agent {id:?}")]
    Agent { id: String, source: io::Error },
    /// A cache mount cannot be used.
    #[error("cannot use the cache mount {id:?}")]
    CacheMount { id: String, source: io::Error },
    /// The certificates to be trusted beside the image's own cannot be put before a step, or taken out
    /// of what it left.
    #[error("cannot add certificates to {path:?}, or take them out again")]
    Certificates { path: String, source: io::Error },
    /// The step's programs are for another platform, and nothing here runs them.
    #[error(transparent)]
    NoEmulator(Box<Foreign>),
    /// Neither the image nor the host has a shell.
    #[error("the image has no shell, and this host has no static busybox to lend")]
    NoShell,
    /// A shell for an image that has none.
    #[error("cannot lend the image a shell")]
    LendShell { source: io::Error },
    /// Unpacking an archive of `ADD`.
    #[error("cannot unpack {path:?}")]
    Unpack { path: String, source: kiln_layer::ExtractError },
    /// A tree from outside.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Store, snapshots and the rest.
    #[error(transparent)]
    Build(Box<BuildError>),
}

fn warnings_are_errors(count: usize) -> String {
    match count {
        1 => "1 warning, and `# check=error=true` makes it an error".to_owned(),
        _ => format!("{count} warnings, and `# check=error=true` makes them errors"),
    }
}

fn describe(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exited with code {code}"),
        Exit::Signal(signal) => format!("was killed by signal {signal}"),
    }
}

impl From<BuildError> for OpError {
    fn from(error: BuildError) -> Self {
        OpError::Build(Box::new(error))
    }
}

impl From<kiln_content::Error> for OpError {
    fn from(error: kiln_content::Error) -> Self {
        OpError::from(BuildError::from(error))
    }
}

impl From<kiln_snapshotter::Error> for OpError {
    fn from(error: kiln_snapshotter::Error) -> Self {
        OpError::from(BuildError::from(error))
    }
}
