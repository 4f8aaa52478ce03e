//! Trees from outside: a file from a web server, a checkout of a git repository.
//!
//! Read [`Fetcher`] first, then `http.rs` and `git.rs`. What comes in is hostile: names are one
//! checked component, sizes are bounded, and no program is started but git with a configuration
//! that is wholly ours.

mod error;
mod git;
mod git_command;
mod git_remote;
mod git_submodules;
mod git_tree;
mod http;
mod http_client;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_content::SourceRecord;
use kiln_oci::{Digest, SnapshotId};
use rustix::fs::{Gid, Mode, OFlags, Timespec, Timestamps, Uid, fchmod, fchown, futimens, openat};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::cancel::BuildCancel;
use crate::{BuildError, Engine};

pub use error::{Fault, SourceError};
pub(crate) use http::Downloaded;
pub(crate) use http_client::strip_user;

/// Where credentials come from.
///
/// Asked for are `HTTP_AUTH_HEADER_<host>` and `HTTP_AUTH_TOKEN_<host>` for downloads;
/// `GIT_AUTH_HEADER[.<host>]` and `GIT_AUTH_TOKEN[.<host>]` for git over http. A token is sent as
/// docker's tools send it, a header's value as it is.
pub trait SecretSource: Send + Sync {
    /// The value of the secret `name`; `None`: the user gave none of that name.
    ///
    /// # Errors
    /// When it was given, but cannot be read.
    fn secret(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
}

/// No secrets at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSecrets;

impl SecretSource for NoSecrets {
    fn secret(&self, _name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

/// How trees from outside are fetched.
#[derive(Clone)]
pub struct SourceOptions {
    /// Credentials.
    pub secrets: Arc<dyn SecretSource>,
    /// Certificates in PEM form by which servers are known, beside the system's.
    pub authorities: Arc<str>,
    /// A download beyond this many bytes is given up.
    pub max_download_bytes: u64,
    /// Socket of the ssh agent that git over ssh may use; `None`: ssh has no keys at all.
    pub ssh_agent: Option<PathBuf>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            secrets: Arc::new(NoSecrets),
            authorities: Arc::default(),
            // As much as a layer may have.
            max_download_bytes: 64 << 30,
            ssh_agent: None,
        }
    }
}

/// Fetches trees from outside into committed snapshots. Blocking: for threads that may wait.
pub(crate) struct Fetcher<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) options: &'a SourceOptions,
    pub(crate) cancel: &'a BuildCancel,
    /// Hears one line about what was resolved.
    pub(crate) log: &'a dyn Fn(&str),
}

impl Fetcher<'_> {
    fn check_cancelled(&self) -> Result<(), SourceError> {
        if self.cancel.flag().load(std::sync::atomic::Ordering::Relaxed) {
            return Err(SourceError::Cancelled);
        }
        Ok(())
    }

    /// The first of `names` that the user gave, as text without the line end of a file.
    fn secret(&self, names: &[String]) -> Result<Option<(usize, String)>, SourceError> {
        for (at, name) in names.iter().enumerate() {
            let failed = |source| SourceError::Secret { name: name.clone(), source };
            let Some(value) = self.options.secrets.secret(name).map_err(failed)? else { continue };
            let text = String::from_utf8(value).ok();
            let text = text.map(|text| text.trim_end_matches(['\r', '\n']).to_owned());
            // A line break would start another header.
            let text = text.filter(|text| !text.is_empty() && !text.chars().any(char::is_control));
            let text = text.ok_or_else(|| failed(io::Error::other("not one line of text")))?;
            return Ok(Some((at, text)));
        }
        Ok(None)
    }

    /// What was fetched under `key` before, if its snapshot is still there.
    pub(crate) fn known(&self, key: &Digest) -> Result<Option<SourceRecord>, SourceError> {
        let record = self.engine.store.source(key).map_err(BuildError::from)?;
        Ok(record.filter(|record| self.engine.snapshots.contains(&record.snapshot)))
    }

    pub(crate) fn remember(&self, key: &Digest, record: &SourceRecord) -> Result<(), SourceError> {
        Ok(self.engine.store.put_source(key, record).map_err(BuildError::from)?)
    }

    /// Commits a snapshot of one file: `write` fills it and says when it was last changed, or that
    /// it is not wanted after all.
    pub(crate) fn one_file(
        &self,
        name: &str,
        mode: u32,
        write: impl FnOnce(&mut File) -> Result<Option<i64>, SourceError>,
    ) -> Result<Option<SnapshotId>, SourceError> {
        let active = self.engine.prepare(None)?;
        let root = self.engine.snapshots.open_layer(active.key()).map_err(BuildError::from)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let host = |errno: Errno| SourceError::Host { what: "making the file", source: errno.into() };
        let mut file = File::from(openat(&root, name, flags, Mode::RUSR | Mode::WUSR).map_err(host)?);
        let Some(mtime_unix) = write(&mut file)? else { return Ok(None) };
        if geteuid().is_root() {
            // Owner before mode: chown(2) clears setuid bits.
            fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT)).map_err(host)?;
        }
        fchmod(&file, Mode::from_raw_mode(mode & 0o7777)).map_err(host)?;
        futimens(&file, &times(mtime_unix)).map_err(host)?;
        drop((file, root));
        Ok(Some(active.commit()?))
    }
}

/// Both times of a file: seconds since 1970.
fn times(unix: i64) -> Timestamps {
    let at = Timespec { tv_sec: unix, tv_nsec: 0 };
    Timestamps { last_access: at, last_modification: at }
}

/// One component that is a name, as file names from outside must be.
fn check_file_name(name: &str) -> Result<(), SourceError> {
    let bad = matches!(name, "" | "." | "..")
        || name.len() > 255
        || name.contains('/')
        || name.chars().any(char::is_control)
        // In a layer it would delete something.
        || name.starts_with(".wh.");
    if bad { Err(SourceError::FileName { name: name.to_owned() }) } else { Ok(()) }
}

/// A digest of parts that cannot run into each other.
pub(crate) fn key_of(parts: &[&str]) -> Digest {
    let mut text = String::new();
    for part in parts {
        text.push_str(&format!("{} {part}\n", part.len()));
    }
    Digest::of(text.as_bytes())
}

/// The directory `path` below `root`, no link followed on the way.
fn open_plain_dir(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<std::os::fd::OwnedFd> {
    use rustix::fs::{ResolveFlags, openat2};
    let path = if path.is_empty() { &b"."[..] } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), resolve)
}

#[cfg(test)]
pub(crate) mod tests;
