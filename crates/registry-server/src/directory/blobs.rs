//! Blobs, and which repository has them.

use std::fs::{self, File, FileTimes};
use std::io;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::SystemTime;

use kiln_oci::Digest;

use super::{Directory, DirectoryError, is_gone, remove, sync};
use crate::route::Name;

impl Directory {
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.root.join("blobs/sha256").join(&hex[..2]).join(hex)
    }

    fn mark(&self, name: &Name, digest: &Digest) -> PathBuf {
        self.repository(name).join("_blobs").join(digest.hex())
    }

    /// A blob that the repository has, and its size in bytes.
    pub(crate) fn open_blob(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<(File, u64)>, DirectoryError> {
        let mark = self.mark(name, digest);
        let opened = || -> io::Result<(File, u64)> {
            let mark = File::open(mark)?;
            // Who looks whether a blob is there will not send it: it has to stay for the manifest to come.
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

    pub(super) fn has_blob(&self, name: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        Ok(self.open_blob(name, digest)?.is_some())
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

    /// Makes the bytes in `file` the blob `digest` of a repository. They were compared with it, and are not
    /// durable yet.
    pub(crate) fn publish(
        &self,
        name: &Name,
        digest: &Digest,
        path: &std::path::Path,
        file: &File,
    ) -> Result<(), DirectoryError> {
        let blob = self.blob(digest);
        if !blob.exists() {
            // Not under the lock: this is what takes long.
            file.sync_data().map_err(DirectoryError::host("written", path))?;
        }
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        if blob.exists() {
            // The same bytes: one file of them is enough.
            remove(path)?;
        } else {
            file.sync_data().map_err(DirectoryError::host("written", path))?;
            fs::rename(path, &blob).map_err(DirectoryError::host("written", &blob))?;
            sync(blob.parent().unwrap_or(&self.root))?;
        }
        self.give(name, digest)
    }

    /// The repository has the blob from now on. Under the lock.
    fn give(&self, name: &Name, digest: &Digest) -> Result<(), DirectoryError> {
        self.fresh.add(digest);
        if let Ok(file) = File::open(self.blob(digest)) {
            let _ = touch(&file);
        }
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
fn touch(file: &File) -> io::Result<()> {
    let now = SystemTime::now();
    let seen = file.metadata()?.modified()?;
    // A minute more or less does not matter, writing an inode each time does.
    if now.duration_since(seen).is_ok_and(|age| age.as_secs() < 60) {
        return Ok(());
    }
    file.set_times(FileTimes::new().set_modified(now))
}
