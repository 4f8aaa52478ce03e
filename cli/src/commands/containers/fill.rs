//! Volumes of a new container, filled from the image where they are empty.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use kiln_containers::{Config, MountKind, Volumes};
use kiln_layer::{CopyRequest, EntryKind, ScanOptions, TopDir, beneath};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, openat};

use crate::errors::Failure;
use crate::session::Session;

/// Makes the volumes that are not there, and puts what the image has in their place into those that are
/// empty, as docker does.
pub(crate) fn volumes(session: &Session, config: &Config) -> Result<(), Failure> {
    let volumes = Volumes::open(session.containers.root());
    for mount in &config.mounts {
        let MountKind::Volume { name, anonymous, fill: wanted } = &mount.kind else { continue };
        volumes.create(name, &BTreeMap::new(), *anonymous)?;
        if let Some(snapshot) = config.snapshot.as_ref().filter(|_| *wanted) {
            volumes.fill(name, |data| {
                let view = session.engine.snapshots.open_view(snapshot)?;
                fill(session, view.as_fd(), mount.target.as_bytes(), data)
            })?;
        }
    }
    Ok(())
}

fn fill(
    session: &Session,
    view: std::os::fd::BorrowedFd<'_>,
    target: &[u8],
    data: &Path,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::store(format!("volume at {}: {error}", String::from_utf8_lossy(target)))
    };
    let cancel = session.cancel.flag();
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel };
    // What is not there, or is no directory, leaves the volume empty.
    let Ok(path) = beneath::real_path(view, target) else { return Ok(()) };
    let Ok(entries) = kiln_layer::scan(view, &path, &options) else { return Ok(()) };
    let Some(top) = entries.first().filter(|first| first.kind == EntryKind::Dir) else { return Ok(()) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let to = openat(CWD, data, flags, Mode::empty()).map_err(|error| failed(&error))?;
    kiln_layer::copy(&CopyRequest {
        strip: &path,
        top: TopDir::Contents,
        ..CopyRequest::tree(view, &entries, to.as_fd(), cancel)
    })
    .map_err(|error| failed(&error))?;
    // Owner before mode: chown(2) clears setuid bits.
    fchown(&to, Some(Uid::from_raw(top.uid)), Some(Gid::from_raw(top.gid)))
        .map_err(|error| failed(&error))?;
    fchmod(&to, Mode::from_raw_mode(top.mode)).map_err(|error| failed(&error))
}
