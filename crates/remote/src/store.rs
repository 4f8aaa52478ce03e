//! The contract of a remote store.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use crate::ObjectName;

/// Asked again and again while something is waited for: whether to give up.
pub type Stop = Arc<dyn Fn() -> bool + Send + Sync>;

/// What a put does with an object that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the new one is dropped.
    Keep,
    /// The new one takes its place.
    Replace,
}

/// Keeps small records and large blobs by name, for many machines at once.
///
/// An object is wholly there or not at all. Blocking: to be called from threads that may wait. Every wait
/// has an end: a server that does not answer, or stops in the middle, is an error after seconds.
pub trait RemoteStore: Send + Sync {
    /// The objects' contents, in the order of `names`; `None` for what is not there. Of one that is larger
    /// than `max_bytes` only one byte more than that. Asks side by side.
    ///
    /// # Errors
    /// [`RemoteError`]; so for all methods.
    fn get_many(&self, names: &[ObjectName], max_bytes: u64) -> Result<Vec<Option<Vec<u8>>>, RemoteError>;

    /// The sizes of objects in bytes, in the order of `names`; `None` for what is not there. Asks side by
    /// side, and reads no content.
    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError>;

    /// Reads one object from its beginning, and hands its pieces to `out` as they come; false: it is not
    /// there. An error of `out` ends it, as [`RemoteError::Content`].
    fn read(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError>;

    /// Puts an object of `size_bytes`. When `content` fails, or has another length, the object is not
    /// there afterwards, and the error is [`RemoteError::Content`].
    fn put(
        &self,
        name: &ObjectName,
        content: &mut (dyn Read + Send),
        size_bytes: u64,
        existing: Existing,
    ) -> Result<(), RemoteError>;
}

/// Why a remote store did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// Whoever asked does not wait any more.
    #[error("given up")]
    Stopped,
    /// What was to be put could not be read, or what was read could not be kept: not the store's fault.
    #[error("its content cannot be moved")]
    Content(#[source] io::Error),
    /// A directory that is a store.
    #[error("{call} failed for {}", path.display())]
    Host {
        /// System call.
        call: &'static str,
        /// Path.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A server. It says what happened in one line without credentials: what an HTTP client reports has
    /// whole URLs in it, and with some services these are keys.
    #[error("{0}")]
    Server(String),
    /// The options of a store make none.
    #[error("{0}")]
    Options(String),
}

/// Reads exactly `size_bytes`, and says so when there are more or fewer.
pub(crate) struct Exactly<'a> {
    inner: &'a mut (dyn Read + Send),
    left_bytes: u64,
}

impl<'a> Exactly<'a> {
    pub(crate) fn new(inner: &'a mut (dyn Read + Send), size_bytes: u64) -> Self {
        Self { inner, left_bytes: size_bytes }
    }
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        if length == 0 && !buffer.is_empty() && self.left_bytes > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let left = self.left_bytes.checked_sub(length as u64);
        self.left_bytes = left.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_of_another_length_is_an_error() {
        let read = |bytes: &[u8], size| {
            let mut inner = bytes;
            io::copy(&mut Exactly::new(&mut inner, size), &mut io::sink()).map_err(|error| error.kind())
        };
        assert_eq!(read(b"abc", 3), Ok(3));
        assert_eq!(read(b"", 0), Ok(0));
        assert_eq!(read(b"abc", 4), Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(read(b"abc", 2), Err(io::ErrorKind::FileTooLarge));
    }
}
