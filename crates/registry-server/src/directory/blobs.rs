//! Blobs, and which repository has them.

use std::fs::{self, File, FileTimes};
use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::SystemTime;

use kiln_oci::Digest;

use super::{Directory, DirectoryError, is_gone, remove, sync};
use crate::images::Part;
use crate::route::Name;

impl Directory {
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.root.join("blobs/sha256").join(&hex[..2]).join(hex)
    }

    pub(super) fn mark(&self, name: &Name, digest: &Digest) -> PathBuf {
        self.repository(name).join("_blobs").join(digest.hex())
    }

    /// A blob that the repository has, and its size in bytes.
    pub(crate) fn open_blob(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<(File, u64)>, DirectoryError> {
        // Who looks whether a blob is there will not send it: it has to stay for the manifest to come. Only
        // under the lock nobody decides meanwhile that it is old.
        let is_seen = |mark: PathBuf| fs::metadata(mark).is_ok_and(|mark| is_recent(&mark));
        let _publishing = (!is_seen(self.mark(name, digest)))
            .then(|| self.publishing.read().unwrap_or_else(PoisonError::into_inner));
        self.find_blob(name, digest)
    }

    /// The same under the lock.
    fn find_blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, DirectoryError> {
        let opened = || -> io::Result<(File, u64)> {
            let mark = File::open(self.mark(name, digest))?;
            let _ = touch(&mark);
            let file = File::open(self.blob(digest))?;
            let size = file.metadata()?.len();
            Ok((file, size))
        };
        match opened() {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(DirectoryError::host("opened", self.blob(digest))(error)),
        }
    }

    /// Under the lock.
    pub(super) fn has_blob(&self, name: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        Ok(self.find_blob(name, digest)?.is_some())
    }

    /// Lets `name` have a blob that `from` has; false: it has not.
    pub(crate) fn mount(&self, name: &Name, from: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        if !self.has_blob(from, digest)? {
            return Ok(false);
        }
        self.give(name, digest)?;
        Ok(true)
    }

    /// Lets `name` have a blob that is here and was compared; false: it is not, or was not.
    pub(crate) fn give_good(&self, name: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        let Ok(file) = File::open(self.blob(digest)) else { return Ok(false) };
        if self.verified.knows(digest, &file) != Some(true) {
            return Ok(false);
        }
        self.give(name, digest)?;
        Ok(true)
    }

    /// Makes the bytes in `file` the blob `digest` of a repository. They were compared with it, and are not
    /// durable yet. A blob that is there and damaged is replaced: costs reading it, if that was not done before.
    pub(crate) fn publish(
        &self,
        name: &Name,
        digest: &Digest,
        path: &std::path::Path,
        file: &File,
    ) -> Result<(), DirectoryError> {
        let blob = self.blob(digest);
        // Not under the lock: this is what takes long.
        let is_there = self.is_good(digest);
        if !is_there {
            file.sync_data().map_err(DirectoryError::host("written", path))?;
        }
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        if is_there && blob.exists() {
            // The same bytes: one file of them is enough.
            remove(path)?;
        } else {
            let dir = blob.parent().unwrap_or(&self.root);
            self.make_dirs(dir)?;
            // A collection may have removed the one that was there.
            file.sync_data().map_err(DirectoryError::host("written", path))?;
            fs::rename(path, &blob).map_err(DirectoryError::host("written", &blob))?;
            sync(dir)?;
            // Two names of one file: there a rename does nothing.
            remove(path)?;
            // After the rename, which is a change, too.
            self.verified.note(digest, file);
            self.waiting.add(digest, file.metadata().map_or(0, |metadata| metadata.len()));
        }
        self.give(name, digest)
    }

    /// Whether the bytes of a blob are there, and are what they should be.
    fn is_good(&self, digest: &Digest) -> bool {
        let Ok(file) = File::open(self.blob(digest)) else { return false };
        self.verified.is_good(digest, &file).unwrap_or(false)
    }

    /// Blobs of a repository have got other names, or lost some, and were not written to.
    pub(crate) fn names_changed(&self, name: &Name, blobs: impl Iterator<Item = Digest>) {
        for digest in blobs {
            if let Ok(Some((file, _))) = self.open_blob(name, &digest) {
                self.verified.follow(&digest, &file);
            }
        }
    }

    /// The file of a blob that a repository has.
    pub(crate) fn part(&self, name: &Name, digest: &Digest) -> Result<Option<Part>, DirectoryError> {
        let Some((file, _)) = self.open_blob(name, digest)? else { return Ok(None) };
        let is_compared = self.verified.knows(digest, &file) == Some(true);
        Ok(Some(Part { path: self.blob(digest), is_compared }))
    }

    /// The repository has the blob from now on. Under the lock.
    fn give(&self, name: &Name, digest: &Digest) -> Result<(), DirectoryError> {
        self.fresh.add(digest);
        // The mark's time counts, which is nobody's but ours: that of the blob tells that its bytes are the same.
        let mark = self.mark(name, digest);
        match File::open(&mark) {
            Ok(mark) => {
                let _ = touch(&mark);
                Ok(())
            }
            Err(_) => self.write(&mark, b""),
        }
    }

    /// Takes a blob from a repository; whether it had it.
    pub(crate) fn remove_blob(&self, name: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        remove(&self.mark(name, digest))
    }
}

/// Says that somebody had to do with it now.
pub(super) fn touch(file: &File) -> io::Result<()> {
    if is_recent(&file.metadata()?) {
        return Ok(());
    }
    file.set_times(FileTimes::new().set_modified(SystemTime::now()))
}

/// A minute more or less does not matter, writing an inode each time does.
pub(super) fn is_recent(metadata: &fs::Metadata) -> bool {
    let age = metadata.modified().map(|seen| SystemTime::now().duration_since(seen));
    matches!(age, Ok(Ok(age)) if age.as_secs() < 60)
}
