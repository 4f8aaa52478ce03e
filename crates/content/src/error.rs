//! What can go wrong with the store.

use std::io;
use std::path::PathBuf;

use kiln_oci::Digest;
use rusqlite::ErrorCode;
use rusqlite::ffi::{SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE};
use rustix::process::{Resource, getrlimit};

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store's directory cannot be made or written.
    #[error("the store at {path} cannot be written")]
    NotWritable {
        /// The store.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Somebody else has power over the store.
    #[error("the store at {path} is not safe to use: {what}")]
    Unsafe {
        /// The store.
        path: PathBuf,
        /// Who, and how.
        what: String,
    },
    /// A newer kiln made this store.
    #[error("the store at {path} has version {found}; this kiln knows versions up to {known}")]
    NewerStore {
        /// The store.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// A record makes no sense.
    #[error("a record of the store is damaged: {what}")]
    Damaged {
        /// Which, and why.
        what: String,
    },
    /// Bytes are not what was promised.
    #[error(
        "content is {actual}, {actual_bytes} bytes, but {expected}, {expected_bytes} bytes, was promised"
    )]
    Mismatch {
        /// Promised digest.
        expected: Digest,
        /// Promised size.
        expected_bytes: u64,
        /// What came.
        actual: Digest,
        /// Its size.
        actual_bytes: u64,
    },
    /// A blob is not there.
    #[error("blob {0} is not in the store")]
    NoBlob(Digest),
    /// A blob is larger than its reader allows.
    #[error("blob {digest} is larger than {max_bytes} bytes")]
    TooLarge {
        /// Which.
        digest: Digest,
        /// The limit.
        max_bytes: u64,
    },
    /// The kernel refused.
    #[error("{call} failed for {path}")]
    Host {
        /// Which call.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// The index refused.
    #[error("the store's index failed")]
    Db(#[from] rusqlite::Error),
}

impl Error {
    /// Wraps a failed call on `path`.
    pub(crate) fn host<E: Into<io::Error>>(
        call: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Error::Host { call, path, source: source.into() }
    }

    /// Whether the disk is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Error::Host { source, .. } | Error::NotWritable { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            // What is in memory for all processes grows as a file, and the errno of that is not told.
            Error::Db(error) => error.sqlite_error().is_some_and(|error| {
                error.code == ErrorCode::DiskFull
                    || [SQLITE_IOERR_SHMOPEN, SQLITE_IOERR_SHMSIZE].contains(&error.extended_code)
            }),
            _ => false,
        }
    }

    /// Whether a file became larger than this process's limit.
    pub fn is_file_size(&self) -> bool {
        match self {
            Error::Host { source, .. } | Error::NotWritable { source, .. } => {
                source.kind() == io::ErrorKind::FileTooLarge
            }
            // SQLite keeps the errno to itself; with a limit there is no likelier one.
            Error::Db(error) => {
                let limited = || getrlimit(Resource::Fsize).current.is_some();
                error.sqlite_error().is_some_and(|error| error.code == ErrorCode::SystemIoFailure)
                    && limited()
            }
            _ => false,
        }
    }
}
