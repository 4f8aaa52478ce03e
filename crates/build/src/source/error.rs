//! Why a tree from outside did not come. No message holds credentials.

use std::io;

use kiln_frontend::git_url::GitUrlError;
use kiln_oci::Digest;

use crate::BuildError;

/// Why a download or a checkout failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Not `http://` or `https://`, or no URL at all.
    #[error("{url:?} is no http or https URL")]
    Url { url: String },
    /// The server answered, but not with the file.
    #[error("{host} answered {status} to the request for {url}")]
    Status { host: String, url: String, status: u16 },
    /// The server was not reached, or the transfer broke off.
    #[error("the transfer from {host} failed")]
    Transfer { host: String, source: reqwest::Error },
    /// Nothing came for so long that waiting makes no sense.
    #[error("{host} sent nothing for {seconds} seconds")]
    Stalled { host: String, seconds: u64 },
    /// The server sends from place to place.
    #[error("{host} redirects more than {limit} times")]
    Redirects { host: String, limit: usize },
    /// The server sends somewhere that is not the web.
    #[error("{host} redirects to {target:?}: only http and https are followed")]
    RefusedRedirect { host: String, target: String },
    /// A file name that could reach another place.
    #[error("{name:?} is refused as the name of a file")]
    FileName { name: String },
    /// The file is not the expected one.
    #[error("{url} has digest {actual}, but {expected} is expected")]
    Checksum { url: String, expected: Digest, actual: Digest },
    /// The file is larger than allowed.
    #[error("{what} is larger than {limit_bytes} bytes")]
    TooLarge { what: String, limit_bytes: u64 },
    /// What was written as a repository is none, or refused.
    #[error(transparent)]
    GitUrl(#[from] GitUrlError),
    /// There is no git.
    #[error("the program `git` cannot be started")]
    NoGit { source: io::Error },
    /// git says why.
    #[error("git could not {action}: {said}")]
    Git { action: String, said: String },
    /// No such branch, tag or commit.
    #[error("{remote} has no branch, tag or commit {reference:?}")]
    NoReference { remote: String, reference: String },
    /// The remote has no commits, or no HEAD.
    #[error("{remote} has no HEAD: name a branch, tag or commit")]
    NoHead { remote: String },
    /// The commit is not the expected one.
    #[error("{reference:?} of {remote} is commit {actual}, but {expected} is expected")]
    Commit { remote: String, reference: String, expected: String, actual: String },
    /// A fetch by commit needs all digits of it.
    #[error("a fetch by commit needs the complete commit as checksum")]
    NeedsCommit,
    /// The directory asked for is not in the repository.
    #[error("{remote} has no directory {subdir:?} at commit {commit}")]
    NoSubdir { remote: String, subdir: String, commit: String },
    /// The directory asked for is something that leads elsewhere.
    #[error("{subdir:?} of {remote} is {what}, which is refused as a subdirectory")]
    RefusedSubdir { remote: String, subdir: String, what: &'static str },
    /// A submodule failed.
    #[error("submodule {path:?} failed")]
    Submodule { path: String, source: Box<SourceError> },
    /// A submodule that cannot be found out about.
    #[error("submodule {path:?} has no usable entry in .gitmodules")]
    NoSubmodule { path: String },
    /// Submodules within submodules, or too many of them.
    #[error("{what}: {limit} are allowed")]
    Submodules { what: &'static str, limit: usize },
    /// A secret was given, but cannot be used.
    #[error("the secret {name} cannot be used")]
    Secret { name: String, source: io::Error },
    /// The kernel refused.
    #[error("{what} failed")]
    Host { what: &'static str, source: io::Error },
    /// The build was stopped.
    #[error("cancelled")]
    Cancelled,
    /// Store, snapshots and the rest.
    #[error(transparent)]
    Build(Box<BuildError>),
}

/// What a user can do about a [`SourceError`]; the front ends' exit codes are made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// What was asked for does not exist, or is not written properly.
    Source,
    /// The network or a server.
    Network,
    /// Not what was promised.
    Integrity,
    /// Refused as dangerous.
    Refused,
    /// Too much of something.
    Limit,
    /// Stopped by the user.
    Cancelled,
    /// kiln's store or the machine.
    Store,
}

impl SourceError {
    /// Which kind of fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Url { .. }
            | Self::NoGit { .. }
            | Self::NoReference { .. }
            | Self::NoHead { .. }
            | Self::NeedsCommit
            | Self::NoSubdir { .. }
            | Self::NoSubmodule { .. }
            | Self::Secret { .. } => Fault::Source,
            Self::Status { .. }
            | Self::Transfer { .. }
            | Self::Stalled { .. }
            | Self::Redirects { .. }
            | Self::Git { .. } => Fault::Network,
            Self::Checksum { .. } | Self::Commit { .. } => Fault::Integrity,
            Self::RefusedRedirect { .. }
            | Self::FileName { .. }
            | Self::RefusedSubdir { .. }
            | Self::GitUrl(GitUrlError::Refused { .. }) => Fault::Refused,
            Self::GitUrl(_) => Fault::Source,
            Self::TooLarge { .. } | Self::Submodules { .. } => Fault::Limit,
            Self::Submodule { source, .. } => source.fault(),
            Self::Cancelled => Fault::Cancelled,
            Self::Host { .. } | Self::Build(_) => Fault::Store,
        }
    }
}

impl From<BuildError> for SourceError {
    fn from(error: BuildError) -> Self {
        SourceError::Build(Box::new(error))
    }
}
