//! Work on several objects at once, and streams that are checked as they pass by.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use kiln_oci::{Digest, Sha256Writer};
use kiln_remote::{ObjectName, RemoteError, RemoteStore};

/// Does something with each of `items`, `parallel` at a time.
///
/// # Errors
/// One of those that occurred; what was not begun by then is left.
pub(super) fn at_once<T: Sync, E: Send>(
    items: &[T],
    parallel: usize,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failed: Mutex<Option<E>> = Mutex::new(None);
    let run = || {
        while !is_over.load(Ordering::Relaxed) {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            if let Err(error) = work(item) {
                is_over.store(true, Ordering::Relaxed);
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..parallel.min(items.len()) {
            // Without another thread it takes longer.
            let _ = thread::Builder::new().name("cache".to_owned()).spawn_scoped(scope, run);
        }
        run();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Why a blob did not come.
pub(super) enum PullError {
    /// The store does not answer.
    Remote(RemoteError),
    /// It is not what the record says.
    Damaged(String),
    /// This machine cannot take it.
    Here(io::Error),
}

/// Fills `spool` with the blob `digest` of `size_bytes`; not a byte more is taken.
pub(super) fn pull_blob(
    store: &dyn RemoteStore,
    digest: &Digest,
    size_bytes: u64,
    spool: &File,
) -> Result<(), PullError> {
    let mut out = Sha256Writer::new(spool);
    let mut is_long = false;
    let found = store.read(&ObjectName::Blob(*digest), &mut |piece| {
        if out.size_bytes() + piece.len() as u64 > size_bytes {
            is_long = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        out.write_all(piece)
    });
    match found {
        _ if is_long => {
            return Err(PullError::Damaged(format!("blob {digest} has more than {size_bytes} bytes")));
        }
        Ok(true) => {}
        Ok(false) => return Err(PullError::Damaged(format!("blob {digest} is missing"))),
        Err(RemoteError::Content(error)) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(PullError::Damaged(error.to_string()));
        }
        Err(RemoteError::Content(error)) => return Err(PullError::Here(error)),
        Err(error) => return Err(PullError::Remote(error)),
    }
    let (_, actual, actual_bytes) = out.finish();
    if (actual, actual_bytes) != (*digest, size_bytes) {
        return Err(PullError::Damaged(format!(
            "blob {digest} is another one, {actual} of {actual_bytes} bytes"
        )));
    }
    Ok(())
}

/// Content that fails at its end when it is not what its name says: nothing damaged leaves.
pub(super) struct Checked<R> {
    inner: R,
    hash: Option<Sha256Writer<io::Sink>>,
    expected: Digest,
}

impl<R: Read> Checked<R> {
    pub(super) fn new(inner: R, expected: Digest) -> Self {
        Self { inner, hash: Some(Sha256Writer::new(io::sink())), expected }
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        if length > 0 {
            if let Some(hash) = &mut self.hash {
                hash.write_all(&buffer[..length])?;
            }
        } else if !buffer.is_empty()
            && let Some(hash) = self.hash.take()
            && hash.finish().1 != self.expected
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the store's blob is damaged"));
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_unless_one_fails() {
        let sum = AtomicUsize::new(0);
        let add = |item: &usize| -> Result<(), ()> {
            sum.fetch_add(*item, Ordering::Relaxed);
            Ok(())
        };
        let items: Vec<usize> = (1..=100).collect();
        assert_eq!(at_once(&items, 7, add), Ok(()));
        assert_eq!(sum.into_inner(), 5050);
        assert_eq!(at_once(&items, 3, |item| if *item == 50 { Err(*item) } else { Ok(()) }), Err(50));
        assert_eq!(at_once(&[], 3, |item: &usize| Err(*item)), Ok(()));
    }

    #[test]
    fn damaged_content_fails_before_it_is_whole() {
        let read = |bytes: &[u8]| {
            let mut out = Vec::new();
            Checked::new(bytes, Digest::of(b"good")).read_to_end(&mut out).map_err(|error| error.kind())
        };
        assert_eq!(read(b"good"), Ok(4));
        assert_eq!(read(b"evil"), Err(io::ErrorKind::InvalidData));
    }
}
