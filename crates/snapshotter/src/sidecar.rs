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
/// Records with [`Links::full`].
const VERSION_DELTA: u32 = 3;

/// Far above any sidecar; a larger file is not one.
const MAX_BYTES: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    parent: Option<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changes: Option<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    full: Option<SnapshotId>,
}

/// The other snapshots that one needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Links {
    /// What it stands on.
    pub(crate) parent: Option<SnapshotId>,
    /// The snapshot whose directory holds its changes; `None`: its own.
    pub(crate) changes: Option<SnapshotId>,
    /// The snapshot whose directory stands below that one: the changes are both of them together.
    pub(crate) full: Option<SnapshotId>,
}

impl Links {
    /// The snapshots whose directories are shown beside its own.
    pub(crate) fn shown(&self) -> impl Iterator<Item = &SnapshotId> {
        self.changes.iter().chain(&self.full)
    }
}

/// Writes the sidecar `name` below `dir`; it must not exist.
pub(crate) fn write(dir: impl AsFd, name: &Path, links: &Links) -> Result<(), Error> {
    let Links { parent, changes, full } = links.clone();
    let version = match (&changes, &full) {
        (None, None) => VERSION,
        (Some(_), None) => VERSION_SHARING,
        (_, Some(_)) => VERSION_DELTA,
    };
    let record = Record { version, parent, changes, full };
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
    match (record.version, &record.changes, &record.full) {
        (VERSION, None, None) | (VERSION_SHARING, Some(_), None) | (VERSION_DELTA, _, Some(_)) => {}
        (version, ..) if version > VERSION_DELTA => {
            return Err(Error::Newer { path: name.to_owned(), found: version, known: VERSION_DELTA });
        }
        _ => return Err(damaged("its version does not fit what it says")),
    }
    Ok(Some(Links { parent: record.parent, changes: record.changes, full: record.full }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_lowest_version_that_can_say_it_and_no_other() {
        let temp = tempfile::tempdir().unwrap();
        let dir = File::open(temp.path()).unwrap();
        let id = |name: &str| -> Option<SnapshotId> { Some(name.parse().unwrap()) };
        for (nth, (version, changes, full)) in
            [(1, None, None), (2, id("owner"), None), (3, None, id("full")), (3, id("owner"), id("full"))]
                .into_iter()
                .enumerate()
        {
            let links = Links { parent: id("parent"), changes, full };
            let name = Path::new("meta").with_extension(nth.to_string());
            write(&dir, &name, &links).unwrap();
            assert_eq!(read(&dir, &name).unwrap(), Some(links.clone()));
            let text = std::fs::read_to_string(temp.path().join(&name)).unwrap();
            // A kiln that knows fewer versions refuses what it would read wrong.
            for other in (1..=3).filter(|other| *other != version) {
                let wrong = text.replace(&format!("\"version\":{version}"), &format!("\"version\":{other}"));
                assert_ne!(wrong, text);
                std::fs::write(temp.path().join(&name), wrong).unwrap();
                assert!(matches!(read(&dir, &name), Err(Error::Damaged { .. })), "{links:?} as {other}");
            }
        }
        std::fs::write(temp.path().join("newer"), r#"{"version":4,"parent":null}"#).unwrap();
        assert!(matches!(read(&dir, Path::new("newer")), Err(Error::Newer { found: 4, known: 3, .. })));
    }
}
