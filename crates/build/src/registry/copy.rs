//! `kiln copy`: an image goes from one place to another as it is. No layer is unpacked, and none packed anew unless
//! somebody asks for that, so that digests stay.
//!
//! Read [`copy()`] first, then `copy/source.rs` (where an image comes from, `docker.rs` where that is a docker
//! archive), `copy/tree.rs` (what it consists of and where that goes), `copy/packing.rs` (layers that are packed
//! anew), `copy/attached.rs` (what refers to an image), `copy/said.rs` (what is said of one) and `copy/inward.rs` (into the store). What comes out of the store leaves by `push` and by `save`.
//!
//! What comes from a registry comes into the store first, as blobs that nothing needs: it is verified there, and
//! the next copy of the same image finds it. Garbage collection takes it. Decided in
//! `docs/adr/0040-copies-keep-what-has-a-digest.md`.

mod attached;
mod docker;
mod inward;
mod packing;
mod said;
mod source;
mod tree;

use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_oci::{Platform, Reference};

use super::Registries;
use crate::export::{Compress, DirShelf, NewFile, Packing, TarShelf, Target};
use crate::{BuildCancel, BuildError, Engine, LayoutImage};

pub use attached::{Referrer, Referrers, referrers};
pub use inward::copy_in;
pub use said::{Said, Statement, StoredAttestation, said_at, said_of};
use source::Source;
use tree::Tree;

/// A place outside the store that has images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A registry.
    Registry(Reference),
    /// An OCI layout: a directory, and which image of it; to write, only a tag is a name.
    Layout(PathBuf, LayoutImage),
    /// The same as a tar.
    Archive(PathBuf, LayoutImage),
    /// What `docker save` writes, and the name of the image in it; to read, `None` is its only one.
    Docker(PathBuf, Option<Reference>),
}

impl Place {
    /// How layers that were never packed are packed for this place; `None`: they stay plain.
    fn packing(&self) -> Option<Packing> {
        match self {
            Self::Registry(_) | Self::Layout(..) | Self::Archive(..) => Some(Packing::GZIP),
            Self::Docker(..) => None,
        }
    }
}

/// Which images of several are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Those for all platforms, with the index that lists them.
    All,
    /// This machine's, where there is a choice.
    Own,
    /// The one for this platform and no other.
    Platform(Platform),
}

/// What to copy, and where to.
#[derive(Debug, Clone)]
pub struct CopyRequest {
    /// From here.
    pub from: Place,
    /// To there.
    pub to: Place,
    /// Of an image for several platforms.
    pub which: Which,
    /// How layers are packed that come as plain tars, and with `force` all; the image gets another digest then.
    /// `None`: as they come.
    pub compress: Option<Compress>,
    /// Along with what refers to the image, and what refers to that. Registries and OCI layouts have it.
    pub referrers: bool,
}

impl CopyRequest {
    /// An image as it is, for all its platforms.
    pub fn whole(from: Place, to: Place) -> Self {
        Self { from, to, which: Which::All, compress: None, referrers: false }
    }
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Digest of the manifest or index.
    pub digest: String,
    /// Blobs that had to go, and their bytes.
    pub sent: (usize, u64),
    /// Blobs that a registry took from another repository of its own.
    pub mounted: usize,
    /// Blobs that were there.
    pub known: usize,
    /// Layers that are packed in another way than somebody asked for, and stayed so.
    pub kept: usize,
    /// Manifests that refer to the image, or to each other.
    pub referrers: usize,
}

/// Copies an image from place to place.
///
/// # Errors
/// [`BuildError::Registry`], [`BuildError::Archive`], [`BuildError::NoPlatform`], [`BuildError::Output`]; what is
/// damaged is not copied. No name has moved then.
pub fn copy(
    engine: &Engine,
    registries: &Arc<Registries>,
    request: &CopyRequest,
    cancel: &BuildCancel,
) -> Result<Copied, BuildError> {
    let (mut source, _abort) = Source::open(engine, registries, &request.from, cancel)?;
    let mut tree = Tree::read(&source, &request.which)?;
    let mut done = Copied::default();
    // What has no manifest has no digest to keep.
    let usual = request.to.packing().filter(|_| source.is_bare).map(Compress::new);
    if let Some(compress) = request.compress.or(usual) {
        let root = tree.root()?.clone();
        let (root, kept) = packing::pack_anew(engine, &mut source, &root, &compress, cancel)?;
        done.kept = kept;
        tree = Tree::of(&source, &root)?;
    }
    if request.referrers {
        source.look_for_referrers()?;
        tree.add_referrers(&source)?;
    }
    done.digest = tree.root()?.digest.to_string();
    done.referrers = tree.referrers();
    match &request.to {
        Place::Registry(name) => {
            let repository = registries.repository(name);
            // On the same registry, what the other repository has need not travel.
            let from = source.from.as_ref().map(|from| registries.place(from));
            let near = from.filter(|from| from.domain() == repository.domain());
            let near: Vec<String> = near.map(|from| from.path().to_owned()).into_iter().collect();
            registries.wait(cancel, tree.send(&source, repository, name, near, &mut done))?;
        }
        Place::Layout(path, image) => {
            let mut shelf = DirShelf::new(path)?;
            let names = tree::Names::Tag(image);
            tree.put(&source, &mut shelf, &names, cancel, &mut done)?;
        }
        Place::Archive(path, image) => {
            let names = tree::Names::Tag(image);
            write(path, &mut |shelf| tree.put(&source, shelf, &names, cancel, &mut done))?;
        }
        Place::Docker(path, name) => {
            // Where nobody says, it has the name that it was pulled by.
            let name = name.as_ref().or(source.from.as_ref().filter(|from| from.tag().is_some()));
            let names = tree::Names::Docker(name);
            write(path, &mut |shelf| tree.put(&source, shelf, &names, cancel, &mut done))?;
        }
    }
    Ok(done)
}

/// Lets `put` fill the archive at `path`, which is there when all of it is.
fn write(
    path: &Path,
    put: &mut dyn FnMut(&mut TarShelf<'_>) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let new = NewFile::create(path)?;
    new.write_by(&mut |target| {
        let out = &mut BufWriter::with_capacity(256 << 10, &mut *target.out);
        let mut shelf = TarShelf::new(Target { path: target.path, out, file: None });
        put(&mut shelf)?;
        shelf.finish()
    })?;
    new.finish()
}
