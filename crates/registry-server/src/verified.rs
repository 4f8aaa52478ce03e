//! What was compared with its digest, so that what a disk has damaged is not given out as good.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_oci::{Digest, Sha256Writer};
use tokio::sync::Semaphore;

use crate::directory::is_unreadable;
use crate::version::Version;

/// A disk may lose a bit without anybody writing to it: after so long it is looked at again.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// No more files are known.
const MAX_KNOWN: usize = 1 << 17;
/// So many blobs are compared at once at the most: each holds a thread.
const AT_ONCE: usize = 16;
/// Several clients that want the same blob wait for one look at it.
const TURNS: usize = 256;
/// Read at once.
const PIECE_BYTES: usize = 256 << 10;

/// Files that were compared with their names.
pub(crate) struct Verified {
    known: Mutex<HashMap<Digest, Known>>,
    turns: Vec<Arc<tokio::sync::Mutex<()>>>,
    room: Arc<Semaphore>,
}

/// What a file turned out to be.
struct Known {
    version: Version,
    when: Instant,
    is_good: bool,
}

impl Default for Verified {
    fn default() -> Self {
        let turns = (0..TURNS).map(|_| Arc::default()).collect();
        Self { known: Mutex::default(), turns, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Verified {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this very file was what `digest` says, if it was compared and nobody has written to it since. Costs one
    /// system call.
    pub(crate) fn knows(&self, digest: &Digest, file: &File) -> Option<bool> {
        let version = Version::of_open(file).ok()?;
        let known = self.known();
        let known =
            known.get(digest).filter(|known| known.version == version && known.when.elapsed() < LIFE)?;
        Some(known.is_good)
    }

    /// The bytes of `file` were compared with `digest` just now, by who made the file and told nobody of it before.
    pub(crate) fn note(&self, digest: &Digest, file: &File) {
        if let Ok(version) = Version::of_open(file) {
            self.remember(digest, version, true);
        }
    }

    /// Somebody has given the file another name, or taken one away: that is no reason to read it again.
    pub(crate) fn follow(&self, digest: &Digest, file: &File) {
        let Ok(version) = Version::of_open(file) else { return };
        if let Some(known) = self.known().get_mut(digest)
            && known.version.is_same_content(&version)
        {
            known.version = version;
        }
    }

    /// It was found to be something else after all.
    pub(crate) fn forget(&self, digest: &Digest) {
        self.known().remove(digest);
    }

    fn remember(&self, digest: &Digest, version: Version, is_good: bool) {
        let mut known = self.known();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(*digest, Known { version, when: Instant::now(), is_good });
    }

    /// Whether `file` is what `digest` says. Costs reading all of it unless that is known. Where it was read to
    /// is as before.
    pub(crate) fn is_good(&self, digest: &Digest, file: &File) -> io::Result<bool> {
        if let Some(is_good) = self.knows(digest, file) {
            return Ok(is_good);
        }
        let before = Version::of_open(file)?;
        // Another write within the same tick would leave no trace.
        let is_racy = before.is_racy();
        let mut hash = Sha256Writer::new(io::sink());
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match file.read_at(&mut piece, hash.size_bytes()) {
                Ok(0) => break,
                Ok(count) => hash.write_all(&piece[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What a disk cannot read is as good as damaged. It may be able to the next time.
                Err(error) if is_unreadable(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let is_good = hash.finish().1 == *digest;
        if !is_racy {
            // Of the version that was read from its first byte on.
            self.remember(digest, before, is_good);
        }
        Ok(is_good)
    }

    /// The same for who must not wait on his thread.
    pub(crate) async fn is_good_soon(self: &Arc<Self>, digest: &Digest, file: &File) -> io::Result<bool> {
        if let Some(is_good) = self.knows(digest, file) {
            return Ok(is_good);
        }
        let nth = usize::from_str_radix(&digest.hex()[..4], 16).unwrap_or(0) % TURNS;
        let turn = self.turns[nth].clone().lock_owned().await;
        let room = self.room.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (verified, digest, file) = (self.clone(), *digest, file.try_clone()?);
        let looked = tokio::task::spawn_blocking(move || {
            // Also when nobody waits for it any more: the next one would begin anew.
            let _held = (turn, room);
            verified.is_good(&digest, &file)
        });
        looked.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Until the file system's clock has gone on.
    fn pass() {
        std::thread::sleep(Duration::from_millis(40));
    }

    #[test]
    fn a_file_is_read_once_until_somebody_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, b"hello").unwrap();
        let (verified, digest) = (Verified::default(), Digest::of(b"hello"));
        let open = || File::open(&path).unwrap();
        assert_eq!(verified.knows(&digest, &open()), None);
        pass();
        assert!(verified.is_good(&digest, &open()).unwrap());
        assert_eq!(verified.knows(&digest, &open()), Some(true));
        // As long as before, and with the time from before: its inode tells.
        let modified = open().metadata().unwrap().modified().unwrap();
        std::fs::write(&path, b"hellO").unwrap();
        let times = std::fs::FileTimes::new().set_modified(modified);
        File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
        assert_eq!(verified.knows(&digest, &open()), None);
        pass();
        assert!(!verified.is_good(&digest, &open()).unwrap());
        // That is known as well.
        assert_eq!(verified.knows(&digest, &open()), Some(false));
        // Another file in its place.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"hello").unwrap();
        assert!(verified.is_good(&digest, &open()).unwrap());
    }

    #[test]
    fn what_was_written_a_moment_ago_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        let (verified, digest) = (Verified::default(), Digest::of(b"hello"));
        // The clock that files have may stand still between the two.
        let is_seen = |_| {
            std::fs::write(&path, b"hello").unwrap();
            let file = File::open(&path).unwrap();
            assert!(verified.is_good(&digest, &file).unwrap());
            let known = verified.knows(&digest, &file);
            // Unless this thread was not asleep in between.
            Version::of_open(&file).unwrap().is_racy().then_some(known)
        };
        assert_eq!((0..1000).find_map(is_seen), Some(None));
    }

    #[test]
    fn another_name_is_no_reason_to_read_a_file_again_and_another_byte_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, b"hello").unwrap();
        pass();
        let (verified, digest) = (Verified::default(), Digest::of(b"hello"));
        let file = File::open(&path).unwrap();
        assert!(verified.is_good(&digest, &file).unwrap());
        pass();
        std::fs::hard_link(&path, dir.path().join("other")).unwrap();
        assert_eq!(verified.knows(&digest, &file), None);
        verified.follow(&digest, &file);
        assert_eq!(verified.knows(&digest, &file), Some(true));
        pass();
        std::fs::write(&path, b"hellO").unwrap();
        verified.follow(&digest, &file);
        assert_eq!(verified.knows(&digest, &file), None);
    }
}
