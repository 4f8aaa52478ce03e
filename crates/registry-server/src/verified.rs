//! What was compared with its digest, so that what a disk has damaged is not given out as good.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_oci::{Digest, Sha256Writer};

use crate::version::Version;

/// A disk may lose a bit without anybody writing to it: after so long it is looked at again.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// No more files are known.
const MAX_KNOWN: usize = 1 << 17;
/// So many blobs are compared at once at the most; several clients that want the same one wait for one look at it.
const TURNS: usize = 16;
/// Read at once.
const PIECE_BYTES: usize = 256 << 10;

/// Files that were what their names say.
#[derive(Default)]
pub(crate) struct Verified {
    known: Mutex<HashMap<Digest, (Version, Instant)>>,
    turns: [Arc<tokio::sync::Mutex<()>>; TURNS],
}

impl Verified {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, (Version, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this very file was compared, and nobody has written to it since. Costs one system call.
    pub(crate) fn knows(&self, digest: &Digest, file: &File) -> bool {
        let Ok(version) = Version::of_open(file) else { return false };
        let known = self.known();
        known.get(digest).is_some_and(|(seen, when)| *seen == version && when.elapsed() < LIFE)
    }

    /// The bytes of `file` were compared with `digest` just now.
    pub(crate) fn note(&self, digest: &Digest, file: &File) {
        if let Ok(version) = Version::of_open(file) {
            self.remember(digest, version);
        }
    }

    fn remember(&self, digest: &Digest, version: Version) {
        let mut known = self.known();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(*digest, (version, Instant::now()));
    }

    /// Whether `file` is what `digest` says. Costs reading all of it unless that is known. Where it was read to
    /// is as before.
    pub(crate) fn is_good(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        if self.knows(digest, file) {
            return Ok(true);
        }
        let before = Version::of_open(file)?;
        let mut hash = Sha256Writer::new(io::sink());
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match file.read_at(&mut piece, hash.size_bytes()) {
                Ok(0) => break,
                Ok(count) => hash.write_all(&piece[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if hash.finish().1 != *digest {
            return Ok(false);
        }
        // Of the version that was read from its first byte on.
        self.remember(digest, before);
        Ok(true)
    }

    /// The same for who must not wait on his thread.
    pub(crate) async fn is_good_soon(self: &Arc<Self>, digest: &Digest, file: &File) -> io::Result<bool> {
        if self.knows(digest, file) {
            return Ok(true);
        }
        let turn = usize::from(digest.hex().as_bytes().first().copied().unwrap_or(0)) % TURNS;
        let turn = self.turns[turn].clone().lock_owned().await;
        let (verified, digest, file) = (self.clone(), *digest, file.try_clone()?);
        let looked = tokio::task::spawn_blocking(move || {
            // Also when nobody waits for it any more: the next one would begin anew.
            let _turn = turn;
            verified.is_good(&digest, &file)
        });
        looked.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_once_until_somebody_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, b"hello").unwrap();
        let (verified, digest) = (Verified::default(), Digest::of(b"hello"));
        let open = || File::open(&path).unwrap();
        assert!(!verified.knows(&digest, &open()));
        assert!(verified.is_good(&digest, &open()).unwrap());
        assert!(verified.knows(&digest, &open()));
        // As long as before, and with the time from before: its inode tells.
        let modified = open().metadata().unwrap().modified().unwrap();
        std::fs::write(&path, b"hellO").unwrap();
        let times = std::fs::FileTimes::new().set_modified(modified);
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        assert!(!verified.knows(&digest, &open()));
        assert!(!verified.is_good(&digest, &open()).unwrap());
        assert!(!verified.knows(&digest, &open()));
        // Another file in its place.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"hello").unwrap();
        assert!(verified.is_good(&digest, &open()).unwrap());
    }
}
