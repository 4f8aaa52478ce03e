//! What was found in a tree, kept for the next build: a committed snapshot does not change.

use std::fs;
use std::path::PathBuf;

use kiln_oci::image::to_json;
use kiln_oci::{Digest, SnapshotId};
use serde::{Deserialize, Serialize};

use super::Contents;
use crate::why::forget_oldest;
use crate::{Engine, builds};

/// Version of the files, and of what is looked for: another one finds other things.
const VERSION: u32 = 1;
/// Files that are kept, those written last, and what they may take together.
const FILES: usize = 100;
const FILES_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    snapshot: String,
    contents: Contents,
}

fn dir(engine: &Engine) -> PathBuf {
    engine.store.root().join("state/sbom")
}

fn path(engine: &Engine, snapshot: &SnapshotId) -> PathBuf {
    dir(engine).join(format!("{}.json", Digest::of(snapshot.to_string().as_bytes()).hex()))
}

/// What was found in it; `None`: nobody has looked, or nobody knows any more.
pub(super) fn find(engine: &Engine, snapshot: &SnapshotId) -> Option<Contents> {
    let path = path(engine, snapshot);
    let is_sized = fs::symlink_metadata(&path).is_ok_and(|file| file.len() <= FILES_BYTES);
    let json = is_sized.then(|| fs::read(&path).ok()).flatten()?;
    let record: Record = serde_json::from_slice(&json).ok()?;
    let fits = record.version == VERSION && record.snapshot == snapshot.to_string();
    fits.then_some(record.contents)
}

/// Remembers it. Where that does not work, the next build looks again.
pub(super) fn keep(engine: &Engine, snapshot: &SnapshotId, contents: &Contents) {
    let record = Record { version: VERSION, snapshot: snapshot.to_string(), contents: contents.clone() };
    if builds::replace(&path(engine, snapshot), &to_json(&record)).is_ok() {
        forget_oldest(&dir(engine), FILES, FILES_BYTES);
    }
}
