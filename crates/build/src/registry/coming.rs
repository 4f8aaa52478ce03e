//! Blobs that are read while they come.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_content::Ingest;
use kiln_oci::Digest;
use kiln_registry::Sink;
use kiln_solver::Cancellation;

use super::POLL;
use crate::BuildCancel;

/// How much of a blob has come.
pub(super) struct Progress {
    /// What there will be.
    pub(super) size_bytes: u64,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    file: Option<Arc<File>>,
    come_bytes: u64,
    /// Whether it has turned out to be right.
    end: Option<bool>,
}

impl Progress {
    pub(super) fn new(size_bytes: u64) -> Self {
        Self { size_bytes, state: Mutex::default(), more: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It will come into `file`.
    pub(super) fn begin(&self, file: File) {
        self.state().file = Some(Arc::new(file));
    }

    fn add(&self, bytes: usize) {
        self.state().come_bytes += bytes as u64;
        self.more.notify_all();
    }

    /// No more comes. `is_right`: it is in the store, as what it is named after.
    pub(super) fn end(&self, is_right: bool) {
        self.state().end = Some(is_right);
        self.more.notify_all();
    }
}

/// A blob on its way in that says how much of it has come.
pub(super) struct Counted<'a, 's> {
    pub(super) ingest: &'a mut Ingest<'s>,
    pub(super) progress: &'a Progress,
}

impl Write for Counted<'_, '_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.ingest.write(buffer)?;
        self.progress.add(count);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.ingest.flush()
    }
}

impl Sink for Counted<'_, '_> {
    fn size_bytes(&self) -> u64 {
        self.ingest.size_bytes()
    }

    fn digest(&self) -> Digest {
        self.ingest.digest()
    }
}

/// Reads a blob while it comes. Ends when it is in the store, and fails when it will not be.
pub(super) struct Coming {
    pub(super) progress: Arc<Progress>,
    pub(super) at: u64,
    pub(super) cancel: BuildCancel,
}

impl Read for Coming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.progress.state();
        loop {
            let left = state.come_bytes.saturating_sub(self.at);
            if left > 0
                && let Some(file) = state.file.clone()
            {
                drop(state);
                let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                let count = file.read_at(&mut buffer[..most], self.at)?;
                self.at += count as u64;
                return Ok(count);
            }
            match state.end {
                Some(true) => return Ok(0),
                Some(false) => return Err(io::Error::other("it did not come")),
                None => {}
            }
            if self.cancel.is_cancelled() {
                return Err(io::Error::other("cancelled"));
            }
            let waited = self.progress.more.wait_timeout(state, POLL);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coming(progress: &Arc<Progress>) -> Coming {
        Coming { progress: progress.clone(), at: 0, cancel: BuildCancel::new().unwrap() }
    }

    #[test]
    fn a_blob_is_read_while_it_comes_and_ends_when_it_is_right() {
        let progress = Arc::new(Progress::new(6));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut reader = coming(&progress);
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        progress.begin(file.reopen().unwrap());
        for part in [b"abc", b"def"] {
            file.write_all(part).unwrap();
            progress.add(3);
        }
        assert!(!read.is_finished());
        progress.end(true);
        assert_eq!(read.join().unwrap().unwrap(), b"abcdef");
    }

    #[test]
    fn a_blob_that_is_wrong_is_no_end() {
        let progress = Arc::new(Progress::new(3));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"abc").unwrap();
        progress.begin(file.reopen().unwrap());
        progress.add(3);
        progress.end(false);
        let mut all = Vec::new();
        assert!(coming(&progress).read_to_end(&mut all).is_err());
        assert_eq!(all, b"abc");
        // Nobody waits for what somebody has cancelled.
        let progress = Arc::new(Progress::new(3));
        let reader = coming(&progress);
        reader.cancel.cancel();
        assert!({ reader }.read(&mut [0]).is_err());
    }
}
