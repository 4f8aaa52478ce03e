//! The files of the store, as a directory listing shows them.

use std::fs;
use std::io::{self, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_oci::{Digest, Sha256Writer};

use crate::{Error, Store};

/// A blob's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlobFile {
    /// How many bytes it has.
    pub size_bytes: u64,
    /// How many bytes of blocks it takes.
    pub disk_bytes: u64,
}

/// What is in the directory of blobs.
#[derive(Debug, Default)]
pub struct Files {
    /// Blobs, sorted by digest.
    pub blobs: Vec<(Digest, BlobFile)>,
    /// What has no business there.
    pub strays: Vec<PathBuf>,
}

impl Store {
    /// Lists all blobs. Costs a system call each.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn blob_files(&self) -> Result<Files, Error> {
        let root = self.root().join("blobs/sha256");
        let mut files = Files::default();
        for (path, metadata) in list(&root)? {
            if !metadata.is_dir() {
                files.strays.push(path);
                continue;
            }
            for (path, metadata) in list(&path)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let digest = format!("sha256:{name}").parse::<Digest>().ok();
                match digest.filter(|digest| self.blob_path(digest) == path && metadata.is_file()) {
                    Some(digest) => {
                        let (size_bytes, disk_bytes) = (metadata.len(), metadata.blocks() * 512);
                        files.blobs.push((digest, BlobFile { size_bytes, disk_bytes }));
                    }
                    None => files.strays.push(path),
                }
            }
        }
        files.blobs.sort();
        files.strays.sort();
        Ok(files)
    }

    /// Reads a blob from end to end; whether it is what its name says.
    ///
    /// # Errors
    /// [`Error::NoBlob`], [`Error::Host`]: what the disk cannot read is not good either.
    pub fn is_blob_good(&self, digest: &Digest) -> Result<bool, Error> {
        let (file, _) = self.open_blob(digest)?;
        let mut hashed = Sha256Writer::new(io::sink());
        let copied = io::copy(&mut BufReader::with_capacity(256 << 10, file), &mut hashed);
        copied.map_err(Error::host("read", self.blob_path(digest)))?;
        Ok(hashed.finish().1 == *digest)
    }
}

fn list(dir: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::host("read", dir))? {
        let entry = entry.map_err(Error::host("read", dir))?;
        match entry.metadata() {
            Ok(metadata) => found.push((entry.path(), metadata)),
            // Gone meanwhile. What cannot be looked at is not gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::host("stat", entry.path())(error)),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::new_store;

    #[test]
    fn blobs_and_strays_are_told_apart() {
        let (dir, store) = new_store();
        let digest = store.put_blob(b"hello").unwrap();
        let root = dir.path().join("blobs/sha256");
        let hex = Digest::of(b"other").hex();
        fs::create_dir_all(root.join("zz")).unwrap();
        fs::write(root.join("zz").join(&hex), "other").unwrap();
        fs::write(root.join("note"), "").unwrap();
        let files = store.blob_files().unwrap();
        assert_eq!(
            files.blobs,
            [(digest, BlobFile { size_bytes: 5, disk_bytes: files.blobs[0].1.disk_bytes })]
        );
        assert_eq!(files.strays, [root.join("note"), root.join("zz").join(hex)]);
    }

    #[test]
    fn damaged_blob_is_not_good() {
        let (_dir, store) = new_store();
        let digest = store.put_blob(b"hello").unwrap();
        assert!(store.is_blob_good(&digest).unwrap());
        fs::write(store.blob_path(&digest), "hellO").unwrap();
        assert!(!store.is_blob_good(&digest).unwrap());
    }
}
