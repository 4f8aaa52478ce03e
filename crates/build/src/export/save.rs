//! `kiln save`: images of the store as one tar that other tools load, or as a layout.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_content::ImageRecord;
use kiln_oci::{Digest, Reference};

use super::archive::{ArchiveFormat, ImageWriter, Outgoing, Shelf, TarShelf};
use super::file::Target;
use super::image::{Assembled, Style, make_ready};
use super::index::whole_index;
use super::layers::Along;
use super::layout::DirShelf;
use super::packing::Compress;
use crate::{BuildCancel, BuildError, Engine};

/// One image to save, under the names the archive shall give it.
#[derive(Debug, Clone)]
pub struct SavedImage {
    /// The image.
    pub image: ImageRecord,
    /// None: the archive does not name it.
    pub names: Vec<Reference>,
}

/// How to save.
#[derive(Debug, Clone, Copy)]
pub struct SaveOptions {
    /// Who shall read it.
    pub format: ArchiveFormat,
    /// How layers are packed.
    pub compress: Compress,
    /// Without the other platforms that an image came with. Otherwise they go along if all of them are in the store.
    pub alone: bool,
}

/// Writes `images` as one archive to `target`; the digest of each manifest, or index, that it lists.
///
/// Layers are read out of their snapshots and checked against their digests on the way; packed ones
/// are remembered in the store.
///
/// # Errors
/// [`BuildError::LayerChanged`] when a stored layer is damaged, [`BuildError::Output`] when `target`
/// does not take it. What was written then is no archive.
pub fn save(
    engine: &Engine,
    images: &[SavedImage],
    options: &SaveOptions,
    target: &mut Target<'_>,
    cancel: &BuildCancel,
) -> Result<Vec<Digest>, BuildError> {
    let assembled = assembled(engine, images)?;
    let leaving = leaving(images, &assembled, options);
    let style = Style::new(options.compress);
    let made = write_archive(engine, &leaving, &style, options.format, target, cancel.flag())?;
    Ok(made.iter().map(|made| made.root().digest).collect())
}

/// The same as the layout `dir`, which keeps what else is in it.
///
/// # Errors
/// As [`save`]. Blobs may be in `dir` then which nothing lists.
pub fn save_layout(
    engine: &Engine,
    images: &[SavedImage],
    options: &SaveOptions,
    dir: &Path,
    cancel: &BuildCancel,
) -> Result<Vec<Digest>, BuildError> {
    let assembled = assembled(engine, images)?;
    let leaving = leaving(images, &assembled, options);
    let (style, mut shelf) = (Style::new(options.compress), DirShelf::new(dir)?);
    let made = write_ready(engine, &leaving, &style, options.format, &mut shelf, cancel.flag())?;
    Ok(made.iter().map(|made| made.root().digest).collect())
}

fn assembled(engine: &Engine, images: &[SavedImage]) -> Result<Vec<Assembled>, BuildError> {
    images.iter().map(|saved| Assembled::stored(engine, &saved.image)).collect()
}

fn leaving<'a>(
    images: &'a [SavedImage],
    assembled: &'a [Assembled],
    options: &SaveOptions,
) -> Vec<Leaving<'a>> {
    let one = |(saved, image): (&'a SavedImage, &'a Assembled)| {
        let index = (!options.alone).then_some(&saved.image);
        Leaving { image, names: &saved.names, index }
    };
    images.iter().zip(assembled).map(one).collect()
}

/// An image that shall leave, under the names that the archive shall give it.
pub(crate) struct Leaving<'a> {
    pub(crate) image: &'a Assembled,
    pub(crate) names: &'a [Reference],
    /// What it is in the store, to take along what else its index lists.
    pub(crate) index: Option<&'a ImageRecord>,
}

/// Writes one archive to `target`; as [`write_ready`].
pub(crate) fn write_archive<'a>(
    engine: &Engine,
    images: &[Leaving<'a>],
    style: &Style,
    format: ArchiveFormat,
    target: &mut Target<'_>,
    cancel: &AtomicBool,
) -> Result<Vec<Outgoing<'a>>, BuildError> {
    let Target { path, out, file } = target;
    let mut shelf = TarShelf::new(Target { path, out: &mut **out, file: *file });
    let made = write_ready(engine, images, style, format, &mut shelf, cancel)?;
    shelf.finish()?;
    Ok(made)
}

/// Packs `images` and puts them on `shelf`, in one go where it takes drafts. Elsewhere all of them are
/// packed before the first byte: what cannot be packed leaves no half of an archive.
///
/// # Errors
/// As [`save`].
pub(crate) fn write_ready<'a>(
    engine: &Engine,
    images: &[Leaving<'a>],
    style: &Style,
    format: ArchiveFormat,
    shelf: &mut dyn Shelf,
    cancel: &AtomicBool,
) -> Result<Vec<Outgoing<'a>>, BuildError> {
    let mut writer = ImageWriter::new(engine, format, shelf, cancel);
    let takes_drafts = writer.drafts().is_some();
    let mut outgoing = Vec::with_capacity(images.len());
    for &Leaving { image, names, index } in images {
        let mut along = if takes_drafts { Along::Archive(&mut writer) } else { Along::Nobody };
        let image = make_ready(engine, image, style, cancel, &mut along)?;
        let index = match index {
            Some(record) => whole_index(engine, record, &image.descriptor.digest)?,
            None => None,
        };
        let ready = Outgoing { image, names, index };
        if takes_drafts {
            writer.image(&ready)?;
        }
        outgoing.push(ready);
    }
    if !takes_drafts {
        outgoing.iter().try_for_each(|ready| writer.image(ready))?;
    }
    writer.finish()?;
    Ok(outgoing)
}
