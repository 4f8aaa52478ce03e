//! `kiln import`: a root file system becomes an image of one layer.

use std::io::{self, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kiln_content::ImageRecord;
use kiln_layer::{ApplyOptions, CopyRequest, Limits, LookedAt, ScanOptions, Whiteouts, bounded_decoder};
use kiln_oci::image::{History, ImageConfig};
use kiln_oci::{Platform, Reference};
use kiln_snapshotter::OpenOptions;
use rustix::fs::{Mode, OFlags, open};

use crate::cancel::BuildCancel;
use crate::engine::{now_unix, rfc3339};
use crate::image::{store_image, with_layers};
use crate::input::open_stream;
use crate::layers::describe;
use crate::{BuildError, Engine};

/// What to import.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// A tar (plain, gzip, zstd, bzip2 or xz), a directory, or `-` for standard input.
    pub source: PathBuf,
    /// Name of the image.
    pub name: Reference,
    /// `-c`: instructions that set the config.
    pub changes: Vec<String>,
}

/// Imports a root file system.
///
/// # Errors
/// [`BuildError`]; no name has moved then, and nothing but garbage is left in the store.
pub fn import(
    engine: &Engine,
    request: &ImportRequest,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let platform = Platform::host();
    let mut config = ImageConfig::empty(&platform);
    let changes = kiln_frontend::apply_changes(&mut config, &request.changes, &platform)
        .map_err(|error| BuildError::Change { message: error.to_string() })?;

    let active = engine.prepare(None)?;
    let root = engine.snapshots.open_active(active.key(), &OpenOptions::default())?;
    if request.source.is_dir() {
        copy_dir(&request.source, root.as_fd(), cancel)?;
    } else {
        unpack(&request.source, root.as_fd(), &engine.limits, cancel)?;
    }
    drop(root);
    let snapshot = active.commit()?;
    let layer = describe(&engine.store, &*engine.snapshots, &snapshot)?;

    let created = rfc3339(now_unix());
    let origin = if request.source == Path::new("-") {
        "standard input".into()
    } else {
        request.source.display().to_string()
    };
    config.history.push(History {
        created: Some(created.clone()),
        created_by: Some(format!("kiln import {origin}")),
        ..History::default()
    });
    config
        .history
        .extend(changes.into_iter().map(|entry| History { created: Some(created.clone()), ..entry }));
    config.created = Some(created);
    let layers = [layer];
    let image = store_image(engine, &with_layers(config, &layers), &layers, Some(snapshot), None)?;
    engine.store.set_name(&request.name, &image)?;
    engine.store.barrier()?;
    Ok(image)
}

fn unpack(
    source: &Path,
    root: std::os::fd::BorrowedFd<'_>,
    limits: &Limits,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let unreadable = |error| BuildError::Unreadable { path: source.to_owned(), source: error };
    let (input, reading) = open_stream(source, cancel).map_err(unreadable)?;
    let (_, plain) =
        bounded_decoder(BufReader::with_capacity(256 << 10, input), limits).map_err(unreadable)?;
    let options = ApplyOptions {
        whiteouts: Whiteouts::Remove,
        keep_owner: true,
        reading,
        limits: *limits,
        cancel: cancel.flag(),
    };
    kiln_layer::apply(plain, root, &options)?;
    Ok(())
}

fn copy_dir(
    source: &Path,
    root: std::os::fd::BorrowedFd<'_>,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let unreadable = |source_error| BuildError::Unreadable { path: source.to_owned(), source: source_error };
    let from = open(source, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| unreadable(errno.into()))?;
    let looked_at = LookedAt::now();
    let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: cancel.flag() };
    let entries =
        kiln_layer::scan(from.as_fd(), b"", &options).map_err(|error| unreadable(io::Error::other(error)))?;
    // Somebody may be writing to it.
    let copy = CopyRequest::tree(from.as_fd(), &entries, root, cancel.flag());
    kiln_layer::copy(&CopyRequest { looked_at: Some(looked_at), ..copy })
        .map_err(|error| unreadable(io::Error::other(error)))?;
    Ok(())
}
