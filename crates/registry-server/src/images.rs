//! Images that are somebody else's to keep, and a registry's to give out.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

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

/// Where images go that others push.
///
/// ```text
/// blobs, manifests come ─▶ kept as they came ── take() ─▶ an image with a name ─▶ the tag leads to what came
/// ```
/// The registry keeps what was pushed byte by byte; who takes it makes an image of it, of that alone: nothing that was
/// not pushed to this repository may become part of it, and no image that another name leads to may change. A tag
/// leads to what was pushed as long as its name leads to that image.
pub trait Takes: Images {
    /// Makes an image of what was pushed and lets the name that this tag stands for lead to it, durably. Of an index the
    /// image for this machine, or else the first that it lists. May take minutes.
    ///
    /// # Errors
    /// [`NotTaken::Refused`]: it is no image, or is a hostile one. No name has moved then, nor with any other.
    fn take(&self, name: &Name, tag: &Tag, pushed: Pushed) -> Result<(), NotTaken>;

    /// What all tags lead to, at once: the digest of each image's config. A repository is there under all its names.
    fn names(&self) -> Result<HashMap<Name, HashMap<Tag, Digest>>, ImagesError>;

    /// The digest of the config of the image that a tag leads to; `None`: it leads nowhere.
    fn image(&self, name: &Name, tag: &Tag) -> Result<Option<Digest>, ImagesError>;

    /// Whether the names that all these tags stand for could be taken away.
    ///
    /// # Errors
    /// [`NotTaken::Needed`].
    fn can_forget(&self, name: &Name, tags: &[Tag]) -> Result<(), NotTaken>;

    /// What a repository is called that has several names; the same for all of them. Whoever may write to one writes to
    /// the others.
    fn called(&self, name: &Name) -> Name;

    /// Takes the name away that a tag stands for; whether there was one. A name of another host may stand for the same
    /// tag then.
    ///
    /// # Errors
    /// [`NotTaken::Needed`]; nothing has changed then.
    fn forget(&self, name: &Name, tag: &Tag) -> Result<bool, NotTaken>;
}

/// An image that was pushed, on its way in.
pub struct Pushed {
    /// What it is.
    pub media_type: String,
    /// Digest of the manifest or index.
    pub digest: Digest,
    /// How long that is.
    pub size_bytes: u64,
    /// Of the images that it is, or leads to. Nothing else of it may get the name.
    pub configs: Arc<HashSet<Digest>>,
    /// What it consists of.
    pub parts: Arc<dyn Parts>,
}

/// What came of an image.
pub trait Parts: Send + Sync {
    /// A manifest or an index, itself or one that an index leads to; its digest was compared.
    fn document(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ImagesError>;

    /// The file of a blob.
    fn blob(&self, digest: &Digest) -> Result<Option<Part>, ImagesError>;
}

/// The file of a blob, durable, which nobody writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Where it is.
    pub path: PathBuf,
    /// Its bytes were compared with its digest, and have not changed since.
    pub is_compared: bool,
}

/// Why something that was asked for is not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotTaken {
    /// Who asked hears why.
    #[error("{0}")]
    Refused(String),
    /// It is needed. Who asked hears what for.
    #[error("{0}")]
    Needed(String),
    /// There is no room for it.
    #[error("the disk is full")]
    Full,
    /// Who serves hears why.
    #[error(transparent)]
    Failed(#[from] ImagesError),
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
