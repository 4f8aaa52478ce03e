//! `kiln save`: images of the store as one tar that other tools load.

use std::sync::atomic::AtomicBool;

use kiln_content::ImageRecord;
use kiln_oci::Reference;

use super::archive::{ArchiveFormat, ImageWriter, Outgoing, Shelf, TarShelf};
use super::file::Target;
use super::image::{Assembled, ReadyImage, Style, make_ready};
use super::index::whole_index;
use super::layers::Along;
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
}

/// Writes `images` as one archive to `target`.
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
) -> Result<(), BuildError> {
    let assembled = images.iter().map(|saved| Assembled::stored(engine, &saved.image));
    let assembled: Vec<Assembled> = assembled.collect::<Result<_, _>>()?;
    let leaving = images.iter().zip(&assembled).map(|(saved, image)| Leaving {
        image,
        names: &saved.names,
        index: Some(&saved.image),
    });
    let leaving: Vec<Leaving<'_>> = leaving.collect();
    let style = Style::new(options.compress);
    write_archive(engine, &leaving, &style, options.format, target, cancel.flag()).map(drop)
}

/// An image that shall leave, under the names that the archive shall give it.
pub(crate) struct Leaving<'a> {
    pub(crate) image: &'a Assembled,
    pub(crate) names: &'a [Reference],
    /// What it is in the store, to take along what else its index lists.
    pub(crate) index: Option<&'a ImageRecord>,
}

/// Writes one archive to `target`; as [`write_ready`].
pub(crate) fn write_archive(
    engine: &Engine,
    images: &[Leaving<'_>],
    style: &Style,
    format: ArchiveFormat,
    target: &mut Target<'_>,
    cancel: &AtomicBool,
) -> Result<Vec<ReadyImage>, BuildError> {
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
pub(crate) fn write_ready(
    engine: &Engine,
    images: &[Leaving<'_>],
    style: &Style,
    format: ArchiveFormat,
    shelf: &mut dyn Shelf,
    cancel: &AtomicBool,
) -> Result<Vec<ReadyImage>, BuildError> {
    let mut writer = ImageWriter::new(engine, format, shelf, cancel);
    let takes_drafts = writer.drafts().is_some();
    let mut outgoing = Vec::with_capacity(images.len());
    for Leaving { image, names, index } in images {
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
    Ok(outgoing.into_iter().map(|ready| ready.image).collect())
}
