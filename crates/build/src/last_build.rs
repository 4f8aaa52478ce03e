//! What `kiln shell` has to know of builds that are over: how they were asked for, and what is left of
//! the step that failed.
//!
//! ```text
//! state/last-build.json    the last one
//! state/failed-build.json  the last one that failed, and the snapshot with its step's files
//! ```
//!
//! Nothing refers to that snapshot but the record: garbage collection takes it like anything that
//! nobody needs, and the next failure takes it in any case, so that there is one at most.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use kiln_content::{Claims, Expected, Pinnable};
use kiln_oci::{Digest, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::engine::Active;
use crate::{BuildError, BuildRequest, Engine, builds};

/// Version of the records.
const VERSION: u32 = 1;

/// How a build was asked for, so that it can be asked for again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOrigin {
    /// The command line without the program's name.
    pub words: Vec<String>,
    /// Where it was given.
    pub dir: PathBuf,
}

/// A build that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBuild {
    version: u32,
    /// The command line without the program's name; empty where a URL in it, or in a build argument,
    /// has a password: such a thing is not kept.
    pub words: Vec<String>,
    /// Where it was given.
    pub dir: PathBuf,
    /// `--build-arg`, those from the environment included.
    pub build_args: BTreeMap<String, String>,
    /// The step that failed.
    pub failed: Option<FailedStep>,
}

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedStep {
    /// Digest of what it does.
    pub op: Digest,
    /// As the progress shows it.
    pub title: String,
    /// Its files as it left them, if it came to write any.
    pub snapshot: Option<SnapshotId>,
}

/// Which of the builds that are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhichBuild {
    /// The last one.
    Last,
    /// The last one that failed at a step.
    Failed,
}

impl WhichBuild {
    fn path(self, root: &Path) -> PathBuf {
        root.join("state").join(match self {
            Self::Last => "last-build.json",
            Self::Failed => "failed-build.json",
        })
    }
}

/// The record of a build in the store at `root`; `None`: there was no such build, or a newer kiln's.
///
/// # Errors
/// When the record is there and cannot be read.
pub fn last_build(root: &Path, which: WhichBuild) -> io::Result<Option<LastBuild>> {
    let bytes = match fs::read(which.path(root)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // Half a record, as a power cut may leave one, is none.
    let record: Option<LastBuild> = serde_json::from_slice(&bytes).ok();
    Ok(record.filter(|record| record.version == VERSION))
}

/// The files of a step that failed: of several that fail at once those of the first.
#[derive(Default)]
pub(crate) struct Kept(Mutex<Option<(Digest, SnapshotId)>>);

impl Kept {
    /// Keeps what the step `op` has written; in vain if it cannot be kept.
    pub(crate) fn keep(&self, op: Digest, active: Active) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_none()
            && let Ok(id) = active.commit()
        {
            *kept = Some((op, id));
        }
    }

    /// What was kept of the step `op`.
    pub(crate) fn of(&self, op: &Digest) -> Option<SnapshotId> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|(known, _)| known == op).map(|(_, id)| id.clone())
    }
}

/// Writes down how a build ended. What cannot be written is missing when somebody asks for it, and the
/// build is what it is.
pub(crate) fn note(engine: &Engine, request: &BuildRequest, failed: Option<FailedStep>) {
    let Some(BuildOrigin { mut words, dir }) = request.origin.clone() else { return };
    let mut build_args = request.build_args.clone();
    if words.iter().chain(build_args.values()).any(|text| has_password(text)) {
        words.clear();
        build_args.clear();
    }
    let record = LastBuild { version: VERSION, words, dir, build_args, failed };
    let Ok(bytes) = serde_json::to_vec(&record) else { return };
    let root = engine.store.root();
    let _ = replace(&WhichBuild::Last.path(root), &bytes);
    if record.failed.is_some() {
        let before = last_build(root, WhichBuild::Failed).ok().flatten();
        let written = replace(&WhichBuild::Failed.path(root), &bytes);
        let old = before.and_then(|before| before.failed?.snapshot);
        let new = record.failed.and_then(|failed| failed.snapshot);
        if let Some(old) = old.filter(|old| written.is_ok() && Some(old) != new.as_ref()) {
            // Whatever comes in the way: garbage collection finds it.
            let _ = remove(engine, &old);
        }
    }
}

/// Whether a URL in it logs in somewhere.
fn has_password(text: &str) -> bool {
    matches!(kiln_frontend::without_credentials(text), std::borrow::Cow::Owned(_))
}

/// Only its owner may read it: command lines tell more than they should.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    builds::replace(path, bytes)
}

/// Removes a kept snapshot unless somebody uses it.
fn remove(engine: &Engine, id: &SnapshotId) -> Result<(), BuildError> {
    let claims = Claims::open(&engine.store)?;
    let Some(_claim) = claims.claim(&Pinnable::Snapshot(id.clone()))? else { return Ok(()) };
    let expected = Expected { cache: false, source: false, images: Vec::new() };
    if engine.store.forget_snapshot(id, &expected)? {
        engine.snapshots.remove(id)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_urls_are_seen() {
        for (text, expected) in [
            ("https://user:secret@host/repo.git#main", true),
            ("--build-context=x=https://u:p@host/x.tar", true),
            ("ssh://git@host/repo.git", false),
            ("git@host:repo.git", false),
            ("https://host/a@b", false),
            (".", false),
        ] {
            assert_eq!(has_password(text), expected, "{text}");
        }
    }

    #[test]
    fn half_a_record_and_one_of_a_newer_kiln_are_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        assert_eq!(last_build(dir.path(), WhichBuild::Last).unwrap(), None);
        let record = |version: u32| LastBuild {
            version,
            words: vec!["build".to_owned()],
            dir: "/".into(),
            build_args: BTreeMap::new(),
            failed: None,
        };
        let path = WhichBuild::Last.path(dir.path());
        let write = |version| replace(&path, &serde_json::to_vec(&record(version)).unwrap()).unwrap();
        write(VERSION + 1);
        assert_eq!(last_build(dir.path(), WhichBuild::Last).unwrap(), None);
        write(VERSION);
        assert_eq!(last_build(dir.path(), WhichBuild::Last).unwrap(), Some(record(VERSION)));
        fs::write(&path, "{\"version\":1,").unwrap();
        assert_eq!(last_build(dir.path(), WhichBuild::Last).unwrap(), None);
    }
}
