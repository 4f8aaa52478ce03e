//! What the store has, read once more: with two threads, for disks give more then, and somebody may be
//! building.

use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln_oci::{Digest, Sha256Writer};

use crate::{BuildCancel, BuildError, Engine};

const THREADS: usize = 2;

/// Whether a blob is what its name says; all of it is read.
///
/// # Errors
/// [`BuildError::Cancelled`]; those of [`kiln_content::Store::open_blob`].
pub(crate) fn is_blob_good(
    engine: &Engine,
    digest: &Digest,
    cancel: &BuildCancel,
) -> Result<bool, BuildError> {
    let (inner, _) = engine.store.open_blob(digest)?;
    let mut hashed = Sha256Writer::new(io::sink());
    let read = io::copy(&mut BufReader::with_capacity(256 << 10, Stoppable { inner, cancel }), &mut hashed);
    match read {
        Ok(_) => Ok(hashed.finish().1 == *digest),
        Err(_) if cancel.flag().load(Ordering::Relaxed) => Err(BuildError::Cancelled),
        Err(source) => {
            let path = digest.to_string().into();
            Err(kiln_content::Error::Host { call: "read", path, source }.into())
        }
    }
}

/// As [`is_blob_good`]: what the disk cannot read is not good either.
///
/// # Errors
/// [`BuildError::Cancelled`].
pub(crate) fn is_readable(
    engine: &Engine,
    digest: &Digest,
    cancel: &BuildCancel,
) -> Result<bool, BuildError> {
    match is_blob_good(engine, digest, cancel) {
        Err(BuildError::Cancelled) => Err(BuildError::Cancelled),
        good => Ok(good.unwrap_or(false)),
    }
}

/// Does something with each of `items`, two at a time; the answers stand in their order.
///
/// # Errors
/// [`BuildError::Cancelled`], or the first error.
pub(crate) fn side_by_side<T: Sync, R: Send>(
    items: &[T],
    cancel: &BuildCancel,
    work: impl Fn(&T) -> Result<R, BuildError> + Sync,
) -> Result<Vec<R>, BuildError> {
    let next = AtomicUsize::new(0);
    let answers: Vec<Mutex<Option<Result<R, BuildError>>>> = items.iter().map(|_| Mutex::default()).collect();
    let run = || {
        while !cancel.flag().load(Ordering::Relaxed) {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(nth) else { break };
            *answers[nth].lock().unwrap_or_else(PoisonError::into_inner) = Some(work(item));
        }
    };
    thread::scope(|scope| {
        for _ in 1..THREADS.min(items.len()) {
            // Without another thread it takes longer.
            let _ = thread::Builder::new().name("reread".to_owned()).spawn_scoped(scope, run);
        }
        run();
    });
    let answers =
        answers.into_iter().map(|answer| answer.into_inner().unwrap_or_else(PoisonError::into_inner));
    answers.map(|answer| answer.unwrap_or(Err(BuildError::Cancelled))).collect()
}

/// A reader that fails once its job is cancelled.
pub(crate) struct Stoppable<'a, R> {
    pub(crate) inner: R,
    pub(crate) cancel: &'a BuildCancel,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stopped = self.cancel.flag().load(Ordering::Relaxed);
        if stopped { Err(io::Error::other("cancelled")) } else { self.inner.read(buffer) }
    }
}
