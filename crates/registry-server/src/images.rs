//! Images that are somebody else's to keep, and a registry's to give out.

use std::error::Error;
use std::fs::File;

use kiln_oci::Digest;

use crate::route::{Name, Tag, Which};

/// Where a registry that keeps nothing itself finds its images.
///
/// All methods block for as long as the disk takes, and may be called from many threads at once.
pub trait Images: Send + Sync {
    /// The repositories that have a tag, sorted, each once.
    ///
    /// # Errors
    /// [`ImagesError`]; so for all methods.
    fn repositories(&self) -> Result<Vec<Name>, ImagesError>;

    /// The tags of a repository, sorted, each once; none: there is no such repository.
    fn tags(&self, name: &Name) -> Result<Vec<Tag>, ImagesError>;

    /// A manifest or an index. Does nothing that takes long; then it is [`Found::Unready`].
    fn manifest(&self, name: &Name, which: &Which) -> Result<Found, ImagesError>;

    /// As [`Images::manifest`] after whatever has to be done, which may take minutes. Never [`Found::Unready`].
    fn make_ready(&self, name: &Name, tag: &Tag) -> Result<Found, ImagesError>;

    /// A blob that a manifest of this repository leads to, and its size in bytes. It can be read to its end
    /// whatever happens to its image meanwhile.
    fn blob(&self, name: &Name, digest: &Digest) -> Result<Option<(File, u64)>, ImagesError>;

    /// Lets go of what was kept for clients that did not come back. Called about once a minute.
    fn tidy(&self);
}

/// What became of a manifest that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// There it is.
    Manifest(FoundManifest),
    /// Its image is there, and not in the form in which it leaves.
    Unready,
    /// There is none.
    Missing,
}

/// A manifest or an index, as it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundManifest {
    /// What it is.
    pub media_type: String,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The document.
    pub bytes: Vec<u8>,
}

/// Images cannot be given out. Clients hear that it is so, and who serves them why.
#[derive(Debug, thiserror::Error)]
#[error("images cannot be given out")]
pub struct ImagesError(#[from] pub Box<dyn Error + Send + Sync>);
