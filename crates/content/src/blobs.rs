//! Blobs: immutable files named by their digest.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_oci::{Digest, Sha256Writer};

use rustix::fs::Advice;

use crate::{Error, Store};

/// A blob on its way in; dropping it takes it back.
pub struct Ingest<'a> {
    /// `None` once it was committed.
    writer: Option<Sha256Writer<File>>,
    path: PathBuf,
    store: &'a Store,
    /// Up to where the disk was asked to begin writing.
    flush_from: u64,
}

/// Lets the disk begin with what was written up to `end`, so that the sync at the end of a large blob
/// finds little left to do; returns up to where it did. `posix_fadvise(2)`: Linux starts writing the
/// range, and pages that are still being written stay.
fn flush_soon(file: &File, from: u64, end: u64) -> u64 {
    const PIECE: u64 = 8 << 20;
    let Some(length) = NonZeroU64::new(end - from).filter(|length| length.get() >= PIECE) else {
        return from;
    };
    // Advice: the sync at the end meets whatever is wrong.
    let _ = rustix::fs::fadvise(file, from, Some(length), Advice::DontNeed);
    end
}

impl Ingest<'_> {
    /// Makes the blob part of the store: synced, renamed, directory synced. A blob that is there
    /// already is left as it is, or replaced if it is damaged. Costs O(bytes) then, to know.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it is not `expected` (digest, size in bytes); [`Error::Host`].
    /// Nothing is left behind then.
    pub fn commit(mut self, expected: Option<(Digest, u64)>) -> Result<(Digest, u64), Error> {
        let writer = self.writer.take().expect("only commit takes it, and commit consumes the value");
        let (file, actual, actual_bytes) = writer.finish();
        if let Some((expected, expected_bytes)) = expected
            && (expected, expected_bytes) != (actual, actual_bytes)
        {
            return Err(Error::Mismatch { expected, expected_bytes, actual, actual_bytes });
        }
        // Before it is looked for, and before it is there: garbage collection cannot come between.
        self.store.hold_blob(&actual)?;
        let path = self.store.blob_path(&actual);
        let is_whole = fs::metadata(&path).is_ok_and(|there| there.len() == actual_bytes)
            && self.store.is_blob_good(&actual).unwrap_or(false);
        if !is_whole {
            let parent = path.parent().unwrap_or(self.store.root());
            fs::create_dir_all(parent).map_err(Error::host("mkdir", parent))?;
            file.sync_data().map_err(Error::host("fdatasync", &self.path))?;
            fs::rename(&self.path, &path).map_err(Error::host("rename", &path))?;
            let synced = File::open(parent).and_then(|directory| directory.sync_all());
            synced.map_err(Error::host("fsync", parent))?;
        }
        Ok((actual, actual_bytes))
    }
}

impl Ingest<'_> {
    fn written(&self) -> &Sha256Writer<File> {
        self.writer.as_ref().expect("only commit takes it, and commit consumes the value")
    }

    /// So many bytes have come.
    pub fn size_bytes(&self) -> u64 {
        self.written().size_bytes()
    }

    /// The digest of what has come so far.
    pub fn digest(&self) -> Digest {
        self.written().digest()
    }

    /// What has come so far, to be read from its beginning while more comes. Nobody vouches for it before
    /// [`Ingest::commit`].
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn reader(&self) -> Result<File, Error> {
        File::open(&self.path).map_err(Error::host("open", &self.path))
    }

    /// Another way into the file, for bytes that come before those in front of them. They wait there: part of
    /// the blob is what is written to this value itself.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn ahead(&self) -> Result<File, Error> {
        let opened = File::options().read(true).write(true).open(&self.path);
        opened.map_err(Error::host("open", &self.path))
    }
}

impl Write for Ingest<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some(writer) = &mut self.writer else { return Ok(0) };
        let length = writer.write(buf)?;
        self.flush_from = flush_soon(writer.get_ref(), self.flush_from, writer.size_bytes());
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Ingest<'_> {
    fn drop(&mut self) {
        // Renamed away after a commit; otherwise the next sweep takes what cannot be removed now.
        let _ = fs::remove_file(&self.path);
    }
}

