//! `meta`: the file beside each snapshot's tree that says what it stands on.

use std::path::Path;

use kiln_oci::SnapshotId;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Write};

use crate::Error;
use crate::error::host;

/// Records that a kiln without [`Links::changes`] reads right too.
const VERSION: u32 = 1;
/// Records with [`Links::changes`].
const VERSION_SHARING: u32 = 2;

/// Far above any sidecar; a larger file is not one.
const MAX_BYTES: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    parent: Option<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changes: Option<SnapshotId>,
}

/// The other snapshots that one needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Links {
    /// What it stands on.
    pub(crate) parent: Option<SnapshotId>,
    /// The snapshot whose directory holds its changes; `None`: its own.
    pub(crate) changes: Option<SnapshotId>,
}

/// Writes the sidecar `name` below `dir`; it must not exist.
pub(crate) fn write(dir: impl AsFd, name: &Path, links: &Links) -> Result<(), Error> {
    let Links { parent, changes } = links.clone();
    let version = if changes.is_some() { VERSION_SHARING } else { VERSION };
    let record = Record { version, parent, changes };
    let bytes = serde_json::to_vec(&record).expect("a record of a number and names is JSON");
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let fd = openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(host("openat", name))?;
    File::from(fd).write_all(&bytes).map_err(host("write", name))
}

/// Reads the sidecar `name`; `Ok(None)`: no such file.
pub(crate) fn read(dir: impl AsFd, name: &Path) -> Result<Option<Links>, Error> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(host("openat", name)(errno)),
    };
    let mut bytes = Vec::new();
    File::from(fd).take(MAX_BYTES).read_to_end(&mut bytes).map_err(host("read", name))?;
    let damaged = |reason| Error::Damaged { path: name.to_owned(), reason };
    let record: Record = serde_json::from_slice(&bytes).map_err(|_| damaged("it is no snapshot record"))?;
    match (record.version, &record.changes) {
        (VERSION, None) | (VERSION_SHARING, Some(_)) => {}
        (version, _) if version > VERSION_SHARING => {
            return Err(Error::Newer { path: name.to_owned(), found: version, known: VERSION_SHARING });
        }
        _ => return Err(damaged("its version does not fit what it says")),
    }
    Ok(Some(Links { parent: record.parent, changes: record.changes }))
}
