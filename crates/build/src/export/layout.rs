//! An OCI layout directory as a place to put images.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use kiln_oci::image::{Descriptor, Index};

use super::archive::Shelf;
use super::file::NewFile;
use super::layers::WriteError;
use crate::BuildError;

/// A directory that is, or becomes, an OCI layout. Images that are in it stay.
pub(crate) struct DirShelf {
    root: PathBuf,
    made: HashSet<PathBuf>,
}

impl DirShelf {
    /// Makes the directory when it is not there.
    pub(crate) fn new(root: &Path) -> Result<Self, BuildError> {
        let shelf = Self { root: root.to_owned(), made: HashSet::new() };
        fs::create_dir_all(root).map_err(|source| shelf.failed(source))?;
        Ok(shelf)
    }

    fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.root.clone(), source }
    }
}

impl Shelf for DirShelf {
    fn put(
        &mut self,
        name: &str,
        size_bytes: u64,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), WriteError>,
    ) -> Result<(), BuildError> {
        let path = self.root.join(name);
        let is_blob = name.starts_with("blobs/");
        if is_blob && fs::metadata(&path).is_ok_and(|there| there.is_file() && there.len() == size_bytes) {
            return Ok(());
        }
        let parent = path.parent().unwrap_or(&self.root).to_owned();
        if !self.made.contains(&parent) {
            fs::create_dir_all(&parent).map_err(|source| self.failed(source))?;
            self.made.insert(parent);
        }
        let new = NewFile::create(&path)?;
        let mut out = BufWriter::with_capacity(256 << 10, new.file());
        write(&mut out).map_err(|error| error.named(|source| new.failed(source)))?;
        out.into_inner().map_err(|error| new.failed(error.into_error()))?;
        new.finish()
    }

    fn listed(&mut self) -> Result<Vec<Descriptor>, BuildError> {
        let path = self.root.join("index.json");
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(BuildError::Output { path, source }),
        };
        let index: Index = serde_json::from_slice(&json)
            .map_err(|error| BuildError::Output { path, source: io::Error::other(error) })?;
        Ok(index.manifests)
    }
}