impl Store {
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.root().join("blobs/sha256").join(&hex[..2]).join(&hex)
    }

    /// A locked temporary file: whoever cannot take the lock knows that its writer lives.
    fn temporary(&self) -> Result<(File, PathBuf), Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}-{}-{number}", std::process::id(), crate::lease::random());
            let path = self.root().join("ingest").join(name);
            if let Some(file) = crate::lease::create_locked(&path)? {
                return Ok((file, path));
            }
        }
    }

    /// Starts a new blob.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn ingest(&self) -> Result<Ingest<'_>, Error> {
        let (file, path) = self.temporary()?;
        Ok(Ingest { writer: Some(Sha256Writer::new(file)), path, store: self, flush_from: 0 })
    }

    /// A file without a name on the store's file system, gone with its descriptor.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn spool(&self) -> Result<File, Error> {
        let (file, path) = self.temporary()?;
        fs::remove_file(&path).map_err(Error::host("unlink", path))?;
        Ok(file)
    }

    /// Stores `bytes`, held as long as this handle lives. What is there already is read, and replaced if
    /// it is damaged: this is for documents.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        self.hold_blob(&digest)?;
        if self.read_blob(&digest, bytes.len() as u64).is_err() {
            let mut ingest = self.ingest()?;
            let path = ingest.path.clone();
            ingest.write_all(bytes).map_err(Error::host("write", path))?;
            ingest.commit(None)?;
        }
        Ok(digest)
    }

    /// Makes the file at `path` a blob, too, held as long as this handle lives: one file under two names where the file
    /// system can, else a copy. It has to be durable, and nobody may write to it any more. A blob that is there is replaced,
    /// so that there is one file less, and no damaged one. Costs reading the file, unless it `is_compared` with `digest`
    /// already and replaces nothing; where there are no such links, reading the blob that is there or writing one as
    /// well.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it is not what `digest` says; [`Error::Host`].
    pub fn link_blob(&self, path: &Path, digest: &Digest, is_compared: bool) -> Result<(), Error> {
        self.hold_blob(digest)?;
        let mut file = File::open(path).map_err(Error::host("open", path))?;
        let here = file.metadata().map_err(Error::host("stat", path))?;
        let expected_bytes = here.len();
        let to = self.blob_path(digest);
        let there = fs::metadata(&to).ok();
        let is_same = there.as_ref().is_some_and(|it| (it.dev(), it.ino()) == (here.dev(), here.ino()));
        // What takes another file's place is read, whoever has compared it.
        if !is_compared || (there.is_some() && !is_same) {
            let mut hashed = Sha256Writer::new(io::sink());
            let actual_bytes = io::copy(&mut file, &mut hashed).map_err(Error::host("read", path))?;
            let actual = hashed.digest();
            if actual != *digest {
                return Err(Error::Mismatch { expected: *digest, expected_bytes, actual, actual_bytes });
            }
        }
        if is_same {
            return Ok(());
        }
        let parent = to.parent().unwrap_or(self.root());
        fs::create_dir_all(parent).map_err(Error::host("mkdir", parent))?;
        match self.link_over(path, &to) {
            Ok(()) => {
                let synced = File::open(parent).and_then(|directory| directory.sync_all());
                synced.map_err(Error::host("fsync", parent))
            }
            // Another file system, or one without such links.
            Err(_) if self.has_blob(digest) && self.is_blob_good(digest).unwrap_or(false) => Ok(()),
            Err(_) => {
                let mut ingest = self.ingest()?;
                let into = ingest.path.clone();
                file.rewind().map_err(Error::host("seek", path))?;
                io::copy(&mut file, &mut ingest).map_err(Error::host("write", into))?;
                ingest.commit(Some((*digest, expected_bytes))).map(drop)
            }
        }
    }

    /// Gives the file at `path` the name `to` as well, which another file may have so far.
    fn link_over(&self, path: &Path, to: &Path) -> io::Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        match fs::hard_link(path, to) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            done => return done,
        }
        // A link replaces nothing, a rename does. Should it be left here, the next sweep takes it.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{}-link-{number}", std::process::id(), crate::lease::random());
        let between = self.root().join("ingest").join(name);
        fs::hard_link(path, &between)?;
        let renamed = fs::rename(&between, to);
        // It is still there where both names have come to be one file's.
        let _ = fs::remove_file(&between);
        renamed
    }

    /// Whether a blob is there.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).exists()
    }

    /// Opens a blob: its file and size in bytes. Its content is not checked.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::Host`].
    pub fn open_blob(&self, digest: &Digest) -> Result<(File, u64), Error> {
        let path = self.blob_path(digest);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NoBlob(*digest),
            _ => Error::host("open", &path)(error),
        })?;
        let size_bytes = file.metadata().map_err(Error::host("stat", &path))?.len();
        Ok((file, size_bytes))
    }

    /// Reads a small blob as a whole and checks its digest.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Mismatch`] for a damaged one, and those of
    /// [`Store::open_blob`].
    pub fn read_blob(&self, digest: &Digest, max_bytes: u64) -> Result<Vec<u8>, Error> {
        let (file, size_bytes) = self.open_blob(digest)?;
        if size_bytes > max_bytes {
            return Err(Error::TooLarge { digest: *digest, max_bytes });
        }
        let mut bytes = Vec::new();
        file.take(max_bytes).read_to_end(&mut bytes).map_err(Error::host("read", self.blob_path(digest)))?;
        let actual = Digest::of(&bytes);
        if actual == *digest {
            return Ok(bytes);
        }
        let actual_bytes = bytes.len() as u64;
        Err(Error::Mismatch { expected: *digest, expected_bytes: size_bytes, actual, actual_bytes })
    }

    /// Removes temporary files whose writer is dead; how many.
    ///
    /// # Errors
    /// [`Error::Host`] when the directory cannot be read, [`Error::Db`].
    pub fn sweep_ingest(&self) -> Result<usize, Error> {
        let dir = self.root().join("ingest");
        let mut removed = self.sweep_journal()?;
        for entry in fs::read_dir(&dir).map_err(Error::host("read", dir.clone()))? {
            let path = entry.map_err(Error::host("read", dir.clone()))?.path();
            let Ok(file) = File::open(&path) else { continue };
            match file.try_lock() {
                Ok(()) if fs::remove_file(&path).is_ok() => removed += 1,
                Ok(()) | Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::new_store;

    #[test]
    fn what_was_put_is_read_back() {
        let (_dir, store) = new_store();
        let digest = store.put_blob(b"hello").unwrap();
        assert_eq!(store.read_blob(&digest, 100).unwrap(), b"hello");
        assert_eq!(store.put_blob(b"hello").unwrap(), digest);
        assert!(matches!(store.read_blob(&digest, 3), Err(Error::TooLarge { .. })));
        assert!(matches!(store.read_blob(&Digest::of(b"x"), 3), Err(Error::NoBlob(_))));
    }

    #[test]
    fn wrong_content_leaves_nothing() {
        let (dir, store) = new_store();
        let mut ingest = store.ingest().unwrap();
        ingest.write_all(b"hello").unwrap();
        let wrong = ingest.commit(Some((Digest::of(b"other"), 5)));
        assert!(matches!(wrong, Err(Error::Mismatch { .. })));
        assert!(!store.has_blob(&Digest::of(b"hello")));
        assert_eq!(fs::read_dir(dir.path().join("ingest")).unwrap().count(), 0);
    }

    #[test]
    fn a_file_beside_the_store_becomes_a_blob_if_it_is_what_it_should_be() {
        let (dir, store) = new_store();
        let path = dir.path().join("beside");
        fs::write(&path, b"hello").unwrap();
        let wrong = store.link_blob(&path, &Digest::of(b"other"), false);
        assert!(matches!(wrong, Err(Error::Mismatch { .. })) && !store.has_blob(&Digest::of(b"other")));
        let digest = Digest::of(b"hello");
        store.link_blob(&path, &digest, false).unwrap();
        store.link_blob(&path, &digest, false).unwrap();
        // The one is there without the other.
        fs::remove_file(&path).unwrap();
        assert_eq!(store.read_blob(&digest, 5).unwrap(), b"hello");
        assert!(matches!(store.link_blob(&path, &digest, false), Err(Error::Host { .. })));
        fs::write(&path, b"hello").unwrap();
        store.link_blob(&path, &digest, false).unwrap();
        // What has rotted in the store is replaced, not what is beside it.
        for damage in [&b"hellO"[..], b"hel"] {
            fs::remove_file(store.blob_path(&digest)).unwrap();
            fs::write(store.blob_path(&digest), damage).unwrap();
            store.link_blob(&path, &digest, false).unwrap();
            assert_eq!(store.read_blob(&digest, 5).unwrap(), b"hello");
        }
        // There is one file of it, whichever was there first.
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(inode(&path), inode(&store.blob_path(&digest)));
        // What was compared is not read again, unless another file is there that may be good.
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"unread").unwrap();
        assert!(matches!(store.link_blob(&path, &digest, true), Err(Error::Mismatch { .. })));
        assert_eq!(store.read_blob(&digest, 5).unwrap(), b"hello");
        fs::remove_file(store.blob_path(&digest)).unwrap();
        store.link_blob(&path, &digest, true).unwrap();
        assert_eq!(inode(&path), inode(&store.blob_path(&digest)));
        assert_eq!(fs::read_dir(dir.path().join("ingest")).unwrap().count(), 0);
    }

    #[test]
    fn damaged_blob_is_noticed_when_read() {
        let (_dir, store) = new_store();
        let digest = store.put_blob(b"hello").unwrap();
        fs::write(store.blob_path(&digest), b"hellO").unwrap();
        assert!(matches!(store.read_blob(&digest, 100), Err(Error::Mismatch { .. })));
    }

    #[test]
    fn damaged_blob_is_replaced_when_it_comes_again() {
        let (_dir, store) = new_store();
        let digest = store.put_blob(b"hello").unwrap();
        for damage in [&b"hellO"[..], b"hel", b""] {
            fs::write(store.blob_path(&digest), damage).unwrap();
            let mut ingest = store.ingest().unwrap();
            ingest.write_all(b"hello").unwrap();
            ingest.commit(None).unwrap();
            assert_eq!(store.read_blob(&digest, 100).unwrap(), b"hello");
            fs::write(store.blob_path(&digest), damage).unwrap();
            store.put_blob(b"hello").unwrap();
            assert_eq!(store.read_blob(&digest, 100).unwrap(), b"hello");
        }
    }

    #[test]
    fn what_waits_ahead_is_part_of_the_blob_in_its_turn() {
        use std::os::unix::fs::FileExt;
        let (_dir, store) = new_store();
        let mut ingest = store.ingest().unwrap();
        let ahead = ingest.ahead().unwrap();
        ahead.write_all_at(b"world", 6).unwrap();
        ingest.write_all(b"hello ").unwrap();
        let mut rest = [0; 5];
        ahead.read_exact_at(&mut rest, 6).unwrap();
        ingest.write_all(&rest).unwrap();
        assert_eq!((ingest.digest(), ingest.size_bytes()), (Digest::of(b"hello world"), 11));
        let (digest, size_bytes) = ingest.commit(None).unwrap();
        assert_eq!((digest, size_bytes), (Digest::of(b"hello world"), 11));
        assert_eq!(store.read_blob(&digest, 100).unwrap(), b"hello world");
    }

    #[test]
    fn only_dead_writers_files_are_swept() {
        let (dir, store) = new_store();
        let living = store.ingest().unwrap();
        fs::write(dir.path().join("ingest/dead"), b"x").unwrap();
        assert_eq!(store.sweep_ingest().unwrap(), 1);
        assert!(living.path.exists());
    }
}
