//! Who one is at a registry: `~/.docker/config.json` and the helpers that it names.

mod config_file;
mod helper;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use config_file::{DockerConfig, Stored};

/// What to show to a registry. Its `Debug` shows none of it.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// A user and a password, or what a registry takes for one.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A token that token servers give tokens for (`docker login` of some registries).
    Identity(String),
    /// A token for the registry itself.
    Registry(String),
}

impl Credential {
    /// The words that no message may hold.
    pub(crate) fn secret(&self) -> &str {
        match self {
            Self::Password { password, .. } => password,
            Self::Identity(token) | Self::Registry(token) => token,
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::Identity(_) => "Identity(…)",
            Self::Registry(_) => "Registry(…)",
        })
    }
}

/// Where credentials come from. Blocking: asked on a thread that may wait.
pub trait CredentialSource: Send + Sync {
    /// The credential for the registry with this key ([`crate::credential_key`]); `None`: none.
    ///
    /// # Errors
    /// When there may be one, but it cannot be read.
    fn credential(&self, key: &str) -> Result<Option<Credential>, CredentialError>;
}

/// No credentials at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCredentials;

impl CredentialSource for NoCredentials {
    fn credential(&self, _key: &str) -> Result<Option<Credential>, CredentialError> {
        Ok(None)
    }
}

/// One credential for whatever registry asks.
impl CredentialSource for Credential {
    fn credential(&self, _key: &str) -> Result<Option<Credential>, CredentialError> {
        Ok(Some(self.clone()))
    }
}

/// Why credentials cannot be read or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The file cannot be read or written.
    #[error("{} cannot be {what}", path.display())]
    File { path: PathBuf, what: &'static str, source: io::Error },
    /// The file is no configuration.
    #[error("{}, line {}, is not as docker writes it", path.display(), source.line())]
    Form { path: PathBuf, source: serde_json::Error },
    /// An entry of it.
    #[error("the entry for {key:?} in {} is not as docker writes it", path.display())]
    Entry { path: PathBuf, key: String },
    /// A helper's name that is none.
    #[error("{name:?} is not the name of a credential helper")]
    HelperName { name: String },
    /// There is no such helper.
    #[error("the credential helper `{program}` is not there")]
    NoHelper { program: String },
    /// The helper cannot be run.
    #[error("the credential helper `{program}` cannot be run")]
    Run { program: String, source: io::Error },
    /// The helper says that something is wrong.
    #[error("the credential helper `{program}` failed: {said}")]
    Helper { program: String, said: String },
}
