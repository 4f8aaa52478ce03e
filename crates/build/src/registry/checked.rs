//! A blob of the store on its way out. Its last bytes come when all of it was compared with its digest and size, so
//! that what the disk has damaged never becomes whole elsewhere, and is told as what it is: the store's fault, not the
//! registry's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use kiln_content::Store;
use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Sha256Writer};
use kiln_registry::BlobSource;

use crate::{BuildError, Engine};

/// A blob that a descriptor names.
pub(super) struct StoredBlob {
    store: Arc<Store>,
    digest: Digest,
    size_bytes: u64,
}

impl StoredBlob {
    pub(super) fn new(engine: &Engine, blob: &Descriptor) -> Self {
        Self { store: engine.store.clone(), digest: blob.digest, size_bytes: blob.size }
    }
}

impl BlobSource for StoredBlob {
    /// Costs reading all that stands before `offset`.
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        let (file, _) = self.store.open_blob(&self.digest).map_err(of_store)?;
        let seen = Sha256Writer::new(io::sink());
        let mut blob = Checked { file, seen, digest: self.digest, size_bytes: self.size_bytes };
        io::copy(&mut blob.by_ref().take(offset), &mut io::sink())?;
        Ok(Box::new(blob))
    }
}

/// An error that the end of a push knows again.
fn of_store(error: kiln_content::Error) -> io::Error {
    io::Error::other(BuildError::from(error))
}

/// Reads a file that is one blob and nothing else.
struct Checked {
    file: File,
    /// What was read.
    seen: Sha256Writer<io::Sink>,
    digest: Digest,
    size_bytes: u64,
}

impl Checked {
    /// Whether it was what its name says, now that nothing more is expected.
    fn check(&mut self) -> io::Result<()> {
        let more = self.file.read(&mut [0])? as u64;
        let (actual, actual_bytes) = (self.seen.digest(), self.seen.size_bytes() + more);
        let (expected, expected_bytes) = (self.digest, self.size_bytes);
        if (actual, actual_bytes) == (expected, expected_bytes) {
            return Ok(());
        }
        Err(of_store(kiln_content::Error::Mismatch { expected, expected_bytes, actual, actual_bytes }))
    }
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size_bytes - self.seen.size_bytes();
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.file.read(&mut buffer[..most])?;
        self.seen.write_all(&buffer[..count])?;
        if count == 0 || self.seen.size_bytes() == self.size_bytes {
            self.check()?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    /// What comes of a file that shall be `expected`, from `offset` on.
    fn read(file: &[u8], expected: &[u8], offset: usize) -> (io::Result<usize>, Vec<u8>) {
        let mut there = tempfile::tempfile().unwrap();
        there.write_all(file).and_then(|()| there.rewind()).unwrap();
        let (digest, size_bytes) = (Digest::of(expected), expected.len() as u64);
        let mut blob = Checked { file: there, seen: Sha256Writer::new(io::sink()), digest, size_bytes };
        let (mut out, mut buffer) = (Vec::new(), vec![0; offset]);
        blob.read_exact(&mut buffer).unwrap();
        let end = blob.read_to_end(&mut out);
        (end, out)
    }

    fn content() -> Vec<u8> {
        (0..100_000_u32).map(|n| (n ^ (n >> 9)) as u8).collect()
    }

    #[test]
    fn what_is_whole_comes_from_any_byte_on() {
        let all = content();
        for offset in [0, 1, 50_000, all.len() - 1, all.len()] {
            let (end, came) = read(&all, &all, offset);
            assert_eq!(end.unwrap(), all.len() - offset);
            assert!(came == all[offset..]);
        }
        assert_eq!(read(b"", b"", 0).0.unwrap(), 0);
    }

    #[test]
    fn what_is_damaged_never_comes_whole() {
        let all = content();
        let mut flipped = all.clone();
        flipped[7] ^= 1;
        let damages = [flipped, all[..all.len() - 1].to_vec(), [&all[..], b"x"].concat(), Vec::new()];
        for damaged in damages {
            let (end, came) = read(&damaged, &all, 0);
            let error = end.unwrap_err().downcast::<BuildError>().unwrap();
            assert!(matches!(error, BuildError::Store(kiln_content::Error::Mismatch { .. })), "{error}");
            assert!(came.len() < all.len());
        }
        // The rest alone is in order.
        let mut flipped = all.clone();
        flipped[7] ^= 1;
        assert!(read(&flipped, &all, 50_000).0.is_err());
    }
}
