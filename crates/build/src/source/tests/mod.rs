//! Real servers on loopback, real repositories. Needs root and `git`.

mod git;
mod http;
pub(crate) mod repo;
pub(crate) mod web;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kiln_content::Store;
use kiln_executor::{Cancel, ExecError, Executor, Finished, Handles, ProcessSpec, Stdio};
use kiln_oci::SnapshotId;
use kiln_snapshotter::Overlay;

use super::{Fetcher, SecretSource, SourceOptions};
use crate::{BuildCancel, Engine};

/// An executor for what never starts a process.
struct NoProcesses;

impl Executor for NoProcesses {
    fn run(&self, _: Handles, _: &ProcessSpec, _: Stdio<'_>, _: &Cancel) -> Result<Finished, ExecError> {
        Err(ExecError::Cancelled)
    }

    fn stub_dir(&self) -> &Path {
        Path::new("/")
    }
}

/// Secrets by name.
#[derive(Default)]
struct Secrets(BTreeMap<String, String>);

impl SecretSource for Secrets {
    fn secret(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.get(name).map(|value| value.clone().into_bytes()))
    }
}

/// A store of its own, and what fetches into it.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) engine: Engine,
    pub(crate) options: SourceOptions,
    pub(crate) cancel: BuildCancel,
    log: Mutex<Vec<String>>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let store = Arc::new(Store::open(&root).unwrap());
        let snapshots = Arc::new(Overlay::open(&root.join("snapshots")).unwrap());
        let engine = Engine::new(store, snapshots, Arc::new(NoProcesses)).unwrap();
        let (options, cancel) = (SourceOptions::default(), BuildCancel::new().unwrap());
        Self { dir, engine, options, cancel, log: Mutex::default() }
    }

    fn with_secrets(secrets: &[(&str, &str)]) -> Self {
        let mut bench = Self::new();
        let secrets = secrets.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        bench.options.secrets = Arc::new(Secrets(secrets.collect()));
        bench
    }

    pub(crate) fn fetch<T>(&self, work: impl FnOnce(&Fetcher<'_>) -> T) -> T {
        let log = |line: &str| self.log.lock().unwrap().push(line.to_owned());
        work(&Fetcher { engine: &self.engine, options: &self.options, cancel: &self.cancel, log: &log })
    }

    /// Where a snapshot without a parent keeps its files.
    pub(crate) fn path(&self, snapshot: &SnapshotId) -> PathBuf {
        let dir = self.engine.snapshots.open_changes(snapshot).unwrap().dir;
        fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).unwrap()
    }

    /// Snapshots, committed and not, and files on their way.
    fn leftovers(&self) -> usize {
        let (committed, active) = self.engine.snapshots.list().unwrap();
        let ingest = fs::read_dir(self.dir.path().join("store/ingest")).unwrap().count();
        committed.len() + active.len() + ingest
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(|error| error.to_string()).collect::<Vec<_>>().join(": ")
}
