//! `meta`: the file beside each snapshot's tree that names its parent.

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

const VERSION: u32 = 1;

/// Far above any sidecar; a larger file is not one.
const MAX_BYTES: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    parent: Option<SnapshotId>,
}

/// Writes the sidecar `name` below `dir`; it must not exist.
pub(crate) fn write(dir: impl AsFd, name: &Path, parent: Option<&SnapshotId>) -> Result<(), Error> {
    let record = Record { version: VERSION, parent: parent.cloned() };
    let bytes = serde_json::to_vec(&record).expect("a record of a number and a name is JSON");
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let fd = openat(dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(host("openat", name))?;
    File::from(fd).write_all(&bytes).map_err(host("write", name))
}

/// Reads the parent out of the sidecar `name`; `Ok(None)`: no such file.
pub(crate) fn read(dir: impl AsFd, name: &Path) -> Result<Option<Option<SnapshotId>>, Error> {
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
    if record.version != VERSION {
        return Err(damaged("its version is not known to this kiln"));
    }
    Ok(Some(record.parent))
}
